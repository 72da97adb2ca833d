"""Is a wire that differs from what was agreed refused, by name, before a byte of it is used?"""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Layout, Span
from dtrain.codec import BoundBlocks, plain
from dtrain.errors import WireError
from dtrain.kernels import operations
from dtrain.wire import HEADER_BYTES, VERSION, without_checksums

CPU = torch.device("cpu")
NAMES = ("identity", "bf16", "int8:64", "int4:64", "e3m0:32", "lut4:128", "sign:64", "topk:64/4096:2", "topk:8/64:8")
GOLDEN = Path(__file__).parents[1] / "golden" / "wires"


def layout_of(*numels: int) -> Layout:
    starts = [sum(numels[:k]) for k in range(len(numels))]
    return Layout(tuple(Span(f"p{k}", (n,), s, s, s + n) for k, (s, n) in enumerate(zip(starts, numels, strict=True))))


LAYOUT = layout_of(128, 70, 5_000, 1)


def sample(numel: int) -> Tensor:
    """Values that need no random generator: of many sizes, both signs, some zero, exact in fp32."""
    i = torch.arange(numel, dtype=torch.int64)
    return ((i * 7919 % 2003) - 1001).float() * torch.exp2((i * 31 % 13 - 8).float()) * (i % 17 > 0)


def wire_of(name: str, layout: Layout = LAYOUT, node: int = 0) -> tuple[BoundBlocks, Tensor]:
    bound = plain(name).bind(layout, node)
    wire = bound.new_wire(CPU)
    bound.encode(sample(layout.numel), wire, bound.init(CPU))
    return bound, wire


def reseal(bound: BoundBlocks, wire: Tensor) -> Tensor:
    """A checksum that fits, for a body that was changed by somebody who knows how."""
    bound._wire.seal(wire)
    wire[5] = 0
    body = torch.cat((wire[:24], wire[HEADER_BYTES:]))
    operations(CPU).checksum(body, 0, 0, wire[24:32].view(torch.int64))
    return wire


@pytest.mark.parametrize("name", NAMES)
def test_golden_wires(name: str) -> None:
    """Written once by the reference; a change of format is a new version. Each backend writes these bytes."""
    bound, wire = wire_of(name, layout_of(128, 70, 1))
    file = GOLDEN / f"{name.replace(':', '-').replace('/', 'of')}.bin"
    want = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    assert torch.equal(wire, want)
    bound.check(want)


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_corruptions_are_all_refused(name: str) -> None:
    """A flipped bit, changed bytes, a swap, bytes lost or gained; 10,000 over all codecs, seeded."""
    bound, wire = wire_of(name)
    bound.check(wire)
    g = torch.Generator().manual_seed(len(name))

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    for trial in range(1_112):
        bad = wire.clone()
        match trial % 4:
            case 0:
                bad[draw(bad.numel())] ^= 1 << draw(8)
            case 1:
                at = draw(bad.numel() - 1)
                part = bad[at : at + 1 + draw(64)]
                part ^= torch.randint(1, 256, part.shape, generator=g, dtype=torch.uint8)
            case 2:
                first, second = draw(bad.numel()), draw(bad.numel())
                if wire[first] == wire[second]:
                    bad[first] ^= 255
                bad[[first, second]] = bad[[second, first]]
            case _:
                bad = bad[: draw(bad.numel())] if draw(2) else torch.cat((bad, bad[: 1 + draw(8)]))
        with pytest.raises(WireError):
            bound.check(bad)


def test_each_field_is_refused_by_name() -> None:
    bound, wire = wire_of("int8:64")
    others = {
        "codec 3": plain("int4:64").bind(LAYOUT),
        "block 32": plain("int8:32").bind(LAYOUT),
        "cut": plain("int8:64").bind(layout_of(70, 5_000, 1, 128)),
    }
    for words, other in others.items():
        with pytest.raises(WireError, match=words):
            bound.check(torch.cat((other.new_wire(CPU)[:24], wire[24:])))
    longer = wire.clone()
    longer[16] += 1
    with pytest.raises(WireError, match=f"number of elements {LAYOUT.numel + 1}, {LAYOUT.numel} was agreed"):
        bound.check(longer)
    bound, wire = wire_of("topk:64/4096:2")
    for at, words in ((0, "magic"), (3, f"version {VERSION + 1}"), (5, "non-finite"), (8, "k "), (10, "bits"), (11, "reserved")):
        bad = wire.clone()
        bad[at] += 1
        with pytest.raises(WireError, match=words):
            bound.check(bad)
    with pytest.raises(WireError, match=re.escape(f"a wire of {len(wire) - 1} bytes, {len(wire)} were agreed")):
        bound.check(wire[:-1])
    bad = wire.clone()
    bad[-1] ^= 1
    with pytest.raises(WireError, match="checksum"):
        bound.check(bad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_scale_or_value_that_is_not_finite_is_refused_though_the_checksum_fits(name: str, bad: float) -> None:
    bound, wire = wire_of(name)
    dtype = torch.float32 if name == "identity" else torch.bfloat16
    wire[HEADER_BYTES + 4 : HEADER_BYTES + 8].view(dtype)[-1] = bad
    with pytest.raises(WireError, match="inf or NaN"):
        bound.check(reseal(bound, wire))


def test_the_checksum_is_what_the_page_says() -> None:
    """WIRE.md, in plain integers."""

    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        return h ^ h >> 16

    _, wire = wire_of("int4:64", layout_of(65))
    data = bytes(wire[:24].tolist()) + bytes(wire[HEADER_BYTES:].tolist())
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[k : k + 4], "little") for k in range(0, len(data), 4)]
    total = sum(mix(word ^ mix(i)) for i, word in enumerate(words))
    assert int(wire[24:32].view(torch.int64)) == total


def test_only_what_this_thread_makes_in_the_block_is_without_a_checksum() -> None:
    def sealed(bound: BoundBlocks) -> bool:
        wire = bound.new_wire(CPU)
        bound.encode(sample(LAYOUT.numel), wire, bound.init(CPU))
        return bool(wire[24:HEADER_BYTES].any())

    def bind() -> BoundBlocks:
        return plain("int8:64").bind(LAYOUT)

    before, elsewhere = bind(), list[bool]()
    with without_checksums():
        with without_checksums():
            inner = bind()
        outer = bind()
        thread = threading.Thread(target=lambda: elsewhere.append(sealed(bind())))
        thread.start()
        thread.join()
        assert sealed(before)
    assert (sealed(inner), sealed(outer), sealed(bind()), elsewhere) == (False, False, True, [True])


def test_random_rounding_differs_by_island_and_round_and_not_by_cut() -> None:
    x = sample(256)
    whole = plain("int4:64:stochastic").bind(layout_of(128, 128), 1)
    wires: list[Tensor] = []
    for node in (1, 2):
        bound = plain("int4:64:stochastic").bind(layout_of(128, 128), node)
        state = bound.init(CPU)
        for _ in range(2):
            wires.append(bound.new_wire(CPU))
            bound.encode(x, wires[-1], state)
    assert len({bytes(w[HEADER_BYTES:].tolist()) for w in wires}) == 4
    second = plain("int4:64:stochastic").bind(layout_of(128, 128).part(128, 256), 1)
    part = second.new_wire(CPU)
    second.encode(x[128:], part, second.init(CPU))
    assert torch.equal(second._wire.parts(part)[0].codes, whole._wire.parts(wires[0])[0].codes[64:])
