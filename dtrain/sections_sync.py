"""What can [sync] and its levels say: the eight answers, and what each means? Pure: no torch, no clock, no environment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dtrain import quorum, schedule, topology, units
from dtrain.matrices import check_word
from dtrain.methods import AlgorithmName
from dtrain.own_name import is_own
from dtrain.section import Section


class Answers(Section):
    """The eight answers. A key that is left out takes its recipe's answer."""

    recipe: str | None = Field(None, description="a row that dtrain recipes lists, or FILE.py:ROW, one of your own")
    algorithm: AlgorithmName | None = Field(None, description="what is sent, and how it is applied: a file of dtrain/algorithms")
    topology: str | None = Field(
        None, examples=["ring"],
        description='who talks to whom (gossip methods): a name that `dtrain topology` lists, as "ring", or FILE.py:FUNCTION of '
        "your own",
    )
    graph: str | None = Field(
        None, examples=["barabasi_albert:3"],
        description='the edges of topology "graph", "coloured" and "directed": "barabasi_albert:3", or a file of them',
    )
    server: str | None = Field(
        None, examples=["sampled:2:5"],
        description='rounds that reach beyond the neighbours: after every H others, K islands that are drawn take their mean, '
        '"sampled:K:H" for themselves, "all:K:H" for all',
    )
    participants: int | None = Field(
        None, ge=1, examples=[2],
        description='K islands that are drawn for each round, whose mean all take (outer loops, by reduce = "gather"); none: all',
    )
    every: int | str | None = Field(
        None, examples=[50],
        description='H: optimizer steps between two rounds; "adaptive:H": H at first, fewer as rank = "adaptive:R" falls',
    )
    schedule: str | None = Field(
        None, examples=["budget:20%"],
        description='"every", or a budget that is spent ever faster: "budget:R" rounds in all, "budget:S%" of the steps; a '
        'growth p behind it, "budget:20%:2", makes their density t^p, t without; or "ready": pairs (a2cid2) meet when both are',
    )
    moments: str | None = Field(
        None, examples=["3:6"],
        description='rounds that take AdamW\'s moments along (desloc): "3:6", the first every 3rd, the second every 6th',
    )
    fragments: int | None = Field(None, ge=1, description="parts of the model that take turns; 1 sends all at once")
    codec: str | None = Field(
        None, examples=["int4:64"],
        description='"identity", "bf16", "int8", "int4", "e3m0", "lut4", "sign", with a block size: "int4:64", '
        '"int4:64:stochastic" rounds at random; "topk:64/4096:2": 64 of 4096, 2 bits each; "codebook8": 256 means for 4096; '
        '"dct:32/64": 32 cosines of 64 x 64; or FILE.py:NAME',
    )
    error_feedback: bool | None = Field(None, description="keep what the codec lost and send it with the next round")
    feedback_decay: float | None = Field(
        None, gt=0, le=1, description="beta of error_feedback: the share of what was lost that is kept from round to round"
    )
    reduce: Literal["none", "neighbours", "gather", "all_to_all", "low_rank"] | None = Field(
        None, description="path of the bytes"
    )
    outer: Literal["copy", "sgd", "nesterov", "delayed_nesterov"] | None = Field(None, description="how the mean is applied")
    outer_lr: float | None = Field(None, gt=0, description="learning rate of outer but \"copy\", and of noloco")
    outer_momentum: float | None = Field(None, ge=0, lt=1, description="momentum of outer's nesterovs, and of noloco")
    outer_state: Literal["device", "host"] | None = Field(
        None, description="where an outer loop's anchor, momentum and residuals lie: beside the parameters, or in CPU memory"
    )
    gamma: float | None = Field(None, gt=0, le=1, description="the consensus step size of choco, beer, deepsqueeze, noloco")
    delay: int | Literal["round"] | None = Field(
        None, examples=[5], description='optimizer steps a round may fly before it lands; "round" means every'
    )
    gossip_steps: int | None = Field(None, ge=1, description="gossip steps in a row, of multi_gossip and chebyshev")
    landing: Literal["keep", "eager", "pure", "blend"] | None = Field(None, description="what becomes of progress made in flight")
    alpha: float | None = Field(None, ge=0, lt=1, description="of landing = \"blend\": the share that local parameters keep")
    quorum: int | str | None = Field(
        None, examples=["60%"],
        description='islands that a round (diloco) does not go on without, or "60%" of them; left out: all',
    )
    grace: str | None = Field(
        None, examples=["2s"], description='how long a needed round waits for the others once a quorum\'s wires are here: "2s"'
    )
    bucket_bytes: int | None = Field(
        None, ge=4, description="largest bucket; left out: an eighth of the model, 8 MiB from 64 to 128 MiB, a "
        "sixteenth of a larger one; 64 MiB at most"
    )
    rank: int | str | None = Field(
        None, examples=[32],
        description='r of reduce = "low_rank": a matrix goes as r columns and r rows; "adaptive:R": as few as do, R at most',
    )
    include: list[str] | None = Field(
        None, min_length=1, examples=[["blocks.*"]],
        description='parameters that islands share, as patterns of names: ["blocks.*"]; left out: all',
    )
    exclude: list[str] | None = Field(
        None, min_length=1, examples=[["head.*"]],
        description='parameters that stay each island\'s own, also in the merge (its file has island 0\'s): ["head.*"]',
    )

    @field_validator("topology")
    @classmethod
    def _topology_has_a_name(cls, value: str | None) -> str | None:
        if value is not None and not is_own(value):
            topology.parameter(value)
        return value

    @field_validator("server")
    @classmethod
    def _server_parses(cls, value: str | None) -> str | None:
        if value is not None:
            topology.parse_server(value)
        return value

    @field_validator("schedule")
    @classmethod
    def _schedule_parses(cls, value: str | None) -> str | None:
        if value is not None:
            schedule.parse(value)
        return value

    @field_validator("rank")
    @classmethod
    def _rank_is_some(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            check_word(value)
        elif value is not None and value < 1:
            raise ValueError(f'rank = {value} is not allowed; use 1 or more, or "adaptive:32"')
        return value

    @field_validator("every")
    @classmethod
    def _every_is_some(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            schedule.steps_at_first(value)
        elif value is not None and value < 1:
            raise ValueError(f'every = {value} is not allowed; use 1 or more, or "adaptive:125"')
        return value

    @field_validator("quorum")
    @classmethod
    def _quorum_parses(cls, value: int | str | None) -> int | str | None:
        quorum.check(value)
        return value

    @field_validator("grace")
    @classmethod
    def _grace_parses(cls, value: str | None) -> str | None:
        if value is not None:
            units.seconds(value)
        return value

    @field_validator("moments")
    @classmethod
    def _moments_parse(cls, value: str | None) -> str | None:
        if value is not None:
            schedule.multiples(value)
        return value

    @field_validator("delay")
    @classmethod
    def _delay_is_not_negative(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 0:
            raise ValueError(f'delay = {value} is negative; use 0, a number of steps, or "round"')
        return value


class Level(Answers):
    """One of two in a job: what the islands of a group do among themselves, or what the groups do (``levels.py``)."""

    islands: int | None = Field(
        None, ge=2, description="of the near level, the first: so many neighbouring islands are a group, of two or more"
    )
    rate: str | None = Field(None, description="an island's uplink to its group, or to the other groups; left out: link.rate")
    rtt: str | None = Field(None, description="round-trip time within a group, or to other groups; left out: link.rtt")

    @field_validator("rate")
    @classmethod
    def _rate_parses(cls, value: str | None) -> str | None:
        if value is not None:
            units.bits_per_s(value)
        return value

    @field_validator("rtt")
    @classmethod
    def _rtt_parses(cls, value: str | None) -> str | None:
        if value is not None:
            units.seconds(value)
        return value


class Sync(Answers):
    level: list[Level] | None = Field(
        None,
        description="two tables [[sync.level]] in place of sync's other keys: the first of groups of neighbouring islands, the "
        "second of all groups; each has any of these keys, and its own islands, rate and rtt",
    )
