"""Does the planner say of 107 billion parameters over a gigabit what bytes and rate alone say?

DiLoCoX (arXiv 2506.21263) measured 3,728 tokens/s, 2,197 where rounds are waited for, 1,168 where they are not compressed, and
10.4 of all-reduce, here taken to be of 2 bytes a number."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from dtrain.launch.checks import read_job
from dtrain.launch.plan_job import Said, setting_of
from dtrain.plan.plans import Planner
from dtrain.recipes import Recipe, of_section, resolve

JOB = Path(__file__).parents[2] / "launch" / "jobs" / "plan_107b.toml"
LAYERS, WIDTH, VOCAB, RANK, H = 133, 8192, 256, 2048, 125
STEP_S, BYTES_PER_S, TOKENS = 4.8, 1e9 / 8, 2 * 80 * 112
"""The tokens of a step, at the paper's 3,728 a second, take 4.8 s."""
WHOLE = 12 * LAYERS * WIDTH**2 + 2 * VOCAB * WIDTH
THIN = RANK * 16 * WIDTH * LAYERS + 2 * VOCAB * WIDTH
"""Numbers of a round: of a block's four matrices r (4 + 2 + 5 + 5) w; the embedding and the head go whole."""
INT4 = 4.25 / 8
"""Bytes a number: of 64 codes of 4 bits one scale of 16."""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    text = tmp_path_factory.mktemp("text") / "bytes.txt"
    text.write_text("what is trained on does not matter\n" * 2000)
    here = [f"data.source={text}"]
    said = Said(step_s=STEP_S, bits_per_s=8 * BYTES_PER_S, rtt_s=0.0, gpu="a100")
    return Planner(setting_of(JOB, here, read_job(JOB, here), said, Console())[0])


def asked() -> Recipe:
    return of_section(read_job(JOB).sync.model_dump(exclude_none=True), 2)


WAITED = resolve("dilocox", {"rank": RANK, "delay": 0, "landing": "keep"}, 2)
PLAIN = resolve("dilocox", {"reduce": "all_to_all", "codec": "bf16", "error_feedback": False}, 2)
ALL_REDUCE = resolve("allreduce", {"codec": "bf16"}, 2)


@pytest.mark.parametrize(
    ("recipe", "round_bytes", "step_s", "tokens_per_s"),
    [
        (asked(), INT4 * THIN, STEP_S, 3733),
        (WAITED, INT4 * THIN, STEP_S + INT4 * THIN / BYTES_PER_S / H, 2977),
        (PLAIN, 2 * WHOLE, 2 * WHOLE / BYTES_PER_S / H, 1307),
        (ALL_REDUCE, 2 * WHOLE, STEP_S + 2 * WHOLE / BYTES_PER_S, 10.43),
    ],
    ids=["dilocox", "waited for", "not compressed", "all-reduce"],
)
def test_a_step_is_what_bytes_and_rate_say(
    planner: Planner, recipe: Recipe, round_bytes: float, step_s: float, tokens_per_s: float
) -> None:
    """Of two islands each sends a round's numbers once. Beside them there are headers, and passes over memory: below 0.2 %."""
    row = planner.row(recipe, 2)
    assert row.sent.mean_round_bytes == pytest.approx(round_bytes, rel=1e-5)
    assert row.time.step_s == pytest.approx(step_s, rel=2e-3)
    assert row.tokens_per_s == pytest.approx(tokens_per_s, rel=2e-3)
    assert tokens_per_s == pytest.approx(TOKENS / step_s, rel=2e-3)


def test_the_readme_says_what_is_planned() -> None:
    """The rows above are held to the planner; these are they."""
    said = (JOB.parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1:] for line in said.partition("| tokens/s | planned |")[2].splitlines()[2:6]]
    assert [planned for planned, _ in rows] == ["3,733", "2,977", "1,307", "10.43"]
    assert [measured for _, measured in rows] == ["3,728 |", "2,197 |", "1,168 |", "10.4 |"]
    assert f"{3733 / 10.43:.0f} times all-reduce" in said
    flight_s = INT4 * THIN / BYTES_PER_S
    assert f"{INT4 * THIN / 1e9:.0f} GB fly for {flight_s:.0f} s behind {H * STEP_S:.0f} s of steps" in said.replace("\n", " ")


def test_the_job_is_the_papers(planner: Planner) -> None:
    recipe, setting = asked(), planner.setting
    assert (recipe.every, recipe.rank, recipe.codec, recipe.delay) == (H, RANK, "int4:64", "round")
    assert setting.parameters == WHOLE
    assert 107.0e9 < WHOLE < 107.5e9
    assert setting.num_ranks * read_job(JOB).islands.count == 160
    assert setting.tokens_per_step * 2 == TOKENS
