"""How fast are the kernels on this device? The rows of ``dtrain bench kernels``, taken without its command line.

Only inequality fails the check; a speed is written down, and judged by who reads it. Where torch's own GPU kernels, which the
specification runs on, differ from its CPU's, that row has no speed, and the results say why."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import chain

import torch

from dtrain.kernels.bench import FULL, Options, Row, find_backends, run
from dtrain.kernels.bench_timing import available_bytes
from tests.gpu.checks import Found

DEADLINE_S = 120.0
"""For all rows; what is not reached is counted."""
COMPILED = ("accum_adam", "gossip_adam", "quantize_int4", "dequantize_add_int4", "encode_feedback", "mix")
"""Beside torch.compile, which takes about 10 s a case to compile."""


def kernels_timed(device: torch.device) -> Found:
    plans = (
        Options(device, numels=(FULL,), dtypes=("bf16",), compile=False, least_s=0.05),
        Options(device, COMPILED, numels=(1 << 24,), dtypes=("bf16",), least_s=0.05),
        Options(device, numels=(1 << 20, FULL), dtypes=("fp32",), compile=False, least_s=0.05),
    )
    return timed(plans, device, DEADLINE_S)


def timed(plans: tuple[Options, ...], device: torch.device, deadline_s: float) -> Found:
    until, rows, notes = time.monotonic() + deadline_s, list[Row](), list[str]()
    backends = find_backends((), device, notes.append)
    planned = sum(len(options.cases()) * len(options.numels) * len(backends) for options in plans)
    for row in chain.from_iterable(run(options, backends, notes.append) for options in plans):
        rows.append(row)
        if time.monotonic() > until:
            break
    unequal = [f"{row.backend}: {row.message}" for row in rows if not row.equal and row.backend != "reference"]
    assert not unequal, "; ".join(dict.fromkeys(unequal))
    assert rows, "no row was measured"
    ours = [row for row in rows if row.backend != "reference" and row.copy_fraction is not None]
    shares = sorted(row.copy_fraction or 0.0 for row in ours)
    detail = f"{len(rows)} of {planned} rows in {deadline_s:g} s"
    if shares:
        detail += f"; share of the bandwidth: median {shares[len(shares) // 2]:.0%}, least {shares[0]:.0%}"
    return Found(detail, {"rows": [asdict(row) for row in rows], "notes": notes, "free_bytes": available_bytes(device)})
