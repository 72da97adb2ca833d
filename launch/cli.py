"""What can a person type? The ``dtrain`` command; every error of theirs is one line, and exit status 2.

torch is imported inside the commands that need it, so that ``dtrain --help`` and a misspelt key answer at once, and
``dtrain doctor`` where it is broken.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dtrain.errors import PeerLost
from dtrain.launch import lab_user
from dtrain.launch.cli_bench import bench_app
from dtrain.launch.cli_doctor import doctor
from dtrain.launch.cli_kubernetes import kubernetes
from dtrain.launch.cli_lab import lab_app
from dtrain.launch.cli_plan import plan
from dtrain.launch.cli_run import run
from dtrain.launch.cli_slurm import slurm
from dtrain.launch.cli_status import status
from dtrain.launch.cli_topology import topology
from dtrain.launch.closing import EXIT_INTERRUPTED, EXIT_RESUMABLE, EXIT_USER_ERROR, close, complain, resumable
from dtrain.launch.run_folder import Choice, open_run
from dtrain.launch.tables import check_picture, table
from dtrain.launch.typed import Fresh, FreshName, JobFile, Overrides, Resume

_ABOUT = """Train one model on several islands of computers that only a slow link connects.

An island is what a fast network holds together: a machine, or a rack. Islands train on their own most of the time and
exchange little. A job is a TOML file; any of its keys can be given on the command line as section.key=value.

\b
Start here:
  dtrain run launch/jobs/quickstart.toml   two islands on this machine
  dtrain status                            how it stands, from beside it
  dtrain report runs/quickstart            what that cost, and what it saved
  dtrain recipes                           the ways in which islands talk
  dtrain topology ring --islands 16        how quickly they come together
  dtrain check mine.py:row                 whether a method of your own keeps its promises
  dtrain plan JOB.toml                     which of them suits your link and your machines
  dtrain profile JOB.toml                  where a step's time goes
  dtrain lab up --islands 2 --rate 10mbit  real slow links on this machine, to run it over
  dtrain doctor JOB.toml                   what of this machine would stop it
  dtrain slurm JOB.toml                    a script that runs it on a Slurm cluster
  dtrain kubernetes JOB.toml               manifests that run it on Kubernetes
  dtrain keys                              what a job file can say
"""

app = typer.Typer(help=_ABOUT, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")
app.add_typer(lab_app, name="lab")
app.command()(run)
app.command()(topology)
app.command()(plan)
app.command()(status)
app.command()(doctor)
app.command()(slurm)
app.command()(kubernetes)


@app.command(hidden=True)
def train(job_file: JobFile, window: Annotated[str | None, typer.Option("--profile")] = None) -> None:
    """What torchrun runs on every rank; "dtrain run" and "dtrain profile" start it."""
    from dtrain.launch.worker import train as train_rank

    train_rank(job_file, window)


@app.command()
def sim(
    job_file: JobFile,
    overrides: Overrides = None,
    num_islands: Annotated[int | None, typer.Option("--islands", help="islands.count", min=1, show_default=False)] = None,
    resume: Resume = False,
    fresh: Fresh = False,
    fresh_name: FreshName = False,
) -> None:
    """Train all islands in this one process.

    The code is the same; the link takes no time. What it would take is reckoned on a
    virtual clock where sim.step_s is set, and for the small problems of sim.problem;
    a long run of that takes more processes.

    Example: dtrain sim launch/jobs/quickstart.toml --islands 16 job.name=sixteen
    """
    from dtrain.launch.simulated import run_simulated
    from dtrain.launch.virtual_shown import account, run_virtual

    changes = [*(overrides or ()), *([] if num_islands is None else [f"islands.count={num_islands}"])]
    console = Console()
    with open_run(job_file, changes, Choice(resume, fresh, fresh_name), how="sim") as opened:
        for note in opened.notes:
            console.print(Text(note), soft_wrap=True)
        job, virtual = opened.job, list[list[str]]()
        try:
            if job.sim.problem != "gpt":
                virtual = run_virtual(job, opened.run)
            elif not opened.finished:
                run_simulated(job, opened.run, resume_step=opened.resume_step, console=console)
            if job.sim.problem == "gpt" and job.sim.has_clock:
                virtual = account(job, opened.run)
        except KeyboardInterrupt:
            raise typer.Exit(complain(EXIT_INTERRUPTED, resumable("stopped", "sim", opened.run))) from None
        close(console, opened.run, job.islands.count, summary=job.sim.problem == "gpt", virtual=virtual)


@app.command()
def profile(
    job_file: JobFile,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="steps to look at; left out: whole rounds", min=1, show_default=False)
    ] = None,
    with_ncu: Annotated[bool, typer.Option("--ncu", help="count the DRAM traffic of our kernels too, with NVIDIA's ncu")] = False,
) -> None:
    """Show where a job's step spends its time.

    Runs its first steps on every island, in a folder of its own: NAME-profile, or
    NAME-profile-2 where that is there. Models of your own scripts are not profiled.

    Example: dtrain profile launch/jobs/quickstart.toml link.rate=1mbit
    """
    from dtrain.launch import ncu
    from dtrain.launch.profile import profile_job

    console = Console()
    outcome, tables = profile_job(job_file, overrides or (), steps=steps, with_ncu=with_ncu, console=console)
    if tables is None:
        for line in outcome.log:
            print(line, file=sys.stderr)
        raise typer.Exit(complain(outcome.exit_status, outcome.message))
    from dtrain.profile_table import KERNEL_HEADER, PART_HEADER, SHARE_HEADER

    shown = (KERNEL_HEADER, tables.kernels), (ncu.HEADER, tables.dram), (PART_HEADER, tables.parts), (SHARE_HEADER, tables.shares)
    for header, rows in shown:
        if rows:
            console.print()
            console.print(table(header, rows))
    console.print()
    for line in tables.lines:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"\nall ranks and rounds on one clock: {tables.trace}, for https://ui.perfetto.dev"), soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="draw them into one picture")] = None,
) -> None:
    """Print runs side by side.

    Example: dtrain report runs/quickstart runs/allreduce --out both.png
    """
    if out is not None:
        check_picture(out)
    from dtrain.report import compare_rows, load_run

    records = [load_run(path) for path in runs]
    header, rows = compare_rows(records)
    Console().print(table(header, rows))
    if out is not None:
        from dtrain.plots import plot_compare

        plot_compare(records, out)
        print(f"drawn: {out}")


@app.command("eval")
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run", show_default=False)],
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="how sure, by what the islands disagree about")] = False,
) -> None:
    """Evaluate a finished run's models again.

    The merged one first, then each island's own; with --uncertainty also the mean of
    the islands' predictions, and how well each model's confidence is calibrated.

    Example: dtrain eval runs/quickstart
    """
    from dtrain.evaluate_run import evaluate_run, uncertainty_of_run

    if uncertainty:
        found, distance, share = uncertainty_of_run(run_folder)
        header = ["model", "loss, nats a token", "calibration error", "accuracy", "spread"]
        shown = [[name, *(f"{v:.4f}" for v in (p.loss, p.calibration_error, p.accuracy)), f"{p.spread:.2e}"] for name, p in found]
        Console().print(table(header, shown))
        print(f"consensus distance {distance:.4g}, {share:.2%} of the parameters' norm")
        return
    rows = [[name, f"{loss:.4f}", "-" if bits is None else f"{bits:.4f}"] for name, loss, bits in evaluate_run(run_folder)]
    Console().print(table(["model", "loss, nats a token", "bits a byte"], rows))


@app.command()
def recipes(
    show: Annotated[str | None, typer.Option("--show", metavar="NAME", help="all answers of one recipe")] = None,
) -> None:
    """List the ways in which islands talk.

    Example: dtrain recipes --show diloco
    """
    from dtrain.recipes import DEFAULT_RECIPE, RECIPES

    if show is not None:
        from dtrain.launch.recipe_sheet import sheet

        Console().print(table(["", show], sheet(show)))
        return
    names = [f"{name} (default)" if name == DEFAULT_RECIPE else name for name in RECIPES]
    rows = [[name, recipe.summary, recipe.paper] for name, recipe in zip(names, RECIPES.values(), strict=True)]
    Console().print(table(["recipe", "what islands do", "from"], rows))


@app.command()
def check(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a name, or FILE.py:ROW", show_default=False)]) -> None:
    """Check that a recipe keeps what every method promises.

    Runs it on four small islands in this process. Status 1 where a promise is broken.

    Example: dtrain check mine.py:row
    """
    from dtrain.contract import check as check_recipe

    console, broken = Console(), 0
    for one in check_recipe(recipe):
        broken += one.kept is False
        word = {True: "kept", False: "BROKEN", None: "skipped"}[one.kept]
        console.print(Text(f"{word:<7} {one.promise}: {one.found}"), soft_wrap=True)
    if broken:
        raise typer.Exit(complain(1, f"{recipe} breaks {broken} of its promises"))


@app.command()
def keys(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="of this section only", show_default=False)] = None,
) -> None:
    """List the keys of a job file, what they are when left out, and what they mean.

    Example: dtrain keys link
    """
    from dtrain.launch.keys import key_rows

    Console().print(table(["key", "left out", "meaning"], key_rows(section)))


def main(arguments: list[str] | None = None) -> None:
    """The ``dtrain`` command."""
    exit_status = run_command(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. Taking torch apart would cost 0.7 s of CPU, and seconds on a busy machine, after each Ctrl-C.
    os._exit(exit_status)


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit status; errors of the user are printed as one line."""
    ours, script = _split_script(arguments)
    try:
        if "--" in arguments and not script:
            raise ValueError("no script stands behind --; write dtrain run JOB.toml -- SCRIPT ARGS, or leave -- out")
        if script and ours[:1] not in (["run"], ["slurm"]) and ours[:2] != ["lab", "run"]:
            raise ValueError("only dtrain run takes a script after --, and dtrain lab run and dtrain slurm do")
        if lab_user.goes_inside(ours):
            return lab_user.go_inside(arguments)
        status = typer.main.get_command(app).main(args=ours or ["--help"], prog_name="dtrain", standalone_mode=False, obj=script)
    except typer.TyperException as e:
        known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
        known |= {group.name for group in app.registered_groups}
        command = f"dtrain {ours[0]}" if ours and ours[0] in known else "dtrain"
        message = e.format_message()
        return complain(EXIT_USER_ERROR, f"{message}{'' if message.endswith(('.', '?')) else '.'} See {command} --help.")
    except ValueError as e:
        return complain(EXIT_USER_ERROR, str(e))
    except OSError as e:
        if e.filename is None or ours[:1] == ["train"]:  # not a path that somebody typed
            raise
        return complain(EXIT_USER_ERROR, f"{e.filename}: {e.strerror}; name a path that can be used")
    except PeerLost as e:
        return complain(EXIT_RESUMABLE, str(e))
    except (KeyboardInterrupt, typer.Abort):
        return complain(EXIT_INTERRUPTED, "stopped")
    return status if isinstance(status, int) else 0


def _split_script(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What comes after "--" is the script's, options included."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])
