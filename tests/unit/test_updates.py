"""When do rounds land and start around an update that DeepSpeed makes, and what of one that it skips?"""

from __future__ import annotations

from typing import cast

import pytest

from dtrain.engine import Sync
from dtrain.errors import NonFinite
from dtrain.inside_zero import ZeroUpdates
from dtrain.island.zero import Zero


class _Said:
    """A Sync and a Zero that write down who was called."""

    step = 3

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_update(self) -> None:
        self.calls.append("land")

    def after_update(self) -> None:
        self.calls.append("start")


class _Engine:
    def __init__(self, said: _Said, *, changes: bool) -> None:
        self._said, self._changes = said, changes

    def step(self) -> bool:
        self._said.calls.append("step")
        return self._changes


def _step(said: _Said, *, changes: bool) -> None:
    ZeroUpdates(cast(Zero, _Engine(said, changes=changes))).step(cast(Sync, said))


def test_rounds_land_before_deepspeeds_step_and_start_after_it() -> None:
    said = _Said()
    _step(said, changes=True)
    assert said.calls == ["land", "step", "start"]


def test_a_step_that_deepspeed_skips_ends_the_run_as_a_gradient_that_is_not_finite() -> None:
    said = _Said()
    with pytest.raises(NonFinite, match=r"^step 4: DeepSpeed found a gradient that is not finite; lower train\.lr$"):
        _step(said, changes=False)
    assert said.calls == ["land", "step"]
