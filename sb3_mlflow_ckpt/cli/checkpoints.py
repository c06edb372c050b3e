"""Owns the commands `checkpoints ...`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

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
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError, RunNotFoundError
from sb3_mlflow_ckpt.printable import printable


@click.group("checkpoints", cls=Group)
def checkpoints_group() -> None:
    """List, verify, pin, prune, repair and sync checkpoints."""


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
    """Check sizes, hashes and metadata of checkpoints, replay buffers included: those named, else all there are.

    A zip, a run folder, an agent's folder or the folder of all agents can be named.

    Exits with 1 if one is not whole.
    """
    from sb3_mlflow_ckpt.checkpoints import list_checkpoints
    from sb3_mlflow_ckpt.cli.reports import checkpoints_at, verdict

    if paths:
        found = [checkpoint for path in paths for checkpoint in checkpoints_at(Path(path))]
    else:
        found = list_checkpoints(_existing(checkpoint_dir, run_id, agent_id), run_id=run_id, agent_id=agent_id)
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
@click.option(
    "--keep-best-n",
    type=click.IntRange(min=0),
    default=0,
    metavar="INTEGER",
    help="How many of the highest mean reward to keep beside them",
)
@click.option(
    "--keep-every-n-episodes",
    type=click.IntRange(min=0),
    default=0,
    metavar="INTEGER",
    help="Keep the first checkpoint at or after each multiple of it as well; 0 is none",
)
@click.option("--dry-run", is_flag=True, help="Print what would go and why the rest stays, and remove nothing")
@with_options(checkpoint_dir_option, agent_id_option, run_id_option, json_option)
@click.pass_context
def prune_command(
    ctx: click.Context,
    keep_last_n: int,
    keep_best_n: int,
    keep_every_n_episodes: int,
    dry_run: bool,
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    as_json: bool,
) -> None:
    """Remove all but the newest checkpoints of each run, its best and its milestones, and print what went.

    Never the newest one that verifies, a pinned one, one that somebody resumes from, nor one that MLflow has not
    yet. A run that is training now is left to its own process. Exits with 1 if a folder could not be pruned.
    """
    from sb3_mlflow_ckpt.checkpoints import run_folders
    from sb3_mlflow_ckpt.policies import Retention
    from sb3_mlflow_ckpt.pruning import prune_runs

    folders = run_folders(_existing(checkpoint_dir, run_id, agent_id), run_id, agent_id)
    pruned = prune_runs(folders, Retention(keep_last_n, keep_best_n, keep_every_n_episodes), dry_run=dry_run)
    removed = [path for pruning in pruned for path in pruning.removed]
    kept = {path: why for pruning in pruned for path, why in pruning.kept.items()}
    for pruning in pruned:
        if pruning.problem:
            click.echo(printable(f"{pruning.folder.path}: {pruning.problem}"), err=True)
    if as_json:
        stays = [{"path": str(path), "why": list(why)} for path, why in kept.items()]
        print_json({"removed": [str(path) for path in removed], "kept": stays, "dry_run": dry_run})
    for path in removed if not as_json else ():
        click.echo(path)
    for path, why in kept.items() if dry_run and not as_json else ():
        click.echo(printable(f"# {path} stays: {', '.join(why)}"))
    if any(pruning.failed for pruning in pruned):
        ctx.exit(FAILURE_EXIT_CODE)


@checkpoints_group.command("pin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def pin_command(paths: tuple[str, ...]) -> None:
    """Keep checkpoints from being removed, also by a run that is training now; print their paths."""
    from sb3_mlflow_ckpt.checkpoints import pin_checkpoint

    for path in paths:
        click.echo(pin_checkpoint(path))


@checkpoints_group.command("unpin")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def unpin_command(paths: tuple[str, ...]) -> None:
    """Let checkpoints be removed again when their turn comes; print their paths."""
    from sb3_mlflow_ckpt.checkpoints import unpin_checkpoint

    for path in paths:
        click.echo(unpin_checkpoint(path))


@checkpoints_group.command("repair")
@click.option("--dry-run", is_flag=True, help="Print what is wrong and change nothing")
@with_options(checkpoint_dir_option, agent_id_option, run_id_option, tracking_uri_option, json_option)
@click.pass_context
def repair_command(
    ctx: click.Context,
    dry_run: bool,
    checkpoint_dir: str,
    agent_id: str | None,
    run_id: str | None,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Bring the run folders in order that nobody trains in, and print what was wrong and what was done, a line each.

    What a crash left half-done is finished, what is damaged is fetched from MLflow or set aside, never deleted.
    Exits with 1 if something stays broken.
    """
    from sb3_mlflow_ckpt.checkpoints import run_folders
    from sb3_mlflow_ckpt.repair import repair_runs

    folders = [*run_folders(_existing(checkpoint_dir, run_id, agent_id), run_id, agent_id)]
    repairs = []
    for repair in repair_runs(folders, tracking_uri=tracking_uri, dry_run=dry_run):
        repairs.append(repair)
        if not as_json:
            click.echo(printable(f"{repair.folder}: {repair.defect}: {repair.action}"))
    if as_json:
        print_json([asdict(repair) for repair in repairs])
    elif not repairs:
        click.echo(f"Nothing to repair in {checkpoint_dir}")
    if any(not repair.mended for repair in repairs):
        ctx.exit(FAILURE_EXIT_CODE)


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
        _existing(checkpoint_dir, run_id, agent_id),
        mirror_addresses(ctx, tracking_uri, mongo_uri, mongo_db),
        run_id=run_id,
        agent_id=agent_id,
        verify=verify,
    )
    if as_json:
        print_json([{key: value for key, value in asdict(result).items() if key != "outage"} for result in results])
    for result in results if not as_json else ():
        for change in result.changes:
            click.echo(printable(f"{result.folder}: {result.mirror}: {change}"))
        click.echo(": ".join(filter(None, (str(result.folder), result.mirror, result.error or "ok"))))
    if not results:
        click.echo(f"No runs in {checkpoint_dir}", err=True)
    if any(result.error for result in results):
        ctx.exit(FAILURE_EXIT_CODE)


def _existing(folder: str, run_id: str | None = None, agent_id: str | None = None) -> str:
    """Return a checkpoint folder that exists, and holds the run or agent that was named: a wrong name is no success."""
    if not Path(folder).is_dir():
        raise CheckpointNotFoundError(folder, "There is no such folder; name the right one with --checkpoint-dir")
    if run_id is not None or agent_id is not None:
        from sb3_mlflow_ckpt.checkpoints import run_folders

        if not any(True for _ in run_folders(folder, run_id, agent_id)):
            raise RunNotFoundError(run_id or f"any of {agent_id}", folder)
    return folder
