"""Where do tokens come from? A corpus, read once, and batches that are a pure function of where training stands."""

from dtrain.data.corpus import Corpus, load_corpus
from dtrain.data.sampler import heldout_sequences, sample_batch

__all__ = ["Corpus", "heldout_sequences", "load_corpus", "sample_batch"]
