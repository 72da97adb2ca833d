"""How is one rank profiled while it trains? First by its own spans alone, which cost nothing, then under torch.profiler too.

The shares of a step come from the first window: torch.profiler notes every operation, and that makes small ones slower. What it
notes of shapes takes 3 KB an operation, and as long again: one step of it tells the bytes of all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from dtrain import spans
from dtrain.membership import Place
from dtrain.metrics import write_json
from dtrain.profile_steps import Window

Observe = Callable[[int], None]
"""Called before each step, counted from 0, and once more after the last."""


def unobserved(step: int) -> None:
    """What a rank that nobody profiles calls."""


class Profiled:
    """Notes one rank's windows and leaves them in the island's log folder; on a failure no profiler goes on."""

    def __init__(self, window: Window, place: Place, device: torch.device) -> None:
        assert place.run is not None
        self._window, self._place, self._device = window, place, device
        self._folder = place.run / "logs" / f"island{place.island}"
        self._recorder = spans.Recorder()
        self._plain: list[int] = []
        self._traced: list[int] = []
        self._held = ExitStack()

    def __enter__(self) -> Profiled:
        # Loading the profiler takes a second where there is a GPU: not in a step that is measured.
        with self._torch_profiler(shapes=False):
            pass
        return self

    def __exit__(self, *failure: object) -> None:
        self._held.close()

    def before_step(self, step: int) -> None:
        at = self._window
        if self._device.type == "cuda" and step in (at.plain, at.traced, at.shapes, at.end):
            torch.cuda.synchronize(self._device)  # kernels of the step before belong to it
        if step == at.plain:
            spans.record(self._recorder)
            self._held.callback(spans.record, None)
        if at.plain <= step <= at.traced:
            self._plain.append(self._recorder.now_ns())
        if step == at.traced:
            self._times = self._torch_profiler(shapes=False)
            self._held.enter_context(self._times)
            self._recorder.annotates = True
        if at.traced <= step <= at.shapes:
            self._traced.append(self._recorder.now_ns())
        if step == at.shapes:
            self._held.close()
            # At once: exporting a session after another has been opened has crashed inside torch.
            self._times.export_chrome_trace(str(self._trace("times")))
            self._shapes = self._held.enter_context(self._torch_profiler(shapes=True))
        if step == at.end:
            self._held.close()
            self._write()

    def _torch_profiler(self, *, shapes: bool) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # All threads: the link's own decodes while the step's thread computes.
        every_thread = _ExperimentalConfig(profile_all_threads=True)
        return profile(activities=activities, record_shapes=shapes, experimental_config=every_thread)

    def _trace(self, what: str) -> Path:
        return self._folder / f"{what}-rank{self._place.rank}.json"

    def _write(self) -> None:
        rank = self._place.rank
        traces = [self._trace(what) for what in ("times", "shapes")]
        self._shapes.export_chrome_trace(str(traces[1]))
        content = {
            "island": self._place.island,
            "rank": rank,
            "main_thread": threading.get_native_id(),
            "plain": self._plain,
            "traced": self._traced,
            "spans": [list(span) for span in self._recorder.spans],
            "marks": [list(mark) for mark in self._recorder.marks],
            "traces": [trace.name for trace in traces],
        }
        write_json(self._folder / f"profile-rank{rank}.json", content)


def written(run: Path, num_ranks: Sequence[int]) -> list[Path]:
    """What the ranks of a profiled run left, in their order. ``num_ranks``: of each island."""
    return [
        run / "logs" / f"island{island}" / f"profile-rank{rank}.json"
        for island, count in enumerate(num_ranks) for rank in range(count)
    ]  # fmt: skip
