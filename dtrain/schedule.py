"""When does a fragment start a round? Pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Control(NamedTuple):
    """What a run may change while it works; all islands hold the same."""

    every: int
    """H: optimizer steps between two rounds of a fragment."""


When = Callable[[int, int, Control], bool]
"""(optimizer steps done, fragment, control) -> does this fragment start a round now?"""


def every(step: int, fragment: int, control: Control) -> bool:
    """All fragments together, after every H-th step."""
    return step % control.every == 0


def staggered(num_fragments: int) -> When:
    """Fragment p starts p * H / P steps after fragment 0: the peak of the link falls by P (Streaming DiLoCo, arXiv
    2501.18512)."""

    def when(step: int, fragment: int, control: Control) -> bool:
        return step % control.every == fragment * control.every // num_fragments

    return when
