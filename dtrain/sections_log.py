"""What can [log] of a job file say? Who else hears of each step's numbers, which ``metrics.jsonl`` always has. Pure."""

from __future__ import annotations

from pydantic import Field

from dtrain.section import Section


class Log(Section):
    tensorboard: bool = Field(False, description="write events below the run's folder too, for: tensorboard --logdir RUN")
    wandb: str = Field("", description="a Weights & Biases project that hears of them too, each island a run; empty: none")
