"""Does ``dtrain plan --write`` write the recipe that it recommends into the job file, and nothing else?"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.launch.cli_plan import check_text
from dtrain.plan.candidates import candidates
from dtrain.plan.write import answers, replaced, write
from dtrain.recipes import Recipe, of_section, resolve
from tests.unit.small_run import write_job_file


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    return Path("job.toml")


TEXT = """# a job
[islands]
count = 2   # two

[sync]
# how they talk
recipe = "choco"   # for now
gamma = 0.5

[link]
rate = "10mbit"
"""


def test_answers_take_the_place_of_the_old_ones_and_comments_stay() -> None:
    new = replaced(TEXT, {"recipe": "dpsgd", "codec": "int8:64", "error_feedback": True, "every": 1}, "job.toml")
    answered = 'recipe = "dpsgd"\ncodec = "int8:64"\nerror_feedback = true\nevery = 1\n'
    kept = "# how they talk\n"
    assert new == TEXT.replace('# how they talk\nrecipe = "choco"   # for now\ngamma = 0.5\n', answered + kept)
    assert replaced("[job]\nname = 'x'\n", {"recipe": "local"}, "j") == "[job]\nname = 'x'\n\n[sync]\nrecipe = \"local\"\n"


@pytest.mark.parametrize(
    "text",
    ['sync = { recipe = "x" }\n', 'sync.recipe = "x"\n', '[sync]\ngraph = """\nover\nlines"""\n', '["sync"]\nevery = 3\n'],
)
def test_a_section_that_is_written_otherwise_is_left_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r'is not written as one section with a key a line.* by hand: recipe = "local"'):
        write(file, {"recipe": "local"}, len)
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("job.toml", text)]


def test_a_file_behind_a_link_is_the_one_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text(TEXT, encoding="utf-8")
    os.chmod(tmp_path / "real.toml", 0o640)
    (tmp_path / "job.toml").symlink_to("real.toml")
    write(tmp_path / "job.toml", {"recipe": "local"}, len)
    assert (tmp_path / "job.toml").is_symlink()
    assert tomllib.loads((tmp_path / "real.toml").read_text(encoding="utf-8"))["sync"] == {"recipe": "local"}
    assert (tmp_path / "real.toml").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_written_says_the_recipe_whole() -> None:
    """Every candidate, through the text of a job file and back."""
    for recipe in candidates(resolve(None, {}, 8), 8, per_host=2):
        assert again(answers(recipe, 8), 8) == recipe


def again(written: Mapping[str, object], num_islands: int) -> Recipe:
    return of_section(tomllib.loads(replaced(TEXT, written, "job.toml"))["sync"], num_islands)


MINE = """
from dtrain.recipes import Recipe
row = Recipe("mine", "s", "p", "dpsgd", "parameters", 1, "neighbours", "ring", combine="gossip", delay=1)
"""


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("diloco", {"every": 100, "fragments": 4, "outer_lr": 0.4, "delay": 25}),
        ("semi_s2s", {"server": "sampled:4:2"}),
        ("mine.py:row", {"codec": "int8:64"}),
        ("choco", {"gamma": 0.5, "bucket_bytes": 8192}),
        ("chebyshev", {"gossip_steps": 2}),
        ("diloco", {"landing": "eager", "delay": "round", "reduce": "gather", "outer": "sgd", "codec": "int4:64"}),
    ],
)
def test_a_jobs_own_answers_are_written_too(
    name: str, axes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE, encoding="utf-8")
    recipe = resolve(name, axes, 8)
    assert answers(recipe, 8, name).items() <= ({"recipe": name} | axes).items()
    assert again(answers(recipe, 8, name), 8) == recipe
    assert again(answers(recipe, 8), 8) == recipe


def test_what_a_job_file_cannot_say_is_not_written() -> None:
    """No key takes a row's server away."""
    with pytest.raises(ValueError, match='no words for "semi_s2s"'):
        answers(replace(resolve("semi_s2s", {"graph": "ring"}, 4), server=None), 4)


def test_a_text_that_would_not_run_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="no recipe"):
        write(tmp_path / "job.toml", {"recipe": "nothing"}, refuse)
    assert (tmp_path / "job.toml").read_text(encoding="utf-8") == TEXT


def refuse(text: str) -> None:
    raise ValueError("no recipe" if 'recipe = "nothing"' in text else "another text")


def test_what_is_written_is_read_again_as_a_job(job: Path) -> None:
    """For the islands of the file, whatever else was planned for: a ring of three has no hypercube."""
    text = '[islands]\ncount = 3\n[sync]\nrecipe = "choco"\n'
    check_text(text, job, resolve("choco", {}, 3))
    with pytest.raises(ValueError, match="2, 4, 8"):
        check_text(text + 'topology = "hypercube"\n', job, resolve("choco", {"topology": "hypercube"}, 4))
    with pytest.raises(ValueError, match="another recipe"):
        check_text(text + "gamma = 0.25\n", job, resolve("choco", {}, 3))
