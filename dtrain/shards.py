"""What of a tensor does this rank hold? All of a plain one; of a DTensor its part."""

from __future__ import annotations

from torch import Tensor, nn


def is_part(x: Tensor) -> bool:
    """Whether it is one of torch's DTensors, which FSDP makes of parameters (torch.distributed.tensor is slow to import, and need
    not be where no DTensor is)."""
    return hasattr(x, "to_local")


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Parameter]]:
    """By the names that they have without activation checkpointing, whose wrappers would stand among them."""
    return [(_plain(name), p) for name, p in model.named_parameters(remove_duplicate=remove_duplicate)]


def named_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """As ``named_parameters``."""
    return [(_plain(name), b) for name, b in model.named_buffers()]


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def local(x: Tensor) -> Tensor:
    """This rank's part, which shares its memory."""
    return x.to_local() if is_part(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def whole(x: Tensor) -> Tensor:
    """All of it, on every rank; all ranks call this."""
    return x.full_tensor() if is_part(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def placed_as(like: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor that is laid out as ``like``, as such a tensor; ``part`` itself where that is a plain one."""
    if not is_part(like) or part.shape != local(like).shape:
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]
    return DTensor.from_local(
        part.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def first_element(x: Tensor) -> int:
    """Where this rank's part begins within the flat tensor, in elements; 0 of a plain one. Raises ValueError for a tensor that is
    cut along another dimension than its first: that part is no range."""
    if not is_part(x):
        return 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = x.device_mesh, x.placements  # pyright: ignore[reportAttributeAccessIssue]
    cut = next((p for p in placements if not p.is_replicate() and p != Shard(0)), None)
    if cut is not None:
        raise ValueError(
            f"a parameter of shape {tuple(x.shape)} is placed as {cut}; use fully_shard with Shard(0), as it does by itself"
        )
    _, offset = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    return offset[0] * (x.numel() // x.shape[0]) if x.ndim and x.shape[0] else 0
