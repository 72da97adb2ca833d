"""What does Kubernetes have to be told so that it runs the islands of a job? A JobSet, and a ConfigMap with the job file.

The launcher is a pod, and so is each node of each island. Pods have host names that the others know (JobSet's network), and
islands meet at the launcher's. Pods are scheduled one by one, so each waits first until all run. One that fails has the whole set
made anew, as often as islands.max_restarts says, and it goes on from the newest checkpoint on the volume; what a person has to
put right (exit status 2) ends it at once.

JobSet: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dtrain import topology
from dtrain.config import Job, dump_job
from dtrain.launch.islands import TORCHRUN_VARIABLE
from dtrain.launch.outside import each_override, nodes_of, tables_of
from dtrain.own_name import OWN_AXES, is_own

Manifest = dict[str, Any]

_MEETING_PORT = 29400
_TORCHRUN_PORT = 29500
_INTERFACE = "eth0"  # of a pod
_RUNS, _JOB = "/runs", "/job/job.toml"
_LONGEST = 63  # characters of a host name
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_USER_ERROR = 2
_LOOKS_EVERY_S = 5  # for a pod that does not run yet


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command."""

    image: str
    namespace: str | None = None
    gpus_per_node: int | None = None
    volume: str = "runs"


@dataclass(frozen=True, slots=True)
class Pods:
    """Of one island."""

    island: int
    count: int
    ranks: int
    """Of one of them."""


def manifests(job: Job, asked: Asked) -> list[Manifest]:
    """The ConfigMap and the JobSet; raises ValueError for what no cluster would take."""
    name = _name(job)
    _check(job, asked)
    tables = tables_of(job)
    islands = [_pods(k, tables[k].get("ranks", job.islands.ranks), asked.gpus_per_node) for k in range(job.islands.count)]
    longest = max(len(_host(name, f"island{pods.island}", pods.count - 1)) for pods in islands)
    if max(longest, len(_host(name, "launcher", 0))) > _LONGEST:
        raise ValueError(f"job.name = {job.job.name!r} makes host names longer than {_LONGEST} characters; use a shorter one")
    job = _in_pods(job, name)
    metadata = {"name": name, **({"namespace": asked.namespace} if asked.namespace else {})}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**metadata, "name": _config(name)},
        "data": {"job.toml": dump_job(job)},
    }
    together = _together(name, islands)
    parts = [_replicated(f"island{p.island}", p.count, _island_pod(job, name, p, asked, together)) for p in islands]
    spec = {
        # A pod has a name once it runs, and not while its image is still on the way.
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": False},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["launcher"]},
        "failurePolicy": {
            "maxRestarts": job.islands.max_restarts,
            "restartStrategy": "BlockingRecreate",
            "rules": [{"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [_replicated("launcher", 1, _launcher_pod(job, name, asked, together)), *parts],
    }
    return [config, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]


def to_yaml(documents: Sequence[Manifest], command: str) -> str:
    """For ``kubectl apply -f``; the same text for the same manifests."""
    head = (
        f"# Written by: {command}\n#\n"
        "#   kubectl apply -f FILE    runs it; the cluster needs the JobSet controller, https://jobset.sigs.k8s.io\n"
        "#   kubectl get jobsets      how it stands\n"
        "#   kubectl delete -f FILE   ends it; what the volume holds stays, and applied again it goes on from there\n"
    )
    return head + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Text of several lines stands as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _check(job: Job, asked: Asked) -> None:
    if not asked.image or not asked.image.isprintable() or " " in asked.image:
        raise ValueError(f"--image {asked.image!r} is no image; write REGISTRY/NAME:TAG")
    if asked.namespace is not None and not _LABEL.fullmatch(asked.namespace):
        raise ValueError(f"--namespace {asked.namespace}: Kubernetes has no such names; use small letters, digits and dashes")
    if not _CLAIM.fullmatch(asked.volume):
        raise ValueError(f"--volume {asked.volume}: no claim has such a name; use small letters, digits, dashes and dots")
    for k in job.elsewhere:
        if job.island(k).launcher == "ssh":
            raise ValueError(f'islands.each.{k}.launcher = "ssh", and here each island is a pod; leave launcher and host out')
    if job.link.transport == "nccl":
        raise ValueError('link.transport = "nccl" is for islands that share a machine, and pods do not; use "c10d"')
    source, model = job.data.source, job.model
    on_hub = source.startswith("hf:") and not os.path.exists(source.split(":")[1])
    named = {"data.source": source} if source != "stdlib" and not on_hub else {}
    if job.data.tokenizer != "bytes":
        named["data.tokenizer"] = job.data.tokenizer
    if is_own(model.factory):
        named["model.factory"] = model.factory
    if os.path.exists(model.hf):  # else a name on the hub
        named["model.hf"] = model.hf
    if job.islands.deepspeed is not None:
        named["islands.deepspeed"] = job.islands.deepspeed
    for k, level in enumerate(job.sync.level or [job.sync]):
        section = f"sync.level.{k}" if job.sync.level else "sync"
        own = {axis: getattr(level, axis) for axis in OWN_AXES}
        named |= {f"{section}.{axis}": value for axis, value in own.items() if value is not None and is_own(value)}
        if level.graph is not None and topology.is_file(level.graph):
            named[f"{section}.graph"] = level.graph
    for key, value in named.items():
        if not os.path.isabs(value):
            raise ValueError(f"{key} = {value!r} is a file here, and pods have others; say where it lies in the image, from / on")


def _name(job: Job) -> str:
    """As host names may be: Kubernetes has neither capitals nor dots nor underscores in them, and a letter first."""
    name = re.sub("[^a-z0-9]+", "-", job.job.name.lower()).strip("-")
    return name if name[0].isalpha() else f"run-{name}"


def _in_pods(job: Job, name: str) -> Job:
    """The job as its pods see it."""
    link = job.link.model_copy(
        update={
            "advertise": f"{_host(name, 'launcher', 0)}.{name}",
            "port": job.link.port or _MEETING_PORT,
            "interface": job.link.interface or _INTERFACE,
        }
    )
    return job.model_copy(update={"job": job.job.model_copy(update={"dir": _RUNS}), "link": link})


def _pods(island: int, ranks: int, gpus_per_node: int | None) -> Pods:
    count = nodes_of(island, ranks, None, gpus_per_node)
    return Pods(island, count, ranks // count)


def _config(name: str) -> str:
    return f"{name}-job"


def _host(name: str, part: str, pod: int) -> str:
    return f"{name}-{part}-0-{pod}"  # JobSet, replicated job, which of its jobs, which of that one's pods


def _together(name: str, islands: Sequence[Pods]) -> str:
    """What each pod does first: GPUs may come to one of them hours after the others, and link.timeout_s is not for that."""
    hosts = [_host(name, "launcher", 0), *(_host(name, f"island{p.island}", k) for p in islands for k in range(p.count))]
    return (
        "# Pods are scheduled one by one. None begins before all have names, which are those of pods that run.\n"
        "trap 'exit 143' TERM    # which the first process of a pod hears only if it asks to\n"
        "command -v getent >/dev/null || { echo 'the image has no getent, which looks names up'; exit 2; }\n"
        "awaited=\n"
        f"for pod in {' '.join(hosts)}; do\n"
        f'    until getent ahosts "$pod.{name}" >/dev/null; do\n'
        '        if [ "$pod" != "$awaited" ]; then echo "waiting for pod $pod, which does not run yet"; fi\n'
        "        awaited=$pod\n"
        f"        sleep {_LOOKS_EVERY_S}\n"
        "    done\n"
        "done\n"
    )


def _launcher_pod(job: Job, name: str, asked: Asked, together: str) -> Manifest:
    runs = _go_on(f"{_RUNS}/{job.job.name}") + f"exec {_dtrain_run(job)} \"$@\"\n"
    return _pod(together + runs, _config(name), asked, gpus=None)


def _island_pod(job: Job, name: str, pods: Pods, asked: Asked, together: str) -> Manifest:
    run, meet = f"{_RUNS}/{job.job.name}-island{pods.island}", f"{job.link.advertise}:{job.link.port}"
    joins = _go_on(run) + f"exec {_dtrain_run(job)} --island {pods.island} --meet {meet} \"$@\"\n"
    torchrun = [
        *("env", "-u", "DTRAIN_PARENT", "python", "-m", "torch.distributed.run"),
        *(f"--nnodes={pods.count}", f"--nproc-per-node={pods.ranks}", "--rdzv-backend=static"),
        f"--rdzv-endpoint={_host(name, f'island{pods.island}', 0)}.{name}:{_TORCHRUN_PORT}",
    ]
    several = (
        "# A torchrun on each pod. The first joins the launcher for all, and the others start theirs whenever it does.\n"
        f'export {TORCHRUN_VARIABLE}="{shlex.join(torchrun)} --node-rank=$JOB_COMPLETION_INDEX"\n'
        'if [ "$JOB_COMPLETION_INDEX" != 0 ]; then\n'
        f"    exec python -m dtrain.launch.follow {_JOB} {run} {pods.island} {meet}\n"
        "fi\n"
    )
    return _pod(together + (several if pods.count > 1 else "") + joins, _config(name), asked, gpus=asked.gpus_per_node)


def _dtrain_run(job: Job) -> str:
    return shlex.join(["dtrain", "run", _JOB, each_override(job, "manual")])


def _go_on(run: str) -> str:
    return f"# With the run that the volume holds, if it does.\nif [ -e {run}/job.toml ]; then set -- --resume; fi\n"


def _pod(script: str, config: str, asked: Asked, *, gpus: int | None) -> Manifest:
    """One that runs a shell's script."""
    container: Manifest = {
        "name": "dtrain",
        "image": asked.image,
        "command": ["/bin/sh", "-ec", script],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],  # kubectl logs shows a line when it is said
        "volumeMounts": [
            {"name": "job", "mountPath": os.path.dirname(_JOB)},
            {"name": "runs", "mountPath": _RUNS},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if gpus is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
    volumes = [
        {"name": "job", "configMap": {"name": config}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": asked.volume}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {"restartPolicy": "Never", "containers": [container], "volumes": volumes}


def _replicated(part: str, pods: int, pod: Manifest) -> Manifest:
    """One job, whose failure is the set's to judge."""
    fails = {"action": "FailJob", "onExitCodes": {"containerName": "dtrain", "operator": "In", "values": [_USER_ERROR]}}
    spec = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [fails]},
        "template": {"spec": pod},
    }
    return {"name": part, "replicas": 1, "template": {"spec": spec}}
