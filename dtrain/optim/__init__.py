"""Which inner optimizers does dtrain bring along? (AdamW, AccumAdamW; any torch optimizer works with ``dtrain.join``.)"""

from dtrain.optim.accum_adam import AccumAdamW
from dtrain.optim.adam import adamw, cosine_lr, decay_groups, set_lr

__all__ = ["AccumAdamW", "adamw", "cosine_lr", "decay_groups", "set_lr"]
