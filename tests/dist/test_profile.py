"""Does ``dtrain profile`` find where the time of a real job goes? On a link whose rounds are waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.job import QUICKSTART, ROOT, SMALL, logs

RTT_MS = 60
WAITED = ("sync.every=6", "sync.delay=0", f"link.rtt={RTT_MS}ms", "train.batch=4")


@pytest.mark.slow
def test_a_round_that_is_waited_for_is_found_exposed(tmp_path: Path) -> None:
    words = ["profile", str(QUICKSTART), f"job.dir={tmp_path}", "job.name=small", *SMALL, *WAITED, "--steps", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", *words],
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "130"},
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs(tmp_path / 'small-profile')}"
    assert [path.name for path in tmp_path.iterdir()] == ["small-profile"], "a run of the job's own name is left alone"

    said = done.stdout
    shares = [[float(n) for n in re.findall(r"[\d.]+", line)][1:] for line in said.splitlines() if re.match(r"island \d  ", line)]
    assert len(shares) == 2
    for *of_rank, step_ms in shares:
        assert abs(sum(of_rank) - 100) < 0.05 * len(of_rank), "each is rounded to a tenth"
        # The wires of a round go there and, combined, back: each way half a round trip, every 6 steps.
        assert of_rank[6] / 100 * step_ms > 0.9 * RTT_MS / 6, said
    (link,) = re.findall(r"rounds of 2 ranks .*: ([\d.]+) ms in flight, ([\d.]+) ms hidden.*, ([\d.]+) ms waited for", said)
    in_flight, hidden, waited = (float(n) for n in link)
    assert abs(in_flight - hidden - waited) < 0.2
    assert waited > 0.8 * in_flight, "nothing to hide behind"
    for name in ("aten::mm", "forward_backward", "encode", "optimizer"):
        assert re.search(rf"^{name} +step +\d+ +[\d.]+ +[\d.]+ %", said, flags=re.MULTILINE), name
    assert "encode, decode, landing and optimizer together:" in said

    events = json.loads((tmp_path / "small-profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert set(names) == {"island 0 rank 0", "island 1 rank 0"}
    rounds = [{e["name"]: e for e in events if e["pid"] == pid and e["name"].startswith("round ")} for pid in names.values()]
    both = rounds[0].keys() & rounds[1].keys()
    assert len(both) >= 4
    for name in both:
        one, other = (of[name] for of in rounds)
        shared = min(one["ts"] + one["dur"], other["ts"] + other["dur"]) - max(one["ts"], other["ts"])
        assert shared > 0, f"{name} flies on both islands at once, on one clock"
    traced = [e for e in events if e["name"] == "dtrain.encode"]
    assert {e["pid"] for e in traced} == {0, 1}, "torch.profiler was told of the spans"
