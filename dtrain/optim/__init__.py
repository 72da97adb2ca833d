"""Which inner optimizers does dtrain bring along? (AdamW, AccumAdamW, Muon beside AdamW, and SAM around any; any torch
optimizer works with ``dtrain.join``.)"""

from dtrain.optim.accum_adam import AccumAdamW
from dtrain.optim.adam import adamw, cosine_lr, decay_groups, set_lr
from dtrain.optim.muon import hidden_matrices, muon_adamw
from dtrain.optim.sam import SAM

__all__ = ["SAM", "AccumAdamW", "adamw", "cosine_lr", "decay_groups", "hidden_matrices", "muon_adamw", "set_lr"]
