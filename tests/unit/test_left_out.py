"""Is what has no effect on a run said in a line before it starts, and what a resume would go on from when it stops?"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain import checkpoint
from dtrain.config import parse_job
from dtrain.launch import doctor
from dtrain.launch.closing import resumable
from dtrain.launch.left_out import left_out

JOB = """
[sync]
recipe = "diloco"
every = 8
codec = "int4:64"
"""
LEVELS = """
[[sync.level]]
recipe = "dpsgd"
rate = "1gbit"
[[sync.level]]
recipe = "dilocox"
"""


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (JOB, ["sync.recipe=fedavg"], ("sync.every, sync.codec",)),
        (JOB, ["sync.recipe=fedavg", "sync.every=4"], ("sync.codec",)),
        (JOB, ["sync.recipe=fedavg", "sync.every=4", "sync.codec=bf16"], ()),
        (JOB, ["sync.every=4"], ()),
        (LEVELS, ["sync.recipe=fedavg"], ("[[sync.level]]; the levels' links go with it, and [link] says what this run's is",)),
        (LEVELS, ["sync.level.1.recipe=diloco"], ()),
        ("", ["sync.recipe=fedavg"], ()),
    ],
)
def test_a_recipe_that_is_typed_leaves_the_files_answers_out_and_says_so(
    text: str, overrides: list[str], said: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text, encoding="utf-8")
    begins = "sync.recipe on the command line takes the place of what the job file says of [sync]: "
    assert left_out(path, overrides, "run") == tuple(begins + keys for keys in said)


def test_what_a_script_says_itself_has_no_effect_on_it(tmp_path: Path) -> None:
    overrides = ["train.steps=10", "link.rate=1mbit", "model.width=8"]
    assert left_out(tmp_path / "none", overrides, "run") == ()
    assert left_out(tmp_path / "none", overrides, "script") == (
        "no effect on a script, which says it itself: train.steps, model.width",
    )


def test_who_stops_a_run_learns_what_a_resume_goes_on_from(tmp_path: Path) -> None:
    again = f"resume with: dtrain run {tmp_path}/job.toml --resume"
    assert resumable("stopped at step 7", "run", tmp_path) == (
        f"stopped at step 7, and nothing is kept, as no checkpoint was due; {again}"
    )
    checkpoint.step_folder(tmp_path, 4).mkdir(parents=True)
    checkpoint.mark_commit(tmp_path, 4, 2)
    assert resumable("stopped at step 7", "run", tmp_path) == f"stopped at step 7, kept up to step 4; {again}"
    assert resumable("stopped at step 7", "run", tmp_path, ("a.py",)) == f"stopped at step 7; {again} -- a.py"


def test_a_remedy_takes_the_place_of_what_was_typed() -> None:
    typed = doctor.Asked(parse_job({}), ("job.toml", "link.interface=eth7", "train.steps=9"))
    assert typed.again("link.interface=eth0") == "dtrain run job.toml train.steps=9 link.interface=eth0"
