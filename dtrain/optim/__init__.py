"""Which inner optimizers does dtrain bring along? (AdamW, AccumAdamW, Schedule-Free AdamW, Muon beside AdamW, and SAM
around any; any torch optimizer works with ``dtrain.join``.)"""

from dtrain.optim.accum_adam import AccumAdamW
from dtrain.optim.adam import adamw, cosine_lr, decay_groups, set_lr
from dtrain.optim.muon import hidden_matrices, muon_adamw
from dtrain.optim.sam import SAM
from dtrain.optim.schedule_free import ScheduleFreeAdamW, at_averages, average_of

__all__ = [
    "SAM",
    "AccumAdamW",
    "ScheduleFreeAdamW",
    "adamw",
    "at_averages",
    "average_of",
    "cosine_lr",
    "decay_groups",
    "hidden_matrices",
    "muon_adamw",
    "set_lr",
]
