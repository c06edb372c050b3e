"""Owns what a trial goes on from: the checkpoint that Ray Tune hands it, or a newer one of its own; never from zero.

Tune's snapshot of an experiment is seconds old: after a driver died it may name an older checkpoint, or none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.layout import model_episode
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.resume import ResumeSource
from sb3_mlflow_ckpt.scale.search_space import Distribution
from sb3_mlflow_ckpt.verification import read_metadata

EXPLOIT = "exploit"
"""The key under which a trial's configuration names the exploit that made it."""


@dataclass(frozen=True)
class TrialStart:
    """How a trial begins.

    Attributes:
        hyperparameters: The values of what the sweep varies.
        source: What it goes on from; None for the beginning.
        generation: How often the trial has taken over another's model.
        donor: The run, episode and trial that the model was taken from last; None where it is the trial's own.
        lineage: What each generation took, and what was perturbed.
    """

    hyperparameters: Mapping[str, Any]
    source: ResumeSource | None = None
    generation: int = 0
    donor: Mapping[str, Any] | None = None
    lineage: tuple[Mapping[str, Any], ...] = field(default=())

    def facts(self) -> dict[str, Any]:
        """Return what the record says of it."""
        return {
            "generation": self.generation,
            "donor": dict(self.donor) if self.donor is not None else None,
            "hyperparameters": dict(self.hyperparameters),
            "lineage": [dict(step) for step in self.lineage],
        }


def trial_start(
    run_id: str,
    config: Mapping[str, Any],
    own: ResumeSource | None,
    handed: ResumeSource | None,
    space: Mapping[str, Distribution],
) -> TrialStart:
    """Return what a trial goes on from.

    Args:
        run_id: The trial's run.
        config: The trial's configuration, as Tune has it.
        own: The newest checkpoint of the trial's run.
        handed: The checkpoint that Tune hands it: an earlier one of its own, or another's.
        space: What the sweep varies.
    """
    values = {key: value for key, value in config.items() if key != EXPLOIT}
    exploit = config.get(EXPLOIT)
    if handed is not None and handed.metadata.run_id != run_id:
        if own is None or exploit not in _exploits(own.metadata):
            return _clone(handed, own, values, exploit, space)
        handed = None  # That clone was taken up already, and has a checkpoint of its own.
    if own is None or (handed is not None and handed.metadata.timestamp > own.metadata.timestamp):
        own = handed
    if own is None:
        return TrialStart(values)
    # Its own, not Tune's: a snapshot from before an exploit does not know what was perturbed since.
    return replace(_kept(_facts(own.metadata), values), source=own)


def handed_checkpoint(folder: Path) -> Path | None:
    """Return the zip that Tune means by a folder of its own; None where it holds none.

    What a trial reported while it was ended Tune drops, but not its files: the next report of the trial gets the same
    folder. It is the later one.
    """
    found = [folder / name for name in os.listdir(folder) if model_episode(name) is not None]
    return max(found, key=lambda path: read_metadata(path).timestamp, default=None)


def _facts(metadata: CheckpointMetadata) -> Mapping[str, Any]:
    facts = metadata.extra_state.get("sweep")
    return facts if isinstance(facts, Mapping) else {}


def _exploits(metadata: CheckpointMetadata) -> list[Any]:
    return [step.get(EXPLOIT) for step in _facts(metadata).get("lineage") or ()]


def _kept(facts: Mapping[str, Any], values: Mapping[str, Any]) -> TrialStart:
    return TrialStart(
        hyperparameters=facts.get("hyperparameters") or values,
        generation=facts.get("generation") or 0,
        donor=facts.get("donor"),
        lineage=tuple(facts.get("lineage") or ()),
    )


def _clone(
    handed: ResumeSource,
    own: ResumeSource | None,
    values: Mapping[str, Any],
    exploit: Any,
    space: Mapping[str, Distribution],
) -> TrialStart:
    metadata = handed.metadata
    theirs = _facts(metadata)
    before = theirs.get("hyperparameters") or {}
    donor = {
        "run_id": metadata.run_id,
        "trial": theirs.get("trial"),
        "episode": metadata.episode,
        "num_timesteps": metadata.num_timesteps,
        "sha256": metadata.files[0].sha256 if metadata.files else None,
        "generation": theirs.get("generation"),
    }
    perturbed = {
        key: {"from": before.get(key), "to": value, "by": space[key].operation(before.get(key), value)}
        for key, value in values.items()
        if key in space and space[key].kind != "grid" and before.get(key) is not None
    }
    mine = _kept(_facts(own.metadata), values) if own is not None else TrialStart(values)
    generation = mine.generation + 1
    # Tune gives a clone all of its donor's: what the weights fit, and a seed that is not the member's own.
    values = {key: mine.hyperparameters.get(key, value) if key == "seed" else value for key, value in values.items()}
    step = {"generation": generation, EXPLOIT: exploit, "donor": donor, "perturbed": perturbed}
    return TrialStart(values, handed, generation, donor, (*mine.lineage, step))
