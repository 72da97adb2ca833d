"""What can a person type after ``dtrain kubernetes``?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def kubernetes(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file", show_default=False)],
    image: Annotated[str, typer.Option("--image", metavar="IMAGE", help="that has dtrain in it", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="keys that differ from the file", show_default=False),
    ] = None,
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="where they are written; -: standard output")] = "-",
    force: Annotated[bool, typer.Option("--force", help="overwrite FILE")] = False,
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="NS", help="left out: kubectl's", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="G", help="of a pod; left out: none", min=1, show_default=False)
    ] = None,
    volume: Annotated[str, typer.Option("--volume", metavar="CLAIM", help="claim that keeps runs, for many writers")] = "runs",
) -> None:
    """Write the manifests that run a job on Kubernetes, as a JobSet.

    A pod a node of each island, and one for the launcher. A set that is started again
    goes on from the newest checkpoint. The cluster needs the JobSet controller.

    Example: dtrain kubernetes JOB.toml --image my/dtrain | kubectl apply -f -
    """
    from dtrain.launch.checks import read_job, refuse_sim, resolved
    from dtrain.launch.kubernetes import Asked, manifests, to_yaml
    from dtrain.launch.output_file import STDOUT, check_output, put

    job = read_job(job_file, overrides or ())
    refuse_sim(job)
    resolved(job)
    documents = manifests(job, Asked(image, namespace, gpus_per_node, volume))
    check_output(output, force=force)
    typed = ["--image", image, *(["--namespace", namespace] if namespace else []), "--volume", volume]
    typed += ["--gpus-per-node", str(gpus_per_node)] if gpus_per_node else []
    put(output, to_yaml(documents, shlex.join(["dtrain", "kubernetes", str(job_file), *(overrides or ()), *typed])))
    if output != STDOUT:
        print(f"written: {output}; start it with: kubectl apply -f {shlex.quote(output)}")
