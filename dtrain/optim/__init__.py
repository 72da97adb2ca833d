"""Which inner optimizers does dtrain bring along? (AdamW; any torch optimizer works with ``dtrain.join``.)"""

from dtrain.optim.adam import adamw, cosine_lr, set_lr

__all__ = ["adamw", "cosine_lr", "set_lr"]
