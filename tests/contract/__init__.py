"""Do all implementations of one interface keep the same promises? One suite, run over each."""
