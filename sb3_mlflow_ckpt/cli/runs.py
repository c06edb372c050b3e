"""Owns the commands `runs ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from sb3_mlflow_ckpt.errors import MirrorUnavailableError, RunNotFoundError
from sb3_mlflow_ckpt.printable import printable

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.runs.reader import Document, RunReader
    from sb3_mlflow_ckpt.runs.summaries import RunQuery


# As `runs.document.STATUSES` and `runs.summaries.SORTS` have them; a test holds them to it.
_STATUSES = ("running", "stalled", "lost", "completed", "failed", "interrupted")
_SORTS = (
    *("started_at", "ended_at", "name", "agent_id", "algo", "env_id", "status"),
    *("num_timesteps", "episode", "mean_reward", "best_mean_reward"),
)
_RUNS_OF_A_SCREEN = 50
_MOST_COMPARED = 8
_SHORTEST_BEGINNING = 4
_store_options = (checkpoint_dir_option, mongo_uri_option, mongo_db_option)


@click.group("runs", cls=Group)
def runs_group() -> None:
    """List, show, compare, open and settle training runs.

    A run is named by its id, or by as much of its beginning, four characters or more, as no other run shares.
    """


@runs_group.command("list")
@with_options(
    click.option("--status", type=click.Choice(_STATUSES), multiple=True, help="Only this status; may be repeated"),
    click.option("--algo", metavar="TEXT", help="Only this algorithm"),
    click.option("--env", "env_id", metavar="TEXT", help="Only this environment"),
    agent_id_option,
    click.option(
        "--search", "text", default="", metavar="WORDS", help="Words that occur in name, id, agent, host, ..."
    ),
    click.option(
        "--sort",
        default="-started_at",
        show_default=True,
        metavar="FIELD",
        help=f"One of {', '.join(_SORTS)}; with - before it the greatest first",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="INTEGER",
        help=f"At most this many; by default {_RUNS_OF_A_SCREEN} in a terminal, all in a pipe or as JSON",
    ),
    *_store_options,
    json_option,
)
def runs_list_command(
    status: tuple[str, ...],
    algo: str | None,
    env_id: str | None,
    agent_id: str | None,
    text: str,
    sort: str,
    limit: int | None,
    checkpoint_dir: str,
    mongo_uri: str | None,
    mongo_db: str,
    as_json: bool,
) -> None:
    """Print the runs, the newest first. `stalled` lives and takes no steps; the heartbeat of `lost` is stale."""
    from sb3_mlflow_ckpt.runs.summaries import RunQuery

    query = RunQuery(status=status, algo=algo, env_id=env_id, agent_id=agent_id, text=text, sort=sort)
    reader = _reader(checkpoint_dir, mongo_uri, mongo_db)
    summaries = reader.summaries()
    if limit is None and not as_json and sys.stdout.isatty():
        limit = _RUNS_OF_A_SCREEN
    runs, total = _select(summaries, query, limit)
    glances = reader.glances([run["run_id"] for run in runs])
    if as_json:
        from sb3_mlflow_ckpt.web.documents import listed_run

        print_json([listed_run(run, glances) for run in runs])
        return
    from sb3_mlflow_ckpt.cli.tables import print_runs

    ids = [run["run_id"] for run in summaries]
    otherwise = f"No such runs, of {len(ids):,}" if ids else _no_runs(checkpoint_dir, mongo_uri, mongo_db)
    print_runs(runs, glances, total=total, ids=ids, otherwise=otherwise)


@runs_group.command("show")
@click.argument("run_id", metavar="RUN")
@with_options(*_store_options, json_option)
def runs_show_command(run_id: str, checkpoint_dir: str, mongo_uri: str | None, mongo_db: str, as_json: bool) -> None:
    """Print one run: its facts, what it changed of its parent, its kin, its checkpoints, how to resume it."""
    reader = _reader(checkpoint_dir, mongo_uri, mongo_db)
    run_id = _whole_id(reader, run_id)
    run = reader.get(run_id)
    if as_json:
        from sb3_mlflow_ckpt.web.documents import run_document
        from sb3_mlflow_ckpt.web.settings import WebSettings

        print_json(run_document(run, WebSettings(Path(checkpoint_dir))))
        return
    from sb3_mlflow_ckpt.cli.run_report import print_run
    from sb3_mlflow_ckpt.runs.lineage import lineage
    from sb3_mlflow_ckpt.runs.reader import Glance

    line = None
    with suppress(RunNotFoundError):  # Its record was removed just now.
        line = lineage(reader.summaries(), run_id)
    print_run(run, reader.glances([run_id]).get(run_id, Glance()), line)


@runs_group.command("compare")
@click.argument("run_ids", metavar="RUN RUN [RUN]...", nargs=-1)
@with_options(*_store_options, json_option)
def runs_compare_command(
    run_ids: tuple[str, ...], checkpoint_dir: str, mongo_uri: str | None, mongo_db: str, as_json: bool
) -> None:
    """Print two to eight runs side by side: facts, curves on one scale, and the settings in which they differ."""
    reader = _reader(checkpoint_dir, mongo_uri, mongo_db)
    chosen = list(dict.fromkeys(_whole_id(reader, run_id) for run_id in run_ids))
    if not 2 <= len(chosen) <= _MOST_COMPARED:
        raise click.UsageError(f"Two to {_MOST_COMPARED} different runs are compared; {len(chosen)} are named")
    runs = [reader.record(run_id) for run_id in chosen]
    if as_json:
        from sb3_mlflow_ckpt.web.documents import comparison_document

        print_json(comparison_document(runs))
        return
    from sb3_mlflow_ckpt.cli.tables import print_comparison

    print_comparison(runs, reader.glances(chosen))


@runs_group.command("open")
@click.argument("run_id", metavar="RUN")
@click.option(
    "--url", default="http://localhost:5173", show_default=True, metavar="URL", help="Where `serve` shows the pages"
)
@with_options(*_store_options)
def runs_open_command(run_id: str, url: str, checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> None:
    """Open a run's page, which `sb3-mlflow-ckpt serve` serves, in the browser, and print its address.

    A whole UUID is taken as it is, for a server that shows other runs than those of this machine.
    """
    from urllib.parse import quote, urlsplit

    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise click.UsageError(f"--url: {url!r} is not an address such as http://localhost:5173")
    if not _is_uuid(run_id):
        run_id = _whole_id(_reader(checkpoint_dir, mongo_uri, mongo_db), run_id)
    address = f"{url.rstrip('/')}/training/{quote(run_id, safe='')}"
    click.echo(printable(address))
    click.launch(address)


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


def _no_runs(checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> str:
    """Return the line that says where no runs are, and how to look elsewhere."""
    if mongo_uri:
        return f"No runs in the database {mongo_db}; name another with --mongo-db"
    folder = Path(checkpoint_dir).absolute()
    if folder.is_dir():
        return f"No runs in {folder}; name another folder with --checkpoint-dir"
    return f"No runs in {folder}, there is no such folder; name another with --checkpoint-dir"


def _select(summaries: Sequence[Document], query: RunQuery, limit: int | None) -> tuple[list[Any], int]:
    """Return the runs that a query asks for, at most `limit`, and how many it admits."""
    from sb3_mlflow_ckpt.runs.summaries import LARGEST_PAGE, select

    found: list[Any] = []
    cursor: str | None = None
    while True:
        page = select(summaries, query, min(LARGEST_PAGE, (limit or LARGEST_PAGE + len(found)) - len(found)), cursor)
        found += page.items
        cursor = page.next_cursor
        if cursor is None or len(found) == limit:
            return found, page.total


def _whole_id(reader: RunReader, run_id: str) -> str:
    """Return the id of the run that is meant by an id or by its beginning.

    Raises:
        RunNotFoundError: There is none.
        click.UsageError: It is the beginning of several.
    """
    try:
        return str(reader.record(run_id)["run_id"])
    except RunNotFoundError:
        begin = run_id.replace("-", "").lower()
        if len(begin) < _SHORTEST_BEGINNING:
            raise
        found = [run for run in reader.summaries() if _begins(run["run_id"], run_id, begin)]
        if not found:
            raise
    if len(found) > 1:
        told = [f"{run['run_id']} ({run.get('name') or run.get('algo')}, {run['status']})" for run in found]
        more = f" and {len(told) - 10} more" if len(told) > 10 else ""
        raise click.UsageError(f"{run_id!r} is the beginning of {len(told)} runs: {', '.join(told[:10])}{more}")
    return str(found[0]["run_id"])


def _begins(run_id: str, as_given: str, as_hex: str) -> bool:
    return run_id.startswith(as_given) or (_is_uuid(run_id) and run_id.replace("-", "").startswith(as_hex))


def _is_uuid(text: str) -> bool:
    from sb3_mlflow_ckpt.layout import id_spellings

    return len(id_spellings(text)) > 1
