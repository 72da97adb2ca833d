"""A Slurm of one machine, as far as a script of ``dtrain slurm`` sees it, and a dtrain that only says how it was called.

Runs under the names sbatch, srun, scontrol, ip, dtrain and python. Each call adds a line of JSON to the file CALLS. ``srun``
starts its command once a node, with what Slurm says to a task. The launcher ends when as many tasks have begun as TASKS says.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
calls = Path(os.environ["CALLS"])
SAID = ("DTRAIN_", "SLURM", "GLOO_", "OMP_", "TORCH_ELASTIC")


def note() -> None:
    environment = {key: value for key, value in os.environ.items() if key.startswith(SAID)}
    call = {"name": name, "arguments": arguments, "environment": environment, "cwd": os.getcwd()}
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\n")


def tasks_begun() -> int:
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    return sum("SLURM_PROCID" in call["environment"] for call in called)


def launcher() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Path(os.environ["RUN"])
    run.mkdir(parents=True, exist_ok=True)
    (run / "job.toml").touch()
    while tasks_begun() < int(os.environ["TASKS"]):
        time.sleep(0.02)
    if "COMMITS" in os.environ:
        (run / "checkpoints" / "step_00000009").mkdir(parents=True)
        (run / "checkpoints" / "step_00000009" / "COMMIT").touch()
    if "HANGS" in os.environ:
        (run / "hangs").touch()
        time.sleep(60)
    return int(os.environ.get("ENDS", "0"))


def srun() -> int:
    at = next(k for k, word in enumerate(arguments) if not word.startswith("--"))
    options = dict(word.removeprefix("--").split("=", 1) for word in arguments[:at])
    group = options.get("het-group")
    nodes = (options.get("nodelist") or os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"]).split(",")
    assert len(nodes) == int(options["nodes"]) == int(options["ntasks"]), options
    tasks: list[subprocess.Popen[bytes]] = []
    for k, node in enumerate(nodes):
        place = {"SLURM_NODEID": str(k), "SLURM_PROCID": str(k), "SLURM_NTASKS": str(len(nodes)), "SLURMD_NODENAME": node}
        with Path(options["output"].replace("%N", node)).open("ab") as log:
            tasks.append(subprocess.Popen(arguments[at:], env=os.environ | place, stdout=log, stderr=log))
    return max(task.wait() for task in tasks)


def island() -> int:
    """Also starts its torchruns, as DTRAIN_TORCHRUN says and dtrain.launch.islands does."""
    folder = Path(os.environ["RUN"] + "-island" + arguments[arguments.index("--island") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").touch()
    if "DTRAIN_TORCHRUN" in os.environ:
        words = [*shlex.split(os.environ["DTRAIN_TORCHRUN"]), "--rdzv-id=epoch0"]
        return subprocess.run(words, env=os.environ | {"DTRAIN_PARENT": "1"}, check=False).returncode
    return int(os.environ.get("ISLANDS_END", "0"))


note()
match name, arguments[:1]:
    case "scontrol", ["show"] if arguments[1] == "job":
        print(f"   PreemptEligibleTime=2026-11-27T10:00:00 PreemptTime={os.environ.get('PREEMPTED', 'None')}")
        status = 0
    case "scontrol", ["show"]:
        print("\n".join(arguments[-1].split(",")))
        status = 0
    case "ip", _:
        print(f"2: {arguments[-1]}    inet 10.0.0.7/24 brd 10.0.0.255 scope global {arguments[-1]}")
        status = 0
    case "sbatch", _:
        Path(os.environ["SUBMITTED"]).write_text(sys.stdin.read())
        print("4711;here")
        status = 0
    case "srun", _:
        status = srun()
    case "dtrain", _ if "--island" not in arguments:
        status = launcher()
    case "dtrain", _:
        status = island()
    case _:
        status = 0
sys.exit(status)
