"""Is what sites are to have alike read once, and before anyone waits for it? With a store in this process in place of TCP, and no
islands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch._C._distributed_c10d import HashStore

from dtrain.config import Job, load_job
from dtrain.data import corpus
from dtrain.launch import islands, local, meeting, part, part_words
from dtrain.launch.cli import run_command
from dtrain.launch.elsewhere import Call
from dtrain.launch.local import Outcome
from tests.unit.test_part_files import with_files

QUIET = Console(quiet=True)


def last_read(store: HashStore, patch: pytest.MonkeyPatch) -> Callable[..., HashStore]:
    """Connects to the meeting point, for the launcher or a site; from then on nothing may be read."""

    def late(*_: object) -> None:
        raise AssertionError("somebody waits for this")

    def connect(*_: object) -> HashStore:
        patch.setattr(part_words, "_digest", late)
        patch.setattr(corpus, "load_corpus", late)
        return store

    return connect


def refuses(store: HashStore, job: Job, held: part_words.Contents) -> None:
    """Whoever has another text, or script."""
    for key in ("data.source", "the script after --"):
        other = {**held, key: part_words.Content("f00d", "b:/other")}
        with pytest.raises(ValueError, match=rf"^{key}: /other is not what "):
            part_words.check_job(store, job, 1, other)


def test_the_launcher_knows_what_it_has_before_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, job = HashStore(), with_files(tmp_path / "here")
    script = (f"{tmp_path}/here/model.py",)
    held = part_words.contents(job, "feed", script)
    monkeypatch.setattr(meeting, "serve", last_read(store, monkeypatch))
    monkeypatch.setattr(local, "_watch", lambda *_: Outcome(75, "watched"))
    (tmp_path / "run").mkdir()
    call = Call(Path("job.toml"))
    said = local.run_local(job, tmp_path / "run", resume_step=0, script=script, console=QUIET, call=call, text="feed")
    assert said.message == "watched"
    part_words.check_job(store, job, 1, held)
    refuses(store, job, held)


def test_a_site_knows_what_it_has_before_it_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, job, found = HashStore(), with_files(tmp_path / "here"), list[part.Part]()
    script = (f"{tmp_path}/here/model.py",)
    part_words.say_job(store, job, part_words.contents(job, "feed", script))
    (tmp_path / "run").mkdir()

    def joins(text: str, script: tuple[str, ...] = script) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(part, "_reach", last_read(store, patch))
            patch.setattr(part, "_keep", lambda mine, *_: found.append(mine) or Outcome(0, "kept"))
            return part.run_part(job, tmp_path / "run", 1, "h:1", script=script, console=QUIET, text=text)

    with pytest.raises(ValueError, match=r"^data\.source: stdlib is not what "):
        joins("f00d")
    with pytest.raises(ValueError, match=r"^the script after --: .*/zero\.json is not what .*/model\.py is "):
        joins("feed", (f"{tmp_path}/here/zero.json",))
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, "srun 'a b'")
    assert joins("feed").message == "kept"
    assert [each.launch.torchruns for each in found] == [("srun", "a b")], "as the scheduler's script says"


def test_it_is_the_text_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    Path("text.txt").write_text(200 * "".join(f"line {k}\n" for k in range(1000)))
    tables = "[[islands.each]]\n[[islands.each]]\nlauncher = 'manual'\n"
    Path("job.toml").write_text(f"[job]\nname = 'small'\n[data]\nsource = 'text.txt'\n{tables}[link]\ninterface = 'lo'\n")
    found = list[str]()

    def look(*_: object, **options: Any) -> Outcome:
        found.append(options["text"])
        return Outcome(75, "looked")

    monkeypatch.setattr("dtrain.launch.local.run_local", look)
    monkeypatch.setattr("dtrain.launch.part.run_part", look)
    site = ("--island", "1", "--meet", "127.0.0.1:1")
    for words in ((), ("--resume",), ("--fresh", "--", "train.py")):
        assert run_command(["run", "job.toml", *words]) == 75
        assert run_command(["run", "job.toml", *site, *words]) == 75
    text = corpus.corpus_of(load_job(Path("job.toml")).data).hash
    assert found == [text] * 4 + [""] * 2
