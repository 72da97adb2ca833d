"""Do simulated islands equal live ones bit for bit, and do two ranks an island send what one sends?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.launch.cli import run_command
from tests.dist.job import QUICKSTART, ROOT, SMALL, assert_same_weights, run

SHORT = (*SMALL, "train.steps=30", "train.checkpoint_every=0", "train.batch=4")
JOB = (*SHORT, "sync.every=8", "sync.delay=3")
FUSED = (*SHORT, "train.moments_every=4", "sync.recipe=dpsgd", "sync.codec=int8:64")
"""What launch/jobs/gossip.toml runs: landing, optimizer and encoding in one pass."""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("job", "count"),
    [
        pytest.param(JOB, 3, id="default"),
        pytest.param(JOB, 4, id="default of four", marks=pytest.mark.slow),
        pytest.param(FUSED, 4, id="fused", marks=pytest.mark.slow),
    ],
)
def test_simulated_islands_equal_live_ones(tmp_path: Path, job: tuple[str, ...], count: int) -> None:
    live = run(tmp_path, "live", *job, f"islands.count={count}", timeout_s=150)
    # In this process, which has imported torch already.
    words = ["sim", str(QUICKSTART), "--islands", str(count), f"job.dir={tmp_path}", "job.name=sim", *job]
    assert run_command(words) == 0
    assert_same_weights(live, tmp_path / "sim")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (live, tmp_path / "sim")]
    for key in ("wire_bytes_sent", "wire_bytes_start", "wire_bytes_merge", "eval_loss", "eval_bits_per_byte_islands"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_ranks_an_island_send_the_bytes_of_one(tmp_path: Path) -> None:
    # 16 KiB buckets cut the small model into ten, so that both ranks carry some.
    job = (*JOB, "sync.bucket_bytes=16384")
    one, two = (run(tmp_path, f"ranks{n}", *job, f"islands.ranks={n}") for n in (1, 2))
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, two)]
    assert summaries[0]["wire_bytes_sent"] > 0
    for key in ("wire_bytes_sent", "tokens", "parameters"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_levels_over_real_links_equal_simulated_ones_and_are_counted_apart(tmp_path: Path) -> None:
    job_file = ROOT / "launch" / "jobs" / "two_levels.toml"
    fast = (f"sync.level.{k}.{key}" for k in (0, 1) for key in ("rate=none", "rtt=0ms"))
    job = (*SHORT, *fast, "sync.level.1.every=8", "sync.level.1.rank=4")
    live = run(tmp_path, "live", *job, timeout_s=150, job=job_file)
    assert run_command(["sim", str(job_file), f"job.dir={tmp_path}", "job.name=sim", *job]) == 0
    assert_same_weights(live, tmp_path / "sim")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (live, tmp_path / "sim")]
    for key in ("recipe", "wire_bytes_sent", "wire_bytes_sent_near", "wire_bytes_sent_far", "eval_loss"):
        assert summaries[0][key] == summaries[1][key], key
    assert summaries[0]["recipe"] == "accum_adam + dilocox"
    assert 0 < summaries[0]["wire_bytes_sent_far"] < 0.1 * summaries[0]["wire_bytes_sent_near"]
