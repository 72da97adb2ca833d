"""What can [[islands.each]] say of one island, where islands are not alike or not on one machine? Pure: no torch, no clock, no
environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from dtrain.section import Section

Engine = Literal["ddp", "fsdp", "pipeline", "deepspeed", "fsdp+pipeline"]
PIPELINES = ("pipeline", "fsdp+pipeline")
"""Of these the ranks of an island are stages."""
LauncherName = Literal["local", "ssh", "slurm", "manual"]
OF_SSH = ("host", "workdir", "python")


class Each(Section):
    """One island's own answers. ``ranks``, ``engine`` and ``interface`` that are left out are those of all."""

    ranks: int | None = Field(None, ge=1, le=1024, description="this island's processes (GPUs); left out: islands.ranks")
    engine: Engine | None = Field(None, description="as islands.engine, which is taken where it is left out")
    launcher: LauncherName = Field(
        "local",
        description="who starts it: local, dtrain run itself, here; ssh, dtrain run on host; manual or slurm, its site, by the "
        "command that dtrain run prints",
    )
    host: str | None = Field(
        None, pattern=r"^[^-\s]\S*$", description="of launcher ssh: as ssh knows it; left out: the next of --hosts"
    )
    workdir: str | None = Field(
        None, min_length=1,
        description="of launcher ssh: the folder on host where dtrain run starts; what lies below that of here is looked for "
        "below it; left out: the same as here",
    )
    python: str | None = Field(
        None, min_length=1, description="of launcher ssh: the interpreter on host that has dtrain; left out: the same as here"
    )
    interface: str | None = Field(None, description="network interface that carries its link; left out: link.interface")

    @model_validator(mode="after")
    def _ssh_keys_are_of_ssh(self) -> Each:
        for key in OF_SSH:
            value = getattr(self, key)
            if value is not None and self.launcher != "ssh":
                raise ValueError(
                    f'{key} = {value!r} has no effect with launcher = "{self.launcher}"; leave it out, or use launcher = "ssh"'
                )
        return self


@dataclass(frozen=True, slots=True)
class IslandPlan:
    """How one island is started, with what holds for all islands filled in."""

    ranks: int
    engine: Engine
    launcher: LauncherName
    host: str | None
    workdir: str | None
    python: str | None
    interface: str

    @property
    def here(self) -> bool:
        """Whether it runs on the launcher's machine, as the launcher's own child."""
        return self.launcher == "local"


def with_hosts(each: Sequence[Each] | None, count: int, hosts: Sequence[str]) -> list[Each]:
    """``dtrain run --hosts``: the hosts, in order, for ssh islands that name none; for all islands where no table says more.

    Raises ValueError where there are more or fewer of them than islands that want one."""
    if each is None:
        wanting = list(range(count))
        tables = [Each(launcher="ssh") for _ in wanting]  # pyright: ignore[reportCallIssue]
    else:
        tables = list(each)
        wanting = [k for k, table in enumerate(tables) if table.launcher == "ssh" and table.host is None]
    if len(hosts) != len(wanting):
        whose = "islands" if each is None else 'tables [[islands.each]] with launcher = "ssh" and no host'
        raise ValueError(f"--hosts names {len(hosts)} hosts for {len(wanting)} {whose}; name one for each")
    for k, host in zip(wanting, hosts, strict=True):
        tables[k] = Each.model_validate(tables[k].model_dump() | {"host": host})
    return tables
