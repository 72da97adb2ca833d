"""How few bytes must each operation move? One formula an operation; speed is quoted as these bytes over the time taken.

n elements; e bytes an element of x (and g), 2 or 4; W = bytes of one wire's body; all other state is fp32 (read: 4n, read and
written: 8n). Each operand is read once and written once, whatever an implementation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dtrain.kernels.operands import CODE_BITS, SUM_TILE, Format


class Sizes(NamedTuple):
    """What a floor depends on."""

    numel: int
    x_bytes: int = 4
    fmt: Format = Format("int4", 64)
    wires: int = 1
    """Wires that arrived."""
    every: int = 1
    closes: bool = True

    @property
    def x(self) -> int:
        """x, read or written once."""
        return self.x_bytes * self.numel

    @property
    def state(self) -> int:
        """An fp32 state, read or written once."""
        return 4 * self.numel

    @property
    def wire(self) -> int:
        return self.fmt.code_bytes(self.numel) + 2 * self.fmt.num_scales(self.numel)

    @property
    def landed(self) -> int:
        """The elements of y that a wire changes, read and written. Of top-k these are few, and far apart: a machine moves a whole
        line for each, so its share of the bandwidth is low by nature."""
        kept = self.fmt.num_blocks(self.numel) * self.fmt.k if self.fmt.kind == "topk" else self.numel
        return 8 * min(kept, self.numel)

    @property
    def adam(self) -> int:
        """m and v, written only where a group of s steps closes; the accumulator where s > 1."""
        return (4 if self.closes else 2) * self.state + (2 * self.state if self.every > 1 else 0)


FLOORS: dict[str, Callable[[Sizes], int]] = {
    **{f"quantize_{kind}": lambda s: s.x + s.wire for kind in CODE_BITS if kind not in ("identity", "bf16")},
    **{f"dequantize_add_{kind}": lambda s: s.wire + 2 * s.state for kind in CODE_BITS if kind not in ("identity", "bf16")},
    "cast_bf16": lambda s: s.x + 2 * s.numel,
    "add_bf16": lambda s: 2 * s.numel + 2 * s.state,
    "topk_chunks": lambda s: s.x + s.wire,
    "topk_add": lambda s: s.wire + s.landed,
    "encode": lambda s: s.x + s.wire,
    "decode_add": lambda s: s.wire + s.landed,
    "encode_difference": lambda s: s.x + s.state + s.wire,
    "encode_feedback": lambda s: s.x + 2 * s.state + s.wire,
    "choco_encode": lambda s: s.x + 4 * s.state + s.wire,
    "choco_mix": lambda s: 2 * s.x + 3 * s.state + s.wires * s.wire,
    "mix": lambda s: 2 * s.x + s.wires * s.wire,
    "accum_adam": lambda s: 3 * s.x + s.adam,
    "gossip_adam": lambda s: 3 * s.x + s.adam + (s.wires + 1) * s.wire,
    "choco_gossip_adam": lambda s: 3 * s.x + s.adam + 4 * s.state + (s.wires + 1) * s.wire,
    "outer_step": lambda s: 2 * s.x + 6 * s.state,
    "sum_of_squares": lambda s: s.x + 8 * -(-s.numel // SUM_TILE),
    "scale": lambda s: 2 * s.x,
    "checksum": lambda s: s.numel,
    "flag_non_finite": lambda s: s.x,
    "put_identity": lambda s: s.x + 4 * s.numel,
}
"""A checksum's elements are bytes. Scalars (a flag, a factor) are left out."""

PARTS = {
    "gossip_adam": ("mix", "accum_adam", "encode"),
    "choco_gossip_adam": ("choco_mix", "accum_adam", "choco_encode"),
}
"""What the fused operations do in one pass. Sum of the parts' floors / own floor is the most that one pass can win."""


def floor_bytes(op: str, sizes: Sizes) -> int:
    return FLOORS[op](sizes)


def parts_bound(op: str, sizes: Sizes) -> float | None:
    if op not in PARTS:
        return None
    return sum(floor_bytes(part, sizes) for part in PARTS[op]) / floor_bytes(op, sizes)
