"""How fast are GPUs that one has not got? What their makers say, and how much of it training usually reaches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accelerator:
    flop_per_s: float
    """Dense, of the tensor cores, bf16 in and fp32 added up."""
    fp32_flop_per_s: float | None
    """In fp32 throughout, without TF32, which torch does not use unless it is told to; None: its maker does not say."""
    memory_bytes_per_s: float
    memory_bytes: float
    intra_bytes_per_s: float
    """To other GPUs of its machine and from them at once: NVLink, or PCIe where it has none."""
    source: str


ACCELERATORS = {
    "h100": Accelerator(989e12, 67e12, 3.35e12, 80e9, 450e9, "NVIDIA H100 data sheet, SXM5"),
    "h200": Accelerator(989e12, 67e12, 4.8e12, 141e9, 450e9, "NVIDIA H200 data sheet, SXM"),
    "b200": Accelerator(
        2250e12, None, 8e12, 180e9, 900e9, "NVIDIA DGX B200 data sheet, an eighth; half its FLOP/s, which are sparse"
    ),
    "a100": Accelerator(312e12, 19.5e12, 2.039e12, 80e9, 300e9, "NVIDIA A100 data sheet, SXM4 80 GB"),
    "a40": Accelerator(149.7e12, 37.4e12, 696e9, 48e9, 32e9, "NVIDIA A40 data sheet"),
    "l40s": Accelerator(362e12, 91.6e12, 864e9, 48e9, 32e9, "NVIDIA L40S data sheet"),
    "t4": Accelerator(65e12, 8.1e12, 320e9, 16e9, 16e9, "NVIDIA T4 data sheet; fp16, as it has no bf16"),
    "rtx4090": Accelerator(165.2e12, 82.6e12, 1008e9, 24e9, 32e9, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "mi300x": Accelerator(1307.4e12, 163.4e12, 5.3e12, 192e9, 448e9, "AMD Instinct MI300X data sheet"),
}

MFU = 0.4
"""Model FLOPs utilisation: large models report 38 to 46 % (Llama 3, arXiv 2407.21783, table 4; PaLM, arXiv 2204.02311, table 3).
Small ones, whose kernels end before the next is launched, reach far less."""
MEMORY_SHARE = 0.7
"""Of the memory's bandwidth that passes over parameters reach."""
INTRA_SHARE = 0.7
"""Of the bandwidth between GPUs that an all-reduce of megabytes reaches; an assumption."""
_BACKWARD = 2 / 3
"""Of a step's FLOPs, behind which DDP hides what it exchanges inside an island."""
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
    frozen: int = 0
    """Of the parameters, those that no gradient is asked of."""

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen

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


def peak(gpu: Accelerator, name: str, precision: str) -> float:
    """FLOP/s of a forward pass in a job's train.precision. Raises ValueError where it is not known."""
    if precision == "bf16":
        return gpu.flop_per_s
    if gpu.fp32_flop_per_s is None:
        raise ValueError(
            f'--gpu {name}: its rate in train.precision = "{precision}" is not known; set train.precision=bf16, or use '
            "--step-time"
        )
    return gpu.fp32_flop_per_s


def step_s(work: Work, gpu: Accelerator, flop_per_s: float, num_ranks: int = 1, intra_bytes_per_s: float = 1.0) -> float:
    """The FLOPs at that rate, or DDP's ring all-reduce of fp32 gradients where it takes longer than it can hide behind them; then
    the optimizer's pass over the parameters; of trained ones alone."""
    compute_s = work.flop / flop_per_s
    ring_s = 2 * (num_ranks - 1) / num_ranks * 4 * work.trained / intra_bytes_per_s
    passes_s = _OPTIMIZER_BYTES * work.trained / (gpu.memory_bytes_per_s * MEMORY_SHARE)
    return compute_s + max(0.0, ring_s - _BACKWARD * compute_s) + passes_s
