"""What does a child process of the harness run? Named functions, one after the other, each in a link of its own."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys

import torch.distributed as dist
from torch import Tensor, nn

from dtrain.launch.processes import die_with_parent

RESULT, SCENARIO = "RESULT ", "SCENARIO "
"""What a line of stdout with a value, and a line of stderr before a scenario, begin with."""


def report(name: str, value: object) -> None:
    """Hand a JSON value to the test."""
    print(RESULT + json.dumps({name: value}), flush=True)


def digest(*tensors: Tensor) -> str:
    """Equal for equal bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Parameters and buffers, by the bits."""
    return digest(*model.state_dict().values())


def island() -> int:
    return int(os.environ["DTRAIN_ISLAND"])


def main(calls: list[tuple[str, str, str, dict[str, object]]]) -> None:
    die_with_parent()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    for epoch, (name, module, function, arguments) in enumerate(calls):
        os.environ["DTRAIN_EPOCH"] = str(epoch)
        print(SCENARIO + name, file=sys.stderr, flush=True)
        report(name, getattr(importlib.import_module(module), function)(**arguments))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
