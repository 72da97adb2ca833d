"""Does ``dtrain run`` end where pairs meet when both are ready? Three real processes, their desk at the meeting point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist import job

STEPS = 60
READY = ("sync.recipe=a2cid2", "sync.schedule=ready", "islands.count=3", f"train.steps={STEPS}")


@pytest.mark.slow
def test_a_run_ends_and_its_report_counts_meetings(tmp_path: Path) -> None:
    """All islands save their checkpoints after the same steps, and some have a partner just then."""
    run = job.run(tmp_path, "ready", *job.SMALL, *READY, "train.checkpoint_every=10")
    summary = json.loads((run / "summary.json").read_text())
    meetings = summary["meetings"]
    assert isinstance(meetings, int)
    assert 10 <= meetings <= 3 * STEPS // 2, "an island meets at most once a step"
    # Each of two sends its fp32 parameters, of 3 islands in the mean; checksums and headers add little.
    each = 2 * meetings / 3 * 4 * summary["parameters"]
    assert each <= summary["wire_bytes_sent"] <= 1.01 * each
    parts = [json.loads((run / "logs" / f"island{k}" / "part.json").read_text()) for k in range(3)]
    assert sum(part["meetings"] for part in parts) == 2 * meetings
    assert (run / "checkpoints").is_dir()
