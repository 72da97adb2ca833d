"""Is every command line understood, or refused with one line?"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dtrain
from dtrain import launch
from dtrain.config import Job, load_job
from dtrain.launch.cli import run_command
from dtrain.launch.recipe_sheet import QUESTIONS, sheet
from dtrain.recipes import DEFAULT_RECIPE, RECIPES
from dtrain.sections_each import Each
from tests.unit.small_run import finish, opened, refused, write_job_file

PACKAGE_ROOT = Path(dtrain.__file__).parents[1]
LONG = "x" * 300  # a name may have 255 bytes
QUICKSTART = Path(launch.__file__).parent / "jobs" / "quickstart.toml"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


def test_help_is_quick_and_names_the_first_commands() -> None:
    probe = (
        "import sys; from dtrain.launch.cli import run_command; status = run_command(['--help']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first = ("dtrain run launch/jobs/quickstart.toml", "dtrain report runs/quickstart", "dtrain recipes", "dtrain keys")
    for words in ("slow link", *first):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "job.toml", "sync.evry=5"], "on the command line: unknown key sync.evry; did you mean 'every'?"),
        (["run", "job.toml", "snyc.every=5"], "on the command line: unknown section [snyc]; did you mean 'sync'?"),
        (["run", "job.toml", "islands.count=0"], "on the command line: islands.count = 0 is not allowed"),
        (["run", "job.toml", "train.steps=many"], "on the command line: train.steps = 'many' is not allowed"),
        (["run", "job.toml", "resume"], "'resume' is not an override; write section.key=value"),
        (["run", "job.toml", "sync.delay=9"], "sync.delay = 9 is longer than sync.every = 5"),
        (["run", "job.toml", "sync.recipe=choco", "islands.count=1"], 'sync.topology = "ring" needs at least'),
        (["run", "job.toml", "data.source=not/there"], 'data.source = "not/there" does not exist'),
        (["run", "no.toml"], "no job file at no.toml"),
        (["run", "."], ". is a folder"),
        (["run", "job.toml", "--resume"], "runs/small holds no run to resume"),
        (["run", "job.toml", "--resume", "--fresh"], "--resume, --fresh and --fresh-name exclude each other"),
        (["run", "job.toml", "job.dir=job.toml"], "the run folder job.toml/small cannot be written: Not a directory"),
        (["run", "job.toml", "job.dir=/proc"], "the run folder /proc/small cannot be written"),
        (["run", "job.toml/below"], "job.toml/below cannot be read: Not a directory; name a job file that can"),
        (["run", LONG], f"{LONG} cannot be read: File name too long"),
        (["run", "job.toml", f"data.source={LONG}"], f'data.source = "{LONG}" cannot be read: File name too long'),
        (["run", "job.toml", f"job.name={LONG}"], f"the run folder runs/{LONG} cannot be written: File name too long"),
        (["run", "job.toml", "--fresh-name", f"job.name={LONG}"], f"the run folder runs/{LONG} cannot be written"),
        (["eval", LONG], f"{LONG}/job.toml: File name too long; name a path that can be used"),
        (["report", LONG], f"{LONG}/job.toml: File name too long"),
        (["report", "runs/none", "--out", "both.pdf"], "--out both.pdf: pictures are drawn as PNG; name a file that"),
        (["report", "runs/none", "--out", "not/there.png"], "--out not/there.png: there is no folder not; make it first"),
        (["run", "job.toml", "train.sam_rho=inf"], "on the command line: train.sam_rho = inf is not allowed; use a finite"),
        (["run", "job.toml", "train.merge=variance_corrected"], 'train.merge = "variance_corrected" stretches the mean of'),
        (
            [
                *("sim", "job.toml", "sync.recipe=local", "islands.start=own"),
                *("train.merge=variance_corrected", "train.eval_merged=true"),
            ],
            'train.eval_merged = true is of the mean, and train.merge = "variance_corrected" ends with another; leave it out',
        ),
        (["sim", "job.toml", "train.eval_merged=true", "train.eval_every=0"], "train.eval_merged = true has no effect"),
        (["sim", "job.toml", "train.merge=variance_corrected"], 'train.merge = "variance_corrected" stretches the mean of'),
        (["run", "job.toml", "islands.start=own", "--", "job.toml"], "islands.start = 'own' has no effect on a script"),
        (["run", "job.toml", "train.merge=variance_corrected", "--", "job.toml"], "train.merge = 'variance_corrected' has no"),
        (["run", "job.toml", "train.sam_rho=0.1", "--", "job.toml"], "train.sam_rho = 0.1 has no effect on a script"),
        (["run", "job.toml", 'sync.exclude=["haed.*"]'], 'sync.exclude: the pattern "haed.*" matches none of the trained'),
        (["sim", "job.toml", "sync.exclude=head.*"], "on the command line: sync.exclude = 'head.*' is not allowed; use a list"),
        (["sim", "job.toml", "sync.include=[]"], "on the command line: sync.include = [] is not allowed; use a list of 1 or mor"),
        (["run", "job.toml", "train.optimizer=muon", "--", "job.toml"], "train.optimizer = 'muon' has no effect on a script"),
        (
            ["run", "job.toml", "islands.engine=pipeline", "islands.ranks=2", "train.accumulate=2", "--", "job.toml"],
            "islands.engine = 'pipeline' has no effect on a script",
        ),
        (["run", "job.toml", "--", "no.py"], "no script at no.py"),
        (["run", "job.toml", "--"], "no script stands behind --; write dtrain run JOB.toml -- SCRIPT ARGS"),
        (["keys", "lnk"], "'lnk' is no section of a job file; use one of job, islands, model,"),
        (["sim", "job.toml", "--", "no.py"], "only dtrain run takes a script"),
        (["sim", "job.toml", "--islands", "0"], "Invalid value for '--islands'"),
        (["run", "job.toml", "--no-such-flag"], "No such option: --no-such-flag. See dtrain run --help."),
        (["profile", "no.toml"], "no job file at no.toml"),
        (["profile", "job.toml", "sync.evry=5"], "on the command line: unknown key sync.evry"),
        (["profile", "job.toml", "--steps", "0"], "Invalid value for '--steps': Input should be greater than or equal to 1. See"),
        (["profile", "job.toml", "train.steps=9"], "train.steps=9: dtrain profile ends after the steps that it looks at"),
        (["profile", "job.toml", "--", "no.py"], "only dtrain run takes a script"),
        (["sim"], "Missing argument 'JOB.toml'. See dtrain sim --help."),
        (["rnu", "job.toml"], "No such command 'rnu'. Did you mean 'run'? See dtrain --help."),
        (["recipes", "--show", "dilco"], "recipe 'dilco' is not known (did you mean diloco?); use one of"),
        (["report", "runs/none"], "runs/none is no run folder"),
        (["eval", "runs/none"], "runs/none is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert refused(capsys, *arguments).startswith(said)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert f"{DEFAULT_RECIPE} (default)" in out
    assert run_command(["recipes", "--show", "diloco"]) == 0
    assert "outer_momentum" in capsys.readouterr().out


def test_a_recipe_shown_says_its_answers_and_what_they_cost() -> None:
    """All-to-all of four: each sends 3/4 and again 3/4 of what there is, in fp32 6 bytes a parameter and round. The outer loop
    keeps four vectors of fp32, and its path the encoded parts, an island's own part and that encoded, 16 + 4 + 1 + 1; e3m0:64
    makes 0.5 + 2 / 64 bytes of 4. A wire's header is 0.2 % at most beside so many parameters."""
    shown = dict(sheet("diloco"))
    assert shown["from"] == RECIPES["diloco"].paper
    assert shown["equations"] == "dtrain/algorithms/diloco.py"
    assert shown["when?"] == 'every = 100, fragments = 1, schedule = "every"'
    assert shown["how is it applied?"] == 'outer = "nesterov", outer_lr = 0.7, outer_momentum = 0.9, outer_state = "device"'
    assert shown["how late does it land?"] == 'delay = 0, landing = "keep"', "alpha would have no effect"
    wants = {name: dict(sheet(name)).get("optimizer") for name in ("diloco", "muloco", "demo", "desloc", "accum_adam")}
    muon, accumulates = 'Muon, train.optimizer = "muon"', "AccumAdamW, train.moments_every = 4"
    assert list(wants.values()) == [None, muon, "SGD without momentum", "AdamW", accumulates]
    assert shown["bytes a parameter a step"] == "0.06, sent by each of 4 islands, of a 1024 x 1024 matrix"
    peers = {name: dict(sheet(name))["who talks to whom?"] for name in ("noloco", "desloc", "demo", "local")}
    assert list(peers.values()) == ["pairs drawn for each round", "all islands", "all islands", "-"]
    assert dict(sheet("noloco"))["what?"] == 'algorithm = "noloco", payload = "parameters", and pseudo-gradients'
    assert shown["memory"].startswith("22 bytes a parameter kept between steps")
    streaming = dict(sheet("streaming_diloco"))
    assert streaming["how late does it land?"] == 'delay = 5, landing = "blend", alpha = 0.5'
    sent = float(streaming["bytes a parameter a step"].partition(",")[0])
    assert sent == pytest.approx(6 / 100 * (0.5 + 2 / 64) / 4, rel=0.005)
    assert dict(sheet("single_merge"))["bytes a parameter a step"].startswith("0.8,"), "a fifth of its steps, to one peer"
    assert dict(sheet("accum_adam"))["optimizer"] == "AccumAdamW, train.moments_every = 4"
    assert dict(sheet("dfedsam"))["optimizer"] == "SAM, train.sam_rho = 0.01"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_shown(name: str) -> None:
    shown = dict(sheet(name))
    file = Path(dtrain.__file__).parent.parent / shown["equations"]
    equations = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert name == "local" or "<-" in equations or "+=" in equations
    assert set(shown) >= {question for question, _ in QUESTIONS}
    assert ("memory" in shown) == (name != "dadao")


def test_every_key_is_listed_with_its_default_and_its_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run_command(["keys"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    listed = {key: (default, meaning.strip()) for key, default, meaning in rows}
    sections = {name: type(getattr(Job(), name)) for name in Job.model_fields}
    of_each = [f"each.K.{key}" for key in Each.model_fields]
    of_links = {"sync": ["level.0.islands", "level.N.rate", "level.N.rtt"], "islands": of_each}
    keys = {name: [*section.model_fields, *of_links.get(name, ())] for name, section in sections.items()}
    assert list(listed) == [f"{name}.{key}" for name, of in keys.items() for key in of]
    assert listed["train.lr"] == ("0.006", "peak learning rate of AdamW")
    assert listed["sync.recipe"][0] == f'"{DEFAULT_RECIPE}"'
    assert listed["sync.every"][0] == "(recipe's)"
    assert listed["sync.outer"][1].endswith('("copy", "sgd", "nesterov", "delayed_nesterov")')
    assert run_command(["keys", "link"]) == 0
    assert {line.split(".")[0] for line in capsys.readouterr().out.splitlines()[1:]} == {"link"}


def test_a_damaged_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = opened().run
    finish(run, 20)
    (run / "model.safetensors").write_bytes(b"\0" * 20)
    assert refused(capsys, "eval", str(run)).startswith("runs/small/model.safetensors is damaged")


def test_the_quickstart_is_small_and_leaves_the_recipe_to_the_default() -> None:
    job = load_job(QUICKSTART)
    assert isinstance(job, Job)
    assert job.sync.model_dump(exclude_none=True) == {}
    assert (job.islands.count, job.link.rate, job.link.rtt) == (2, "10mbit", "20ms")
    assert job.train.steps >= 1500


@pytest.mark.parametrize(
    ("command", "backend", "gpu", "words"),
    [
        ("run", "nonsense", False, "DTRAIN_KERNELS = 'nonsense' is not a backend"),
        ("run", "triton", False, "DTRAIN_KERNELS = 'triton' needs a GPU, and this machine shows none"),
        ("sim", "triton", True, "DTRAIN_KERNELS = 'triton' needs a GPU, and dtrain sim computes on the CPU"),
        ("run", "numba", True, "DTRAIN_KERNELS = 'numba' is for CPUs, and jobs train on this machine's GPU"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_anything_is_written(
    command: str, backend: str, gpu: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("DTRAIN_KERNELS", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert run_command([command, str(QUICKSTART), f"job.dir={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
