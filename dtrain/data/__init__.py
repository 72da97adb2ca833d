"""Where do tokens come from? A corpus, read once, and batches that are a pure function of where training stands."""
