"""Owns which checkpoint each loaded model came from, so that a callback goes on from there. Imports no torch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt.leases import Lease
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, ParentReference

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

# Where a loaded model came from, so that a callback goes on counting from there.
_origins: weakref.WeakKeyDictionary[Any, Origin] = weakref.WeakKeyDictionary()


class Origin(NamedTuple):
    """The checkpoint that a model came from.

    Attributes:
        source: Its path or URI.
        metadata: Its metadata.
        path: Its zip on this machine; None where there is none.
        lacking: Arguments of the model that it did not say and that nobody gave again.
        lease: Holds it until the run that goes on from it has a checkpoint of its own.
    """

    source: str
    metadata: CheckpointMetadata
    path: Path | None = None
    lacking: tuple[str, ...] = ()
    lease: Lease | None = None

    @property
    def reference(self) -> ParentReference:
        """How a resumed run names it."""
        files = self.metadata.files
        return ParentReference(
            run_id=self.metadata.run_id,
            checkpoint=self.source,
            episode=self.metadata.episode,
            sha256=files[0].sha256 if files else None,
            timestamp=self.metadata.timestamp,
        )


def note_origin(
    model: BaseAlgorithm,
    source: str,
    metadata: CheckpointMetadata,
    path: Path | None = None,
    lacking: Sequence[str] = (),
    lease: Lease | None = None,
) -> None:
    """Remember which checkpoint (path or URI, and where its zip lies) a model came from, and hold it."""
    _origins[model] = Origin(source, metadata, path, tuple(lacking), lease)


def origin(model: BaseAlgorithm) -> Origin | None:
    """Return the checkpoint that a model was loaded from, or None."""
    return _origins.get(model)


def lease_of(model: BaseAlgorithm) -> Lease | None:
    """Return what holds the checkpoint that a model was loaded from, or None."""
    came_from = origin(model)
    return came_from.lease if came_from is not None else None
