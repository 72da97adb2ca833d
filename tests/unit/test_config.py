"""Does a job file say what its keys are documented to say, and is what it cannot say refused with one line?"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config import Job, dump_job, load_job, parse_job
from dtrain.section import Section

FULL = """
[job]
name = "all-keys"
seed = 7
dir = "elsewhere"
[islands]
start = "same"
count = 3
ranks = 2
engine = "fsdp"
shards = 1
recompute = true
shard = "by_file"
speeds = [1, 0.5, 0.25]
threads = 1
max_restarts = 0
[[islands.each]]
ranks = 1
engine = "ddp"
launcher = "ssh"
host = "user@far"
workdir = "/srv/far"
python = "/usr/bin/python3"
interface = "eth0"
[[islands.each]]
launcher = "slurm"
[[islands.each]]
[model]
name = "gpt"
factory = ""
hf = ""
arguments = {}
layers = 2
width = 32
heads = 2
context = 64
[data]
source = 'a \\ path with "quotes"'
tokenizer = "bytes"
streaming = false
[train]
steps = 10
batch = 8
accumulate = 2
optimizer = "adamw"
moments_every = 4
sam_rho = 0.05
merge = "mean"
precision = "bf16"
lr = 1
warmup = 2
weight_decay = 0
clip = 0
eval_every = 5
eval_merged = true
checkpoint_every = 0
keep = 1
consensus_every = 5
[sync]
recipe = "diloco"
every = 5
delay = "round"
codec = "int8:32"
error_feedback = true
[link]
transport = "c10d"
rate = "1.5gbit"
rtt = "40ms"
timeout_s = 12
port = 0
interface = "lo"
advertise = "localhost"
[log]
tensorboard = true
wandb = "dtrain"
[sim]
problem = "quadratic"
numel = 50
clock = "steps"
rates = "uniform"
step_s = 1
step_noise = 0.1
stragglers = 1
processes = 1
straggler_factor = 3
jitter = "1ms"
loss = 0.01
links = "0-1:10mbit/80ms, 2-0:none/5ms"
"""


def sections() -> dict[str, type[Section]]:
    return {name: type(getattr(Job(), name)) for name in Job.model_fields}


def test_every_key_is_documented_where_it_is_defined() -> None:
    silent = [f"{s}.{k}" for s, model in sections().items() for k, field in model.model_fields.items() if not field.description]
    assert silent == []


def test_the_full_file_above_leaves_no_key_out_but_recipe_axes() -> None:
    job = parse_job(_toml(FULL))
    for name, model in sections().items():
        if name != "sync":
            others = {"sim": {"meetings"}, "islands": {"deepspeed", "stages_per_rank"}}.get(name, set())  # of others
            assert getattr(job, name).model_fields_set == set(model.model_fields) - others, name


def test_a_job_comes_back_from_its_own_toml() -> None:
    job = parse_job(_toml(FULL))
    assert parse_job(_toml(dump_job(job))) == job
    assert parse_job(_toml(dump_job(parse_job({})))) == parse_job({})


def test_a_recipe_on_the_command_line_drops_the_files_axes_and_keeps_its_own() -> None:
    raw = {"sync": {"recipe": "diloco", "every": 7, "codec": "bf16", "outer_lr": 0.3}}
    assert parse_job(raw, ["sync.outer_lr=0.4"]).sync.model_dump(exclude_none=True) == {
        "recipe": "diloco", "every": 7, "codec": "bf16", "outer_lr": 0.4,
    }  # fmt: skip
    for order in (["sync.recipe=dpsgd", "sync.every=2"], ["sync.every=2", "sync.recipe=dpsgd"]):
        assert parse_job(raw, order).sync.model_dump(exclude_none=True) == {"recipe": "dpsgd", "every": 2}


def test_values_on_the_command_line_are_toml_or_plain_words() -> None:
    job = parse_job({}, ["sync.delay=round", "job.name=night", "train.lr=1e-3", "link.timeout_s=5", "sync.error_feedback=true"])
    assert (job.sync.delay, job.job.name, job.train.lr, job.link.timeout_s) == ("round", "night", 1e-3, 5.0)
    assert job.sync.error_feedback is True


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=5", "unknown key train.stpes; did you mean 'steps'?"),
        ("sync.speeds=[1, 0.5]", "unknown key sync.speeds; did you mean islands.speeds?"),
        ("trian.steps=5", "unknown section [trian]; did you mean 'train'?"),
        ("train.steps=1e3", "train.steps = 1000.0 is not allowed; use a whole number"),
        ("sync.grace=2", "sync.grace = 2 is not allowed; use text, as sync.grace=2s"),
        ("sync.moments=3", "sync.moments = 3 is not allowed; use text, as sync.moments=3:6"),
        ("sync.every=1.5", "sync.every = 1.5 is not allowed; use a whole number or text, as sync.every=50"),
        ("sync.delay=1.5", "sync.delay = 1.5 is not allowed; use a whole number or 'round', as sync.delay=5"),
        ("sync.participants=50%", "sync.participants = '50%' is not allowed; use a whole number, as sync.participants=2"),
        ("sync.include=blocks", "sync.include = 'blocks' is not allowed; use a list, as 'sync.include=[\"blocks.*\"]'"),
        ("islands.speeds=0.5", "islands.speeds = 0.5 is not allowed; use a list, as 'islands.speeds=[1,0.5]'"),
        ('islands.speeds=[1, "a"]', "islands.speeds.1 = 'a' is not allowed; use a number, as 'islands.speeds=[1,0.5]'"),
        ("train.steps=0", "train.steps = 0 is not allowed"),
        ("train.precision=fp16", "train.precision = 'fp16' is not allowed; use 'fp32' or 'bf16'"),
        ("train.batch=3", "train.batch = 3 does not divide by islands.ranks x train.accumulate = 2; use a multiple of 2"),
        ("model.width=30", "model.width = 30 does not divide into 4 heads of an even size; use a multiple of 8"),
        ("islands.count=0", "islands.count = 0 is not allowed"),
        ("islands.engine=megatron", "islands.engine = 'megatron' is not allowed"),
        ("islands.shards=2", 'islands.shards is of islands.engine = "fsdp"'),
        ("islands.recompute=true", 'islands.recompute is of islands.engine = "fsdp"'),
        ("job.name=a/b", "job.name = 'a/b' is not allowed"),
        ("sync.delay=-1", "delay = -1 is negative"),
        ("sync.topology=rign", "topology = 'rign' is not known"),
        ("link.rate=fast", "'fast' is not a rate"),
        ("link.rtt=-1ms", "'-1ms' is not a time"),
        ("link.port=70000", "link.port = 70000 is not allowed"),
    ],
)
def test_what_a_job_cannot_say_is_one_line(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^on the command line: ") as caught:
        parse_job({"train": {"accumulate": 2}}, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"sync": {"grace": 2}}, 'the job: sync.grace = 2 is not allowed; use text, as grace = "2s"'),
        ({"islands": {"speeds": 0.5}}, "the job: islands.speeds = 0.5 is not allowed; use a list, as speeds = [1, 0.5]"),
        ({"train": {"batch": 3, "accumulate": 2}}, "the job: train.batch = 3 does not divide by"),
        ({"trian": {}}, "the job: unknown section [trian]"),
        ({"sync": {"evry": 2}}, "the job: unknown key sync.evry"),
        ({"sync": {"level": [{"every": 0.5}]}}, "the job: sync.level.0.every = 0.5 is not allowed; use a whole number or"),
    ],
)
def test_what_the_file_says_is_the_files(raw: dict[str, object], said: str) -> None:
    """Whatever else the command line says."""
    with pytest.raises(ValueError, match=r"^the job: ") as caught:
        parse_job(raw, ["train.lr=1e-3", "sync.outer_lr=0.5"])
    assert str(caught.value).startswith(said)


def test_a_list_that_the_shell_took_apart_is_told_how_to_stay_whole() -> None:
    with pytest.raises(ValueError, match=r"^'0\.5\]' is not .* in quotes, without blanks: 'islands\.speeds=\[1,0\.5\]'$"):
        parse_job({}, ["islands.speeds=[1,", "0.5]"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["islands.ranks=1"], 'islands.engine = "pipeline" with islands.ranks = 1 is one stage, which is no pipeline'),
        (["islands.ranks=4", "train.accumulate=6"], "islands.ranks = 4 stages of a pipeline need a block each, and there are"),
        (["islands.ranks=3"], "train.accumulate = 2 micro-batches leave some of islands.ranks = 3 stages of a pipeline without"),
        (["train.batch=5"], "train.batch = 5 does not divide by train.accumulate = 2; use a multiple of 2"),
    ],
)
def test_stages_that_do_not_fit_are_one_line(overrides: list[str], said: str) -> None:
    """Of three blocks, two stages and two micro-batches; the batch is not shared among stages."""
    raw = {"islands": {"engine": "pipeline", "ranks": 2}, "train": {"accumulate": 2, "batch": 6}}
    parse_job(raw)
    with pytest.raises(ValueError, match=r"^on the command line: ") as caught:
        parse_job(raw, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_toml_or_not_of_sections_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    for content, said in (
        (b"steps 5\n", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"sync = 3\n", "sync = 3 is not a section; write [sync]"),
        (b"[[train]]\nsteps = 3\n", "is not a section; write [train]"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as caught:
            load_job(path)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def _toml(text: str) -> dict[str, object]:
    import tomllib

    return tomllib.loads(text)
