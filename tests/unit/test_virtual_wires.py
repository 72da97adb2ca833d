"""Is a wire that islands share written to while somebody has it, and is its memory used again once nobody has?"""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.bucket import whole
from dtrain.codec import BoundBlocks, plain
from dtrain.virtual_wires import SharedWires
from dtrain.wire import without_checksums

CPU = torch.device("cpu")


def bound() -> BoundBlocks:
    return plain("identity").bind(whole("x", torch.zeros(40)))


def test_a_wire_that_somebody_has_gives_way_to_another() -> None:
    codec, wires = bound(), SharedWires()
    own, theirs = codec.new_wire(CPU), codec.new_wire(CPU)
    assert wires.room(own, codec) is own  # nobody else has it
    assert wires.lend(own, 2) is own
    second = wires.room(own, codec)
    assert second is not own
    assert torch.equal(second[:24], own[:24]), "a wire begins with its header"
    assert wires.room(second, codec) is second
    assert wires.lend(second, 1) is second
    assert wires.keep(own, theirs) is own  # the first peer: what it kept before is free
    assert wires.room(second, codec) is theirs
    wires.drop(own)  # the second peer, which keeps nothing
    assert wires.lend(theirs, 1) is theirs
    third = wires.room(theirs, codec)
    assert all(third is not held for held in (own, second, theirs))  # the first peer still has ``own``
    wires.drop(own)
    assert wires.lend(third, 1) is third
    assert wires.room(third, codec) is own


def test_a_wire_that_may_be_written_again_is_copied_once_for_all_peers() -> None:
    codec, wires = bound(), SharedWires()
    own = codec.new_wire(CPU)
    own[40] = 7
    copy = wires.lend(own, 2)
    own[40] = 9
    assert copy[40] == 7
    other = wires.lend(own, 1)
    assert other is not copy
    wires.drop(copy)
    assert _next(wires, own) is not copy  # one of the two has it
    wires.drop(copy)
    again = _next(wires, own)
    assert again is copy
    assert again[40] == 9


def _next(wires: SharedWires, wire: Tensor) -> Tensor:
    return wires.lend(wire, 1)


def test_codecs_in_one_process_know_each_others_wires() -> None:
    """Else each encoding of a wire that came from another island would look anew for what lies where in it."""
    with without_checksums():
        one, other = bound(), bound()
    wire = one.new_wire(CPU)
    assert other._wire.parts(wire) is one._wire.parts(wire)
    apart = bound()
    assert apart._wire.parts(wire) is not one._wire.parts(wire)
