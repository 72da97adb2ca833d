"""Are the manifests of ``dtrain kubernetes`` what Kubernetes and JobSet know, and do their pods run the job?

What Kubernetes knows is held to the types of its own client, which knows nothing of JobSet: those fields are written out here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from dtrain.config import load_job, parse_job
from dtrain.launch import kubernetes as writer
from dtrain.launch.cli import run_command
from tests.unit.small_run import refused, write_job_file

RANKS = ("islands.ranks=4", "train.batch=4")
IMAGE = ("--image", "registry.example/dtrain:1.0")

# What of JobSet v1alpha2 may stand where (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/): a field's kind, its words,
# or what is below it; a V1 name is a type of Kubernetes itself. A star marks what must be there.
RULE = {
    "name*": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
    "action*": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
                "RestartJobAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                             "PodFailurePolicy"}],
    "onJobFailureMessagePatterns": [str],
    "targetReplicatedJobs": [str],
}  # fmt: skip
JOBSET = {
    "apiVersion*": {"jobset.x-k8s.io/v1alpha2"},
    "kind*": {"JobSet"},
    "metadata*": "V1ObjectMeta",
    "spec*": {
        "replicatedJobs*": [
            {"name*": str, "replicas": int, "template*": "V1JobTemplateSpec", "groupName": str,
             "dependsOn": [{"name*": str, "status*": {"Ready", "Complete"}}]}
        ],
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator*": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"}, "rules": [RULE],
        },
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}  # fmt: skip


def strangers(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Each place where a manifest says what is not known there, or lacks what must be."""
    if isinstance(kind, str):
        yield from typed_strangers(value, kind, where)
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            yield f"{where} is no table"
            return
        known = {key.removesuffix("*"): below for key, below in kind.items()}
        yield from (f"{where} lacks {key[:-1]}" for key in kind if key.endswith("*") and key[:-1] not in value)
        for key, below in value.items():
            yield from strangers(below, known[key], f"{where}.{key}") if key in known else [f"{where}.{key}"]
    elif isinstance(kind, list):
        for k, item in enumerate(value):
            yield from strangers(item, kind[0], f"{where}[{k}]")
    elif isinstance(kind, set):
        if value not in kind:
            yield f"{where} = {value!r}"
    elif isinstance(kind, re.Pattern):
        if not kind.fullmatch(value):
            yield f"{where} = {value!r}"
    elif type(value) is not kind:
        yield f"{where} = {value!r}"


def typed_strangers(value: Any, kind: str, where: str) -> Iterator[str]:
    """By the client's types: "V1Pod", "list[V1Container]", "dict(str, str)", "str" ..."""
    if kind.startswith("list["):
        for k, item in enumerate(value):
            yield from typed_strangers(item, kind[5:-1], f"{where}[{k}]")
    elif kind.startswith("dict"):
        for key, item in value.items():
            yield from typed_strangers(item, kind[5:-1].split(", ")[1], f"{where}.{key}")
    elif hasattr(client, kind):
        model = getattr(client, kind)
        names = {said: name for name, said in model.attribute_map.items()}
        for key, item in value.items():
            known = key in names
            yield from typed_strangers(item, model.openapi_types[names[key]], f"{where}.{key}") if known else [f"{where}.{key}"]
        try:
            model(**{names[key]: item for key, item in value.items() if key in names})
        except ValueError as e:  # what must be there, and is not
            yield f"{where}: {e}"
    elif kind in ("str", "int", "bool") and type(value).__name__ != kind:
        yield f"{where} = {value!r}, and must be {kind}"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


def written(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert run_command(["kubernetes", "job.toml", *IMAGE, *words, "--output", "job.yaml", "--force"]) == 0
    config, jobset = yaml.safe_load_all(Path("job.yaml").read_text(encoding="utf-8"))
    return config, jobset


JOBS = {
    "two islands": (),
    "several pods an island": (*RANKS, "--gpus-per-node", "2", "--namespace", "team-a", "--volume", "big.runs"),
    "many islands": ("islands.count=16", "job.name=A_long.Name", "--gpus-per-node", "8", "islands.max_restarts=9"),
}


@pytest.mark.parametrize("words", JOBS.values(), ids=list(JOBS))
def test_kubernetes_and_jobset_know_all_that_is_said(words: Sequence[str]) -> None:
    config, jobset = written(*words)
    assert list(typed_strangers(config, "V1ConfigMap", "config")) == []
    assert list(strangers(jobset, JOBSET, "jobset")) == []


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("spec.successPolicy", "operator", "all"),
        ("spec.failurePolicy", "maxrestarts", 3),
        ("spec.failurePolicy.rules.0", "name", "user error"),
        ("spec.replicatedJobs.1", "replicas", "1"),
        ("spec.replicatedJobs.1.template.spec", "completionmode", "Indexed"),
        ("spec.replicatedJobs.1.template.spec", "parallelism", "1"),
        ("spec.replicatedJobs.1.template.spec.template.spec.containers.0", "name", None),
        ("spec.replicatedJobs.1.template.spec.template.spec.volumes.2.emptyDir", "size", "1Gi"),
    ],
)
def test_what_is_not_known_would_be_found(place: str, key: str, value: object) -> None:
    _, jobset = written()
    at: Any = jobset
    for step in place.split("."):
        at = at[int(step)] if step.isdecimal() else at[step]
    if value is None:
        del at[key]
    else:
        at[key] = value
    assert list(strangers(jobset, JOBSET, "jobset"))


def containers(jobset: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    jobs = jobset["spec"]["replicatedJobs"]
    return {job["name"]: job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs}


def test_an_island_is_a_job_of_indexed_pods_with_its_gpus() -> None:
    _, jobset = written(*RANKS, "--gpus-per-node", "2", "islands.max_restarts=5")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    pods = {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
    sizes = {name: (job["completionMode"], job["completions"], job["parallelism"]) for name, job in pods.items()}
    assert sizes == {"launcher": ("Indexed", 1, 1), "island0": ("Indexed", 2, 2), "island1": ("Indexed", 2, 2)}
    found = containers(jobset)
    assert [found[name].get("resources") for name in ("launcher", "island1")] == [None, {"limits": {"nvidia.com/gpu": "2"}}]
    volumes = {volume.pop("name"): volume for volume in pods["island0"]["template"]["spec"]["volumes"]}
    assert volumes["shm"] == {"emptyDir": {"medium": "Memory"}}
    assert volumes["runs"] == {"persistentVolumeClaim": {"claimName": "runs"}}


def test_the_job_in_the_map_is_the_file_with_what_pods_are_to_know() -> None:
    config, jobset = written("sync.every=10", "job.name=My_Run.1")
    assert config["metadata"]["name"] == "my-run-1-job"
    assert jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "my-run-1"
    Path("pod.toml").write_text(config["data"]["job.toml"], encoding="utf-8")
    host = "my-run-1-launcher-0-0.my-run-1"
    link = ("link.interface=eth0", "link.port=29400", f"link.advertise={host}")
    wanted = load_job(Path("job.toml"), ("sync.every=10", "job.name=My_Run.1", "job.dir=/runs", *link))
    assert load_job(Path("pod.toml")) == wanted


def test_the_text_is_the_same_each_time_and_says_its_command() -> None:
    texts = []
    for _ in range(2):
        written("--namespace", "team-a")
        texts.append(Path("job.yaml").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    image = shlex.join(IMAGE)
    assert texts[0].startswith(f"# Written by: dtrain kubernetes job.toml {image} --namespace team-a --volume runs\n#\n")


STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done
echo "DTRAIN_TORCHRUN=$DTRAIN_TORCHRUN"
"""


def started(jobset: Mapping[str, Any], name: str, pod: int, folder: Path, looks_up: str = "") -> list[str]:
    """What the pod's shell runs, and the torchrun it is told of; ``/runs`` is a folder here, and all names are known."""
    (folder / "bin").mkdir(exist_ok=True)
    for program, text in {"dtrain": STUB, "python": STUB, "getent": "#!/bin/sh\n" + looks_up, "sleep": "#!/bin/sh\n"}.items():
        (folder / "bin" / program).write_text(text)
        (folder / "bin" / program).chmod(0o755)
    shell, option, script = containers(jobset)[name]["command"]
    said = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(pod)}
    script = script.replace("/runs/", f"{folder}/runs/")
    done = subprocess.run([shell, option, script], env=said, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_pods_run_the_launcher_and_the_islands_and_go_on(tmp_path: Path) -> None:
    _, jobset = written()
    words = ["run", "/job/job.toml", 'islands.each=[{launcher = "manual"}, {launcher = "manual"}]']
    joins = ["--island", "1", "--meet", "small-launcher-0-0.small:29400"]
    none = "DTRAIN_TORCHRUN="
    assert started(jobset, "launcher", 0, tmp_path) == [*words, none]
    assert started(jobset, "island1", 0, tmp_path) == [*words, *joins, none]
    for name in ("small", "small-island1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "job.toml").touch()
    assert started(jobset, "launcher", 0, tmp_path) == [*words, "--resume", none]
    assert started(jobset, "island1", 0, tmp_path) == [*words, *joins, "--resume", none]
    assert started(jobset, "island0", 0, tmp_path)[-2:] == ["small-launcher-0-0.small:29400", none]


def test_of_several_pods_the_first_joins_and_the_others_follow(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    _, jobset = written(*RANKS, "--gpus-per-node", "2")
    first, second = (started(jobset, "island1", pod, tmp_path) for pod in (0, 1))
    assert first[:2] == ["run", "/job/job.toml"]
    meet = "small-launcher-0-0.small:29400"
    follow = ["-m", "dtrain.launch.follow", "/job/job.toml", f"{tmp_path}/runs/small-island1", "1", meet]
    assert second[:-1] == follow
    for rank, line in enumerate((first[-1], second[-1])):
        words = shlex.split(line.removeprefix("DTRAIN_TORCHRUN="))
        assert words[:6] == ["env", "-u", "DTRAIN_PARENT", "python", "-m", "torch.distributed.run"]
        torchrun = get_args_parser().parse_args([*words[6:], "-m", "dtrain.launch"])
        assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "2", rank)
        assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("static", "small-island1-0-0.small:29500")


# Plays a network that knows each name when it is asked the third time for it, and notes who was asked for.
KNOWN_LATE = """printf '%s\\n' "$*" >>asked
test "$(grep -cFx "$*" asked)" -ge 3
"""


@pytest.mark.parametrize(("name", "pod"), [("launcher", 0), ("island0", 0), ("island1", 1)])
def test_no_pod_begins_before_the_names_of_all_are_known(name: str, pod: int, tmp_path: Path) -> None:
    _, jobset = written(*RANKS, "--gpus-per-node", "2")
    network, jobs = jobset["spec"]["network"], {job["name"]: job for job in jobset["spec"]["replicatedJobs"]}
    assert network == {"enableDNSHostnames": True, "subdomain": "small", "publishNotReadyAddresses": False}
    pods = [  # JobSet: <jobSet.name>-<spec.replicatedJob.name>-<job-index>-<pod-index>.<subdomain>
        f"{jobset['metadata']['name']}-{each}-{job}-{index}"
        for each, said in jobs.items()
        for job in range(said["replicas"])
        for index in range(said["template"]["spec"]["completions"])
    ]
    assert len(pods) == 5
    lines = started(jobset, name, pod, tmp_path, KNOWN_LATE)
    assert lines[:5] == [f"waiting for pod {each}, which does not run yet" for each in pods]
    assert lines[5:] == started(jobset, name, pod, tmp_path), "and then what it does where it need not wait"
    assert Path("asked").read_text().splitlines() == [f"ahosts {each}.small" for each in pods for _ in range(3)]


def test_an_image_that_cannot_look_names_up_is_refused(tmp_path: Path) -> None:
    """And does not wait for ever: the set's policy ends it at a person's error."""
    _, jobset = written()
    shell, option, script = containers(jobset)["island0"]["command"]
    bare = {"PATH": str(tmp_path)}
    done = subprocess.run([shell, option, script], env=bare, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "the image has no getent, which looks names up\n")


@pytest.mark.parametrize("words", JOBS.values(), ids=list(JOBS))
def test_shellcheck_has_nothing_to_say(words: Sequence[str]) -> None:
    found = containers(written(*words)[1])
    for name in ("launcher", "island0"):  # the other islands say the same
        checker, script = ["shellcheck", "--shell=sh", "-"], found[name]["command"][2]
        done = subprocess.run(checker, input=script, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--namespace", "Team"), "--namespace Team: Kubernetes has no such names"),
        (("--volume", "my runs"), "--volume my runs: no claim has such a name"),
        (("--image", "a b"), "--image 'a b' is no image; write REGISTRY/NAME:TAG"),
        (("model.factory=mine.py:make",), "model.factory = 'mine.py:make' is a file here, and pods have others"),
        (("data.source=text",), "data.source = 'text' is a file here, and pods have others; say where it lies in the image"),
        (('islands.each=[{}, {launcher = "ssh", host = "b"}]',), 'islands.each.1.launcher = "ssh", and here each island'),
        (("link.transport=nccl",), 'link.transport = "nccl" is for islands that share a machine'),
        ((f"job.name={'a' * 51}",), f"job.name = '{'a' * 51}' makes host names longer than 63 characters"),
        (("islands.ranks=3", "train.batch=3", "--gpus-per-node", "2"), "3 ranks of island 0 do not divide by 2 nodes"),
        (("sim.step_s=1.0",), "sim.step_s = 1.0 has no effect with dtrain run"),
        (("--output", "job.toml"), "--output job.toml: the file is there already; overwrite it with --force, or name another"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], words: Sequence[str], said: str) -> None:
    assert refused(capsys, "kubernetes", "job.toml", *IMAGE, *words).startswith(said)


def test_an_image_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "kubernetes", "job.toml").startswith("Missing option '--image'")


def test_a_name_that_starts_with_a_digit_is_made_one_of_a_host() -> None:
    (_, jobset) = writer.manifests(parse_job({"job": {"name": "7b.Run"}}), writer.Asked("image"))
    assert jobset["metadata"]["name"] == "run-7b-run"
