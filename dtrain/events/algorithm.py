"""What is a method of events? What a state does by itself, at a gradient, and where two nodes meet.

A node's state is a few vectors, the first of which is x, its answer. Between events each node follows a linear differential
equation of its own; events touch one node (a gradient) or two (a meeting). So a node need not be looked at until its next
event: that is brought to the event's time by ``flow``, whose steps compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class EventAlgorithm(NamedTuple):
    """States are (k, vectors, d), of k nodes at once; all but ``init`` change them in place."""

    init: Callable[[Array], Array]
    """x (n, d) -> states (n, vectors, d)."""
    flow: Callable[[Array, Array], None]
    """(states, elapsed (k,)): time goes by without an event."""
    step: Callable[[Array, Array], None]
    """(states, gradients at x (k, d))."""
    meet: Callable[[Array, Array], None]
    """(states of one side, of the other)."""
