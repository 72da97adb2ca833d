"""Do a recipe's answers fit together, and is none of them without effect? Each question that is answered no is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeGuard

from dtrain import codec_name, quorum, schedule, units
from dtrain import topology as topologies
from dtrain.codec_fits import NO_FEEDBACK, check_codec_fits
from dtrain.landing_fits import check_landing, check_stable
from dtrain.matrices import adapts, check_word
from dtrain.methods import RULES
from dtrain.own_name import is_own
from dtrain.own_topology import check_kind, check_topology

if TYPE_CHECKING:
    from dtrain.recipes import Recipe

MOST_GOSSIP_STEPS = 64
"""A wire's name has 6 bits for the phase of its round."""

_STABLE_GAMMA = (
    "more than 0 and at most 1: without loss I + gamma (W - I) brings islands together below gamma = 2 / (1 - lambda_n), 1 or "
    "more for whatever W, and drives them apart above it"
)
"""lambda_n, W's least eigenvalue, is -1 or more. A round lands before the next starts, so a delay does not narrow the range. What
a codec loses does: ``codec_fits``."""
_DECAY = "more than 0 and at most 1: the share of what was lost that goes out later; to keep none of it, error_feedback = false"


def check_values(r: Recipe, words: Mapping[str, tuple[object, ...]]) -> None:
    """A job file's types are checked where it is read; those of join() only here."""
    for axis, allowed_words in words.items():
        value = getattr(r, axis)
        if value not in allowed_words:
            raise ValueError(f"{axis} = {value!r} is not known; use one of {', '.join(map(str, allowed_words))}")
    if not isinstance(r.codec, str):
        raise ValueError(f'codec = {r.codec!r} is not allowed; use a name, as "int8:64"')
    if is_own(r.codec):
        from dtrain.own_codec import check_codec  # torch

        check_codec(r.codec)
    else:
        codec_name.parse(r.codec)
    if not isinstance(r.schedule, str):
        raise ValueError(f'schedule = {r.schedule!r} is not allowed; use a name, as "every"')
    schedule.parse(r.schedule)
    if isinstance(r.rank, str):
        check_word(r.rank)
    quorum.check(r.quorum)
    if not isinstance(r.grace, str):
        raise ValueError(f'grace = {r.grace!r} is not allowed; use a time, as "2s"')
    units.seconds(r.grace)
    if r.moments is not None:
        schedule.multiples(r.moments if isinstance(r.moments, str) else repr(r.moments))
    ranges: tuple[tuple[str, bool, str], ...] = (
        ("topology", isinstance(r.topology, str), "a name"),
        ("graph", r.graph is None or isinstance(r.graph, str), "a name, or a file's path as text"),
        ("server", r.server is None or isinstance(r.server, str), 'text, as "sampled:2:5"'),
        ("participants", r.participants is None or (_is_int(r.participants) and r.participants >= 1), "1 or more"),
        ("every", _is_int(r.every) and r.every >= 1, "1 or more"),
        ("fragments", _is_int(r.fragments) and r.fragments >= 1, "1 or more"),
        ("delay", r.delay == "round" or (_is_int(r.delay) and r.delay >= 0), '0 or more, or "round"'),
        ("error_feedback", isinstance(r.error_feedback, bool), "true or false"),
        ("feedback_decay", _is_number(r.feedback_decay) and 0 < r.feedback_decay <= 1, _DECAY),
        ("outer_lr", _is_number(r.outer_lr) and 0 < r.outer_lr < math.inf, "a number above 0"),
        ("outer_momentum", _is_number(r.outer_momentum) and 0 <= r.outer_momentum < 1, "0 or more and less than 1"),
        ("alpha", _is_number(r.alpha) and 0 <= r.alpha < 1, "0 or more and less than 1: the mean has a share of 1 - alpha"),
        ("gamma", _is_number(r.gamma) and 0 < r.gamma <= 1, _STABLE_GAMMA),
        ("sam_rho", r.sam_rho is None or (_is_number(r.sam_rho) and 0 < r.sam_rho < math.inf), "a number above 0"),
        ("optimizer", r.optimizer in ("muon", None), '"muon", or None'),
        ("gossip_steps", _is_int(r.gossip_steps) and 1 <= r.gossip_steps <= MOST_GOSSIP_STEPS, f"1 to {MOST_GOSSIP_STEPS}"),
        ("rank", r.rank is None or isinstance(r.rank, str) or (_is_int(r.rank) and r.rank >= 1), '1 or more, or "adaptive:32"'),
        *((axis, _are_patterns(getattr(r, axis)), 'a list of patterns, as ["head.*"]') for axis in ("include", "exclude")),
        ("bucket_bytes", r.bucket_bytes is None or (_is_int(r.bucket_bytes) and r.bucket_bytes >= 4), "4 or more"),
    )
    for axis, allowed, said in ranges:
        if not allowed:
            raise ValueError(f"{axis} = {getattr(r, axis)!r} is not allowed; use {said}")


def _are_patterns(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and bool(value) and all(isinstance(p, str) and p for p in value))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_int(value) or isinstance(value, float)


def used_axes(r: Recipe) -> frozenset[str]:
    """The axes that say something, but for those that other answers leave idle (``idle_axes``)."""
    return RULES[r.algorithm].axes | {"algorithm"} | ({"error_feedback"} if r.algorithm in NO_FEEDBACK else set())


def idle_axes(r: Recipe) -> dict[str, str]:
    """The axes that another answer leaves without effect, and that answer."""
    of_outer = {"copy": ("outer_lr", "outer_momentum"), "sgd": ("outer_momentum",)}.get(r.outer, ())
    idle = {axis: f'outer = "{r.outer}"' for axis in of_outer if "outer" in used_axes(r)}
    if r.reduce != "low_rank":
        idle["rank"] = f'reduce = "{r.reduce}"'
    if r.landing != "blend":
        idle["alpha"] = f'landing = "{r.landing}"'
    if r.quorum in (None, "100%"):
        idle["grace"] = 'quorum = "100%"'
    if not r.error_feedback:
        idle["feedback_decay"] = "error_feedback = false"
    if r.schedule == schedule.READY:
        idle["delay"] = f'schedule = "{r.schedule}", whose rounds land when they are there'
    elif r.schedule != schedule.EVERY:
        idle["every"] = f'schedule = "{r.schedule}"'
    return idle


def check_used(r: Recipe, row: Recipe, changes: Mapping[str, object]) -> None:
    """Refuse an axis that was changed and would have no effect."""
    used, idle = used_axes(r), idle_axes(r)
    for axis, value in changes.items():
        if value == getattr(row, axis) or axis in used - idle.keys():
            continue
        reason = idle[axis] if axis in used and axis in idle else f'algorithm = "{r.algorithm}"'
        raise ValueError(f"sync.{axis} = {value!r} has no effect with sync.{reason}; leave it out, or choose another recipe")


def _others(r: Recipe, needs: Mapping[str, object]) -> dict[str, object]:
    """Those of the needed answers that the recipe does not give."""
    return {axis: answer for axis, answer in needs.items() if getattr(r, axis) != answer}


def _instead(answers: Mapping[str, object]) -> str:
    return " and ".join(f"{axis} = {_word(answer)}" for axis, answer in answers.items())


def _word(answer: object) -> str:
    """As a job file says it."""
    return f'"{answer}"' if isinstance(answer, str) else str(answer)


def _check_server(r: Recipe, server: str) -> None:
    if "server" not in RULES[r.algorithm].axes or r.reduce != "neighbours":
        raise ValueError(
            f'sync.server = "{server}" stands between rounds of neighbours whose matrix may change, and sync.algorithm = '
            f'"{r.algorithm}" with sync.reduce = "{r.reduce}" has none; leave it out, or use sync.recipe = "dpsgd"'
        )
    if r.algorithm == "gradient_tracking" and server.startswith("all"):
        raise ValueError(
            f'gradient_tracking needs a matrix whose columns sum to one, and those of sync.server = "{server}" do not; use '
            f'"sampled{server.removeprefix("all")}"'
        )


def _check_participants(r: Recipe, participants: int, num_islands: int) -> None:
    """It is an axis of diloco alone."""
    if participants > num_islands:
        raise ValueError(f"sync.participants = {participants} of {num_islands} islands; use fewer, or leave it out")
    why = {
        "reduce": "all islands would have a part in each mean",
        "landing": "those that were not drawn would keep some of what they have",
        "delay": "those that were not drawn would keep some of what they have",
    }
    wrong = _others(r, {"reduce": "gather", "landing": "keep", "delay": 0})
    if wrong:
        reasons = " and ".join(dict.fromkeys(why[axis] for axis in wrong))
        have = " and ".join(f"sync.{axis} = {_word(getattr(r, axis))}" for axis in wrong)
        raise ValueError(
            f"sync.participants = {participants}: all islands take the mean of those that are drawn, and with {have} {reasons}; "
            f"use {_instead(wrong)}"
        )


def combine_of(r: Recipe) -> Literal["mean", "gossip", "push", "sampled", "radial"]:
    """What mixing keeps, by the matrices that the answers give; raises ValueError where one's own row says what they cannot."""
    if r.reduce != "neighbours" or r.combine in ("mean", "push"):
        return r.combine
    if r.combine == "gossip" and r.topology in topologies.DIRECTED:
        raise ValueError(
            f'the row of sync.recipe = "{r.name}" says combine = "gossip", which keeps the mean of all islands, and the columns '
            f'alone of sync.topology = "{r.topology}" sum to one; say combine = "push" there, or use another topology'
        )
    if r.server is not None and topologies.parse_server(r.server).to == "all":
        return "sampled"
    return r.combine if r.algorithm == "own" else "gossip"


def check_trains(r: Recipe) -> None:
    """Raises ValueError for a method that is only simulated."""
    why = RULES[r.algorithm].simulated
    if why is not None:
        raise ValueError(f'sync.recipe = "{r.name}" {why}; to train a model use another recipe, "a2cid2" say')


def check_ranks(r: Recipe, num_ranks: int) -> None:
    """Raises ValueError for a recipe whose islands cannot have so many ranks."""
    if r.near is not None and num_ranks > 1:
        raise ValueError(
            f"islands.ranks = {num_ranks} with [[sync.level]]: the near level is what an island's ranks would do, on islands of "
            "one rank; use islands.ranks=1, and more islands"
        )
    why = RULES[r.algorithm].one_rank
    if why is not None and num_ranks > 1:
        raise ValueError(
            f'islands.ranks = {num_ranks}: sync.recipe = "{r.name}" {why}, and all ranks of an island have to stay alike; use '
            'islands.ranks=1, or sync.recipe = "fedavg"'
        )
    if r.quorum not in (None, "100%") and num_ranks > 1:
        raise ValueError(
            f"islands.ranks = {num_ranks}: with sync.quorum = {r.quorum!r} each rank would look whose wires are here, and those "
            'of an island have one model; use islands.ranks=1, or sync.quorum = "100%"'
        )
    if r.schedule == schedule.READY and num_ranks > 1:
        raise ValueError(
            f'islands.ranks = {num_ranks}: with sync.schedule = "{schedule.READY}" each rank would meet when ready, and those '
            f'of an island have one model; use islands.ranks=1, or sync.schedule = "{schedule.EVERY}"'
        )


def _check_ready(r: Recipe) -> None:
    if not RULES[r.algorithm].pairs:
        raise ValueError(
            f'sync.schedule = "{schedule.READY}" is for meetings of two, and sync.algorithm = "{r.algorithm}" has rounds of all '
            f'islands; use sync.recipe = "a2cid2", or sync.schedule = "{schedule.EVERY}"'
        )
    if r.fragments != 1:
        raise ValueError(
            f'sync.fragments = {r.fragments} cannot take turns with sync.schedule = "{schedule.READY}", pairs meet with all '
            "that they have; use fragments = 1"
        )


def _check_adapts(r: Recipe) -> None:
    said = f'sync.every = "{schedule.adaptive(r.every)}"'
    if r.reduce != "low_rank" or r.rank is None or not adapts(r.rank):
        remedy = "sync.rank=adaptive:32" if r.reduce == "low_rank" else "sync.recipe=dilocox sync.rank=adaptive:32"
        raise ValueError(
            f'{said} needs sync.reduce = "low_rank" with a rank that adapts; use {remedy}, or sync.every = {r.every}'
        )
    if r.fragments != 1:
        raise ValueError(
            f"{said} is one period for the whole model, and sync.fragments = {r.fragments} would take turns in it; use "
            f"fragments = 1, or sync.every = {r.every}"
        )
    if r.delay != "round" and r.delay >= r.every:
        raise ValueError(
            f"sync.delay = {r.delay} leaves {said} no step to fall by, as a round lands before the next starts; use at most "
            f'{r.every - 1}, or "round"'
        )


def _check_quorum(r: Recipe) -> None:
    wrong = _others(r, {"algorithm": "diloco", "reduce": "gather", "landing": "keep"})
    if wrong:
        have = " and ".join(f"sync.{axis} = {_word(getattr(r, axis))}" for axis in wrong)
        raise ValueError(
            f"sync.quorum = {_word(r.quorum)} leaves islands out of a round, and {have} cannot: use {_instead(wrong)}, or "
            'quorum = "100%"'
        )


def check_together(r: Recipe, num_islands: int) -> None:
    regular = r.schedule == schedule.EVERY
    if r.schedule == schedule.READY:
        _check_ready(r)
    if not regular and r.delay == "round":
        raise ValueError(
            f'sync.delay = "round" is as long as a period, and sync.schedule = "{r.schedule}" has none; use a number of steps'
        )
    if regular and r.delay != "round" and r.delay > r.every:
        raise ValueError(
            f"sync.delay = {r.delay} is longer than sync.every = {r.every}: a round must land before the next starts; "
            f'use at most {r.every}, or "round"'
        )
    if r.every_adapts:
        _check_adapts(r)
    if r.algorithm == "push_sum" and is_own(r.topology):
        raise ValueError(
            f"push_sum is for links that go one way, and of sync.topology = {r.topology!r} rows and columns sum to one, as of "
            'every topology of your own; use topology = "directed" with sync.graph, a file of arcs, or sync.recipe = "dpsgd"'
        )
    if r.algorithm == "push_sum" and r.topology not in topologies.DIRECTED:
        raise ValueError(
            f'push_sum is for links that go one way: it needs sync.topology = "directed", got "{r.topology}"; use that, or '
            'sync.recipe = "dpsgd"'
        )
    if r.topology in topologies.DIRECTED and r.algorithm not in ("push_sum", "own"):
        raise ValueError(
            f'sync.algorithm = "{r.algorithm}" needs a topology whose rows and columns sum to one, and those of "{r.topology}" '
            'need not: use sync.recipe = "push_sum"'
        )
    check_topology(r.topology, r.graph, num_islands, server=r.server)
    rules = RULES[r.algorithm]
    if r.server is not None:
        _check_server(r, r.server)
    if r.reduce not in rules.paths:
        raise ValueError(
            f'sync.reduce = "{r.reduce}" does not fit sync.algorithm = "{r.algorithm}"; use one of {", ".join(rules.paths)}'
        )
    if r.reduce in ("gather", "all_to_all", "low_rank") and r.topology != "complete":
        remedy = 'use reduce = "neighbours"' if "neighbours" in rules.paths else 'use a gossip recipe, sync.recipe = "dpsgd" say'
        raise ValueError(f'sync.topology = "{r.topology}" has no effect with sync.reduce = "{r.reduce}"; {remedy}')
    if r.reduce == "low_rank" and r.rank is None:
        raise ValueError('sync.reduce = "low_rank" needs a rank: set sync.rank, 32 say, or use sync.recipe = "dilocox"')
    if rules.static is not None and is_own(r.topology):
        check_kind(r.algorithm, f"{rules.static}, so W must stay the same, and be symmetric", r.topology, num_islands, "same")
    elif rules.static is not None and r.topology not in topologies.STATIC:
        raise ValueError(
            f"{r.algorithm} {rules.static}, so its topology must not change by round; "
            f'"{r.topology}" does: use one of {", ".join(topologies.STATIC)}'
        )
    if "gossip_steps" in rules.axes and r.algorithm != "own" and r.topology == "complete" and r.gossip_steps > 1:
        raise ValueError(
            f'sync.gossip_steps = {r.gossip_steps} over sync.topology = "complete", whose first step is the exact mean; use '
            "gossip_steps = 1, or another topology"
        )
    if rules.pairs and is_own(r.topology):
        check_kind(r.algorithm, "has rounds that are meetings of two", r.topology, num_islands, "pairs")
    elif rules.pairs and r.topology not in topologies.PAIRS:
        raise ValueError(
            f'the rounds of {r.algorithm} are meetings of two; sync.topology = "{r.topology}" has others: use one of '
            f"{', '.join(topologies.PAIRS)}"
        )
    if r.algorithm == "noloco" and r.topology != "random_pairs":
        raise ValueError(
            f'what pairs bear is known of noloco for sync.topology = "random_pairs", and not for "{r.topology}"; use that, or '
            'sync.recipe = "dpsgd"'
        )
    if r.combine == "radial" and (r.algorithm != "diloco" or r.reduce != "gather" or r.landing != "keep"):
        raise ValueError(
            f'the row of sync.recipe = "{r.name}" says combine = "radial", of whole tensors and of all islands together: use '
            'it with sync.algorithm = "diloco", sync.reduce = "gather" and sync.landing = "keep", or use sync.recipe = "diloco"'
        )
    if r.algorithm == "demo" and not r.error_feedback and r.codec != "identity":
        raise ValueError(
            f'sync.error_feedback = false with sync.codec = "{r.codec}": what demo does not send is its momentum, and would be '
            "lost; leave error_feedback out, or use codec=identity"
        )
    if r.algorithm == "desloc" and r.moments is None:
        raise ValueError('sync.algorithm = "desloc" averages moments at every so many rounds; say how many, sync.moments = "3:6"')
    if quorum.size(r.quorum, num_islands) < num_islands:
        _check_quorum(r)
    if r.participants is not None:
        _check_participants(r, r.participants, num_islands)
    if r.landing != "keep":
        check_landing(r)
    if r.algorithm in ("allreduce", "demo") and (r.every != 1 or r.delay_steps != 0 or r.fragments != 1):
        raise ValueError(
            f"{r.algorithm} averages gradients each step before the update; every = 1, delay = 0 and fragments = 1 are all it "
            "can do"
        )
    if rules.rewrites_gradients and (r.every != 1 or r.fragments != 1):
        raise ValueError(f"{r.algorithm} exchanges something before each update; every = 1 and fragments = 1 are all it can do")
    if rules.rewrites_gradients and not regular:
        raise ValueError(f'{r.algorithm} exchanges something before each update; sync.schedule = "every" is all it can do')
    if r.algorithm == "a2cid2" and r.schedule not in (schedule.EVERY, schedule.READY):
        raise ValueError(
            f'a2cid2 counts on rounds that are equally far apart, and sync.schedule = "{r.schedule}" has others; use "every", or '
            '"ready"'
        )
    check_codec_fits(r, num_islands)
    if r.algorithm == "beer" and r.delay_steps != 1:
        raise ValueError(f"beer mixes with the public copies of the step before: use sync.delay = 1, not {r.delay!r}")
    if regular and r.fragments > r.every:
        raise ValueError(
            f"sync.fragments = {r.fragments} cannot take turns within sync.every = {r.every} steps; use at most {r.every}"
        )
    if r.algorithm == "diloco":
        check_stable(r, num_islands)
