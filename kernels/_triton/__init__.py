"""The operations on a GPU: the names, signatures and bytes of ``reference.py``, in Triton. Nothing here waits for the device."""

from dtrain.kernels._triton.adam import accum_adam, choco_gossip_adam, gossip_adam
from dtrain.kernels._triton.encode import (
    cast_bf16,
    choco_encode,
    encode,
    encode_difference,
    encode_feedback,
    quantize_e3m0,
    quantize_int4,
    quantize_int8,
    quantize_lut4,
    quantize_sign,
    topk_chunks,
)
from dtrain.kernels._triton.mix import (
    add_bf16,
    choco_mix,
    decode_add,
    dequantize_add_e3m0,
    dequantize_add_int4,
    dequantize_add_int8,
    dequantize_add_lut4,
    dequantize_add_sign,
    mix,
    topk_add,
)
from dtrain.kernels._triton.outer import outer_step
from dtrain.kernels._triton.tensors import scale, sum_of_squares
from dtrain.kernels._triton.wire import checksum, flag_non_finite, put_identity

__all__ = [
    "accum_adam",
    "add_bf16",
    "cast_bf16",
    "checksum",
    "choco_encode",
    "choco_gossip_adam",
    "choco_mix",
    "decode_add",
    "dequantize_add_e3m0",
    "dequantize_add_int4",
    "dequantize_add_int8",
    "dequantize_add_lut4",
    "dequantize_add_sign",
    "encode",
    "encode_difference",
    "encode_feedback",
    "flag_non_finite",
    "gossip_adam",
    "mix",
    "outer_step",
    "put_identity",
    "quantize_e3m0",
    "quantize_int4",
    "quantize_int8",
    "quantize_lut4",
    "quantize_sign",
    "scale",
    "sum_of_squares",
    "topk_add",
    "topk_chunks",
]
