"""Which errors can dtrain raise, and what does a caller do about each?

``ValueError`` is for input that the user can mend: the command line prints its one line and exits 2.
The types below are for what happens to a run while it works.
"""

from __future__ import annotations

from collections.abc import Sequence


class PeerLost(RuntimeError):
    """An island did not deliver in time, or left. The run ends and can be resumed. ``islands`` is empty where this rank
    only knows that another one of its own island could not go on."""

    def __init__(self, islands: Sequence[int], reason: str) -> None:
        self.islands = tuple(islands)
        self.reason = reason
        names = ", ".join(str(i) for i in self.islands)
        super().__init__(f"lost island {names}: {reason}" if names else reason)

    def __reduce__(self) -> tuple[type[PeerLost], tuple[tuple[int, ...], str], dict[str, object]]:
        """An exception is copied by what its base was given, which is not what it takes."""
        return PeerLost, (self.islands, self.reason), self.__dict__


class Regroup(Exception):
    """A lost island came back: every island goes back to ``step`` and links up again as ``epoch``."""

    def __init__(self, epoch: int, step: int) -> None:
        self.epoch = epoch
        self.step = step
        super().__init__(f"regroup as epoch {epoch} from step {step}")


class IslandsDiffer(ValueError):
    """Islands cannot go on together (another model, another number of steps). All of them find it from the same notes, and raise
    it: who raises it lets its own notes leave first."""


class NonFinite(ValueError):
    """A payload holds inf or NaN; it is never put on a wire."""


class WireError(RuntimeError):
    """Bytes from a peer that are not what was agreed (length, scale); the receiver's state is untouched."""
