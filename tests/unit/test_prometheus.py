"""Does Prometheus read what is told of a run? Its own parser does, and finds the numbers that were written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dtrain.launch import prometheus
from dtrain.launch.status import Reader, State
from tests.unit.watched import make_run, training_run, write_lines


def told(state: State) -> dict[str, Metric]:
    """Families by name; the parser calls a counter by its name without _total."""
    families = list(text_string_to_metric_families(prometheus.text(state)))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def of_islands(family: Metric) -> list[float]:
    assert [sample.labels for sample in family.samples] == [{"island": str(k)} for k in range(len(family.samples))]
    return [sample.value for sample in family.samples]


def test_each_number_is_found_again(tmp_path: Path) -> None:
    word = training_run(tmp_path / "run")
    word.say(1, 10, [0, 1, 0], ["", "lost; will be started again (2 of 3)", ""])
    found = told(Reader(tmp_path / "run").read())
    expected = {
        "dtrain_step": [20, 19, 20],
        "dtrain_loss_nats": [5.98, 4.981, 3.5],
        "dtrain_tokens": [2560, 2432, 2560],
        "dtrain_tokens_per_second": [64, 64, 64],
        "dtrain_wire_sent_bytes": [20_000, 19_000, 20_000],
        "dtrain_wire_received_bytes": [18_000, 17_100, 18_000],
        "dtrain_link_wait_seconds": [10, 9.5, 10],
        "dtrain_waiting": [1, 0, 0],
        "dtrain_waiting_seconds": [10, 0, 0],
        "dtrain_lost": [0, 1, 0],
        "dtrain_restarts": [0, 1, 0],
    }
    assert {name: of_islands(found[name]) for name in expected} == expected
    assert [(s.labels, s.value) for s in found["dtrain_eval_loss_nats"].samples] == [({"island": "2"}, 3.25)]
    rates = {s.labels["island"]: s.value for s in found["dtrain_wire_sent_bytes_per_second"].samples}
    assert rates == {"0": 375.0, "2": 500.0}, "of one that is lost nothing is known"
    links = {(s.labels["island"], s.labels["to"]): s.value for s in found["dtrain_link_bytes_per_second"].samples}
    assert links == {("0", "1"): 187.5, ("0", "2"): 187.5, ("2", "0"): 250.0, ("2", "1"): 250.0}
    whole = {"running": 1, "islands": 3, "steps": 3000, "committed_step": 10, "epoch": 1, "merged_loss_nats": 4.125}
    assert {name: [(s.labels, s.value) for s in found[f"dtrain_{name}"].samples] for name in whole} == {
        name: [({}, value)] for name, value in whole.items()
    }
    (info,) = found["dtrain_run_info"].samples
    assert (info.labels, info.value) == ({"run": "run", "recipe": "choco"}, 1)


def test_counters_are_what_ends_in_total_and_each_family_has_help(tmp_path: Path) -> None:
    training_run(tmp_path / "run")
    state = Reader(tmp_path / "run").read()
    lines = prometheus.text(state).splitlines()
    assert prometheus.text(state).endswith("\n")
    kinds = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    assert set(kinds.values()) == {"counter", "gauge"}
    assert {name for name, kind in kinds.items() if kind == "counter"} == {name for name in kinds if name.endswith("_total")}
    assert sum(name.endswith("_total") for name in kinds) == 5
    assert [line.split()[2] for line in lines if line.startswith("# HELP ")] == list(kinds)
    assert {line.partition("{")[0].split()[0] for line in lines if not line.startswith("#")} == set(kinds)
    assert all(name.startswith("dtrain_") for name in kinds)
    assert all(family.documentation for family in told(state).values())


def test_labels_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    name = 'a "b" \\n\n{c="d"} \\'
    (info,) = told(replace(Reader(tmp_path / "run").read(), name=name))["dtrain_run_info"].samples
    assert info.labels["run"] == name


def test_what_is_not_known_has_no_sample(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    found = told(Reader(tmp_path / "run").read())
    missing = {"dtrain_loss_nats", "dtrain_committed_step", "dtrain_merged_loss_nats", "dtrain_link_bytes_per_second"}
    assert missing & set(found) == set()
    write_lines(tmp_path / "run", [{"step": 1, "island": 0, "loss": 1e-7, "eval_loss_merged": 12345678.9}])
    found = told(Reader(tmp_path / "run").read())
    assert [(s.labels, s.value) for s in found["dtrain_loss_nats"].samples] == [({"island": "0"}, 1e-7)]
    assert found["dtrain_merged_loss_nats"].samples[0].value == 12345678.9
