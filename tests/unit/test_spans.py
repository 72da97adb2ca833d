"""Do spans cost nothing unless somebody profiles, and say what ran when somebody does?"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dtrain import spans
from dtrain.bucket import whole
from dtrain.codec import by_name
from dtrain.spans import Recorder, mark, moving, record, span
from dtrain.transport.base import ROUND
from dtrain.wire import HEADER_BYTES


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    record(recorder)
    yield recorder
    record(None)


def test_nothing_is_made_where_nobody_profiles() -> None:
    assert span("encode", 4) is span("decode") is moving("decode", torch.zeros(1)), "one object does for all"
    with span("encode"):
        mark(ROUND, 0, 0, sent_bytes=1, received_bytes=0, done=False)
    assert spans._recorder is None


def test_spans_nest_on_the_wall_clock_and_know_their_thread(recorder: Recorder) -> None:
    before = time.time_ns()
    with span("outer", 8):
        with span("inner"):
            pass
        thread = threading.Thread(target=lambda: span("aside").__enter__())
        thread.start()
        thread.join()
        mark(ROUND, 3, 1, sent_bytes=5, received_bytes=2, done=True)
    inner, outer = recorder.spans
    assert (inner.name, outer.name, outer.moved_bytes) == ("inner", "outer", 8)
    assert outer.begun_ns <= inner.begun_ns <= inner.ended_ns <= outer.ended_ns
    assert {inner.thread, outer.thread} == {threading.get_native_id()}
    (noted,) = recorder.marks
    assert noted[1:] == (ROUND, 3, 1, 5, 2, True)
    assert outer.begun_ns <= noted.at_ns <= outer.ended_ns
    # A millisecond for a clock that is being corrected meanwhile.
    assert before - 1_000_000 <= outer.begun_ns <= outer.ended_ns <= time.time_ns() + 1_000_000


def test_what_a_part_moves_is_the_bytes_of_its_operands_each_as_often_as_it_is_named(recorder: Recorder) -> None:
    x, wire = torch.zeros(10, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.uint8)
    with moving("decode", x, x, wire):
        pass
    assert [(s.name, s.moved_bytes) for s in recorder.spans] == [("decode", 2 * 20 + 7)]


def test_a_span_ends_where_its_block_fails(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="this"), span("wait"):
        raise ValueError("this")
    assert [s.name for s in recorder.spans] == ["wait"]


def test_a_codec_says_how_many_bytes_it_must_move(recorder: Recorder) -> None:
    x, y = torch.randn(640), torch.zeros(640)
    bound = by_name("int8:64", error_feedback=True).bind(whole("x", x))
    wire = bound.new_wire(x.device)
    bound.encode(x, wire, bound.init(x.device))
    bound.decode_add(wire, y, weight=1.0)
    wire_bytes = HEADER_BYTES + 640 + 2 * 10  # codes and one bf16 a block
    assert bound.wire_bytes == wire_bytes
    *_, encode, decode = recorder.spans
    # Read x and the residual, write the residual and the wire; read the wire and y, write y.
    assert (encode.name, encode.moved_bytes) == ("encode", 3 * 4 * 640 + wire_bytes)
    assert (decode.name, decode.moved_bytes) == ("decode", 2 * 4 * 640 + wire_bytes)
