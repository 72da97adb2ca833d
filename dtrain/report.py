"""What did a run cost, what did it save, and how does it compare with other runs?

The islands' parts become ``summary.json`` and ``loss.png``; a summary becomes rows of words for people.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dtrain import metrics, units
from dtrain.config import load_job, runs_a_script
from dtrain.metrics import Part, RunRecord

Summary = dict[str, Any]

# What tables and pictures show of a summary.
_SHOWN = (
    *("recipe", "islands", "ranks", "parameters", "steps", "tokens", "tokens_per_s", "wall_s", "train_s", "wait_s"),
    *("wire_bytes_sent", "wire_bytes_start", "wire_bytes_merge", "allreduce_wire_bytes", "wire_reduction"),
    *("eval_loss", "eval_bits_per_byte", "eval_bits_per_byte_islands", "corpus_hash"),
)

_MOST_ONE_BY_ONE = 8
"""Islands whose counts stand in one row."""

# On these a part must agree with island 0's: one that does not was left by another run.
_COMMON = ("recipe", "islands", "parameters", "steps", "first_step", "corpus_hash", "bytes_per_token")


def write_summary(run: Path, num_islands: int) -> Summary:
    """Build ``summary.json`` and ``loss.png`` from what every island left behind; returns the summary."""
    # matplotlib takes 0.9 s to import, which every other use of this module is spared.
    from dtrain import plots

    summary = summarize([metrics.read_part(run / "logs" / f"island{i}") for i in range(num_islands)])
    metrics.write_json(run / "summary.json", summary)
    plots.plot_run(metrics.newest(metrics.read(run / "metrics.jsonl")), summary, run / "loss.png")
    return summary


def summarize(parts: Sequence[Part]) -> Summary:
    """The whole run's numbers; bytes and waiting are an island's mean."""
    first = parts[0]
    for part in parts[1:]:
        for name in _COMMON:
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"{name} is {getattr(first, name)!r} on island {first.island} but {getattr(part, name)!r} on island "
                    f"{part.island}; their part.json are of different runs"
                )
    sent = statistics.mean(part.wire_bytes_sent for part in parts)
    allreduce = allreduce_wire_bytes(first.steps - first.first_step, first.parameters, first.islands)
    tokens = sum(part.tokens for part in parts)
    wall_s = max(part.wall_s for part in parts)
    train_s = max(part.train_s for part in parts)
    eval_losses = [part.eval_loss for part in parts]
    eval_loss = None if None in eval_losses else _mean(eval_losses)
    return {
        "recipe": first.recipe,
        "islands": first.islands,
        "ranks": first.ranks if len({part.ranks for part in parts}) == 1 else [part.ranks for part in parts],
        "parameters": first.parameters,
        "steps": first.steps,
        "first_step": first.first_step,
        "tokens": tokens,
        "tokens_per_s": tokens / train_s if train_s > 0 else None,
        "wall_s": wall_s,
        "train_s": train_s,
        "compute_s": statistics.mean(part.compute_s for part in parts),
        "wait_s": statistics.mean(part.wait_s for part in parts),
        "wire_bytes_sent": sent,
        "wire_bytes_start": statistics.mean(part.wire_bytes_start for part in parts),
        "wire_bytes_merge": statistics.mean(part.wire_bytes_merge for part in parts),
        "wire_bytes_consensus": statistics.mean(part.wire_bytes_consensus for part in parts),
        "allreduce_wire_bytes": allreduce,
        "wire_reduction": allreduce / sent if sent > 0 else None,
        "eval_loss": eval_loss,
        "eval_bits_per_byte": bits_per_byte(eval_loss, first.bytes_per_token),
        "eval_bits_per_byte_islands": [bits_per_byte(part.eval_loss_island, part.bytes_per_token) for part in parts],
        "consensus_distance": _mean(part.consensus_distance for part in parts),
        "corpus_hash": first.corpus_hash,
        **({} if first.meetings is None else {"meetings": sum(part.meetings or 0 for part in parts) // 2}),
        **({} if first.wire_bytes_sent_near is None else _links(parts, sent)),
        **({} if first.rounds_joined is None else _members(parts)),
        **{name: value for name in ("every_steps", "rank_mean") if (value := getattr(first, name)) is not None},
    }


def _links(parts: Sequence[Part], sent: float) -> Summary:
    near = statistics.mean(part.wire_bytes_sent_near or 0 for part in parts)
    return {"wire_bytes_sent_near": near, "wire_bytes_sent_far": sent - near}


def _members(parts: Sequence[Part]) -> Summary:
    return {f"{name}_islands": [getattr(part, name) for part in parts] for name in ("rounds_joined", "rounds_left_out")}


def allreduce_wire_bytes(steps: int, parameters: int, islands: int) -> float:
    """What one island sends when fp32 gradients go around a ring each step: 2 (N-1)/N of 4 bytes a parameter."""
    return steps * 8 * parameters * (islands - 1) / islands


def bits_per_byte(loss: float | None, bytes_per_token: float | None) -> float | None:
    """Of a loss that may not have been a finite number, of tokens that may stand for nobody knows how many bytes."""
    return None if loss is None or bytes_per_token is None else units.bits_per_byte(loss, bytes_per_token)


def load_run(path: Path) -> RunRecord:
    """Read a finished run; ValueError says why there is nothing to report."""
    known = ("job.toml", "metrics.jsonl", "summary.json")
    if not any((path / name).is_file() for name in known):
        raise ValueError(
            f"{path} is no run folder (it holds none of {', '.join(known)}); name one, as in runs/quickstart"
        )
    if not (path / "summary.json").is_file():
        if (path / "job.toml").is_file() and runs_a_script(load_job(path / "job.toml")):
            raise ValueError(f"{path} is the run of a script, which keeps its results itself; there is nothing to report")
        if (path / "virtual.json").is_file():
            raise ValueError(f"{path} is the simulation of a problem without a model; its numbers are in {path / 'virtual.json'}")
        raise ValueError(
            f"no summary.json in {path}: still running, or stopped; resume with: dtrain run {path / 'job.toml'} --resume"
        )
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"no metrics.jsonl in {path}: its steps cannot be shown; was it copied without it?")
    summary = metrics.read_json(path / "summary.json")
    missing = [name for name in _SHOWN if name not in summary]
    if missing:
        raise ValueError(
            f"{path / 'summary.json'} lacks {', '.join(missing)}; write it again with: dtrain run {path / 'job.toml'} --resume"
        )
    return RunRecord(
        path=path,
        name=path.resolve().name,
        summary=summary,
        lines=metrics.newest(metrics.read(path / "metrics.jsonl")),
    )


def closing_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What a newcomer sees at the end: the thing, its value, what it means."""
    return [
        ("Loss", _merged(summary), "the islands' models merged into one, on text it never saw; lower is better"),
        ("Each island alone", _alone(summary), "its own model just before the merge"),
        ("Bytes an island sent", _bytes(summary), "against averaging all gradients in fp32 each step (all-reduce)"),
        *_far(summary),
        *_meetings(summary),
        *_beside(summary),
        ("Sent once besides", _once(summary), "to start from equal weights, and to merge at the end"),
        (
            "Waited for the link",
            _wait(summary),
            "time an island could not compute because bytes were still on their way",
        ),
        ("Speed", _speed(summary), f"all {_count(summary['islands'], 'island')} together"),
        ("Time", units.show_seconds(summary["wall_s"]), f"for {_count(summary['steps'], 'step')}, evaluation included"),
    ]


def _islands_and_ranks(islands: int, ranks: int | list[int]) -> str:
    return f"{islands} x {ranks}" if isinstance(ranks, int) else "+".join(map(str, ranks))


def compare_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """A column a run; ValueError where two runs did not read the same text."""
    refuse_different_corpora(runs)
    names = [run.name for run in runs]
    unique = len(set(names)) == len(names)
    losses = [run.summary["eval_bits_per_byte"] for run in runs]
    best = min((loss for loss in losses if loss is not None), default=None)
    cells: list[tuple[str, Callable[[Summary], str]]] = [
        ("recipe", lambda s: s["recipe"]),
        ("islands x ranks", lambda s: _islands_and_ranks(s["islands"], s["ranks"])),
        ("parameters", lambda s: f"{s['parameters']:,}"),
        ("steps", lambda s: f"{s['steps']:,}"),
        ("tokens", lambda s: f"{s['tokens']:,}"),
        ("loss, nats a token", lambda s: _number(s["eval_loss"], 4)),
        ("bits per byte", lambda s: "-" if _of_unknown_bytes(s) else _number(s["eval_bits_per_byte"], 4)),
        ("above the best", lambda s: "-" if _of_unknown_bytes(s) else _above(s["eval_bits_per_byte"], best)),
        ("each island alone", _alone),
        ("bytes an island sent", lambda s: units.show_bytes(s["wire_bytes_sent"])),
        ("all-reduce would send", lambda s: units.show_bytes(s["allreduce_wire_bytes"])),
        ("fewer bytes", lambda s: _times(s["wire_reduction"]) if s["wire_reduction"] else "sent nothing"),
        ("waited for the link", lambda s: f"{_seconds(s['wait_s'])}, {_share(s['wait_s'], s['train_s'])}"),
        *((label.lower(), functools.partial(_one_beside, label)) for label in _labels_beside(runs)),
        ("tokens/s", lambda s: _number(s["tokens_per_s"], 0)),
        ("time", lambda s: units.show_seconds(s["wall_s"])),
    ]
    header = ["", *(names if unique else [str(run.path) for run in runs])]
    rows = [[label, *(show(run.summary) for run in runs)] for label, show in cells]
    if any("eval_loss_merged" in line for run in runs for line in run.lines):
        rows.insert(6, ["best merge on the way", *(_best_on_the_way(run.lines) for run in runs)])
    return header, rows


def refuse_different_corpora(runs: Sequence[RunRecord]) -> None:
    if not runs:
        raise ValueError("no run to report; name a run folder, as in runs/quickstart")
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = first.summary["corpus_hash"], run.summary["corpus_hash"]
        if ours != theirs:
            raise ValueError(
                f"{first.path} and {run.path} read different corpora ({ours} and {theirs}), so their losses do not compare; "
                f"report runs of one corpus"
            )


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return statistics.mean(measured) if measured else None


def _merged(summary: Summary) -> str:
    if summary["eval_loss"] is None:
        return "not a finite number: training diverged"
    if _of_unknown_bytes(summary):
        return f"{summary['eval_loss']:.4f} nats a token; bits per byte need the file's data.tokenizer"
    return f"{summary['eval_loss']:.4f} nats a token = {summary['eval_bits_per_byte']:.4f} bits per byte"


def _best_on_the_way(lines: Sequence[dict[str, Any]]) -> str:
    """What an exact merge would have given, where it was looked at; every island has the same model there."""
    losses = [(line["eval_loss_merged"], line["step"]) for line in lines if line.get("eval_loss_merged") is not None]
    return f"{min(losses)[0]:.4f} after step {min(losses)[1]:,}" if losses else "-"


def _of_unknown_bytes(summary: Summary) -> bool:
    """Whether nobody said what the tokens stand for."""
    return summary["eval_bits_per_byte"] is None and summary["eval_loss"] is not None


def _alone(summary: Summary) -> str:
    if _of_unknown_bytes(summary):
        return "-"
    losses = summary["eval_bits_per_byte_islands"]
    finite = [loss for loss in losses if loss is not None]
    if len(losses) <= 3 or len(finite) < len(losses):
        return ", ".join(_number(loss, 4) for loss in losses)
    return f"{min(finite):.4f} to {max(finite):.4f}"


def _bytes(summary: Summary) -> str:
    sent, allreduce, ratio = summary["wire_bytes_sent"], summary["allreduce_wire_bytes"], summary["wire_reduction"]
    if summary["islands"] == 1:
        return "nothing: there is one island"
    if not sent:
        return f"nothing instead of {units.show_bytes(allreduce)}"
    if 0.95 <= ratio < 1.05:
        return f"{units.show_bytes(sent)}, as much as all-reduce"
    words = f"{_times(ratio)} fewer" if ratio > 1 else f"{_times(1 / ratio)} more"
    return f"{units.show_bytes(sent)} instead of {units.show_bytes(allreduce)}: {words}"


def _meetings(summary: Summary) -> list[tuple[str, str, str]]:
    count = summary.get("meetings")
    return [] if count is None else [("Meetings", f"{count:,}", "of two islands, as soon as both were ready")]


def _beside(summary: Summary) -> list[tuple[str, str, str]]:
    """What only jobs have whose rounds need a quorum, or adapt."""
    rows = list[tuple[str, str, str]]()
    if "rounds_left_out_islands" in summary:
        rows.append(("Left out of rounds", _left_out(summary), "by island; what it learned came in with its next one"))
    if "every_steps" in summary:
        rows.append(("Steps between rounds", f"{summary['every_steps']:,}", "at the end: fewer as the rank falls"))
    if "rank_mean" in summary:
        rows.append(("Mean rank", f"{summary['rank_mean']:.1f}", "at the end, over all matrices that go as products"))
    return rows


def _left_out(summary: Summary) -> str:
    left, joined = summary["rounds_left_out_islands"], summary["rounds_joined_islands"]
    each = ", ".join(map(str, left)) if len(left) <= _MOST_ONE_BY_ONE else f"{min(left)} to {max(left)}"
    return f"{each} of {max(a + b for a, b in zip(left, joined, strict=True)):,}"


def _labels_beside(runs: Sequence[RunRecord]) -> list[str]:
    """Of all runs, each once."""
    return list(dict.fromkeys(label for run in runs for label, _, _ in _beside(run.summary)))


def _one_beside(label: str, summary: Summary) -> str:
    return next((value for at, value, _ in _beside(summary) if at == label), "-")


def _far(summary: Summary) -> list[tuple[str, str, str]]:
    if "wire_bytes_sent_far" not in summary:
        return []
    far, near = (units.show_bytes(summary[f"wire_bytes_sent_{link}"]) for link in ("far", "near"))
    return [("To other groups", far, f"over the far link; the other {near} stayed within its group")]


def _once(summary: Summary) -> str:
    return (
        f"{units.show_bytes(summary['wire_bytes_start'])} first, {units.show_bytes(summary['wire_bytes_merge'])} last"
    )


def _wait(summary: Summary) -> str:
    wait_s, train_s = summary["wait_s"], summary["train_s"]
    return f"{_seconds(wait_s)} of {units.show_seconds(train_s)}, {_share(wait_s, train_s)}"


def _speed(summary: Summary) -> str:
    return f"{_number(summary['tokens_per_s'], 0)} tokens/s"


def _seconds(value: float) -> str:
    """Milliseconds are fine enough; 1.2e-05 s reads badly."""
    return units.show_seconds(round(value, 3))


def _share(part_s: float, whole_s: float) -> str:
    return f"{100 * part_s / whole_s:.1f} %" if whole_s > 0 else "0.0 %"


def _times(ratio: float) -> str:
    """Two digits are all that a reader takes away: 1,200x, 33x, 1.9x."""
    if ratio < 10:
        return f"{ratio:.1f}x"
    digits = 2 - len(str(int(ratio)))
    return f"{round(ratio, digits):,.0f}x"


def _above(loss: float | None, best: float | None) -> str:
    if loss is None or best is None:
        return "-"
    return "best" if loss == best else f"+{100 * (loss / best - 1):.2f} %"


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
