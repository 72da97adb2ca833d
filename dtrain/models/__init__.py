"""Which models does dtrain bring along? (One: ``gpt``, a file to read.)"""

from dtrain.models.gpt import GPT, GPTConfig, flops_per_token, num_parameters

__all__ = ["GPT", "GPTConfig", "flops_per_token", "num_parameters"]
