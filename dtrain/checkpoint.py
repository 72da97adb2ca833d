"""How is a run kept, and when is a checkpoint a checkpoint?

    checkpoints/step_00000500/island0/   a torch.distributed.checkpoint folder, with a manifest of its files
    checkpoints/step_00000500/COMMIT     written when all islands' folders are there

An island writes to a temporary name and renames. A step without COMMIT is none: resume and pruning look at committed
steps only. All state is tensors; nothing is unpickled but DCP's own index, whose hash the manifest holds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dtrain.optim import ScheduleFreeAdamW, average_of
from dtrain.shards import local, named_parameters, placed_as

_MANIFEST = "manifest.json"
_NAMES = ".names"
"""Behind an optimizer's name."""
_OF_THE_MODEL = re.compile(rf"model\..*|clock\.time_s|(.*\.)?optim\d*({re.escape(_NAMES)}|\.groups|\.state\.\d+\.[zx])")
"""Keys of what ``_model_of`` reads, z and x being Schedule-Free's alone, and of the training's time."""
_ONE_WRITES = threading.Lock()
"""The islands of ``dtrain sim`` are threads, and Python's warning filters belong to the process."""


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def island_folder(run: Path, step: int, island: int) -> Path:
    return step_folder(run, step) / f"island{island}"


def save_island(run: Path, step: int, island: int, tensors: dict[str, Tensor], *, rank: int, num_ranks: int) -> None:
    """Write an island's checkpoint. All its ranks call this; keys that several ranks hold are written once."""
    final = island_folder(run, step, island)
    temporary = run / "checkpoints" / f".writing-{final.parent.name}-{final.name}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier(num_ranks)
    with _alone_and_whole(f"checkpoint {final} could not be written; is the disk full?"):
        save(tensors, checkpoint_id=temporary, no_dist=num_ranks == 1)
    _barrier(num_ranks)
    if rank == 0:
        files = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(final)
    _barrier(num_ranks)


def load_island(run: Path, step: int, island: int, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of an island's checkpoint whose keys are wanted, on the CPU. Raises ValueError with one line where it is
    damaged."""
    folder = island_folder(run, step, island)
    _verify(folder)
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if isinstance(entry, TensorStorageMetadata) and wanted(key)
    }
    with _alone_and_whole(f"checkpoint {folder} could not be read"):
        load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def load_parts(run: Path, step: int, island: int, into: dict[str, Tensor]) -> None:
    """Read the tensors of an island's checkpoint into these, of each the part that this rank holds."""
    folder = island_folder(run, step, island)
    with _alone_and_whole(f"checkpoint {folder} could not be read"):
        load(into, checkpoint_id=folder, no_dist=True)


def shapes_of_island(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the model's tensors in an island's checkpoint."""
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key.removeprefix("model."): tuple(entry.size)
        for key, entry in index.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def newest_commit(run: Path) -> int | None:
    """The newest step that all islands have written, or None."""
    steps = committed(run)
    return steps[-1] if steps else None


def commit_islands(run: Path, step: int) -> int:
    """Of how many islands a committed step is."""
    mark = step_folder(run, step) / "COMMIT"
    try:
        return int(json.loads(mark.read_text(encoding="utf-8"))["islands"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{mark} is damaged; remove {mark.parent} to resume from an earlier checkpoint") from None


def commit_ready(run: Path, num_islands: int, keep: int, elsewhere: Mapping[int, Set[int]] | None = None) -> None:
    """Write COMMIT for each step that all islands have written; then drop all but the newest ``keep`` committed
    steps. ``elsewhere``: of islands whose files lie on other hosts, the steps that each has written there."""
    far = {} if elsewhere is None else elsewhere
    for step in sorted(written(run).union(*far.values())):
        folder = step_folder(run, step)
        complete = all(step in far[i] if i in far else (folder / f"island{i}" / _MANIFEST).exists() for i in range(num_islands))
        if complete:
            mark_commit(run, step, num_islands)
    for step in committed(run)[:-keep]:
        _drop(run, step)


def written(run: Path, island: int | None = None) -> set[int]:
    """The steps that an island has written whole; those that any has begun to, where none is named."""
    folders = (run / "checkpoints").glob("step_*" if island is None else f"step_*/island{island}/{_MANIFEST}")
    return {int((p if island is None else p.parents[1]).name.removeprefix("step_")) for p in folders}


def committed(run: Path) -> list[int]:
    """The steps that are a job's checkpoints, the newest last."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*/COMMIT"))


def mark_commit(run: Path, step: int, num_islands: int) -> None:
    """COMMIT for a step that all islands are known to have written; nothing where it is there."""
    folder = step_folder(run, step)
    if not (folder / "COMMIT").exists():
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / ".COMMIT"
        mark.write_text(json.dumps({"islands": num_islands}), encoding="utf-8")
        mark.rename(folder / "COMMIT")


def follow_commits(run: Path, island: int, steps: Sequence[int], num_islands: int) -> None:
    """On the host of one island: mark what the launcher has committed, and drop what is older than all that it keeps."""
    have = written(run, island)
    for step in steps:
        if step in have:
            mark_commit(run, step, num_islands)
    for step in written(run):
        if steps and step < min(steps):
            _drop(run, step)


def _drop(run: Path, step: int) -> None:
    (step_folder(run, step) / "COMMIT").unlink(missing_ok=True)
    shutil.rmtree(step_folder(run, step))


def discard_partial(run: Path) -> None:
    """Remove what no resume will use: half-written folders, and steps that not all islands have."""
    for folder in (run / "checkpoints").glob(".writing-*"):
        shutil.rmtree(folder)
    for folder in (run / "checkpoints").glob("step_*"):
        if not (folder / "COMMIT").exists():
            shutil.rmtree(folder)


def merge_for_resume(run: Path, step: int, num_islands: int) -> None:
    """Write the mean of the islands' weights at a committed step as RUN/init.safetensors, with the slowest one's time: of the
    models that training stands for (``at_averages``), as the merge at the end has it. New islands have no parameters of their own
    yet: of those too it is the mean."""
    sums, dtypes, time_s = dict[str, Tensor](), dict[str, torch.dtype](), 0.0
    for island in range(num_islands):  # one after the other, and no more of each: all state of all is many times as much
        saved = load_island(run, step, island, lambda key: _OF_THE_MODEL.fullmatch(key) is not None)
        time_s = max(time_s, float(saved.get("clock.time_s", 0.0)))
        for name, x in _model_of(saved).items():
            dtypes[name] = x.dtype
            sums.setdefault(name, torch.zeros_like(x, dtype=torch.float64)).add_(x)
    weights = {name: sums.pop(name).div_(num_islands).to(dtype) for name, dtype in dtypes.items()}
    save_weights(run / "init.safetensors", weights, step=step, more={"time_s": repr(time_s), "islands": str(num_islands)})


def _model_of(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an island's training stands for: its parameters, but x of those that Schedule-Free steps."""
    weights = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    for optimizer in (key.removesuffix(_NAMES) for key in saved if key.endswith(_NAMES)):
        if optimizer.startswith("shard"):
            raise ValueError(
                "the averages of Schedule-Free lie in parts in these checkpoints, and only islands of their own number can go on "
                "from them; resume with the same islands.count"
            )
        names = _read_json(saved[optimizer + _NAMES])
        for group in _read_json(saved[f"{optimizer}.groups"]):
            for index in group["params"]:
                at = f"{optimizer}.state.{index}."
                if f"{at}x" in saved:  # what never had a gradient is its own average
                    state = {key: saved[at + key] for key in ("z", "x")}
                    average = average_of(weights[names[index][0]], state, group["betas"][0])
                    weights |= dict.fromkeys(names[index], average)
    return weights


def merged_note(path: Path) -> str:
    """A line that says what a start from merged weights leaves behind."""
    about = _metadata(path)
    return (
        f"starting from the merged weights of {about['islands']} islands at step {about['step']}; "
        "dropped: inner optimizer state, anchors, outer momentum, residuals, rounds in flight"
    )


def save_weights(path: Path, weights: Mapping[str, Tensor], *, step: int, more: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all; ``more`` joins the step in its metadata, and the format that transformers asks
    for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    # Parameters are views of one flat storage, which safetensors does not take: hence the clones.
    clones = {k: v.detach().cpu().clone() for k, v in weights.items()}
    try:
        save_file(clones, temporary, metadata={"format": "pt", "step": str(step), **(more or {})})
    except SafetensorError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written; is the disk full? ({e})") from e
    temporary.rename(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    with _undamaged(path):
        return load_file(path)


def weights_step(path: Path) -> int:
    """The step at which ``save_weights`` wrote the file."""
    return int(_metadata(path)["step"])


def weights_time_s(path: Path) -> float:
    """Seconds of the training loop that merged weights stand for; 0 where nobody noted them."""
    return float(_metadata(path).get("time_s", "0"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """A torch optimizer's state as flat tensors; hyper-parameters are JSON in a byte tensor."""
    saved = optimizer.state_dict()
    out, numbers = {f"{name}.groups": _as_json(saved["param_groups"])}, dict[str, dict[str, float]]()
    for index, state in saved["state"].items():
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        out |= {f"{name}.state.{index}.{key}": local(value) for key, value in tensors.items()}
        if len(tensors) < len(state):  # DeepSpeed's optimizers count in plain numbers
            numbers[str(index)] = {key: value for key, value in state.items() if key not in tensors}
    return out | ({f"{name}.numbers": _as_json(numbers)} if numbers else {})


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, name: str, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}.state."):
            index, field = key.removeprefix(f"{name}.state.").split(".", 1)
            state.setdefault(int(index), {})[field] = value
    groups = _read_json(tensors[f"{name}.groups"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        state[index] = {key: value if key == "step" else placed_as(parameters[index], value) for key, value in values.items()}
    numbers = _read_json(tensors[f"{name}.numbers"]) if f"{name}.numbers" in tensors else {}
    whole = {index: {**values, **numbers.get(str(index), {})} for index, values in state.items()}
    optimizer.load_state_dict({"state": whole, "param_groups": groups})


def optimizers_tensors(optimizers: Sequence[torch.optim.Optimizer], prefix: str = "") -> dict[str, Tensor]:
    """Of a rank's, in their order: "optim", "optim1" and so on, each behind ``prefix``."""
    each = [optimizer_tensors(optimizer, prefix + _name(k)) for k, optimizer in enumerate(optimizers)]
    return {key: value for tensors in each for key, value in tensors.items()}


def averaged_names(optimizers: Sequence[torch.optim.Optimizer], model: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Beside ``optimizers_tensors``: the names of the parameters (several of one that is tied), in the order of their numbers
    there, whose averages are the model. Nothing of other optimizers."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, p in named_parameters(model, remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return {
        prefix + _name(k) + _NAMES: _as_json([names[p] for group in optimizer.param_groups for p in group["params"]])
        for k, optimizer in enumerate(optimizers)
        if isinstance(optimizer, ScheduleFreeAdamW)
    }


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    for k, optimizer in enumerate(optimizers):
        load_optimizer_tensors(optimizer, prefix + _name(k), tensors)


def _as_json(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _read_json(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _name(k: int) -> str:
    return f"optim{k}" if k else "optim"


def check_same_model(weights: Mapping[str, Tensor], model: torch.nn.Module, where: Path) -> None:
    """Raises ValueError where a checkpoint holds another model."""
    have, want = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (weights, model.state_dict()))
    check_same_shapes(have, want, where)


def check_same_shapes(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """``check_same_model`` by the shapes of a checkpoint's tensors, and of the model's."""
    if want == have:
        return
    name = next(k for k in sorted({*want, *have}) if want.get(k) != have.get(k))
    raise ValueError(
        f"{where} holds another model: {name} has shape {have.get(name, 'none')} there and {want.get(name, 'none')} in this job; "
        "resume with the [model] section it was made with"
    )


def _verify(folder: Path) -> None:
    remedy = f"remove {folder.parent} to resume from an earlier checkpoint"
    manifest = folder / _MANIFEST
    if not manifest.exists():
        raise ValueError(f"checkpoint {folder} is not complete: its {_MANIFEST} is missing; {remedy}")
    try:
        files = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"checkpoint {folder} is damaged: {_MANIFEST} is not what was written; {remedy}") from None
    for name, expected in files.items():
        if not (folder / name).exists():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing; {remedy}")
        if _sha256(folder / name) != expected:
            raise ValueError(f"checkpoint {folder} is damaged: {name} is not what was written; {remedy}")


@contextmanager
def _alone_and_whole(trouble: str) -> Iterator[None]:
    """Around torch's save and load. Their own failure is no Exception, so nobody above would tell it from Ctrl-C; and an
    island of one rank has no process group, which is not worth a warning."""
    with _ONE_WRITES, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as e:
            causes = "; ".join(dict.fromkeys(str(cause) for cause, _ in e.failures.values()))
            raise OSError(f"{trouble} ({causes})") from e


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({e}); remove it, and resume the run") from None


def _metadata(path: Path) -> dict[str, str]:
    with _undamaged(path), safe_open(path, framework="pt") as file:
        return file.metadata()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _barrier(num_ranks: int) -> None:
    if num_ranks > 1:
        dist.barrier()
