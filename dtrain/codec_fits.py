"""Does a codec fit the method, and its gamma the codec? Each question that is answered no is one line. Without torch, but for
Chebyshev's steps."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from dtrain import codec_name, contraction
from dtrain import topology as topologies
from dtrain.own_name import is_own

if TYPE_CHECKING:
    from dtrain.recipes import Recipe

NO_FEEDBACK = ("dpsgd", "push_sum", "multi_gossip", "chebyshev")
"""Gossip on the parameters themselves, with all of gamma = 1: error feedback makes that worse, or grow. |x - mean| of 16 islands
after 150 rounds without and with it, from 35.8: dpsgd's int4:64 0.8 and 1.3, sign:64 7.6 and 57, topk:64/4096:2 11 and 3e8."""
_COPIES = ("choco", "beer", "deepsqueeze")
"""What a codec lost goes out later, and may have grown by then."""
_SEEDED = ("random_regular", "barabasi_albert", "random_out")
"""Graphs whose edges are drawn by the job's seed, which is not known where a recipe is."""


def check_codec_fits(r: Recipe, num_islands: int) -> None:
    """Raises ValueError with ``refused``."""
    if (why := refused(r, num_islands)) is not None:
        raise ValueError(why)


def refused(r: Recipe, num_islands: int) -> str | None:
    """Why not, where mixing would drive the islands apart, or move the mean that it is to keep, for what the codec loses. One's
    own codec and one's own method are their author's to know."""
    if r.error_feedback and r.algorithm in NO_FEEDBACK:
        return (
            f'sync.error_feedback = true with sync.algorithm = "{r.algorithm}" would drive the islands apart: what was lost of '
            'parameters comes back at a time and is mixed whole; leave it out, or use sync.recipe = "deepsqueeze" or "choco"'
        )
    if r.algorithm in ("choco", "beer") and (is_own(r.codec) or codec_name.parse(r.codec).base in codec_name.TORCH):
        return (
            f'{r.algorithm} codes differences by the project\'s own kernels, and sync.codec = "{r.codec}" is none of them; use '
            'another codec, or sync.recipe = "deepsqueeze"'
        )
    if r.algorithm == "noloco" and (why := _of_noloco(r, num_islands)) is not None:
        return why
    if r.algorithm == "own" or r.codec == "identity":
        return None
    if r.algorithm == "dpsgd" and r.reduce != "neighbours":
        return (
            f'sync.codec = "{r.codec}" with sync.algorithm = "dpsgd" and sync.reduce = "{r.reduce}" would round the parameters '
            'themselves, and the mean of all islands with them; use codec = "identity", or reduce = "neighbours", or '
            'sync.recipe = "fedavg", which rounds differences'
        )
    if is_own(r.codec) or r.reduce != "neighbours":
        return None
    codec = codec_name.parse(r.codec)
    if contraction.most_lost(codec) >= 1:
        less = "" if codec.base == "sign" else f', use a smaller block, as in "{codec.base}:64:stochastic"'
        return (
            f'sync.codec = "{r.codec}" can lose more than all of what it is given, so gossip on it drives the islands apart; '
            f'leave ":stochastic" out{less}, or use "int8:64"'
        )
    if r.algorithm in _COPIES:
        return _of_gamma(r, codec, num_islands)
    return _of_chebyshev(r, codec, num_islands) if r.algorithm == "chebyshev" else None


def _of_gamma(r: Recipe, codec: codec_name.CodecName, num_islands: int) -> str | None:
    """``contraction``'s bound: gamma times the largest eigenvalue of I - W, which is below 2 for whatever W."""
    most = contraction.most_moved(codec)
    if r.gamma < most / 2 or num_islands == 1:
        return None
    moved = largest_move(r.topology, r.graph, r.server is not None, num_islands)
    if r.gamma * moved < most:
        return None
    shown = math.floor(1000 * most / moved * 0.999) / 1000
    return (
        f'sync.gamma = {r.gamma} is too large for sync.codec = "{r.codec}": over sync.topology = "{r.topology}" what it loses '
        f'makes {r.algorithm} grow, where gamma is not below {most / moved:.3g}; use gamma={shown:.3f} or less, or a codec that '
        "loses less"
    )


@lru_cache(maxsize=64)
def largest_move(topology: str, graph: str | None, served: bool, num_islands: int) -> float:
    """The largest eigenvalue of I - W, of its rounds if there are several. A round of pairs or of a server's sample: 1."""
    if topology in topologies.PAIRS:
        return 1.0
    if is_own(topology) or (graph is not None and graph.startswith(_SEEDED)):
        return 2.0
    import numpy as np

    from dtrain.topology.consensus import matrix

    mixing = topologies.mixing(topology, graph, 0)
    rounds = (np.eye(num_islands) - matrix(mixing, index, num_islands) for index in range(mixing.period(num_islands)))
    return max(1.0 if served else 0.0, *(float(np.linalg.norm(moves, 2)) for moves in rounds))


def _of_noloco(r: Recipe, num_islands: int) -> str | None:
    from dtrain.pair_momentum import growth, largest_gamma  # numpy

    if num_islands == 1:
        return None
    flown = r.delay_steps / r.every
    lost = 0.0 if is_own(r.codec) else min(1.0, contraction.usually_lost(codec_name.parse(r.codec)))
    grows = growth(r.outer_momentum, r.gamma, r.outer_lr, num_islands, flown=flown, lost=lost)
    if grows < 1:
        return None
    most = largest_gamma(r.outer_momentum, r.outer_lr, num_islands, flown=flown, lost=lost)
    return (
        f"sync.outer_momentum = {r.outer_momentum} with sync.gamma = {r.gamma} and sync.outer_lr = {r.outer_lr} would drive "
        f'pairs drawn from {num_islands} islands apart, by {math.sqrt(grows):.3g} a round with sync.codec = "{r.codec}"; use '
        + ("a smaller outer_momentum or outer_lr" if most is None else f"gamma={most} or less, or a smaller outer_momentum")
    )


def _of_chebyshev(r: Recipe, codec: codec_name.CodecName, num_islands: int) -> str | None:
    """Of a graph that is drawn by the job's seed, that of seed 0 stands for it."""
    from dtrain.algorithms.multi_gossip import chebyshev_growth  # torch

    if num_islands == 1:
        return None
    mixing, lost = topologies.mixing(r.topology, r.graph, 0), contraction.usually_lost(codec)
    growth = chebyshev_growth(mixing, num_islands, r.gossip_steps, lost)
    if growth < 1:
        return None
    return (
        f'sync.codec = "{r.codec}": the {r.gossip_steps} steps of chebyshev over sync.topology = "{r.topology}" with '
        f"{num_islands} islands magnify what it loses, by {math.sqrt(growth):.3g} a round; use a codec that loses less, fewer "
        'gossip_steps, or sync.recipe = "multi_gossip"'
    )
