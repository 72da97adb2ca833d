"""How much of a vector does a codec lose, and which mixing does that leave stable? Pure.

C is a contraction where E|C(x) - x|^2 <= r^2 |x|^2 with r < 1. CHOCO's copies and DeepSqueeze's error feedback, round by round
and along a direction in which I - W has the eigenvalue l, are one loop: v is coded, e_{t+1} = v_t - C(v_t) is lost, and
    v_{t+1} = (1 - a) v_t + (1 + a) e_{t+1} - e_t,   a = gamma l,   so   v = G e,   G(z) = ((1 + a) - 1/z) / (z - (1 - a)).
|G| is largest at z = -1, (2 + a) / (2 - a). By the small-gain theorem no loss of norm r < (2 - a) / (2 + a), whatever it is
and however it changes, makes this grow: a < 2 (1 - r) / (1 + r). Without loss that is the 2 of I + gamma (W - I). Feedback that
decays, beta e for e, has no larger |G|: the larger of 1, at z = 1, and (2 beta + a) / (2 - a), at z = -1.

Top-k loses nearly all, r^2 = 1 - K / CHUNK, but of each element nothing or everything: it goes out about once in CHUNK / K
rounds, while x goes on by gamma (W - I) of the old copy in each. Between two sendings that adds up to 1 - a CHUNK / K, and so
a < 2 K / CHUNK.
This is no proof, as which element goes out when is up to the values; measured, 8 islands in a ring and 4,096 elements came
together within 600 rounds at 1.7 times that bound (64 of 4,096) and 2.1 times (512 of 4,096), and did not at 4.3 and 4.8."""

from __future__ import annotations

import math

from dtrain.codec_name import CodecName

_ROUNDED = 2.0**-8
"""The most by which bf16 is off, of the value."""
_STEPS = {"int8": 127, "int4": 7}
_OUTERMOST = 2.9369
"""The largest value of lut4, in sigmas."""
_BIN = 12 / 256
"""Width of codebook8's bins, in sigmas."""


def most_lost(codec: CodecName) -> float:
    """The largest E|C(x) - x|^2 / |x|^2 of any x, from above; 1 or more of a codec that is no contraction.

    Blocks lose by themselves, so it is that of the worst block. Integers and e3m0: one large value, and all others where codes
    are farthest from them. lut4: all spread goes to one outlier. sign: everything is in one element. top-k: all are as large.
    codebook8: a bin loses how far its values are from their mean, and an outermost one has values of any size."""
    base, block, rounded = codec.base, codec.block, _ROUNDED**2
    match base:
        case "identity":
            return 0.0
        case "bf16":
            return rounded
        case "int8" | "int4":
            return _integers(_STEPS[base], block, stochastic=codec.stochastic)
        case "e3m0" if codec.stochastic:  # between powers of two (x - p) (2p - x) <= x^2 / 8
            return 1 / 8 + _at_random((block - 1) * 2.0**-12) + rounded
        case "e3m0":  # between powers of two a third of x, and below 2^-6 half of that step
            return max(1 / 9, _farthest((block - 1) * 2.0**-14)) + rounded
        case "lut4":  # within its bins a fifth of sigma, or half a gap of 0.53; 0.01: bf16's rounding of mean and sigma
            return (0.07 if codec.stochastic else 0.0465) + (1 - _OUTERMOST / math.sqrt(block)) ** 2 + 0.01
        case "sign":
            return block - 1.0 if codec.stochastic else 1 - (1 - rounded) / block
        case "dct":  # lengths are kept, and all coefficients may be as large; chunks of fewer elements lose less
            return 1 - codec.k / block**2
        case "codebook8":
            return _outliers(block) + _BIN**2 / 4 + rounded
        case "topk" if codec.bits == 8:
            return 1 - codec.k / block * (1 - _integers(127, codec.k, stochastic=False))
        case "topk":  # two means keep |kept|_1^2 / k or more, and |x|^2 <= |kept|_1^2 (1 + (chunk - k) / k^2)
            return 1 - (1 - rounded) * codec.k / (codec.k**2 + block - codec.k)
    raise AssertionError(base)


def _integers(steps: int, block: int, *, stochastic: bool) -> float:
    """Of codes in ``steps`` a side of the largest value: it is off by half a step, or by the rounding of its scale."""
    step = (1 + _ROUNDED) / steps
    first, others = max(step / 2, _ROUNDED) ** 2, (block - 1) * step**2
    return first + (_at_random(others) if stochastic else _farthest(others / 4))


def _farthest(others: float) -> float:
    """All others half a step from 0: they are lost whole."""
    return others / (1 + others)


def _at_random(others: float) -> float:
    """The largest of others p (1 - p) / (1 + others p^2), where all others are p of a step."""
    return (math.sqrt(1 + others) - 1) / 2


def _outliers(block: int) -> float:
    """What the outermost bin, from t = 6 sigmas less a bin on, loses of |x|^2 = block sigma^2 at most: m values there lose
    sum v^2 - (sum v)^2 / m, which of one sum of squares is largest where all but one of them are t."""
    t = 6 - _BIN
    most = int(block / t**2)
    return max((1 - 1 / m) * (math.sqrt(block - (m - 1) * t**2) - t) ** 2 / block for m in range(1, most + 1))


def usually_lost(codec: CodecName) -> float:
    """``most_lost`` of values that are spread as a normal distribution; measured in tests/oracle/test_contraction.py."""
    twice = 2 if codec.stochastic else 1  # rounding at random has a step's s^2 / 6, to nearest s^2 / 12
    match codec.base:
        case "int8" | "int4":  # the largest of so many: E max^2 <= 2 ln(2 block)
            return twice * 2 * math.log(2 * codec.block) / (12 * _STEPS[codec.base] ** 2)
        case "e3m0":  # evenly between two powers of two: (1 / 12) / (7 / 3), and a little below 2^-6
            return twice * 0.042
        case "lut4":  # 0.375^2 / 12 and the outermost bins
            return twice * 0.0125
        case "sign" if not codec.stochastic:
            return 1 - 2 / math.pi
        case "codebook8":
            return _BIN**2 / 12 + _ROUNDED**2
        case _:
            return most_lost(codec)


def most_moved(codec: CodecName) -> float:
    """The bound of a = gamma l that the docstring derives, for values spread as a normal distribution."""
    if codec.base == "topk":
        return 2 * codec.k / codec.block
    r = math.sqrt(min(1.0, usually_lost(codec)))
    return 2 * (1 - r) / (1 + r)
