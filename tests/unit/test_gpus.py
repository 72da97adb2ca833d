"""Has each rank on a machine a GPU of its own, and is it the one of its LOCAL_RANK, which others take without asking?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dtrain.config import Job, parse_job
from dtrain.island.device import own_device
from dtrain.launch import agent, gpus
from dtrain.launch.islands import Launch, environment
from dtrain.launch.processes import PARENT_VARIABLE


@pytest.mark.parametrize(
    ("visible", "count", "before", "ranks", "seen"),
    [
        (None, 8, 0, 4, ["0", "1", "2", "3"]),
        (None, 8, 4, 4, ["4", "5", "6", "7"]),
        ("3,5,7", 3, 1, 2, ["5", "7"]),
        ("GPU-a,GPU-b,-1,GPU-c", 2, 1, 1, ["GPU-b"]),  # torch finds none behind one that is not there
        (None, 3, 2, 2, ["2", "0"]),  # too few: in turn
        (None, 2, 2, 4, ["0", "1"]),
    ],
)
def test_islands_of_one_machine_see_gpus_in_turn(
    visible: str | None, count: int, before: int, ranks: int, seen: list[str]
) -> None:
    assert gpus.own(visible, count, before, ranks) == seen


def islands(*tables: dict[str, object]) -> Job:
    return parse_job({"islands": {"count": len(tables), "each": list(tables)}, "link": {"interface": "eth7"}})


def test_only_ranks_of_the_same_machine_come_before(tmp_path: Path) -> None:
    far = {"launcher": "manual"}
    job = islands({"ranks": 2, **far}, {"ranks": 2}, {"ranks": 1, **far}, {"ranks": 4})
    assert [job.ranks_before(k) for k in range(4)] == [0, 0, 0, 2]
    launch = Launch(job, tmp_path, "10.0.0.1:4711", "tag")
    wanted = [environment(launch, k, 0, 0).get(gpus.GPUS_VARIABLE) for k in range(4)]
    assert wanted == [None, "0:2", None, "2:4"], "who is alone on a machine sees all of it"
    far = {"launcher": "ssh", "host": "a"}
    job = islands({"ranks": 2, **far}, {"ranks": 2, **far, "host": "b"}, {"ranks": 4, **far}, {})
    assert [(job.ranks_before(k), job.ranks_beside(k)) for k in range(4)] == [(0, 6), (0, 2), (2, 6), (0, 1)]
    several_nodes = Launch(job, tmp_path, "10.0.0.1:4711", "tag", torchruns=("srun", "torchrun"))
    assert gpus.GPUS_VARIABLE not in environment(several_nodes, 1, 0, 0)


def test_a_torchrun_leaves_its_ranks_their_gpus_and_no_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, seen in ((8, "2,3,4"), (0, "unchanged")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unchanged")
        if count:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setenv(gpus.GPUS_VARIABLE, "2:3")
        gpus.see_own(lambda count=count: count)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert gpus.GPUS_VARIABLE not in os.environ
    gpus.see_own(lambda: 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "unchanged"
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv(gpus.GPUS_VARIABLE, "2:2")
    gpus.see_own(lambda: 4)
    assert (os.environ["HIP_VISIBLE_DEVICES"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("6,7", "unchanged")


def test_it_is_an_islands_torchrun_that_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr(agent, "die_with_parent", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("torch.distributed.run.main", lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv(PARENT_VARIABLE, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(gpus.GPUS_VARIABLE, "1:2")
    agent.main()
    assert seen == ["5,6"]


def test_a_rank_trains_on_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device() == torch.device("cpu")
    chosen = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert own_device() == torch.device("cuda", local_rank)
    assert chosen == [torch.device("cuda", k) for k in (0, 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 ranks would share 2 GPUs.* use islands.ranks=2, or CUDA_VISIBLE_DEVICES= before"):
        own_device()
    with pytest.raises(ValueError, match=r"use islands.each.1.ranks=2, or"):
        own_device("islands.each.1.ranks")
