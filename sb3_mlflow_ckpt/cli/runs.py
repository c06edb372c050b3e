"""Owns the commands `runs ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sb3_mlflow_ckpt.cli.commands import Group, print_json
from sb3_mlflow_ckpt.cli.options import (
    agent_id_option,
    checkpoint_dir_option,
    json_option,
    mongo_db_option,
    mongo_uri_option,
    with_options,
)

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.runs.reader import RunReader


@click.group("runs", cls=Group)
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


def _reader(checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> RunReader:
    if mongo_uri:
        from sb3_mlflow_ckpt.runs.mongo import MongoRuns

        return MongoRuns(mongo_uri, mongo_db)
    from sb3_mlflow_ckpt.runs.folder import FolderRuns

    return FolderRuns(checkpoint_dir)
