"""The operations on a CPU: explicit vectors compiled by numba, cached on disk, shared by the cores."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from dtrain.kernels._numba.exchange import (
    add_bf16, cast_bf16, choco_encode, choco_mix, decode_add, dequantize_add_e3m0, dequantize_add_int4, dequantize_add_int8,
    dequantize_add_lut4, dequantize_add_sign, encode, encode_difference, encode_feedback, mix, quantize_e3m0, quantize_int4,
    quantize_int8, quantize_lut4, quantize_sign, topk_add, topk_chunks,
)  # fmt: skip
from dtrain.kernels._numba.steps import (
    accum_adam, checksum, choco_gossip_adam, flag_non_finite, gossip_adam, outer_step, put_identity, scale, sum_of_squares,
)  # fmt: skip
from dtrain.kernels._numba.compiled import prepare
from dtrain.kernels.cpu_cache import is_compiled

__all__ = [
    "accum_adam", "add_bf16", "cast_bf16", "checksum", "choco_encode", "choco_gossip_adam", "choco_mix", "decode_add",
    "dequantize_add_e3m0", "dequantize_add_int4", "dequantize_add_int8", "dequantize_add_lut4", "dequantize_add_sign", "encode",
    "encode_difference", "encode_feedback", "flag_non_finite", "gossip_adam", "is_compiled", "mix", "outer_step", "prepare",
    "put_identity", "quantize_e3m0", "quantize_int4", "quantize_int8", "quantize_lut4", "quantize_sign", "scale",
    "sum_of_squares", "topk_add", "topk_chunks",
]
