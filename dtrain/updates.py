"""How do a rank's parameters change by their gradients? By optimizers of torch's kind; ``inside_zero.py`` has DeepSpeed's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from dtrain import checkpoint
from dtrain.engine import Sync
from dtrain.optim import set_lr


class Updates(Protocol):
    @property
    def optimizers(self) -> list[Optimizer]:
        """Those whose steps tell sync of an update, by torch's hooks; none where ``step`` tells it."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        ...

    def step(self, sync: Sync) -> None:
        """Update the parameters; ``sync`` knows before and after."""
        ...

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The optimizers' state, for a checkpoint."""
        ...

    def load(self, saved: Mapping[str, Tensor], prefix: str) -> None:
        """Take what ``tensors`` gave."""
        ...


class Stepped:
    """By optimizers one after another."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            set_lr(optimizer, lr)

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, sync: Sync) -> None:
        for optimizer in self.optimizers:  # which are hooked
            optimizer.step()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return checkpoint.optimizers_tensors(self.optimizers, prefix)

    def load(self, saved: Mapping[str, Tensor], prefix: str) -> None:
        checkpoint.load_optimizers(self.optimizers, saved, prefix)
