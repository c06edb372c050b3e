"""Owns the commands `runs ...`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Group, print_json
from sb3_mlflow_ckpt.cli.options import (
    agent_id_option,
    checkpoint_dir_option,
    json_option,
    mirror_addresses,
    mongo_db_option,
    mongo_uri_option,
    run_id_option,
    tracking_uri_option,
    with_options,
)
from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.printable import printable

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.runs.reader import RunReader


@click.group("runs", cls=Group)
def runs_group() -> None:
    """List, show and settle training runs."""


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
        print_json(runs)
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
        print_json(run)
        return
    from sb3_mlflow_ckpt.cli.tables import print_run

    print_run(run)


@runs_group.command("reap")
@click.option("--dry-run", is_flag=True, help="Print what would be settled and change nothing")
@click.option(
    "--mlflow-orphans", is_flag=True, help="Also set MLflow runs of this project FAILED that have no folder here"
)
@with_options(
    checkpoint_dir_option,
    agent_id_option,
    run_id_option,
    tracking_uri_option,
    mongo_uri_option,
    mongo_db_option,
    json_option,
)
@click.pass_context
def runs_reap_command(
    ctx: click.Context,
    dry_run: bool,
    mlflow_orphans: bool,
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    tracking_uri: str | None,
    mongo_uri: str | None,
    mongo_db: str,
    as_json: bool,
) -> None:
    """Settle the runs whose process is dead: failed, ended at their last heartbeat, here and in their mirrors.

    A run whose process lives is left alone, and one of another host until its heartbeat is stale. Exits with 1 if
    something could not be settled or sent.
    """
    from sb3_mlflow_ckpt.reap import Reaped, reap_mlflow_orphans, reap_runs, tracking_uris

    results = reap_runs(
        checkpoint_dir,
        mirror_addresses(ctx, tracking_uri, mongo_uri, mongo_db),
        run_id=run_id,
        agent_id=agent_id,
        dry_run=dry_run,
    )
    addresses: list[str | None] = []
    if run_id is None and agent_id is None:
        addresses += [tracking_uri] if tracking_uri else tracking_uris(checkpoint_dir)
        if mlflow_orphans and not addresses:
            addresses.append(None)
    for address in addresses:
        try:
            results += reap_mlflow_orphans(address, checkpoint_dir, fail=mlflow_orphans and not dry_run)
        except MirrorUnavailableError as error:
            # What was settled is told all the same.
            results.append(Reaped("", error.uri, "unreachable", "", str(error)))
    if as_json:
        print_json([asdict(result) for result in results])
    for result in [] if as_json else results:
        parts = (result.where, result.run_id, result.action, result.detail, result.problem)
        click.echo(printable(": ".join(part for part in parts if part)))
    if any(result.action == "orphan" for result in results):
        click.echo("Set the orphans FAILED with: sb3-mlflow-ckpt runs reap --mlflow-orphans", err=True)
    if not results and not as_json:
        click.echo(f"No run in {checkpoint_dir} says that it is running")
    if any(result.problem for result in results):
        ctx.exit(FAILURE_EXIT_CODE)


def _reader(checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> RunReader:
    if mongo_uri:
        from sb3_mlflow_ckpt.runs.mongo import MongoRuns

        return MongoRuns(mongo_uri, mongo_db)
    from sb3_mlflow_ckpt.runs.folder import FolderRuns

    return FolderRuns(checkpoint_dir)
