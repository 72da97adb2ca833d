"""How does one island train among gossiping ones? AdamW whose moments can live on the time scale of s accumulated gradients.

AccumAdamW (arXiv 2410.11998); s = 1 is AdamW (arXiv 1711.05101). The equations are ``kernels.reference.accum_adam``'s. Its
step can be taken over by ``dtrain.join``, which mixes and encodes in the same pass over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dtrain.kernels import Adam, Piece, operations
from dtrain.shards import local

Step = Callable[[], None]


class AccumAdamW(torch.optim.Optimizer):
    """``every`` is s. State of a parameter: ``exp_avg`` and ``exp_avg_sq`` (fp32, stored already decayed), ``accumulated`` (fp32,
    empty where s = 1), and ``step``, its updates so far. A parameter without a gradient is left alone, as torch's AdamW does.

    Raises ValueError for settings out of range, and for a parameter that is not contiguous."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 1,
    ) -> None:
        ranges = (
            ("lr", lr, lr >= 0, "0 or more"),
            ("betas", betas, all(0 <= b < 1 for b in betas), "two numbers from 0 to less than 1"),
            ("eps", eps, eps > 0, "more than 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("every", every, isinstance(every, int) and every >= 1, "a whole number from 1"),
        )
        for name, value, allowed, words in ranges:
            if not allowed:
                raise ValueError(f"{name} = {value!r} is not allowed; use {words}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "every": every})
        self.taken_over: Step | None = None
        """Called in place of this optimizer's own kernel; it calls ``begin`` and updates every parameter itself."""
        self._ones: dict[torch.device, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (copy, pickle) belongs to nobody; torch's load_state_dict comes by here too, and changes no owner."""
        super().__setstate__(state)
        if "taken_over" not in self.__dict__:
            self.taken_over, self._ones = None, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.taken_over is not None:
            self.taken_over()
            return loss
        together: dict[tuple[Adam, torch.device], list[Piece]] = {}
        for p, (group, adam) in self.begin().items():
            together.setdefault((adam, p.device), []).append(self.piece(p, group))
        for (adam, device), pieces in together.items():
            operations(device).accum_adam(pieces, adam, self._one(device))
        return loss

    def begin(self) -> dict[Tensor, tuple[dict[str, Any], Adam]]:
        """Count the step of every parameter that has a gradient; returns its group and the numbers of its step."""
        counts = [self._state(p)["step"] for group in self.param_groups for p in group["params"] if p.grad is not None]
        if counts:
            cast(Any, torch)._foreach_add_(counts, 1.0)  # its stubs leave it out
        numbers: dict[tuple[int, float], Adam] = {}
        found: dict[Tensor, tuple[dict[str, Any], Adam]] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    t = self.state[p]["step"].item()
                    if (index, t) not in numbers:
                        numbers[index, t] = _numbers(group, int(t))
                    found[p] = group, numbers[index, t]
        return found

    def piece(self, p: Tensor, group: dict[str, Any], part: slice = slice(None)) -> Piece:
        """A parameter's part with its moments, flat."""
        state = self._state(p)
        assert p.grad is not None
        tensors = (local(p.detach()), local(p.grad).contiguous(), state["exp_avg"], state["exp_avg_sq"])
        x, g, m, v = (t.view(-1)[part] for t in tensors)
        accumulated = state["accumulated"].view(-1)
        return Piece(x, g, m, v, accumulated[part] if group["every"] > 1 else accumulated, group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay fp32 where parameters are bf16. Raises ValueError, with nothing changed, for the state of
        another optimizer, or of another ``every``."""
        own = [group["every"] for group in self.param_groups]
        saved = [group.get("every") for group in state_dict["param_groups"]]
        if saved != own:
            raise ValueError(
                f"the saved optimizer accumulates over every = {saved} steps (None: it is no AccumAdamW), this one over {own}; "
                "load it into one like it"
            )
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            p = parameters[index]
            self.state[p] |= {
                key: local(value).to("cpu" if key == "step" else p.device, copy=True) for key, value in state.items()
            }

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            if not p.is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not contiguous; AccumAdamW walks over flat memory")
            every = next(g["every"] for g in self.param_groups if any(q is p for q in g["params"]))
            state["step"] = torch.zeros((), dtype=torch.float32)
            # Of a sharded parameter this rank's part.
            shape = local(p.detach()).shape
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros(shape, device=p.device) for _ in range(2))
            state["accumulated"] = torch.zeros(shape if every > 1 else (0,), device=p.device)
        return state

    def _one(self, device: torch.device) -> Tensor:
        if device not in self._ones:
            self._ones[device] = torch.ones(1, device=device)
        return self._ones[device]


def _numbers(group: dict[str, Any], t: int) -> Adam:
    """Of a parameter's t-th update, the k-th of its moments."""
    (b1, b2), every = group["betas"], group["every"]
    k = -(-t // every)
    return Adam(group["lr"], b1, b2, group["eps"], b1**k, b2**k, every, t % every == 0)


def check_accumulates(recipe: str, every: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises ValueError where a recipe that is defined with AdamW, or with accumulated moments, meets an optimizer without."""
    for optimizer in optimizers:
        if every == 1 and not isinstance(optimizer, AccumAdamW | torch.optim.AdamW):
            raise ValueError(
                f"recipe {recipe!r} is defined with AdamW, and {type(optimizer).__name__} is another optimizer; use "
                'dtrain.optim.AccumAdamW, or torch.optim.AdamW, or recipe = "dpsgd"'
            )
        if every == 1:
            continue
        if not isinstance(optimizer, AccumAdamW) or any(group["every"] == 1 for group in optimizer.param_groups):
            raise ValueError(
                f"recipe {recipe!r} is defined with accumulated moments, and {type(optimizer).__name__} has none; use "
                f'dtrain.optim.AccumAdamW(..., every={every}), or recipe = "decent_adam"'
            )


def owned(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor]) -> AccumAdamW | None:
    """The AccumAdamW that alone updates these parameters, if there is one."""
    if len(optimizers) != 1 or not isinstance(optimizers[0], AccumAdamW):
        return None
    held = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    return optimizers[0] if all(id(p) in held for p in parameters) else None
