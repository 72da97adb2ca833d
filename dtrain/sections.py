"""What can each section of a job file say, and what does each key mean? ``sections_sync.py`` has [sync].

Every key is documented here, where it is defined. Pure: no torch, no clock, no environment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dtrain import units
from dtrain.methods import InnerOptimizer
from dtrain.section import Section
from dtrain.sections_each import Each, Engine

Precision = Literal["fp32", "bf16"]

NETWORK = ("jitter", "loss", "links")
"""Keys of [sim] that say what a link is like."""


class JobSection(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run folder's name under dir")
    seed: int = Field(0, ge=0, lt=2**31, description="seeds weights, data order and random pairs")
    dir: str = Field("runs", min_length=1, description="folder that holds the run folders")


class Islands(Section):
    count: int = Field(2, ge=1, le=1024, description="number of islands")
    ranks: int = Field(1, ge=1, le=1024, description="processes (GPUs) on each island")
    engine: Engine = Field(
        "ddp",
        description="inside an island: ddp, each rank has the whole model; fsdp, a part of every parameter (FSDP2); pipeline, a "
        "stage of its layers; fsdp+pipeline, a part of each parameter of a stage; deepspeed, a part of what its ZeRO shards",
    )
    deepspeed: str | None = Field(
        None, min_length=1, examples=["zero2.json"],
        description="of engine deepspeed: its JSON file, which says stage (1, 2 or 3), bf16 and offload",
    )
    shards: int | None = Field(
        None, ge=1,
        description="of engine fsdp: ranks that share a copy of the model (HSDP where they are fewer); left out: all; of "
        "fsdp+pipeline: ranks that share a stage",
    )
    stages_per_rank: int = Field(
        1, ge=1, le=1024,
        description="of engine pipeline: stages of each rank; 1: the schedule is 1F1B; more: interleaved 1F1B, which idles less "
        "and sends more",
    )
    recompute: bool = Field(
        False, description="of engine fsdp: activation checkpointing: keep of each block its input alone, and compute it again"
    )
    shard: Literal["iid", "by_file"] = Field(
        "iid", description="iid: every island samples all files; by_file: file k belongs to island k mod count"
    )
    start: Literal["same", "own"] = Field(
        "same", description="same: from one model; own: every island from weights of its own seed, never in sync"
    )
    speeds: list[float] = Field(
        [], examples=[[1, 0.5]],
        description="of each island beside the fastest's 1: one of 0.5 trains in half of the steps; empty: all alike",
    )
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0 shares the machine's cores evenly")
    max_restarts: int = Field(3, ge=0, description="how often the launcher restarts an island that was killed")
    each: list[Each] | None = Field(
        None, min_length=1,
        description="a table [[islands.each]] an island, island 0's first, where they differ or are not all here; count is their "
        "number",
    )

    @property
    def shards_of_stage(self) -> int:
        """Ranks that share the parameters of a stage."""
        return self.shards or 1 if self.engine == "fsdp+pipeline" else 1

    @model_validator(mode="before")
    @classmethod
    def _count_is_the_number_of_tables(cls, said: Any) -> Any:
        if isinstance(said, dict) and isinstance(said.get("each"), list) and "count" not in said:
            return said | {"count": len(said["each"])}
        return said

    @model_validator(mode="after")
    def _a_table_an_island(self) -> Islands:
        if self.each is not None and len(self.each) != self.count:
            raise ValueError(
                f"islands.count = {self.count} with {len(self.each)} tables [[islands.each]]; write a table for each island, or "
                "leave count out"
            )
        return self


class ModelSection(Section):
    name: Literal["gpt"] = Field("gpt", description="the model, where neither factory nor hf names another")
    factory: str = Field(
        "", description='a function of your own that makes the model: "FILE.py:FUNCTION" or "package.module:FUNCTION"'
    )
    arguments: dict[str, Any] = Field(
        {}, examples=[{"width": 64}], description="keywords that factory is called with, behind the size of the vocabulary"
    )
    hf: str = Field(
        "",
        description="a causal language model of transformers: a folder or config.json of config alone (random weights by "
        "job.seed), a folder with weights, or a name on the Hugging Face hub",
    )
    layers: int = Field(3, ge=1, description="blocks of attention and MLP")
    width: int = Field(64, ge=8, description="features of the residual stream; a multiple of 2 * heads")
    heads: int = Field(4, ge=1, description="attention heads; width / heads features each")
    context: int = Field(128, ge=2, description="tokens a sequence")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSection:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width = {self.width} does not divide into {self.heads} heads of an even size; "
                f"use a multiple of {2 * self.heads}"
            )
        return self

    @property
    def theirs(self) -> str:
        """The key that names a model which is not the project's own; empty: gpt."""
        return "factory" if self.factory else "hf" if self.hf else ""

    @field_validator("arguments")
    @classmethod
    def _can_be_written(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_times("model.arguments", value)
        return value

    @model_validator(mode="after")
    def _one_model(self) -> ModelSection:
        if self.arguments and not self.factory:
            said = f"model.arguments = {self.arguments!r} has no effect without model.factory"
            raise ValueError(f"{said}; set that, or leave it out")
        if self.factory and self.hf:
            raise ValueError(f"model.hf = {self.hf!r} is another model than model.factory = {self.factory!r}; leave one out")
        for key in ("layers", "width", "heads"):
            value = getattr(self, key)
            if self.theirs and value != type(self).model_fields[key].default:
                instead = "say it in model.arguments" if self.factory else "leave it out"
                raise ValueError(f"model.{key} = {value} has no effect with model.{self.theirs}; {instead}")
        return self


def _refuse_times(key: str, value: object) -> None:
    """TOML has dates, which no model is made of."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_times(f"{key}.{name}", item)
    elif not isinstance(value, str | int | float):
        raise ValueError(f"{key} = {value} is a {type(value).__name__}; use text, numbers, true or false, lists or tables")


class Data(Section):
    source: str = Field(
        "stdlib",
        min_length=1,
        description='"stdlib" (the Python library\'s own source), or a text file, a folder of text, or a token file '
        '(.bin, uint16, or uint32 when named *.u32.bin), or "hf:NAME_OR_PATH:SPLIT:COLUMN", a data set of Hugging Face (train '
        "and text, where these are left out)",
    )
    tokenizer: str = Field(
        "bytes", min_length=1, description='"bytes", or a tokenizer.json of Hugging Face or its folder; of a .bin: what made it'
    )
    streaming: bool = Field(
        False, description="an hf: source is read while training goes on, row after row, and not before; a resume reads it again"
    )

    @model_validator(mode="after")
    def _streams_rows(self) -> Data:
        if self.streaming and not self.source.startswith("hf:"):
            raise ValueError(f'data.streaming = true needs a data.source of "hf:", and has "{self.source}"; leave it out')
        return self


class Train(Section):
    steps: int = Field(3000, ge=1, description="optimizer steps")
    batch: int = Field(4, ge=1, description="sequences an island an optimizer step, over all its ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches that one optimizer step accumulates")
    precision: Precision = Field("fp32", description="bf16 is autocast; master weights stay fp32")
    lr: float = Field(6e-3, gt=0, description="peak learning rate of AdamW")
    optimizer: InnerOptimizer | None = Field(
        None,
        description="muon: Muon for matrices inside the blocks, AdamW for the rest, of one lr; schedule_free: AdamW whose lr "
        "does not fall after its warm-up, and an average of all steps is the model",
    )
    warmup: int = Field(100, ge=0, description="steps of linear warm-up; cosine to a tenth of lr follows")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on matrices only")
    moments_every: int | None = Field(
        None, ge=1, description="s of AccumAdam: AdamW's moments follow the mean gradient of so many steps; 1 is AdamW"
    )
    sam_rho: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="SAM: the gradient is taken so far up its own direction; 0: in place"
    )
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 never clips")
    merge: Literal["mean", "variance_corrected"] = Field(
        "mean", description="the last exchange; variance_corrected is for islands.start = \"own\": a mean loses their variance"
    )
    eval_every: int = Field(250, ge=0, description="steps between evaluations of each island's own model; 0: at the end")
    eval_merged: bool = Field(
        False, description="evaluate the islands' mean too, each time: what a merge would give; an exact average, waited for"
    )
    consensus_every: int = Field(
        0, ge=0, description="steps between measurements of how far apart the islands are; each is an exact average, waited for"
    )
    checkpoint_every: int = Field(500, ge=0, description="steps between checkpoints, put off while rounds fly; 0: none")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


class LinkSection(Section):
    transport: Literal["c10d", "nccl"] = Field("c10d", description="c10d: gloo over TCP; nccl: near, static GPU links")
    rate: str = Field(
        "none", examples=["10mbit"], description='an island\'s uplink, shared by its ranks: "10mbit", "1gbit", or "none"'
    )
    rtt: str = Field("0ms", examples=["40ms"], description='round-trip time added to the link, "40ms"')
    timeout_s: float = Field(300.0, gt=0, description="how long an island may send nothing; more than a bucket takes on a link")
    port: int = Field(0, ge=0, lt=65536, description="port of the meeting point; 0 takes a free one")
    interface: str = Field("", description="network interface that carries the link; empty: loopback")
    advertise: str = Field(
        "", description="host name or address of the meeting point as other islands see it; empty: 127.0.0.1"
    )

    @field_validator("rate")
    @classmethod
    def _rate_parses(cls, value: str) -> str:
        units.bits_per_s(value)
        return value

    @field_validator("rtt")
    @classmethod
    def _rtt_parses(cls, value: str) -> str:
        units.seconds(value)
        return value


class Sim(Section):
    """``dtrain sim`` on a virtual clock; rate and rtt are [link]'s."""

    problem: Literal["gpt", "quadratic", "consensus", "scattered", "ridge", "logistic"] = Field(
        "gpt",
        description="gpt: [model] is trained, as dtrain run does; quadratic: each island a quadratic loss of its own, by plain "
        "SGD of train.lr; consensus: no gradients, islands begin apart; scattered, ridge, logistic: strongly convex, for clock "
        '"poisson"',
    )
    numel: int = Field(10_000, ge=1, description="parameters of every problem but gpt")
    clock: Literal["steps", "poisson"] = Field(
        "steps",
        description="poisson: gradients, and meetings of two, come at random times, one gradient an island and unit of time, and "
        "train.steps units; for dpsgd (pairs that average), a2cid2 and dadao",
    )
    meetings: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="of an island a unit of time, of clock poisson; left out: 1, for dadao the fewest that it may have",
    )
    rates: Literal["uniform", "sdp"] = Field(
        "uniform", description="which edges meet more often, of clock poisson; sdp: as dadao's theory likes it best, by cvxpy"
    )
    step_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="virtual seconds that an island computes a step; 0: no clock with problem gpt"
    )
    step_noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="sigma of the lognormal factor, 1 in the mean, that each step's seconds get"
    )
    stragglers: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="slow islands, drawn by the seed: their number, or below 1 their share"
    )
    straggler_factor: float = Field(2.0, ge=1, allow_inf_nan=False, description="how many times longer they compute")
    jitter: str = Field("0ms", examples=["5ms"], description="mean of the exponential delay that each wire gets besides rtt / 2")
    loss: float = Field(0.0, ge=0, lt=1, description="share of packets that are lost, and sent again an rtt later")
    links: str = Field(
        "", examples=["0-1:10mbit/80ms"],
        description='rate and rtt between two islands where they are others: "0-1:10mbit/80ms, 0-2:none/5ms"',
    )
    processes: int = Field(
        0, ge=0, description="that share the islands of a virtual clock; 0: as many of this machine's cores as make a run shorter"
    )

    @field_validator("jitter")
    @classmethod
    def _jitter_parses(cls, value: str) -> str:
        units.seconds(value)
        return value

    @field_validator("links")
    @classmethod
    def _links_parse(cls, value: str) -> str:
        units.links(value)
        return value

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Sim:
        for key, needs, met in (
            ("numel", 'sim.problem, "quadratic" say', self.problem != "gpt"),
            ("clock", 'sim.problem, "quadratic" say', self.problem != "gpt"),
            ("meetings", 'sim.clock = "poisson"', self.clock == "poisson"),
            ("rates", 'sim.clock = "poisson"', self.clock == "poisson"),
            *((key, 'sim.clock = "steps"', self.clock == "steps") for key in ("step_s", "processes", *NETWORK)),
            ("step_noise", "sim.step_s", self.step_s > 0),
            ("stragglers", "sim.step_s", self.step_s > 0),
            ("straggler_factor", "sim.stragglers", self.stragglers > 0),
            *((key, "sim.step_s, which starts a virtual clock", self.has_clock) for key in ("processes", *NETWORK)),
        ):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and not met:
                raise ValueError(f"sim.{key} = {value!r} has no effect without {needs}; set that, or leave it out")
        if self.problem in ("scattered", "ridge", "logistic") and self.clock != "poisson":
            raise ValueError(f'sim.problem = "{self.problem}" is for sim.clock = "poisson"; set that, or use "quadratic"')
        return self

    @property
    def has_clock(self) -> bool:
        return self.problem != "gpt" or self.step_s > 0
