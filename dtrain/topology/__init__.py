"""Who talks to whom in a round, and with what weight? Pure functions of the round's number, the node and the number of nodes."""

from dtrain.topology.names import (
    CHANGING,
    DIRECTED,
    NAMES,
    OF_GRAPHS,
    PAIRS,
    STATIC,
    Mixing,
    check,
    fingerprint,
    is_file,
    mixing,
    parameter,
    served,
)
from dtrain.topology.row import Round, Topology
from dtrain.topology.server import of_every_round
from dtrain.topology.server import parse as parse_server

__all__ = [
    "CHANGING",
    "DIRECTED",
    "NAMES",
    "OF_GRAPHS",
    "PAIRS",
    "STATIC",
    "Mixing",
    "Round",
    "Topology",
    "check",
    "fingerprint",
    "is_file",
    "mixing",
    "of_every_round",
    "parameter",
    "parse_server",
    "served",
]
