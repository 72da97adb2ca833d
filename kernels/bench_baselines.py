"""What else could one run in place of an operation? Plain torch, torch.compile, AdamW, and two libraries where installed.

A baseline that cannot run here is its reason, never a number."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import reference
from dtrain.kernels.bench_cases import Case

Call = Callable[[], object]


def eager(case: Case) -> Callable[..., object]:
    """What a user of torch would write; where that is not plainly another thing, the specification itself."""
    if case.every == 1 and case.op in _NATURAL and not case.random:
        return _NATURAL[case.op]
    return getattr(reference, case.op)


def compiled(case: Case, arguments: tuple[Any, ...]) -> Call | str:
    """``torch.compile`` of the same expression, called once; or why there is none."""
    torch._dynamo.reset()  # graphs of other cases count against its limit
    logging.getLogger("torch._inductor").setLevel(logging.CRITICAL)  # 100 lines of each kernel that does not compile; it raises
    function = torch.compile(eager(case), fullgraph=True, dynamic=False)
    try:
        function(*arguments)
    except RuntimeError as e:  # what dynamo and inductor raise
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        return f"torch.compile: {type(e).__name__}: {lines[0] if lines else ''}"[:200]
    return lambda: function(*arguments)


def adamw_fused(case: Case, arguments: tuple[Any, ...]) -> Call | None:
    """A step of torch's own fused AdamW on tensors of the same size and dtype (its moments have x's dtype)."""
    if case.op != "accum_adam":
        return None
    piece, adam = arguments[0][0], arguments[1]
    parameter = torch.nn.Parameter(piece.x.clone())
    parameter.grad = piece.g.clone()
    betas, decay = (adam.beta1, adam.beta2), piece.weight_decay
    return torch.optim.AdamW([parameter], lr=adam.lr, betas=betas, eps=adam.eps, weight_decay=decay, fused=True).step


def bitsandbytes(case: Case, arguments: tuple[Any, ...]) -> Call | str | None:
    """Its blockwise 8-bit and FP4 quantizers, whose codes are not ours; None where it has nothing alike, or is
    not installed."""
    if case.op not in ("quantize_int8", "quantize_int4") or case.random:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    functional = importlib.import_module("bitsandbytes.functional")
    x = arguments[0]
    if case.op == "quantize_int8":
        return _first_call("bitsandbytes", lambda: functional.quantize_blockwise(x, blocksize=64))
    return _first_call("bitsandbytes", lambda: functional.quantize_4bit(x, blocksize=64, quant_type="fp4"))


def deepspeed(case: Case, arguments: tuple[Any, ...]) -> Call | str | None:
    """Its symmetric quantizer of ZeRO++, whose scales are fp32; it runs on a GPU only."""
    if case.op not in ("quantize_int8", "quantize_int4") or case.random or importlib.util.find_spec("deepspeed") is None:
        return None
    x = arguments[0]
    if not x.is_cuda or x.numel() % 64:
        return "deepspeed: its quantizer needs a GPU and whole blocks"
    try:
        builder = importlib.import_module("deepspeed.ops.op_builder").QuantizerBuilder()
        module = builder.load()
    except (ImportError, RuntimeError) as e:  # not installed, or its extension does not build here
        return f"deepspeed: {str(e).splitlines()[0] if str(e) else type(e).__name__}"[:200]
    bits = 8 if case.op == "quantize_int8" else 4
    half = x.half()
    return _first_call("deepspeed", lambda: module.quantize(half, half.numel() // 64, bits, module.Symmetric))


def _first_call(name: str, call: Call) -> Call | str:
    try:
        call()
    except (RuntimeError, NotImplementedError, ValueError) as e:
        return f"{name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}"[:200]
    return call


def _quantize_int8(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: object = None) -> None:
    rows = x.view(-1, block)
    scales.copy_(rows.abs().amax(1) / 127)
    codes.view(torch.int8).view(-1, block).copy_(torch.round(rows / scales[:, None].float()).clamp_(-127, 127))


def _dequantize_add_int8(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    y.view(-1, block).add_(codes.view(torch.int8).view(-1, block) * scales[:, None].float(), alpha=weight)


def _sum_of_squares(tensors: list[Tensor], partial: Tensor) -> None:
    partial[0] = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]).square().sum()


def _scale(tensors: list[Tensor], factor: Tensor) -> None:
    for x in tensors:
        x.mul_(factor)


_NATURAL: dict[str, Callable[..., object]] = {
    "quantize_int8": _quantize_int8,
    "dequantize_add_int8": _dequantize_add_int8,
    "sum_of_squares": _sum_of_squares,
    "scale": _scale,
}
