"""Which of several recipes loses less, and which should be taken?

Speed is predicted for every recipe; what each does to the model is measured for few of them. What the order rests on is in
``ORDER``, for people to read beside the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from dtrain.bucket import whole
from dtrain.methods import RULES
from dtrain.own_codec import codec_of
from dtrain.own_name import is_own
from dtrain.plan.plans import Row
from dtrain.recipes import RECIPES, Recipe
from dtrain.topology import parse_server

NEAR_BEST = 0.05
"""Recipes that are slower than the fastest by no more than this are as good; predictions are not finer."""
FEWEST_ROUNDS = 10
"""Of a job: outer momentum of 0.9, what DiLoCo was published with, needs 1 / (1 - 0.9) rounds to come to its full step, and what
error feedback keeps back leaves with the rounds that follow. With fewer, a recipe is not what it was measured as."""


@dataclass(frozen=True, slots=True)
class Measured:
    percent: float
    """Of all-reduce's bits a byte, more."""
    islands: int
    source: str
    """In tests/bench/results."""
    entry: str = ""
    """Of recipes.jsonl, with ``budget``: the mean of all its seeds."""
    budget: float = 4.0


_PAIRS = "+topology=alternating_exp_ring:2+train.lr=2.4e-2"
MEASURED = {
    "delayed_diloco": Measured(2.1, 2, "quality.json"),
    "accum_adam": Measured(1.6, 8, "recipes.jsonl", f"accum_adam{_PAIRS}"),
    "dpsgd": Measured(2.7, 8, "recipes.jsonl", f"decent_adam{_PAIRS}"),
    "decent_adam": Measured(2.7, 8, "recipes.jsonl", f"decent_adam{_PAIRS}"),
}
"""Recipes as their rows say them, each at its best learning rate beside all-reduce at its own, with 180,224 parameters. Of gossip
with one peer a round what was measured over alternating_exp_ring:2 stands for one_peer_exponential too, which comes to the mean
of 8 islands after 3 rounds, where that takes 4; and decent_adam for dpsgd, whose AdamW is the same outside the fused pass."""
_ONE_PEER = "alternating_exp_ring:2"


def _as(name: str, found: Measured) -> str:
    """And whose number it is, where another recipe's stands for it."""
    measured_as = found.entry.partition("+")[0] or name
    return name if measured_as == name else f"{name} as {measured_as}"


ORDER = (
    "gradients averaged every step; then what was measured beside that on a small model ("
    + ", ".join(f"{_as(name, found)} {found.percent:g} % behind with {found.islands} islands" for name, found in MEASURED.items())
    + "); then the others, by the time between rounds and the bits a number; then matrices sent by a few "
    "columns; last codecs too coarse for what they carry"
)

_FEWEST_BITS = {"gradients": 16, "parameters": 8, "differences": 4, "pseudo_gradients": 4, "none": 0}
"""Below these a payload loses more than an outer loop does: a model that is itself sent in 4 bits, or gradients in 8."""
_AVERAGED, _MEASURED, _UNMEASURED, _LOW_RANK, _COARSE, _SILENT = range(6)
_BITS = {"identity": 32, "bf16": 16, "int8": 8, "int4": 4, "e3m0": 4, "lut4": 4, "sign": 1, "topk": 1, "codebook8": 8, "dct": 1}
_MANY = 2**20
"""Numbers, beside which a wire's header is nothing."""


def rank(rows: Sequence[Row]) -> list[Row]:
    """By speed; of equal ones the one that loses less first, then the one that sends less."""
    return sorted(rows, key=lambda row: (-row.tokens_per_s, loss_order(row), row.bytes_per_step))


def recommend(rows: Sequence[Row]) -> Row:
    """The least lossy of those that are as fast as the fastest that talks, to NEAR_BEST; of equally lossy ones that with the
    fewest bytes, as their speeds are not told apart."""
    talking = [row for row in rows if row.recipe.payload != "none"] or list(rows)
    best = max(row.tokens_per_s for row in talking)
    near = [row for row in talking if row.tokens_per_s >= (1 - NEAR_BEST) * best]
    return min(near, key=lambda row: (loss_order(row), row.bytes_per_step, -row.tokens_per_s))


def loss_order(row: Row) -> tuple[float, ...]:
    """Smaller is nearer to averaging all gradients each step, as far as that is known (``ORDER``)."""
    r = row.recipe
    bits, known = _bits(r.codec), measured(r)
    if r.payload == "none":
        place, percent = _SILENT, 0.0
    elif bits < _FEWEST_BITS[r.payload]:
        place, percent = _COARSE, 0.0
    elif r.payload == "gradients" and not RULES[r.algorithm].signs:
        place, percent = _AVERAGED, 0.0
    elif known is not None:
        place, percent = _MEASURED, known.percent
    else:
        place, percent = _LOW_RANK if r.reduce == "low_rank" else _UNMEASURED, 0.0
    # Rounds of neighbours that fall apart reach some islands only; those with the server join them.
    apart = r.every if r.server is None else r.every * (1 + parse_server(r.server).every)
    # What was measured itself, with its few bits, before what should lose less and sends more.
    presumed = known is not None and r.codec != RECIPES[r.name].codec
    return place, percent, apart, presumed, -bits, not r.error_feedback, row.lambda2 or 0.0, r.delay_steps


def measured(r: Recipe) -> Measured | None:
    """What is known of a recipe that is its row, or differs from it by more bits or less delay alone."""
    row = RECIPES.get(r.name)
    if row is None or r.name not in MEASURED:
        return None
    topology = row.topology if r.topology == _ONE_PEER else r.topology
    same = replace(
        r, topology=topology, codec=row.codec, error_feedback=row.error_feedback, delay=row.delay, bucket_bytes=row.bucket_bytes
    )
    finer = _bits(r.codec) > _bits(row.codec) or (r.codec, r.error_feedback) == (row.codec, row.error_feedback)
    return MEASURED[r.name] if same == row and finer and r.delay_steps <= row.delay_steps else None


@cache
def _bits(codec: str) -> float:
    """A number's, on the wire; of an own codec what its wire is long, as nothing else is known of it."""
    if not is_own(codec):
        return _BITS[codec.partition(":")[0]]
    bound = codec_of(codec, error_feedback=False).bind(whole("bits", torch.empty(_MANY, device="meta")))
    return bound.wire_bytes * 8 / _MANY
