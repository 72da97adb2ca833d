"""Which answers fit which algorithm? One row each. Pure: no torch; ``assemble.py`` has their code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AlgorithmName = Literal[
    "local", "allreduce", "dpsgd", "push_sum", "multi_gossip", "chebyshev", "deepsqueeze", "gradient_tracking", "choco", "beer",
    "a2cid2", "dadao", "diloco", "noloco", "desloc", "demo", "own",
]  # fmt: skip
InnerOptimizer = Literal["adamw", "muon", "schedule_free"]
"""What a job may ask for; what a recipe is defined with goes before."""


@dataclass(frozen=True, slots=True)
class Rules:
    axes: frozenset[str]
    """The axes that say something to the algorithm; any other would be ignored, so it is refused."""
    paths: tuple[str, ...] = ("neighbours",)
    """Answers to ``reduce``."""
    static: str | None = None
    """Why its topology must not change by round; None where it may."""
    rewrites_gradients: bool = False
    """Whether it exchanges something before each update, which waits for it."""
    signs: bool = False
    """Whether that leaves signs in the place of gradients: what is clipped is what goes in, SGD steps by them, and one island
    alone has them too."""
    pairs: bool = False
    """Whether its rounds are meetings of two, so that its topology must be matchings."""
    simulated: str | None = None
    """Why it is only simulated, by ``dtrain.events``; None where it trains models."""
    needs_same_start: str | None = None
    """Why all islands must start from the same parameters; None where each may start from its own."""
    moves: bool = False
    """Whether to send changes the parameters as well, so that an island's ranks differ until they are made equal."""
    one_rank: str | None = None
    """Why its islands must have one rank each; None where they may have several."""
    fuses: bool = False
    """Whether it can land, step and send in one pass, where dtrain's AccumAdamW owns the update."""


_CHOSEN = frozenset({"include", "exclude"})
_FEEDBACK = frozenset({"error_feedback", "feedback_decay"})
_ROUNDS = _CHOSEN | _FEEDBACK | {"every", "schedule", "delay", "fragments", "codec", "reduce", "bucket_bytes"}
_GOSSIP = _ROUNDS | {"topology", "graph"}
_SERVER = frozenset({"server"})
_PLAIN = _GOSSIP - _FEEDBACK
_OUTER = frozenset({"outer", "outer_lr", "outer_momentum"})
_HOST = frozenset({"outer_state"})
_ALL = ("gather", "all_to_all")
_MEANS = (*_ALL, "low_rank")
"""Of what is small beside the parameters, so that a part of it may be left for later."""
_COPIES = "keeps sums of its neighbours' public copies"
_ANCHOR = "keeps an anchor that all islands share"
_REPLICAS = "changes replicas by one mean gradient"
_UNKNOWN = "may keep what all islands share"

RULES: Mapping[AlgorithmName, Rules] = {
    "local": Rules(_CHOSEN | {"bucket_bytes"}, ("none",)),
    "allreduce": Rules(_ROUNDS, _ALL, rewrites_gradients=True, needs_same_start=_REPLICAS),
    "dpsgd": Rules(_PLAIN | _SERVER, ("neighbours", *_ALL), fuses=True),
    "push_sum": Rules(_PLAIN, moves=True),
    "multi_gossip": Rules(_PLAIN | _SERVER | {"gossip_steps"}, static="mixes several times by one matrix"),
    "chebyshev": Rules(_PLAIN | {"gossip_steps"}, static="has the polynomial of one matrix"),
    "deepsqueeze": Rules(_GOSSIP | _SERVER | {"gamma"}),
    "gradient_tracking": Rules(_PLAIN | _SERVER, rewrites_gradients=True),
    "beer": Rules(_PLAIN | {"gamma"}, static=_COPIES, rewrites_gradients=True, needs_same_start=_COPIES),
    "choco": Rules(_PLAIN | {"gamma"}, static=_COPIES, needs_same_start=_COPIES, fuses=True),
    "a2cid2": Rules(_PLAIN, pairs=True, moves=True),
    "dadao": Rules(
        frozenset({"topology", "graph"}),
        simulated="is for strongly convex problems whose curvature is known, and is only simulated",
    ),
    "own": Rules(
        _GOSSIP | _SERVER | {"gamma", "gossip_steps"} | _OUTER, ("none", "neighbours", *_ALL), needs_same_start=_UNKNOWN,
        moves=True,
    ),
    "diloco": Rules(
        _ROUNDS | _OUTER | _HOST | {"topology", "landing", "alpha", "rank", "participants", "quorum", "grace"}, _MEANS,
        needs_same_start=_ANCHOR,
    ),
    "noloco": Rules(
        _ROUNDS - _FEEDBACK - {"schedule"} | _HOST | {"outer_lr", "outer_momentum", "gamma"}, pairs=True,
    ),
    "desloc": Rules(
        _ROUNDS | _HOST | {"moments"}, _ALL, needs_same_start=_ANCHOR, one_rank="averages the moments of one rank's optimizer",
    ),
    # What islands do not share would step by its gradient, by the length of a sign's.
    "demo": Rules(_ROUNDS - _CHOSEN, ("gather",), rewrites_gradients=True, signs=True, needs_same_start=_REPLICAS),
}
