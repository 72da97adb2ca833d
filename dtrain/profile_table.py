"""What does a person read of a profiled run? Rows of the parts of a step, of its kernels, and of where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.intervals import Interval
from dtrain.trace import LABELS, OURS, Flown, Part, Rank, account, flown, kernels, ours, parts, window

_MOST_KERNELS = 15


@dataclass(frozen=True, slots=True)
class Seen:
    """One rank's windows, counted. Shares are of the window without torch.profiler, but where a GPU computes: when its kernels
    ran is known from torch.profiler alone."""

    rank: Rank
    steps: int
    step_ns: float
    plain_step_ns: float
    traced_steps: int
    traced_step_ns: float
    shares: dict[str, int]
    """ns of the window by label; they sum to it."""
    ours_ns: int
    ours_behind_ns: int
    parts: list[Part]
    kernels: list[Part]
    flown: Flown


def see(rank: Rank) -> Seen:
    bounds = rank.traced if rank.on_gpu else rank.plain
    inside, traced = window(bounds), window(rank.traced)
    of = parts(rank, inside)
    in_all, behind = ours(of, on_gpu=rank.on_gpu)
    steps = len(bounds) - 1
    return Seen(
        rank=rank,
        steps=steps,
        step_ns=_span(inside) / steps,
        plain_step_ns=_span(window(rank.plain)) / (len(rank.plain) - 1),
        traced_steps=len(rank.traced) - 1,
        traced_step_ns=_span(traced) / (len(rank.traced) - 1),
        shares=account(inside, of, on_gpu=rank.on_gpu),
        ours_ns=in_all,
        ours_behind_ns=behind,
        parts=of,
        kernels=kernels(rank, traced, of if rank.on_gpu else parts(rank, traced)),
        flown=flown(rank, inside, of),
    )


PART_HEADER = ["part of a step", "on", "calls", "ms/step", "share", "MB/call", "GB/s", "behind"]
KERNEL_HEADER = ["kernel, own time", "on", "calls", "ms/step", "share", "MB/call", "GB/s", "behind"]
SHARE_HEADER = ["share, %", *(label.removeprefix("exposed ") for label in LABELS), "ms"]


def part_rows(seen: Sequence[Seen]) -> list[list[str]]:
    """The mean of all ranks; where a GPU computes, what it runs and what its host waits for."""
    return _rows(seen, lambda s: [p for p in s.parts if not s.rank.on_gpu or p.where == "gpu" or p.name == "wait"], False)


def kernel_rows(seen: Sequence[Seen]) -> list[list[str]]:
    """The mean of all ranks, the longest first; the rest in one row."""
    return _rows(seen, lambda s: s.kernels, True)


def share_rows(seen: Sequence[Seen]) -> list[list[str]]:
    several = any(s.rank.rank for s in seen)
    rows: list[list[str]] = []
    for s in seen:
        total = sum(s.shares.values())
        name = f"island {s.rank.island}" + (f" rank {s.rank.rank}" if several else "")
        rows.append([name, *(f"{100 * s.shares[label] / total:.1f}" for label in LABELS), f"{s.step_ns / 1e6:.2f}"])
    return rows


def traced_line(seen: Sequence[Seen]) -> str:
    """How far the kernels' times are from those of a run that nobody traces."""
    plain, traced = _mean(seen, lambda s: s.plain_step_ns), _mean(seen, lambda s: s.traced_step_ns)
    return f"under torch.profiler, as kernels are shown, a step took {traced / 1e6:.2f} ms, without it {plain / 1e6:.2f} ms"


def share_line(seen: Sequence[Seen]) -> str:
    """Where the step's time goes: the mean of all ranks, in parts that sum to the whole."""
    total = sum(sum(s.shares.values()) for s in seen)
    shares = {label: 100 * sum(s.shares[label] for s in seen) / total for label in LABELS}
    said = ", ".join(f"{label} {share:.1f} %" for label, share in shares.items())
    return f"a step takes {_mean(seen, lambda s: s.step_ns) / 1e6:.2f} ms: {said}"


def ours_line(seen: Sequence[Seen]) -> str:
    ns, behind = (_mean(seen, lambda s, k=k: (s.ours_ns, s.ours_behind_ns)[k] / s.steps) for k in (0, 1))
    step_ns = _mean(seen, lambda s: s.step_ns)
    aside = f", {behind / 1e6:.2f} ms of it behind the step" if behind >= 5e3 else ""
    return f"{', '.join(OURS[:-1])} and {OURS[-1]} together: {ns / 1e6:.2f} ms a step, {100 * ns / step_ns:.1f} % of it{aside}"


def link_line(seen: Sequence[Seen]) -> str:
    """What the rounds of the link hid behind, over all ranks."""
    air = [s.flown for s in seen]
    count = sum(f.count for f in air)
    if not count:
        return "no round of the link began in these steps"
    in_air, exposed = sum(f.in_air_ns for f in air), sum(f.exposed_ns for f in air)
    behind: dict[str, int] = {}
    for f in air:
        for name, ns in f.behind.items():
            behind[name] = behind.get(name, 0) + ns
    hidden = in_air - exposed
    most = max(behind, key=lambda name: behind[name], default=None)
    what = f", {100 * behind[most] / in_air:.0f} % behind {most}" if most is not None and in_air else ""
    longest = max(f.longest_ns for f in air)
    sent = sum(f.sent_bytes for f in air)
    return (
        f"{count} rounds of {len(seen)} ranks sent {sent / 1e3:.0f} kB, the longest flew {longest / 1e6:.1f} ms: "
        f"{in_air / 1e6:.1f} ms in flight, {hidden / 1e6:.1f} ms hidden{what}, {exposed / 1e6:.1f} ms waited for"
    )


def _rows(seen: Sequence[Seen], of: Callable[[Seen], list[Part]], traced: bool) -> list[list[str]]:
    num = len(seen)
    gathered: dict[tuple[str, str], list[Part]] = {}
    for s in seen:
        for part in of(s):
            gathered.setdefault((part.name, part.where), []).append(part)
    steps = seen[0].traced_steps if traced else seen[0].steps
    step_ns = _mean(seen, lambda s: s.traced_step_ns if traced else s.step_ns)
    ordered = sorted(gathered.items(), key=lambda item: -sum(p.busy_ns for p in item[1]))
    rows: list[list[str]] = []
    for (name, where), same in ordered[: _MOST_KERNELS if traced else None]:
        ns, calls = sum(p.busy_ns for p in same), sum(p.calls for p in same)
        moved = sum(p.moved_bytes for p in same) if all(p.moved_bytes for p in same) else 0
        rows.append(
            [
                *(_short(name), where, _whole(calls / num), f"{ns / num / steps / 1e6:.3f}"),
                f"{100 * ns / num / steps / step_ns:.1f} %",
                *((_mega(moved / calls), f"{moved / ns:.1f}") if moved and ns and calls else ("-", "-")),
                _behind(same, ns),
            ]
        )
    rest = [p for _, same in ordered[_MOST_KERNELS:] for p in same] if traced else []
    if rest:
        ns, calls = sum(p.busy_ns for p in rest), sum(p.calls for p in rest)
        share = f"{100 * ns / num / steps / step_ns:.1f} %"
        said = f"{len(ordered) - _MOST_KERNELS} others"
        rows.append([said, "", _whole(calls / num), f"{ns / num / steps / 1e6:.3f}", share, "-", "-", "-"])
    return rows


def _behind(same: Sequence[Part], busy_ns: int) -> str:
    behind: dict[str, int] = {}
    for part in same:
        for name, ns in part.behind.items():
            behind[name] = behind.get(name, 0) + ns
    if not behind or not busy_ns:
        return "-"
    name = max(behind, key=lambda key: behind[key])
    return f"{100 * behind[name] / busy_ns:.0f} % {name}"


def _mean(seen: Sequence[Seen], of: Callable[[Seen], float]) -> float:
    return sum(of(s) for s in seen) / len(seen)


def _span(inside: Interval) -> int:
    return inside[1] - inside[0]


def _short(name: str) -> str:
    """The end of a kernel's name tells forward from backward."""
    return name if len(name) <= 40 else f"{name[:24]}...{name[-13:]}"


def _whole(number: float) -> str:
    return f"{number:.0f}" if number == round(number) else f"{number:.1f}"


def _mega(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3f}"
