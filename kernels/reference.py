"""What does each operation compute? The specification, in plain torch; every backend writes the same bytes.

Operands are flat 1-D and the outputs are the caller's (``operands.py``). All arithmetic is fp32, one rounding an operation:
a multiply and an add are two roundings, never a fused one, but where ``fma`` is said. Sums over a block add its halves
elementwise until one value is left (``tree_sum``), so every backend can add in that order.

Block formats: scale = bf16(...), inverse = 1 / scale (0 where that overflows), and then
    int8, int4   scale = max |x| / q (q = 127, 7)   code = clamp(round_half_even(x inverse), -q, q)      x' = code scale
    e3m0         scale = max |x|                    code = sign, c: the nearest of 0, 2^-6, ..., 1       x' = +-2^(c - 7) scale
    lut4         mean, sigma (both bf16)         code = floor((x - mean) / (0.375 sigma) + 8), 0..15  x' = mean + LUT4[code] sigma
    sign         scale = mean |x|                   code = 1 where x < 0                                 x' = +-scale
With ``Noise`` codes are rounded at random, so that E[x'] = x within the range (sign: scale = max |x| then). Codes are taken
against the rounded scales. A block that holds inf or NaN, or whose scale is not finite, gets scale NaN and the codes of zeros:
``flag_non_finite`` finds it, and it is never sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.kernels.operands import SUM_TILE, Adam, Coded, Format, Noise, Piece, Public, zones
from dtrain.kernels.parts import MASK32, counts, in_rows, mix32, pack4, pack_bits, random_bits, safe_inverse

from dtrain.kernels.parts import square_root, tree_sum, uniform, unpack4  # isort: skip

_HALF = (0.18531319499015808, 0.5559438467025757, 0.9265873432159424, 1.2972520589828491)
_HALF = (*_HALF, 1.6679461002349854, 2.03867769241333, 2.409454107284546, 2.9369494915008545)
LUT4 = (*(-c for c in reversed(_HALF)), *_HALF)
"""The mean of a standard normal within each of 16 bins of width 0.375 about 0; the outermost reach to infinity."""

E3M0 = (0.0, *(2.0**k for k in range(-6, 1)))


# ---- block formats


def quantize_int8(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    """x (n) -> int8 codes (n bytes) and scales (ceil(n / block))."""
    codes.view(torch.int8).copy_(_integers(x, scales, block, 127, noise))


def quantize_int4(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    """x (n) -> code + 8 in ceil(n / 2) bytes, the even element in the low half (odd n: a last high half of 8); scales as int8."""
    pack4(_integers(x, scales, block, 7, noise).add_(8), codes, filler=8)


def quantize_e3m0(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    """x (n) -> 8 [x < 0] + c in ceil(n / 2) bytes (last high half 0); scales (ceil(n / block)).

    The fraction of a float's bits is its place between two powers of two, so adding half a unit (or a random one) to the bits
    and taking the exponent rounds it; below 2^-6 the neighbours are 0 and 2^-6."""
    rows, inverse = _scaled(x, scales, block, lambda rows: rows.abs().amax(1))
    r = (rows.abs() * inverse[:, None]).view(-1)[: x.numel()].contiguous()
    if noise is None:
        up, least = torch.full_like(r, 0x400000, dtype=torch.int32), torch.full_like(r, 2.0**-7)
        grown = r >= least
    else:
        random = random_bits(noise, x.numel(), x.device)
        up, grown = (random >> 9).to(torch.int32), (random >> 8).to(torch.float32) * 2.0**-24 < r * 64.0
    c = ((r.view(torch.int32) + up) >> 23) - 120
    c = torch.where(r < 2.0**-6, grown.to(torch.int32), c.clamp(1, 7))
    pack4(c + 8 * (rows.view(-1)[: x.numel()] < 0), codes, filler=0)


def quantize_lut4(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    """x (n) -> codes 0..15 in ceil(n / 2) bytes (last high half 8); scales (2 ceil(n / block)): mean, sigma of each block.

    The statistical quantizer of MuLoCo (arXiv 2505.23725) with the normal's bin means in place of a table a block."""
    rows = in_rows(x, block)
    count = counts(x.numel(), block, x.device)
    mean = (tree_sum(rows) / count).to(torch.bfloat16)
    inside = torch.arange(block, device=x.device) < count[:, None]
    off = torch.where(inside, rows - mean.float()[:, None], 0.0)
    sigma = square_root(tree_sum(off * off) / count).to(torch.bfloat16)
    bad = ~(mean.isfinite() & sigma.isfinite())
    scales.view(-1, 2).copy_(torch.stack((mean, sigma), 1).masked_fill_(bad[:, None], torch.nan))
    off, sigma = off.masked_fill(bad[:, None], 0.0), sigma.masked_fill(bad, 0.0)
    if noise is None:
        t = off * safe_inverse(sigma.float() * 0.375)[:, None] + 8.0
        code = t.floor_().clamp_(0.0, 15.0).view(-1)[: x.numel()]
    else:
        z = (off * safe_inverse(sigma.float())[:, None]).view(-1)[: x.numel()]
        lut = torch.tensor(LUT4, device=x.device)
        code = (z[:, None] >= lut[1:]).sum(1)
        gap = 1.0 / torch.cat((lut.diff(), torch.tensor([torch.inf], device=x.device)))
        code = code + (uniform(noise, x.numel(), x.device) < (z - lut[code]) * gap[code])
    pack4(code, codes, filler=8)


def quantize_sign(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    """x (n) -> a bit an element, the first lowest, in ceil(n / 8) bytes (fill 0); scales (ceil(n / block))."""
    count = counts(x.numel(), block, x.device)
    if noise is None:
        rows, _ = _scaled(x, scales, block, lambda rows: tree_sum(rows.abs()) / count)
        bits = rows.view(-1)[: x.numel()] < 0
    else:
        rows, inverse = _scaled(x, scales, block, lambda rows: rows.abs().amax(1))
        t = (rows * inverse[:, None]).view(-1)[: x.numel()]
        bits = uniform(noise, x.numel(), x.device) >= (t + 1.0) * 0.5
    pack_bits(bits, codes)


def dequantize_add_int8(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    """y += code (scale weight), for fp32 y (n); the same for the other formats."""
    _add_scaled(codes.view(torch.int8).float(), scales, y, weight, block)


def dequantize_add_int4(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    _add_scaled(unpack4(codes, y.numel()).float() - 8.0, scales, y, weight, block)


def dequantize_add_e3m0(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    nibbles = unpack4(codes, y.numel()).int()
    magnitude = torch.tensor(E3M0, device=y.device)[(nibbles & 7).long()]
    _add_scaled(torch.where(nibbles >= 8, -magnitude, magnitude), scales, y, weight, block)


def dequantize_add_lut4(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    """y += mean weight + LUT[code] (sigma weight)."""
    mean, sigma = (scales.float() * weight).view(-1, 2).unbind(1)
    rows = in_rows(torch.tensor(LUT4, device=y.device)[unpack4(codes, y.numel()).long()], block)
    y.add_((mean[:, None] + rows * sigma[:, None]).view(-1)[: y.numel()])


def dequantize_add_sign(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    bits = (codes[:, None] >> torch.arange(8, dtype=torch.uint8, device=y.device)) & 1
    _add_scaled(1.0 - 2.0 * bits.view(-1)[: y.numel()].float(), scales, y, weight, block)


# ---- casts and top-k


def cast_bf16(x: Tensor, wire: Tensor) -> None:
    """x (n) -> bf16, round to nearest even (2n bytes)."""
    wire.view(torch.bfloat16).copy_(x)


def add_bf16(wire: Tensor, y: Tensor, weight: float) -> None:
    """y += wire weight."""
    y.add_(wire.view(torch.bfloat16).float() * weight)


def topk_chunks(x: Tensor, codes: Tensor, scales: Tensor, chunk: int, k: int, bits: int) -> None:
    """x (n) -> for each chunk k (12 + bits) / 8 bytes of codes, [indices][values], of its k largest |x| (of equal
    ones the first), by rising index.

    Indices take 12 bits, two in three bytes, the first lowest. bits = 8: int8 values, one scale max / 127. bits = 2: a value is
    2 [x < 0] + [|x| >= mean], four a byte, and the chunk's two scales are the means of its smaller and of its larger magnitudes
    (0 where there are none). A short last chunk is filled with zeros, whose indices a reader skips. (SparseLoCo, arXiv
    2508.15706.)"""
    rows = in_rows(x, chunk)
    bad = ~rows.isfinite().all(1)
    rows = rows.masked_fill(bad[:, None], 0.0)
    index = torch.arange(chunk, device=x.device)
    keys = (rows.abs().view(torch.int32).long() << 12) | (4095 - index)
    kept = (4095 - (keys.topk(k, dim=1).values & 4095)).sort(dim=1).values
    values = rows.gather(1, kept)
    out = codes.view(-1, k * (12 + bits) // 8)
    first, second = kept.view(-1, k // 2, 2).unbind(2)
    triple = torch.stack((first & 255, first >> 8 | (second & 15) << 4, second >> 4), 2)
    out[:, : k * 12 // 8] = triple.view(-1, k * 12 // 8).to(torch.uint8)
    if bits == 8:
        scales.copy_(values.abs().amax(1) / 127.0)
        scales.masked_fill_(bad, torch.nan)
        inverse = safe_inverse(scales.float()).nan_to_num_(0.0)[:, None]
        out[:, k * 12 // 8 :] = (values * inverse).round_().clamp_(-127.0, 127.0).to(torch.int8).view(torch.uint8)
        return
    size = values.abs()
    high = size >= (tree_sum(size) / k)[:, None]
    low_mean, high_mean = (tree_sum(size * part) / part.sum(1).clamp(min=1) for part in (~high, high))
    both = torch.stack((low_mean, high_mean), 1).to(torch.bfloat16)
    bad |= ~both.isfinite().all(1)
    scales.view(-1, 2).copy_(both.masked_fill_(bad[:, None], torch.nan))
    quads = (high + 2 * (values < 0)).view(-1, k // 4, 4)
    out[:, k * 12 // 8 :] = (quads << torch.tensor([0, 2, 4, 6], device=x.device)).sum(2).to(torch.uint8)


def topk_add(codes: Tensor, scales: Tensor, y: Tensor, weight: float, chunk: int, k: int, bits: int) -> None:
    """y[index] += value (scale weight), for fp32 y (n); indices at or behind n are skipped."""
    record = codes.view(-1, k * (12 + bits) // 8).int()
    a, b, c = record[:, : k * 12 // 8].reshape(-1, k // 2, 3).unbind(2)
    index = torch.stack((a | (b & 15) << 8, b >> 4 | c << 4), 2).view(-1, k).long()
    index += torch.arange(0, index.shape[0] * chunk, chunk, device=y.device)[:, None]
    if bits == 8:
        part = codes.view(torch.int8).view(-1, k * (12 + bits) // 8)[:, k * 12 // 8 :].float()
        values = part * (scales.float() * weight)[:, None]
    else:
        code = (record[:, k * 12 // 8 :, None] >> torch.tensor([0, 2, 4, 6], device=y.device)).view(-1, k) & 3
        size = (scales.float() * weight).view(-1, 2).gather(1, (code & 1).long())
        values = torch.where(code >= 2, -size, size)
    inside = index < y.numel()
    y[index[inside]] += values[inside]


# ---- encoding with state, any format


def encode(x: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    """x (n) into a wire's zones, in the given format; topk and casts round to nearest only."""
    match fmt.kind:
        case "identity":
            out.codes.view(torch.float32).copy_(x)
        case "bf16":
            cast_bf16(x, out.codes)
        case "topk":
            topk_chunks(x, out.codes, out.scales, fmt.block, fmt.k, fmt.bits)
        case kind:
            _QUANTIZE[kind](x, out.codes, out.scales, fmt.block, noise)


def decode_add(wire: Coded, y: Tensor, weight: float, fmt: Format) -> None:
    """y += weight decode(wire), for fp32 y (n)."""
    match fmt.kind:
        case "identity":
            y.add_(wire.codes.view(torch.float32) * weight)
        case "bf16":
            add_bf16(wire.codes, y, weight)
        case "topk":
            topk_add(wire.codes, wire.scales, y, weight, fmt.block, fmt.k, fmt.bits)
        case kind:
            _DEQUANTIZE_ADD[kind](wire.codes, wire.scales, y, weight, fmt.block)


def encode_difference(a: Tensor, b: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    """out = C(a - b)."""
    encode(a.float() - b.float(), out, fmt, noise)


def encode_feedback(x: Tensor, residual: Tensor, decay: float, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    """e <- decay e + x;  out = C(e);  e <- e - decode(out)          (arXiv 1901.09847; with decay < 1: arXiv 2505.23725)."""
    residual.mul_(decay).add_(x.float())
    encode(residual, out, fmt, noise)
    decode_add(out, residual, -1.0, fmt)


def choco_encode(
    x: Tensor, xhat: Tensor, s: Tensor, self_weight: float, out: Coded, fmt: Format, noise: Noise | None = None
) -> None:
    """out = C(x - xhat);  xhat += decode(out);  s += self_weight decode(out)          (CHOCO, arXiv 1902.00340)."""
    encode_difference(x, xhat, out, fmt, noise)
    decode_add(out, xhat, 1.0, fmt)
    decode_add(out, s, self_weight, fmt)


def choco_mix(
    x: Tensor, xhat: Tensor, s: Tensor, gamma: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format
) -> None:
    """s += sum_j weights_j decode(wires_j);  x += gamma (s - xhat)."""
    for wire, weight in zip(wires, weights, strict=True):
        decode_add(wire, s, weight, fmt)
    x.copy_(x.float() + (s - xhat) * gamma)


def mix(x: Tensor, self_weight: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format) -> None:
    """x <- self_weight x + sum_j weights_j decode(wires_j), added in the order of the wires; rounded to x's dtype once."""
    y = x.float() * self_weight
    for wire, weight in zip(wires, weights, strict=True):
        decode_add(wire, y, weight, fmt)
    x.copy_(y)


# ---- optimizers


def accum_adam(pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor) -> None:
    """AdamW whose moments live on the time scale of s accumulated gradients (AccumAdamW, arXiv 2410.11998), s = ``every``:
        g' = grad_scale g;  a += g' / s;  M' = M + (1 - beta1) g';  V' = V + (1 - beta2) g' g'
        x <- (1 - lr wd) x - lr / (1 - beta1^k) M' / (sqrt(V') / sqrt(1 - beta2^k) + eps)
        closes:  M = beta1 (M + (1 - beta1) a);  V = beta2 (V + (1 - beta2) a a);  a = 0.
    s = 1 is AdamW, whose accumulator is the gradient itself. grad_scale is fp32 (1)."""
    one1, one2 = 1.0 - adam.beta1, 1.0 - adam.beta2
    step_size, root = adam.lr / (1.0 - adam.power1), (1.0 - adam.power2) ** -0.5
    for p in pieces:
        g = p.g.float() * grad_scale
        a = p.a.add_(g * (1.0 / adam.every)) if adam.every > 1 else g
        m, v = p.m + g * one1, p.v + g * one2 * g
        x = p.x.float() * (1.0 - adam.lr * p.weight_decay)
        p.x.copy_(x - m / (square_root(v) * root + adam.eps) * step_size)
        if adam.closes:
            p.m.copy_((p.m + a * one1) * adam.beta1)
            p.v.copy_((p.v + a * one2 * a) * adam.beta2)
            p.a.zero_()


def gossip_adam(
    pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor, self_weight: float, wires: Sequence[Tensor],
    weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    """A step of decentralized Adam in one pass: ``mix`` the arrived wires, ``accum_adam``, ``encode`` the next wire.

    Wires are whole bodies, [scales][codes] of all pieces in order; ``noise.first`` is the first piece's."""
    split = [zones(wire, fmt, [p.x.numel() for p in pieces]) for wire in (out, *wires)]
    for i, p in enumerate(pieces):
        mix(p.x, self_weight, [wire[i] for wire in split[1:]], weights, fmt)
        accum_adam([p], adam, grad_scale)
        encode(p.x, split[0][i], fmt, noise)
        noise = noise and Noise(noise.seed, noise.first + p.x.numel())


def choco_gossip_adam(
    pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, grad_scale: Tensor, gamma: float, self_weight: float,
    wires: Sequence[Tensor], weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    """The CHOCO form of ``gossip_adam``: ``choco_mix``, ``accum_adam``, ``choco_encode``."""
    split = [zones(wire, fmt, [p.x.numel() for p in pieces]) for wire in (out, *wires)]
    for i, (p, q) in enumerate(zip(pieces, public, strict=True)):
        choco_mix(p.x, q.xhat, q.s, gamma, [wire[i] for wire in split[1:]], weights, fmt)
        accum_adam([p], adam, grad_scale)
        choco_encode(p.x, q.xhat, q.s, self_weight, split[0][i], fmt, noise)
        noise = noise and Noise(noise.seed, noise.first + p.x.numel())


def outer_step(x: Tensor, sent: Tensor, anchor: Tensor, momentum: Tensor, delta: Tensor, lr: float, mu: float) -> None:
    """u <- mu u + delta;  anchor <- fma(-lr, fma(mu, u, delta), anchor);  x <- (x - sent) + anchor.

    Nesterov as torch.optim.SGD computes it, which fuses these two multiply-adds where the machine can; then the additive landing
    (arXiv 2311.08105). x - sent is exactly zero where nothing moved in flight."""
    momentum.mul_(mu).add_(delta)
    anchor.add_(delta.add(momentum, alpha=mu), alpha=-lr)
    x.copy_((x.float() - sent) + anchor)


def sum_of_squares(tensors: Sequence[Tensor], partial: Tensor) -> None:
    """partial (fp64, sum of ceil(n / SUM_TILE)): the sum of squares of each SUM_TILE elements of each tensor, in fp64. The one
    operation whose order is a backend's own: two results differ by at most SUM_TILE 2^-53 of themselves."""
    tiles = [tile for x in tensors for tile in x.split(SUM_TILE)]
    partial.copy_(torch.stack([tile.double().square().sum() for tile in tiles]))


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x <- x factor, for fp32 factor (1)."""
    for x in tensors:
        x.copy_(x.float() * factor)


# ---- wires


def checksum(data: Tensor, first_word: int, start: int, out: Tensor) -> None:
    """out (int64, 1) = start + sum_i mix(word_i xor mix(first_word + i)) over data's little-endian 32-bit words, the last filled
    with zero bytes. ``mix32`` is a bijection, so a change within one word always shows."""
    words = pad(data, (0, -data.numel() % 4)).view(torch.int32).long() & MASK32
    index = torch.arange(first_word, first_word + words.numel(), device=data.device) & MASK32
    out.copy_(mix32(words ^ mix32(index)).sum() + start)


def flag_non_finite(values: Tensor, flag: Tensor) -> None:
    """flag (uint8, 1) = 1 where any value (fp32 or bf16) is inf or NaN, else 0."""
    flag.copy_(~values.isfinite().all())


def put_identity(x: Tensor, wire: Tensor, first: int, flag: int) -> None:
    """x (n) into a whole identity wire (uint8): its values in fp32 from byte ``first`` on, a multiple of 4, and byte ``flag`` = 1
    where any of them is inf or NaN, else 0."""
    values = wire[first : first + 4 * x.numel()].view(torch.float32)
    values.copy_(x)
    flag_non_finite(values, wire[flag : flag + 1])


def _scaled(x: Tensor, scales: Tensor, block: int, measure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Fill scales with bf16(measure(rows)); returns the rows, zeroed where the scale is not finite, and 1 / scale."""
    rows = in_rows(x, block)
    scales.copy_(measure(rows))
    bad = ~scales.isfinite()
    scales.masked_fill_(bad, torch.nan)
    return rows.masked_fill(bad[:, None], 0.0), safe_inverse(scales.float()).masked_fill_(bad, 0.0)


def _integers(x: Tensor, scales: Tensor, block: int, largest: int, noise: Noise | None) -> Tensor:
    rows, inverse = _scaled(x, scales, block, lambda rows: rows.abs().amax(1) / largest)
    t = (rows * inverse[:, None]).view(-1)[: x.numel()]
    t = t.round() if noise is None else (t + uniform(noise, x.numel(), x.device)).floor_()
    return t.clamp_(-largest, largest)


def _add_scaled(values: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    rows = in_rows(values, block) * (scales.float() * weight)[:, None]
    y.add_(rows.view(-1)[: y.numel()])


_QUANTIZE = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "e3m0": quantize_e3m0,
    "lut4": quantize_lut4,
    "sign": quantize_sign,
}
_DEQUANTIZE_ADD = {
    "int8": dequantize_add_int8,
    "int4": dequantize_add_int4,
    "e3m0": dequantize_add_e3m0,
    "lut4": dequantize_add_lut4,
    "sign": dequantize_add_sign,
}
