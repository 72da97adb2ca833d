"""What do the operations take? The few named tuples that stand for more than one tensor.

Flat means 1-D and contiguous. x and g are fp32 or bf16, all state is fp32, scales are bf16, wires are uint8."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MIN_BLOCK, MAX_BLOCK = 32, 4096
SUM_TILE = 65536
"""Elements that one partial sum of ``sum_of_squares`` covers."""

Kind = Literal["identity", "bf16", "int8", "int4", "e3m0", "lut4", "sign", "topk"]

CODE_BITS = {"identity": 32, "bf16": 16, "int8": 8, "int4": 4, "e3m0": 4, "lut4": 4, "sign": 1}
SCALES = {"identity": 0, "bf16": 0, "int8": 1, "int4": 1, "e3m0": 1, "lut4": 2, "sign": 1}
"""bf16 scales a block."""


class Format(NamedTuple):
    """How elements become bytes. Blocks of ``block`` elements (a power of two from 32 to 4096) share scales; the last may be
    short. For ``topk`` a block is a chunk, of which ``k`` (a power of two from 4) elements are kept in ``bits`` (2 or 8) bits
    each."""

    kind: Kind
    block: int = 1
    k: int = 0
    bits: int = 0

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def num_scales(self, numel: int) -> int:
        """bf16 values."""
        if self.kind == "topk":
            return self.num_blocks(numel) * (2 if self.bits == 2 else 1)
        return self.num_blocks(numel) * SCALES[self.kind]

    def code_bytes(self, numel: int) -> int:
        if self.kind == "topk":
            return self.num_blocks(numel) * self.k * (12 + self.bits) // 8
        return -(-numel * CODE_BITS[self.kind] // 8)


class Coded(NamedTuple):
    """The two zones of a wire that stand for one flat tensor: codes (uint8) and scales (bf16; empty for casts)."""

    codes: Tensor
    scales: Tensor
    seen = None


class KeptCoded(Coded):
    """Of a wire that stays where it is: the CPU's kernels note here what they found, and need not check it for each call."""

    seen: tuple[Format, int, tuple[int, int]] | None
    """For which format and elements it was checked, and the addresses."""


class Noise(NamedTuple):
    """Random bits for stochastic rounding: ``seed`` (32 bits), and ``first``, the index of the tensor's element 0 in the whole
    model, so that the bits do not depend on how it is cut."""

    seed: int
    first: int


class Adam(NamedTuple):
    """The numbers of one step of AccumAdam. ``power1`` = beta1^k and ``power2`` = beta2^k for the k-th update of the moments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    power1: float
    power2: float
    every: int
    """s: steps whose gradients are averaged into one update of the moments."""
    closes: bool
    """Whether this step ends such a group of s."""


class Piece(NamedTuple):
    """A parameter (or a part of one) with what its optimizer keeps: flat tensors of one length, anywhere in memory."""

    x: Tensor
    g: Tensor
    m: Tensor
    """First moment, stored decayed."""
    v: Tensor
    """Second moment, stored decayed."""
    a: Tensor
    """Accumulated gradient; empty where ``Adam.every`` is 1."""
    weight_decay: float


class Public(NamedTuple):
    """What CHOCO keeps of one piece: the own public copy and the weighted sum of the neighbours'."""

    xhat: Tensor
    s: Tensor


@cache
def _no_scales(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.bfloat16, device=device)


def zones(wire: Tensor, fmt: Format, numels: Sequence[int]) -> list[Coded]:
    """Cut a wire's body, [scales][codes] of consecutive pieces, into one ``Coded`` a piece."""
    if len(numels) == 1 and not SCALES.get(fmt.kind, 1):  # the body is its codes
        return [Coded(wire, _no_scales(wire.device))]
    at_scale, at_code = 0, 2 * sum(fmt.num_scales(n) for n in numels)
    out = []
    for n in numels:
        scale_end, code_end = at_scale + 2 * fmt.num_scales(n), at_code + fmt.code_bytes(n)
        out.append(Coded(wire[at_code:code_end], wire[at_scale:scale_end].view(torch.bfloat16)))
        at_scale, at_code = scale_end, code_end
    return out
