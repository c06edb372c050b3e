"""Owns the command line: parse, call, print, exit code. What a command needs is imported when it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Command, Group
from sb3_mlflow_ckpt.cli.options import (
    agent_id_option,
    checkpoint_dir_option,
    json_option,
    mongo_db_option,
    mongo_uri_option,
    run_id_option,
    tracking_uri_option,
    training_options,
    with_options,
)
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError
from sb3_mlflow_ckpt.printable import printable, printable_json

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.config import TrainingConfig
    from sb3_mlflow_ckpt.runs.reader import RunReader
    from sb3_mlflow_ckpt.trainer import ResolvedTraining


@click.group(cls=Group)
def main() -> None:
    """Checkpoints, resume and run history for Stable-Baselines3, mirrored to MLflow and MongoDB."""


@click.command("train", cls=Command, make_params=training_options)
def train_command(config_file: str | None, dry_run: bool, **flags: str | tuple[str, ...] | None) -> None:
    """Train an agent, or resume one from a checkpoint.

    A setting comes from the first of: its flag, the file of --config, its environment variable
    (SB3_MLFLOW_CKPT_N_ENVS and so on), the checkpoint that is resumed, its default. The value "inherit" of a flag
    stands for "not given".
    """
    from sb3_mlflow_ckpt.cli.settings import environment_layer, file_layer, flag_layer
    from sb3_mlflow_ckpt.config import INHERIT, build_config

    layers = [flag_layer(flags)]
    if config_file is not None and config_file != INHERIT:
        layers.append(file_layer(config_file))
    # Validated before torch is imported: a wrong flag is answered at once.
    config = build_config([*layers, environment_layer(os.environ)])

    if dry_run:
        from sb3_mlflow_ckpt.trainer import resolve_config

        _print_resolved(resolve_config(config))
    else:
        _train(config)


def _train(config: TrainingConfig) -> None:
    from rich.console import Console

    from sb3_mlflow_ckpt.cli.progress import TerminalReporter, configure_logging
    from sb3_mlflow_ckpt.errors import TrainingInterrupted
    from sb3_mlflow_ckpt.trainer import train

    console = Console()
    configure_logging(console)
    reporter = TerminalReporter(console)
    try:
        result = train(config, reporter=reporter)
    except TrainingInterrupted as interruption:
        reporter.close()
        reporter.interrupted(config, interruption.checkpoint)
        raise
    finally:
        reporter.close()
    reporter.finished(result)


def _print_resolved(resolved: ResolvedTraining) -> None:
    """Print a configuration as a YAML file that --config takes, with the differences as comments."""
    import yaml

    if resolved.source is not None:
        click.echo(printable(f"# resumes {resolved.source.uri}"))
        for key, change in resolved.differences.items():
            click.echo(printable(f"# differs from the checkpoint: {key}: {change['from']!r} -> {change['to']!r}"))
    click.echo(yaml.safe_dump(resolved.config.to_json(), sort_keys=False, allow_unicode=True), nl=False)


main.add_command(train_command)


@main.group("checkpoints")
def checkpoints_group() -> None:
    """List, verify, prune and sync checkpoints."""


@checkpoints_group.command("list")
@with_options(checkpoint_dir_option, agent_id_option, run_id_option, json_option)
def list_command(checkpoint_dir: str, agent_id: str | None, run_id: str | None, as_json: bool) -> None:
    """Print the committed checkpoints, one path a line, by episode within a run."""
    from sb3_mlflow_ckpt.checkpoints import list_checkpoints

    paths = list_checkpoints(checkpoint_dir, run_id=run_id, agent_id=agent_id)
    if as_json:
        from sb3_mlflow_ckpt.cli.reports import checkpoint_facts

        _print_json([checkpoint_facts(path) for path in paths])
        return
    for path in paths:
        click.echo(path)
    if not paths:
        why = "" if Path(checkpoint_dir).is_dir() else ", there is no such folder"
        click.echo(f"No checkpoints in {checkpoint_dir}{why}", err=True)


@checkpoints_group.command("verify")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@with_options(checkpoint_dir_option, agent_id_option, run_id_option, json_option)
@click.pass_context
def verify_command(
    ctx: click.Context,
    paths: tuple[str, ...],
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    as_json: bool,
) -> None:
    """Check sizes, hashes and metadata of checkpoints: the zips and run folders named, else all that there are.

    Exits with 1 if one is not whole.
    """
    from sb3_mlflow_ckpt.checkpoints import list_checkpoints
    from sb3_mlflow_ckpt.cli.reports import checkpoints_at, verdict

    if paths:
        found = [checkpoint for path in paths for checkpoint in checkpoints_at(Path(path))]
    else:
        found = list_checkpoints(_existing(checkpoint_dir), run_id=run_id, agent_id=agent_id)
    results = [{"path": str(path), **verdict(path)} for path in found]
    if as_json:
        _print_json(results)
    for result in [] if as_json else results:
        click.echo(printable(f"{result['path']}: {result['status']}" + (f": {result['why']}" if result["why"] else "")))
    if not results:
        click.echo(f"No checkpoints in {checkpoint_dir}", err=True)
    if any(result["status"] != "ok" for result in results):
        ctx.exit(FAILURE_EXIT_CODE)


@checkpoints_group.command("prune")
@click.option(
    "--keep-last-n",
    type=click.IntRange(min=0),
    required=True,
    metavar="INTEGER",
    help="How many to keep of each run; 0 keeps all",
)
@click.option("--dry-run", is_flag=True, help="Print what would go and remove nothing")
@with_options(checkpoint_dir_option, agent_id_option, run_id_option, json_option)
def prune_command(
    keep_last_n: int, dry_run: bool, checkpoint_dir: str, agent_id: str | None, run_id: str | None, as_json: bool
) -> None:
    """Remove all but the newest checkpoints of each run, and print what went."""
    from sb3_mlflow_ckpt.checkpoints import prune_checkpoints

    removed = prune_checkpoints(
        _existing(checkpoint_dir), run_id=run_id, agent_id=agent_id, keep_last_n=keep_last_n, dry_run=dry_run
    )
    if as_json:
        _print_json([str(path) for path in removed])
        return
    for path in removed:
        click.echo(path)


@checkpoints_group.command("sync")
@with_options(
    checkpoint_dir_option, agent_id_option, run_id_option, tracking_uri_option, mongo_uri_option, mongo_db_option
)
@click.pass_context
def sync_command(
    ctx: click.Context,
    tracking_uri: str | None,
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    mongo_uri: str | None,
    mongo_db: str,
) -> None:
    """Send what MLflow and MongoDB miss of the runs on disk. Exits with 1 if something could not be sent."""
    from sb3_mlflow_ckpt.sync import sync_runs

    results = sync_runs(
        _existing(checkpoint_dir),
        run_id=run_id,
        agent_id=agent_id,
        tracking_uri=tracking_uri,
        mongo_uri=mongo_uri,
        # The option's default must not win over the database that the run was sent to.
        mongo_db=None if ctx.get_parameter_source("mongo_db") is ParameterSource.DEFAULT else mongo_db,
    )
    for result in results:
        click.echo(": ".join(filter(None, (str(result.folder), result.mirror, result.error or "ok"))))
    if not results:
        click.echo(f"No runs in {checkpoint_dir}", err=True)
    if any(result.error for result in results):
        ctx.exit(FAILURE_EXIT_CODE)


@main.group("runs")
def runs_group() -> None:
    """List and show training runs."""


@runs_group.command("list")
@click.option(
    "--status",
    type=click.Choice(["running", "completed", "failed", "interrupted", "lost"]),
    help="Only runs of this status; lost is one whose heartbeat is stale",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="INTEGER", help="At most this many")
@with_options(checkpoint_dir_option, agent_id_option, mongo_uri_option, mongo_db_option, json_option)
def runs_list_command(
    status: str | None,
    limit: int | None,
    checkpoint_dir: str,
    agent_id: str | None,
    mongo_uri: str | None,
    mongo_db: str,
    as_json: bool,
) -> None:
    """Print the runs, the newest first."""
    runs = _reader(checkpoint_dir, mongo_uri, mongo_db).list(agent_id=agent_id, status=status, limit=limit)
    if as_json:
        _print_json(runs)
        return
    from sb3_mlflow_ckpt.cli.tables import print_runs

    print_runs(runs)


@runs_group.command("show")
@click.argument("run_id")
@with_options(checkpoint_dir_option, mongo_uri_option, mongo_db_option, json_option)
def runs_show_command(run_id: str, checkpoint_dir: str, mongo_uri: str | None, mongo_db: str, as_json: bool) -> None:
    """Print one run with its checkpoints."""
    run = _reader(checkpoint_dir, mongo_uri, mongo_db).get(run_id)
    if as_json:
        _print_json(run)
        return
    from sb3_mlflow_ckpt.cli.tables import print_run

    print_run(run)


@main.command("check-env")
@click.argument("env_ids", nargs=-1, required=True, metavar="ENV_ID...")
@click.option("--env-kwargs", multiple=True, metavar="MAPPING", help="Arguments of the environments, as for train")
@click.option("--env-wrappers", multiple=True, metavar="LIST", help="Wrappers around them, as for train")
@click.option("--points", type=click.IntRange(min=1), default=8, show_default=True, help="How many states to restore")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="How many steps to compare")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="What seeds all of it")
@json_option
@click.pass_context
def check_env_command(
    ctx: click.Context,
    env_ids: tuple[str, ...],
    env_kwargs: tuple[str, ...],
    env_wrappers: tuple[str, ...],
    points: int,
    steps: int,
    seed: int,
    as_json: bool,
) -> None:
    """Tell whether a resume is exact in an environment, and how its state is captured.

    Exits with 1 if one is not exact.
    """
    from sb3_mlflow_ckpt.cli.settings import flag_layer
    from sb3_mlflow_ckpt.env_check import EnvSpecification, check_env

    given = flag_layer({"env_kwargs": env_kwargs, "env_wrappers": env_wrappers}).values
    reports = [
        check_env(
            EnvSpecification(env_id, given.get("env_kwargs", {}), given.get("env_wrappers", ())),
            points=points,
            steps=steps,
            seed=seed,
        )
        for env_id in env_ids
    ]
    if as_json:
        _print_json([report.to_json() for report in reports])
    else:
        from sb3_mlflow_ckpt.cli.tables import print_env_reports

        print_env_reports([report.to_json() for report in reports])
    if not all(report.exact for report in reports):
        ctx.exit(FAILURE_EXIT_CODE)


def _reader(checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> RunReader:
    if mongo_uri:
        from sb3_mlflow_ckpt.runs.mongo import MongoRuns

        return MongoRuns(mongo_uri, mongo_db)
    from sb3_mlflow_ckpt.runs.folder import FolderRuns

    return FolderRuns(checkpoint_dir)


def _existing(folder: str) -> str:
    if not Path(folder).is_dir():
        raise CheckpointNotFoundError(folder, "There is no such folder; name the right one with --checkpoint-dir")
    return folder


def _print_json(value: Any) -> None:
    click.echo(printable_json(json.dumps(value, indent=2, ensure_ascii=False, default=str)))
