"""Owns the command `sweep`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Command, find_modules_here
from sb3_mlflow_ckpt.printable import printable

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.scale.sweep import SweepResult
    from sb3_mlflow_ckpt.scale.trial import TrialPlan


@click.command("sweep", cls=Command)
@click.argument("sweep_file", metavar="SWEEP.yaml")
@click.option("--resume", is_flag=True, help="Go on with the newest sweep of this name, where it was stopped or died")
@click.option("--auto-resume", is_flag=True, help="The same if there is one, else start: one command for every start")
@click.option("--address", metavar="ADDRESS", help="A Ray cluster (auto, or its address); unset is this machine alone")
@click.pass_context
def sweep_command(ctx: click.Context, sweep_file: str, resume: bool, auto_resume: bool, address: str | None) -> None:
    """Train seeds and hyperparameters of a search space side by side, on Ray Tune.

    Each trial is a run of its own, below one MLflow run. Exits with 1 if a trial failed for good.
    """
    from sb3_mlflow_ckpt.cli.settings import file_layer
    from sb3_mlflow_ckpt.scale.sweep_config import build_sweep

    find_modules_here()
    values = dict(file_layer(sweep_file, given_as="SWEEP.yaml").values)
    training = values.get("training") or {}
    if isinstance(training, Mapping):
        values["training"] = {**training, **_launch_settings()}
    sweep = build_sweep(values, sweep_file)

    from rich.console import Console

    from sb3_mlflow_ckpt.cli.progress import configure_logging
    from sb3_mlflow_ckpt.scale.sweep import run_sweep

    configure_logging(Console(stderr=True))
    how: Literal["no", "yes", "auto"] = "yes" if resume else "auto" if auto_resume else "no"
    result = run_sweep(sweep, resume=how, address=address, starting=_starting, tell=_say, ending=_ending)
    if result.signum is not None:
        from sb3_mlflow_ckpt.resume_commands import shell_word

        at = f" --address {shell_word(address)}" if address is not None else ""
        _say(f"Interrupted; go on with: sb3-mlflow-ckpt sweep {shell_word(sweep_file)} --resume{at}")
        ctx.exit(128 + result.signum)
    if result.status != "completed":
        ctx.exit(FAILURE_EXIT_CODE)


def _launch_settings() -> dict[str, Any]:
    """Return what the environment says of launches, an address with its password say; what is trained is the file's."""
    from sb3_mlflow_ckpt.cli.settings import environment_layer, settings
    from sb3_mlflow_ckpt.scale.sweep_config import THE_SWEEPS_OWN

    # The checkpoint folder is each node's own to say.
    launch = {setting.name for setting in settings() if not setting.inherited} - {*THE_SWEEPS_OWN, "checkpoint_dir"}
    return {name: value for name, value in environment_layer(os.environ).values.items() if name in launch}


def _starting(plan: TrialPlan) -> None:
    _say(f"Sweep {plan.sweep_id}: {plan.sweep.scheduler}, kept in {plan.folder.path}")
    if plan.mlflow_parent is not None:
        _say(f"MLflow run: {plan.mlflow_parent}")


def _ending(result: SweepResult) -> Mapping[str, Path]:
    """Print what the sweep came to, and return the files that tell of it."""
    from sb3_mlflow_ckpt import atomic
    from sb3_mlflow_ckpt.cli.tables import print_sweep
    from sb3_mlflow_ckpt.scale.sweep_report import draw, sweep_report

    report, folder = sweep_report(result.plan, result.trials), result.plan.folder
    print_sweep(report.to_json(), result.plan.sweep.metric)
    atomic.write_bytes(folder.table, atomic.dump_json(report.to_json()))
    files = {"trials": folder.table}
    if draw(report, folder.plot):
        files["curves"] = folder.plot
        _say(f"Curves: {folder.plot}")
    best = report.best
    if best is not None and best.best is not None:
        _say(f"Best checkpoint: {best.best_checkpoint} ({result.plan.sweep.metric} {best.best[1]:.1f})")
        _say(f"Resume with: {report.resume_command}")
    return files


def _say(line: str) -> None:
    click.echo(printable(line))
