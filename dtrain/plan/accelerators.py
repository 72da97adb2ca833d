"""How fast are GPUs that one has not got? What their makers say, and how much of it training usually reaches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accelerator:
    flop_per_s: float
    """Dense, of the tensor cores, bf16 in and fp32 added up."""
    memory_bytes_per_s: float
    memory_bytes: float
    source: str


ACCELERATORS = {
    "h100": Accelerator(989e12, 3.35e12, 80e9, "NVIDIA H100 data sheet, SXM5"),
    "h200": Accelerator(989e12, 4.8e12, 141e9, "NVIDIA H200 data sheet, SXM"),
    "b200": Accelerator(2250e12, 8e12, 180e9, "NVIDIA DGX B200 data sheet, an eighth; half its FLOP/s, which are sparse"),
    "a100": Accelerator(312e12, 2.039e12, 80e9, "NVIDIA A100 data sheet, SXM4 80 GB"),
    "a40": Accelerator(149.7e12, 696e9, 48e9, "NVIDIA A40 data sheet"),
    "l40s": Accelerator(362e12, 864e9, 48e9, "NVIDIA L40S data sheet"),
    "t4": Accelerator(65e12, 320e9, 16e9, "NVIDIA T4 data sheet; fp16, as it has no bf16"),
    "rtx4090": Accelerator(165.2e12, 1008e9, 24e9, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "mi300x": Accelerator(1307.4e12, 5.3e12, 192e9, "AMD Instinct MI300X data sheet"),
}

MFU = 0.4
"""Model FLOPs utilisation: large models report 38 to 46 % (Llama 3, arXiv 2407.21783, table 4; PaLM, arXiv 2204.02311, table 3).
Small ones, whose kernels end before the next is launched, reach far less."""
MEMORY_SHARE = 0.7
"""Of the memory's bandwidth that passes over parameters reach."""
_OPTIMIZER_BYTES = 28
"""A parameter of fp32 and its two moments are read and written, its gradient is read."""


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one rank."""

    tokens: int
    parameters: int
    multiplied: int
    """Parameters that a token is multiplied with: all but the embedding's table."""
    layers: int
    width: int
    context: int

    @property
    def flop(self) -> float:
        """6 a token and parameter, forward and backward, and 12 layers x width x context of attention (PaLM, appendix B)."""
        return self.tokens * (6.0 * self.multiplied + 12.0 * self.layers * self.width * self.context)


def accelerator(name: str) -> Accelerator:
    """Raises ValueError for one that is not known."""
    key = name.lower().replace("-", "").replace("_", "")
    if key not in ACCELERATORS:
        raise ValueError(f"--gpu {name} is not known; use one of {', '.join(ACCELERATORS)}, or give --step-time")
    return ACCELERATORS[key]


def step_s(work: Work, gpu: Accelerator, mfu: float = MFU) -> float:
    """The FLOPs at that utilisation, then the optimizer's pass over the parameters."""
    return work.flop / (gpu.flop_per_s * mfu) + _OPTIMIZER_BYTES * work.parameters / (gpu.memory_bytes_per_s * MEMORY_SHARE)
