"""Owns the removal of old checkpoints: what must stay whatever the policy says, and each removal under its lock."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.commit import remove_checkpoint
from sb3_mlflow_ckpt.dead_writers import sweep
from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointNotFoundError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.leases import leased_episodes, removable, sweep_leases
from sb3_mlflow_ckpt.ledger import CheckpointLedger, committed_episodes
from sb3_mlflow_ckpt.metadata import timestamp_now
from sb3_mlflow_ckpt.pins import is_pinned, pinned_episodes, sweep_pins
from sb3_mlflow_ckpt.policies import Retention, SavedCheckpoint
from sb3_mlflow_ckpt.replay_sweep import ChunkSweeper
from sb3_mlflow_ckpt.runs.folder import read_ledger
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint

logger = logging.getLogger(__name__)

NEWEST, PINNED, IN_USE, NOT_MIRRORED = "newest", "pinned", "in use", "not mirrored"


@dataclass(frozen=True)
class Pruning:
    """What a prune did, or would do, in one run folder.

    Attributes:
        folder: The run folder.
        removed: The zips that went, oldest first.
        kept: Why each of the others stays.
        problem: Why nothing was looked at, or why something could not be removed.
        failed: Whether the problem is more than that the run is training now.
    """

    folder: RunFolder
    removed: list[Path] = field(default_factory=list)
    kept: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    problem: str | None = None
    failed: bool = False


def saved_checkpoints(ledger: CheckpointLedger, episodes: Collection[int]) -> list[SavedCheckpoint]:
    """Return what retention knows of some of a ledger's checkpoints, in the order of their commits.

    One that a repair took up again was committed when its timestamp says, not when it was repaired.
    """
    ordered: list[Mapping[str, Any]] = []
    facts = [ledger.saved[episode] for episode in ledger.on_disk if episode in episodes]
    for saved in sorted(facts, key=lambda facts: bool(facts.get("adopted"))):
        at = len(ordered)
        if saved.get("adopted"):
            later = (i for i, other in enumerate(ordered) if str(other.get("timestamp")) > str(saved.get("timestamp")))
            at = next(later, at)
        ordered.insert(at, saved)
    return [SavedCheckpoint(saved["episode"], _number(saved.get("mean_reward"))) for saved in ordered]


def evict(folder: RunFolder, episode: int) -> str | None:
    """Remove a checkpoint unless somebody uses it or has pinned it; return which of the two, or None.

    The caller holds the folder's lock.

    Raises:
        OSError: It cannot be removed.
    """
    if is_pinned(folder.model(episode)):
        return PINNED
    with removable(folder.model(episode)) as free:
        if not free:
            return IN_USE
        # Once more: whoever pins holds a lease meanwhile, so that from here on no pin can come.
        if is_pinned(folder.model(episode)):
            return PINNED
        remove_checkpoint(folder, episode)
    return None


def prune_runs(folders: Iterable[RunFolder], retention: Retention, *, dry_run: bool = False) -> list[Pruning]:
    """Prune run folders; one whose run is training now is left to it.

    Args:
        folders: The run folders.
        retention: What stays, beside what must.
        dry_run: Remove nothing.
    """
    return [_prune_locked(folder, retention, dry_run=dry_run) for folder in folders]


def _prune_locked(folder: RunFolder, retention: Retention, *, dry_run: bool) -> Pruning:
    try:
        with FileLock(folder.lock, timeout=0):
            return _prune(folder, retention, dry_run=dry_run)
    except Timeout:
        return Pruning(folder, problem="it is training now; its own process prunes it")
    except CheckpointError as error:
        return Pruning(folder, problem=str(error), failed=True)
    except OSError as error:
        if dry_run:
            # What would go can be told of a folder that cannot be written to.
            return _prune(folder, retention, dry_run=True)
        return Pruning(folder, problem=f"it cannot be pruned: {error}", failed=True)


def _prune(folder: RunFolder, retention: Retention, *, dry_run: bool) -> Pruning:
    ledger = read_ledger(folder)
    episodes = committed_episodes(folder)
    protected = {
        NEWEST: newest_verified(folder, episodes),
        PINNED: pinned_episodes(folder),
        IN_USE: leased_episodes(folder),
        NOT_MIRRORED: _not_mirrored(folder, ledger),
    }
    reasons = retention.reasons(saved_checkpoints(ledger, episodes), protected)
    removed: list[Path] = []
    kept: dict[Path, tuple[str, ...]] = {}
    problem = None
    for episode in episodes:
        # One whose metadata cannot be read is not in the ledger: it is for a repair, not for a prune.
        reasons.setdefault(episode, ("damaged",))
    for episode, why in reasons.items():
        try:
            held = why or (() if dry_run else _evicted(folder, episode))
        except OSError as error:
            held = (f"it cannot be removed: {error}",)
            problem = f"{folder.model(episode).name}: {held[0]}"
        if held:
            kept[folder.model(episode)] = held
        else:
            removed.append(folder.model(episode))
            if not dry_run:
                _note_removal(folder, episode)
    if not dry_run:
        sweep(folder)
        ChunkSweeper(folder).sweep()
        sweep_pins(folder)
        sweep_leases(folder)
    return Pruning(folder, removed, kept, problem, failed=problem is not None)


def _evicted(folder: RunFolder, episode: int) -> tuple[str, ...]:
    held = evict(folder, episode)
    return (held,) if held is not None else ()


def _note_removal(folder: RunFolder, episode: int) -> None:
    if folder.events.exists():
        json_lines.append_line(folder.events, {"event": "pruned", "episode": episode, "time": timestamp_now()})


def newest_verified(folder: RunFolder, episodes: Sequence[int]) -> set[int]:
    """Return the episode of the newest checkpoint of a run that verifies; empty where none does."""
    found = []
    for episode in episodes:
        try:
            found.append((read_metadata(folder.model(episode), settle=False).timestamp, episode))
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
    for _, episode in sorted(found, reverse=True):
        try:
            verify_checkpoint(folder.model(episode))
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
            continue
        return {episode}
    return set()


def _not_mirrored(folder: RunFolder, ledger: CheckpointLedger) -> set[int]:
    try:
        tracked = "MLflow" in (read_record(folder).get("mirrors") or ())
    except CheckpointNotFoundError:
        return set()
    except CheckpointError as error:
        logger.warning("Nothing that may still have to be sent is removed: %s", error)
        tracked = True
    return ledger.waiting if tracked else set()


def _number(value: Any) -> float | None:
    # A ledger that somebody edited may hold anything.
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
