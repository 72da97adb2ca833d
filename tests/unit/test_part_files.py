"""Are files that a job names the same at all sites, wherever they lie there, and found where ssh starts a part?"""

from __future__ import annotations

import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from dtrain.config import Job, dump_job, parse_job
from dtrain.data.corpus import corpus_of
from dtrain.launch import part, part_words
from dtrain.launch.elsewhere import job_sent
from dtrain.launch.islands import Launch
from dtrain.own_name import OWN_AXES
from dtrain.sections import ModelSection


def with_files(folder: Path, **contents: str) -> Job:
    """A job as a run keeps it, of a site where its files are in this folder."""
    folder.mkdir()
    names = {"tokenizer": "tokenizer.json", "config": "config.json", "zero": "zero.json", "model": "model.py"}
    for key, name in names.items():
        (folder / name).write_text(contents.get(key, key))
    each = [{"engine": "deepspeed", "ranks": 2}, *({"launcher": "manual", "ranks": 2} for _ in range(2))]
    theirs = {"factory": f"{folder}/model.py:build"} if "factory" in contents else {"hf": str(folder)}
    islands = {"each": each, "deepspeed": f"{folder}/zero.json"}
    data = {"tokenizer": f"{folder}/tokenizer.json"}
    return parse_job({"islands": islands, "data": data, "model": theirs, "train": {"batch": 4}})


def says(store: HashStore, job: Job) -> None:
    """The launcher."""
    part_words.say_job(store, job, part_words.contents(job))


def has(store: HashStore, job: Job) -> None:
    """The site of island 1."""
    part_words.check_job(store, job, 1, part_words.contents(job))


def joins(store: HashStore, job: Job, island: int, text: str) -> None:
    launch = Launch(job, Path("/run"), "h:1", "tag")
    part._join(store, launch, island, part_words.contents(job, text), lambda line: None)


def test_files_lie_where_a_site_says_and_hold_the_same(tmp_path: Path) -> None:
    store = HashStore()
    says(store, with_files(tmp_path / "here"))
    has(store, with_files(tmp_path / "alike"))
    for key, named, name in (
        ("tokenizer", "data.tokenizer", "tokenizer.json"),
        ("config", "model.hf", "config.json"),
        ("zero", "islands.deepspeed", "zero.json"),
    ):
        words = f"{named}: {tmp_path}/{key}/{name} is not what {socket.gethostname()}:{tmp_path}/here/{name} is (sha256 "
        said = rf"^{re.escape(words)}\w{{8}} and \w{{8}}\); copy that one here, or .*{named}=PATH$"
        with pytest.raises(ValueError, match=said):
            has(store, with_files(tmp_path / key, **{key: "other"}))
    hub = with_files(tmp_path / "hub").model_copy(update={"model": ModelSection.model_validate({"hf": "an/owner"})})
    with pytest.raises(ValueError, match=re.escape("model.hf = 'an/owner' differs from the launcher's '(a file)'")):
        has(store, hub)
    own = HashStore()
    says(own, with_files(tmp_path / "own", factory=""))
    with pytest.raises(ValueError, match=r"^model\.factory: .*/theirs/model\.py is not what "):
        has(own, with_files(tmp_path / "theirs", factory="", model="other"))


def test_code_of_ones_own_graphs_and_scripts_hold_the_same_under_their_names(tmp_path: Path) -> None:
    files = {"recipe": "mine.py", "codec": "codec.py", "topology": "ring.py", "graph": "edges.txt", "script": "train.py"}

    def site(name: str, other: str = "", *, levels: bool = False) -> tuple[Job, part_words.Contents]:
        folder = tmp_path / name
        folder.mkdir()
        for key, file in files.items():
            (folder / file).write_text("other" if key == other else key)
        own = {key: f"{folder}/{files[key]}:row" for key in OWN_AXES}
        one = own | {"graph": f"{folder}/edges.txt"}
        sync = {"level": [{"recipe": "fedavg", "islands": 2}, one]} if levels else one
        job = parse_job({"islands": {"each": [{}, {"launcher": "manual"}, {}, {}]}, "sync": sync})
        return job, part_words.contents(job, script=(f"{folder}/train.py", "--lr=1"))

    for levels, at in ((False, "sync"), (True, "sync.level.1")):
        store = HashStore()
        part_words.say_job(store, *site(f"here {at}", levels=levels))
        part_words.check_job(store, *_for_island(site(f"alike {at}", levels=levels)))
        for key in files:
            named = "the script after --" if key == "script" else f"{at}.{key}"
            said = rf"^{named}: .*/{key} {at}/{files[key]} is not what .*; copy that one here, or name one that is the same"
            with pytest.raises(ValueError, match=said):
                part_words.check_job(store, *_for_island(site(f"{key} {at}", key, levels=levels)))


def _for_island(site: tuple[Job, part_words.Contents]) -> tuple[Job, int, part_words.Contents]:
    return site[0], 1, site[1]


def test_the_text_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    """By the hash that a summary asks all islands for, when they have trained."""
    texts = {"here": "one\n", "alike": "one\n", "other": "two\n"}
    jobs = dict[str, Job]()
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(300 * text)
        data = {"source": f"{tmp_path}/{name}/text.txt"}
        jobs[name] = parse_job({"islands": {"each": [{}, {"launcher": "manual"}]}, "data": data})
    store = HashStore()
    held = {name: part_words.contents(job, corpus_of(job.data).hash) for name, job in jobs.items()}
    part_words.say_job(store, jobs["here"], held["here"])
    part_words.check_job(store, jobs["alike"], 1, held["alike"])
    with pytest.raises(ValueError, match=r"^data\.source: .*/other/text\.txt is not what .*/here/text\.txt is \(sha256 "):
        part_words.check_job(store, jobs["other"], 1, held["other"])
    assert part_words.contents(jobs["other"]) == {}, "a script reads data of its own"


def test_a_file_that_the_launcher_has_not_is_that_of_the_first_site(tmp_path: Path) -> None:
    store = HashStore()
    there = with_files(tmp_path / "here")
    (tmp_path / "here" / "zero.json").unlink()
    part_words.say_job(store, there, part_words.contents(there, "feed"))
    wrong, first, other = (with_files(tmp_path / name, zero=name) for name in ("wrong", "first", "other"))
    with pytest.raises(ValueError, match=r"^data\.source: "):
        joins(store, wrong, 1, "f00d")
    joins(store, first, 2, "feed")  # the refused site's file counts for nothing
    for job in (wrong, other):
        with pytest.raises(ValueError, match=r"^islands\.deepspeed: .* is not what .*/first/zero\.json is"):
            joins(store, job, 1, "feed")
    joins(store, first, 1, "feed")


def test_of_two_sites_that_come_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other before both have joined."""
    store, (first, other) = HashStore(), (with_files(tmp_path / name, zero=name) for name in ("first", "other"))
    part_words.say_job(store, first)
    with monkeypatch.context() as patch:
        check_job = part_words.check_job

        def comes_too(*words: Any) -> None:
            check_job(*words)
            patch.undo()
            joins(store, first, 2, "")

        patch.setattr(part_words, "check_job", comes_too)
        with pytest.raises(ValueError, match=r"^islands\.deepspeed: .* is not what .*/first/zero\.json is"):
            joins(store, other, 1, "")
    assert part_words.joined(store, 1) is None
    joins(store, first, 1, "")


def test_over_ssh_files_below_the_folder_here_are_looked_for_below_workdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here, far = tmp_path / "here", {"launcher": "ssh", "host": "far"}
    kept = with_files(here).model_dump()
    kept["islands"]["each"] = [{}, far, far | {"workdir": "/srv"}]
    kept["islands"] |= {"count": 3, "deepspeed": None}
    kept["data"]["source"] = f"hf:{here}/rows.csv:train:text"
    kept["sync"] |= {"graph": "/else/edges", "recipe": f"{here}/mine.py:row"}
    job = Job.model_validate(kept)
    (tmp_path / "job.toml").write_text(dump_job(job))
    launch = Launch(job, tmp_path, "h:1", "tag")
    assert parse_job(tomllib.loads(job_sent(launch, 1))) == job
    sent = parse_job(tomllib.loads(job_sent(launch, 2)))
    assert (sent.data.tokenizer, sent.data.source) == ("./here/tokenizer.json", "hf:./here/rows.csv:train:text")
    assert (sent.model.hf, sent.sync.recipe, sent.sync.graph) == ("./here", "./here/mine.py:row", "/else/edges")
    assert sent.islands == job.islands
