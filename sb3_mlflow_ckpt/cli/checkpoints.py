"""Owns the commands `checkpoints ...`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Group, print_json
from sb3_mlflow_ckpt.cli.options import (
    agent_id_option,
    checkpoint_dir_option,
    json_option,
    mongo_db_option,
    mongo_uri_option,
    run_id_option,
    tracking_uri_option,
    with_options,
)
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError
from sb3_mlflow_ckpt.printable import printable


@click.group("checkpoints", cls=Group)
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

        print_json([checkpoint_facts(path) for path in paths])
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
        print_json(results)
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
        print_json([str(path) for path in removed])
        return
    for path in removed:
        click.echo(path)


@checkpoints_group.command("sync")
@with_options(
    checkpoint_dir_option, agent_id_option, run_id_option, tracking_uri_option, mongo_uri_option, mongo_db_option
)
@click.option(
    "--verify", is_flag=True, help="Download and hash what MLflow has, too; names and sizes are compared always"
)
@json_option
@click.pass_context
def sync_command(
    ctx: click.Context,
    tracking_uri: str | None,
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    mongo_uri: str | None,
    mongo_db: str,
    verify: bool,
    as_json: bool,
) -> None:
    """Make MLflow and MongoDB what the runs on disk say. Exits with 1 if something could not be sent.

    What is missing there is sent, whether it never was, was deleted or was edited; a line tells of each.
    """
    from sb3_mlflow_ckpt.sync import sync_runs

    results = sync_runs(
        _existing(checkpoint_dir),
        run_id=run_id,
        agent_id=agent_id,
        tracking_uri=tracking_uri,
        mongo_uri=mongo_uri,
        # The option's default must not win over the database that the run was sent to.
        mongo_db=None if ctx.get_parameter_source("mongo_db") is ParameterSource.DEFAULT else mongo_db,
        verify=verify,
    )
    if as_json:
        print_json([asdict(result) for result in results])
    for result in results if not as_json else ():
        for change in result.changes:
            click.echo(printable(f"{result.folder}: {result.mirror}: {change}"))
        click.echo(": ".join(filter(None, (str(result.folder), result.mirror, result.error or "ok"))))
    if not results:
        click.echo(f"No runs in {checkpoint_dir}", err=True)
    if any(result.error for result in results):
        ctx.exit(FAILURE_EXIT_CODE)


def _existing(folder: str) -> str:
    if not Path(folder).is_dir():
        raise CheckpointNotFoundError(folder, "There is no such folder; name the right one with --checkpoint-dir")
    return folder
