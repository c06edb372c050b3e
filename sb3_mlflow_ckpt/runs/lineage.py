"""Owns chains of resumes: which run went on from which, and the learning curve of a whole chain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sb3_mlflow_ckpt.errors import RunNotFoundError
from sb3_mlflow_ckpt.layout import id_spellings
from sb3_mlflow_ckpt.runs.reader import Document, RunReader

# A chain beyond this is somebody's edit, or a job that is requeued for ever.
_LONGEST_CHAIN = 1000


@dataclass(frozen=True)
class Lineage:
    """Where a run stands among its kin.

    Attributes:
        run_id: The run.
        root_run_id: The first run of the chain.
        ancestors: What it came from, the first run first; one that the store lacks is
            `{"run_id": ..., "missing": True, "episode": ...}` with the episode of the checkpoint that was taken of it.
        children: What went on from it, the newest last.
        family: Every run of the chain that the store has, the newest last.
    """

    run_id: str
    root_run_id: str
    ancestors: tuple[Document, ...]
    children: tuple[Document, ...]
    family: tuple[Document, ...]


@dataclass(frozen=True)
class Segment:
    """A part of a curve that several runs made one after another.

    Attributes:
        run_id: Whose part.
        points: Its points, in the order in which they were made.
        until_timestep: The environment step at which the next run went on from it; None for the last part.
    """

    run_id: str
    points: Sequence[Document]
    until_timestep: int | None


def lineage(summaries: Iterable[Document], run_id: str) -> Lineage:
    """Return a run's place among the runs of a store.

    Raises:
        RunNotFoundError: The run is not among them.
    """
    every = list(summaries)
    by_id = {run["run_id"]: run for run in every}
    own = next((by_id[spelling] for spelling in id_spellings(run_id) if spelling in by_id), None)
    if own is None:
        raise RunNotFoundError(run_id, "the runs of this store")
    root = str(own.get("root_run_id") or own["run_id"])
    family = [run for run in every if root in (run.get("root_run_id"), run["run_id"])]
    children = [run for run in every if _parent_id(run) == own["run_id"] and run is not own]
    return Lineage(own["run_id"], root, _ancestors(own, by_id), _by_age(children), _by_age(family))


def _ancestors(run: Document, by_id: Mapping[str, Document]) -> tuple[Document, ...]:
    chain: list[Document] = []
    met = {run["run_id"]}
    while (parent := _parent_id(run)) is not None and parent not in met and len(chain) < _LONGEST_CHAIN:
        met.add(parent)
        found = by_id.get(parent)
        if found is None:
            chain.append({"run_id": parent, "missing": True, "episode": run["parent"].get("episode")})
            break
        chain.append(found)
        run = found
    return tuple(reversed(chain))


def _parent_id(run: Mapping[str, Any]) -> str | None:
    parent = run.get("parent")
    found = parent.get("run_id") if isinstance(parent, Mapping) else None
    return found if isinstance(found, str) and found else None


def _by_age(runs: Iterable[Document]) -> tuple[Document, ...]:
    return tuple(sorted(runs, key=lambda run: (str(run.get("started_at") or ""), run["run_id"])))


def stitched_curve(reader: RunReader, line: Lineage, points: int) -> tuple[Segment, ...]:
    """Return the curve of a run behind those of its ancestors, each up to where the next went on from it.

    Args:
        reader: The store.
        line: The run's place.
        points: At most so many points of each run.

    Raises:
        RunNotFoundError: The run is gone.
        MirrorUnavailableError: The store is a server, and does not answer.
    """
    chain = [run for run in line.ancestors if not run.get("missing")]
    ids = [*(run["run_id"] for run in chain), line.run_id]
    segments: list[Segment] = []
    end: int | None = None
    for run_id in reversed(ids):
        try:
            made = reader.curve(run_id, points)
        except RunNotFoundError:
            if run_id == line.run_id:
                raise
            continue
        kept = [point for point in made if end is None or point["num_timesteps"] <= end]
        segments.append(Segment(run_id, kept, end))
        end = _resumed_at(reader, run_id, kept, line)
    return tuple(reversed(segments))


def _resumed_at(reader: RunReader, run_id: str, points: Sequence[Document], line: Lineage) -> int | None:
    """Return at which environment step a run went on from its parent."""
    run = next((run for run in line.family if run["run_id"] == run_id), None)
    parent = run.get("parent") if run is not None else None
    parent_id = _parent_id(run) if run is not None else None
    if isinstance(parent, Mapping) and parent_id is not None and isinstance(parent.get("episode"), int):
        try:
            taken = reader.checkpoints(parent_id, before=parent["episode"] + 1, limit=1)
        except RunNotFoundError:
            taken = []
        if taken and taken[0]["episode"] == parent["episode"] and isinstance(taken[0].get("num_timesteps"), int):
            return int(taken[0]["num_timesteps"])
    # The parent does not tell any more: the own first point lies just behind.
    return points[0]["num_timesteps"] if points else None
