"""Is ncu called as it must be, and its table read? By a program of that name that stands on the PATH in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dtrain.launch import ncu

TABLE = """\
what the process itself prints
==PROF== Connected to process 42
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","42","quantize_int4_kernel(float *, int)","dram__bytes.sum","byte","2,000,000"
"0","42","quantize_int4_kernel(float *, int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","80.5"
"0","42","quantize_int4_kernel(float *, int)","gpu__time_duration.sum","ns","1,000"
"1","42","quantize_int4_kernel(float *, int)","dram__bytes.sum","byte","2,000,000"
"1","42","quantize_int4_kernel(float *, int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","40.5"
"1","42","quantize_int4_kernel(float *, int)","gpu__time_duration.sum","ns","3,000"
"2","42","add","dram__bytes.sum","byte","512"
"2","42","add","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","1"
"2","42","add","gpu__time_duration.sum","nsecond","500"
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: int = 0) -> Path:
    """An ncu that writes down how it was called, prints, and ends so."""
    called = folder / "called.json"
    notes = f"import json, sys\njson.dump(sys.argv[1:], open({str(called)!r}, 'w'))\n"
    code = f"{notes}print({printed!r}, end='')\nsys.exit({status})\n"
    (folder / "ncu").write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return called


def test_a_small_process_of_our_kernels_runs_under_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = stand_in(tmp_path, monkeypatch, TABLE)
    launched = ncu.collect("int4:64", 180_224)
    words = json.loads(called.read_text(encoding="utf-8"))
    at = words.index(sys.executable)
    assert words[at:] == [sys.executable, "-m", "dtrain.codec_alone", "int4:64", "180224"]
    assert words[words.index("--metrics") + 1].split(",") == [
        "dram__bytes.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__time_duration.sum",
    ]
    assert "--csv" in words[:at]
    assert words[words.index("--profile-from-start") + 1] == "off", "what is compiled first is not measured"
    assert words[words.index("--print-units") + 1] == "base"
    # 4 MB in 4 us; 80.5 % for one of them and 40.5 % for three.
    expected = ["quantize_int4_kernel(float *, int)", "2", "2.0", "2.000", "1000.0", "50.5"]
    assert ncu.rows(launched) == [expected, ["add", "1", "0.5", "0.001", "1.0", "1.0"]]
    assert len(ncu.HEADER) == len(expected)


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n\n", 1, "ncu ended with exit status 1: ==ERROR== ERR_NVGPUCTRPERM"),
        ("", 9, "ncu ended with exit status 9: it said nothing"),
        ("==WARNING== No kernels were profiled.\n", 0, "ncu counted no kernel"),
        (TABLE.replace('"byte"', '"Kbyte"'), 0, "ncu gives dram__bytes.sum in 'Kbyte', which is not understood; allowed: byte"),
        (TABLE.replace('"512"', '"n/a"'), 0, "ncu gives dram__bytes.sum = 'n/a': this GPU does not count it"),
        (TABLE.rpartition('"2"')[0], 0, "ncu counted no gpu__time_duration.sum of kernel add"),
    ],
)
def test_what_ncu_cannot_do_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: int, said: str
) -> None:
    stand_in(tmp_path, monkeypatch, printed, status)
    with pytest.raises(ValueError, match="ncu") as refused:
        ncu.collect("int4:64", 8)
    assert str(refused.value).startswith(said)


def test_without_ncu_or_a_gpu_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no ncu on the PATH"):
        ncu.check()
    stand_in(tmp_path, monkeypatch, TABLE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="this machine shows none; leave --ncu out"):
        ncu.check()
