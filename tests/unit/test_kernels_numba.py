"""Does the CPU backend write the same bytes as the specification, whatever the length, the address, the thread and the values?"""

from __future__ import annotations

import math
import os
import threading
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import OPERATIONS, SUM_TILE, Coded, Format, Noise, _numba, reference
from dtrain.kernels._numba import kernels, pool
from dtrain.kernels._numba.tables import address, coded, float_bits, format_numbers
from tests import kernel_cases as cases

FUSED = [f for f in cases.FORMATS if f.kind != "topk"]


def name_of(fmt: Format) -> str:
    return f"{fmt.kind}{fmt.bits or ''}"


def check_codec(x: Tensor, fmt: Format, noise: Noise | None, offset: int = 0, what: str = "") -> None:
    for name, operands in cases.codec_operands(x, fmt, noise):
        cases.check(name, _numba, operands, offset, f"{fmt} {noise} {x.numel()} {x.dtype} {what}")


@pytest.fixture(params=["alone", "torch's threads", "threads of our own"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set through the pool: torch's own number is the whole process's."""
    monkeypatch.setattr(pool, "num_threads", lambda: 1 if request.param == "alone" else 2)
    if request.param == "threads of our own":
        monkeypatch.setattr(pool._team, "parallel", None)
    else:
        assert pool._team.parallel is not None, "torch has another OpenMP than the kernels look for"
    return request.param


def test_every_operation_is_there() -> None:
    assert [name for name in OPERATIONS if not callable(getattr(_numba, name, None))] == []


@pytest.mark.parametrize("fmt", cases.FORMATS, ids=name_of)
def test_wires_of_any_length_at_any_address(fmt: Format) -> None:
    for numel, half, offset in ((1, True, 1), (31, False, 0), (65, True, 0), (100, False, 3), (2049, False, 2), (4099, True, 0)):
        for noise in cases.NOISES:
            x = cases.values(numel)
            check_codec(x.bfloat16() if half else x, fmt, noise, offset)


@pytest.mark.parametrize("fmt", cases.FORMATS, ids=name_of)
def test_the_ends_of_fp32(fmt: Format) -> None:
    for what, x in (*cases.extremes(200), *cases.extremes(9 * 64 + 100)):  # eight whole blocks go another way than one
        for noise in cases.NOISES:
            for name in ("encode", "encode_difference"):
                operands = dict(cases.codec_operands(x, fmt, noise))[name]
                cases.check(name, _numba, operands, what=f"{fmt} {what}")


@pytest.mark.parametrize("fmt", FUSED, ids=name_of)
def test_one_pass_steps(fmt: Format) -> None:
    for numels, half, every, closes, noise in (
        ([1, 70, 0, 2049], False, 1, True, None),
        ([2, 64, 33], True, 4, False, cases.NOISES[1]),
        ([100, 3], False, 4, True, cases.NOISES[1]),
    ):
        for name, operands in cases.step_operands(numels, half, fmt, noise, cases.adam_numbers(every, closes)):
            cases.check(name, _numba, operands, what=f"{fmt} {numels} every {every}, closes {closes}")


def test_a_one_pass_step_refuses_topk() -> None:
    fmt = cases.FORMATS[-1]
    operands: Any = dict(cases.step_operands([300], False, fmt, None, cases.adam_numbers(1, True)))["gossip_adam"]
    with pytest.raises(ValueError, match="topk"):
        _numba.gossip_adam(*operands)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_plain_operations(half: bool) -> None:
    for numel in (1, 2, 31, 33, 1000, 40001):
        for name, operands in cases.plain_operands(numel, half):
            cases.check(name, _numba, operands, offset=numel % 3, what=f"{numel}")


@pytest.mark.parametrize(("first", "flag"), [(36, 5), (-4, 5), (32, 72), (32, -1)])
def test_an_identity_wire_that_is_too_short_is_refused(first: int, flag: int) -> None:
    """The kernel would write behind it."""
    wire = torch.zeros(32 + 4 * 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="72 bytes"):
        _numba.put_identity(torch.ones(10), wire, first, flag)
    assert not wire.any()


def test_many_threads_write_what_one_does(threads: str) -> None:
    x = cases.values(pool.LEAST_SHARED + 77)
    for fmt in (Format("int8", 64), Format("topk", 4096, 64, 2)):
        check_codec(x, fmt, None)
    numels = [100_001, 5, 70_000]
    for name, operands in cases.step_operands(numels, False, Format("int8", 64), None, cases.adam_numbers(4, True)):
        cases.check(name, _numba, operands)
    for name, operands in cases.plain_operands(x.numel(), False):
        cases.check(name, _numba, operands)


def test_only_the_main_thread_uses_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's team would spin beside the model's."""
    called: list[str] = []
    monkeypatch.setattr(pool, "num_threads", lambda: 2)
    run = pool._team.run
    monkeypatch.setattr(pool._team, "run", lambda *arguments: (called.append(threading.current_thread().name), run(*arguments)))
    x = torch.ones(pool.LEAST_SHARED)
    for name in ("main", "other"):
        if name == "main":
            _numba.scale([x], torch.tensor([2.0]))
        else:
            thread = threading.Thread(target=_numba.scale, args=([x], torch.tensor([2.0])))
            thread.start()
            thread.join()
    assert called == [threading.main_thread().name]
    assert bool((x == 4).all())


def test_sums_of_squares(threads: str) -> None:
    """A square of fp32 is exact in fp64. n terms that are not negative, in 32 running sums, take n / 32 + 5 roundings at most."""
    tensors = [cases.values(n).to(kind) for n in (1, 33, 3 * SUM_TILE + 5) for kind in (torch.float32, torch.bfloat16)]
    partial = torch.full((sum(-(-x.numel() // SUM_TILE) for x in tensors),), torch.nan, dtype=torch.float64)
    _numba.sum_of_squares(tensors, partial)
    again = torch.zeros_like(partial)
    _numba.sum_of_squares(tensors, again)
    assert torch.equal(partial, again)
    tiles = [tile.double().square().tolist() for x in tensors for tile in x.split(SUM_TILE)]
    exact = torch.tensor([math.fsum(tile) for tile in tiles], dtype=torch.float64)
    assert ((partial - exact).abs() <= (SUM_TILE / 32 + 5) * 2.0**-53 * exact).all()


def test_calls_from_two_threads_at_once() -> None:
    x, fmt = cases.values((1 << 18) + 5), Format("int8", 64)
    expected = cases.wire_zones(x.numel(), fmt)
    reference.encode(x, expected, fmt)
    wrong: list[int] = []

    def call() -> None:
        for i in range(20):
            out = cases.wire_zones(x.numel(), fmt)
            _numba.encode(x, out, fmt)
            if not (torch.equal(out.codes, expected.codes) and torch.equal(out.scales, expected.scales)):
                wrong.append(i)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_child_of_fork_has_threads_of_its_own() -> None:
    x, fmt = cases.values(1 << 18), Format("int8", 64)
    expected = cases.wire_zones(x.numel(), fmt)
    _numba.encode(x, expected, fmt)
    child = os.fork()
    if child == 0:  # no torch operation: its own threads do not survive a fork
        _numba.encode(x, Coded(expected.codes, expected.scales), fmt)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_random_bits_far_into_a_large_model() -> None:
    x = cases.values(300)
    for first in ((1 << 32) - 100, (1 << 40) + 12345):
        for kind in ("int8", "int4", "e3m0", "lut4", "sign"):
            check_codec(x, Format(kind, 32), Noise(7, first))


def test_offsets_beyond_32_bits() -> None:
    """A kernel is told that its tensor starts 2^33 elements before the part that exists, and that the units before are done."""
    fmt, units = Format("int8", 64), 1 << 18
    skipped, n = units * kernels.UNIT, 1000
    x = cases.values(n)
    out, expected = cases.wire_zones(n, fmt), cases.wire_zones(n, fmt)
    reference.encode(x, expected, fmt, Noise(3, skipped))
    codes, scales = coded(out, fmt, n, "a wire")
    begin = (0, *format_numbers(fmt), skipped + n)
    rest = (x.data_ptr() - 4 * skipped, 0, 0, 0, 0, 0, codes - skipped, scales - 2 * skipped // 64, 3, 0, units)
    arguments = array("q", (*begin, *rest))
    kernels.encode.call(address(arguments))
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.scales, expected.scales)

    y, expected_y = x.clone(), x.clone()
    reference.mix(expected_y, 0.5, [expected], [0.25], fmt)
    rest = (y.data_ptr() - 4 * skipped, 0, 0, 0, float_bits(0.5), 1, units)
    table = (codes - skipped, scales - 2 * skipped // 64, float_bits(0.25))
    arguments = array("q", (*begin, *rest, *table))
    kernels.mix.call(address(arguments))
    assert torch.equal(y, expected_y)


def test_operands_are_checked() -> None:
    x, fmt = cases.values(100), Format("int8", 64)
    short = Coded(torch.zeros(99, dtype=torch.uint8), torch.zeros(2).bfloat16())
    with pytest.raises(ValueError, match=r"codes has 99 elements .* not 100"):
        _numba.encode(x, short, fmt)
    with pytest.raises(ValueError, match="float64"):
        _numba.encode(x.double(), cases.wire_zones(100, fmt), fmt)
    with pytest.raises(ValueError, match="power of two from 32 to 4096"):
        _numba.encode(x, cases.wire_zones(100, Format("int8", 16)), Format("int8", 16))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["int8", "int4", "e3m0", "lut4", "sign"])
def test_every_length_and_block(kind: str) -> None:
    for numel in range(1, 4100):
        fmt = Format(kind, 64)  # type: ignore[arg-type]
        x = cases.values(numel)
        x = x.bfloat16() if numel % 2 else x
        cases.check("encode", _numba, (x, cases.wire_zones(numel, fmt), fmt, cases.NOISES[numel // 2 % 2]), numel % 5)
        wire = cases.sent_wire(cases.values(numel, 1), fmt)
        cases.check("mix", _numba, (x, 0.7, [wire], [0.3], fmt), numel % 5)
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        fmt = Format(kind, block)  # type: ignore[arg-type]
        for numel in (1, 31, block - 1, block, block + 1, 10_001):
            for half in (False, True):
                for noise in cases.NOISES:
                    x = cases.values(numel)
                    check_codec(x.bfloat16() if half else x, fmt, noise, numel % 4)
        for what, x in cases.extremes(block + 100):
            for noise in cases.NOISES:
                check_codec(x, fmt, noise, 0, what)
    check_codec(cases.values(1 << 20), Format(kind, 64), None, 1)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bits", [2, 8])
def test_every_chunk(bits: int) -> None:
    small = ((32, 4), (32, 32), (64, 8), (256, 8), (256, 256), (1024, 64))
    for chunk, k in (*small, (4096, 4), (4096, 64), (4096, 128), (4096, 1024)):
        fmt = Format("topk", chunk, k, bits)
        for numel in (1, chunk - 1, chunk, chunk + 1, 3 * chunk + 5, 10_001):
            for x in (cases.values(numel), cases.values(numel).bfloat16(), torch.ones(numel), torch.zeros(numel)):
                check_codec(x, fmt, None, numel % 4)
        for what, x in cases.extremes(chunk + 100):
            check_codec(x, fmt, None, 0, what)
    check_codec(cases.values(1 << 20), Format("topk", 4096, 64, bits), None, 1)
