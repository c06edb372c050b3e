"""Owns the words in which OpenAPI describes the answers. Bodies are made elsewhere; nothing is validated against these.

What somebody may have edited in a record has no type here: the description must hold for every answer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sb3_mlflow_ckpt.runs.document import STATUSES


class _Open(BaseModel):
    """A document that may hold more than is described."""

    model_config = ConfigDict(extra="allow")


class CheckpointItem(_Open):
    """A checkpoint of a run."""

    episode: int = Field(description="The episode whose end it was saved at", examples=[50])
    path: str = Field(description="Where its zip lies or lay, on the run's own host")
    uri: Any = Field(default=None, description="Its address in MLflow, `runs:/...`, or null")
    num_timesteps: Any = Field(default=None, description="Environment steps of the whole training", examples=[10_000])
    timestamp: Any = Field(default=None, description="When it was saved", examples=["2026-01-01T12:00:00.000Z"])
    bytes: Any = Field(default=None, description="The zip's size", examples=[140_000])
    sha256: Any = Field(default=None, description="The zip's SHA-256 as hexadecimal digits")
    mean_reward: Any = Field(default=None, description="Mean reward of the last episodes", examples=[195.5])
    trigger: Any = Field(default=None, description="Why it was saved", examples=["interval", "end", "signal"])
    state: Literal["mirrored", "local", "pruned"] = Field(
        description="`mirrored`: a mirror holds it; `local`: only the disk does; `pruned`: nobody does"
    )
    on_disk: bool = Field(description="Whether the zip is still in the run folder")
    pinned: bool = Field(description="Whether it is marked to stay there")


class Check(_Open):
    """What is known of a checkpoint's content."""

    state: Literal["verified", "corrupt", "unreadable", "absent"] = Field(
        description="`absent`: it is not on the machine that serves; `unreadable`: it could not be told"
    )
    problem: str | None = Field(description="What is wrong")


class CheckedCheckpoint(CheckpointItem):
    """A checkpoint whose content was read and compared with what was committed."""

    verification: Check


class Checkpoints(_Open):
    """Some checkpoints of a run, ascending by episode."""

    items: list[CheckpointItem]
    next_before: int | None = Field(description="`before` for those that come before these; null where there are none")


class CheckpointCounts(_Open):
    """What a list shows of a run's checkpoints."""

    count: int = Field(description="How many the run has committed")
    resumable: int = Field(description="How many of them are on disk or in a mirror")
    waiting: int = Field(description="How many are on disk and still to be sent to the run's mirror")
    latest: CheckpointItem | None = Field(description="The newest that is on disk or in a mirror")


class RunSummary(_Open):
    """What lists show of a run."""

    run_id: str
    agent_id: Any = Field(default=None, description="The agent", examples=["ppo_agent"])
    name: Any = Field(default=None, description="What a person calls the run, or null")
    algo: Any = Field(default=None, description="The algorithm", examples=["ppo"])
    env_id: Any = Field(default=None, description="The environment", examples=["CartPole-v1"])
    status: str = Field(
        description="`stalled`: its process lives and takes no steps; `lost`: its heartbeat is stale",
        examples=list(STATUSES),
    )
    parent: Any = Field(default=None, description="`{run_id, checkpoint, episode, sha256}` of what it resumed, or null")
    root_run_id: Any = Field(default=None, description="The first run of the chain of resumes")
    progress: Any = Field(
        default=None, description="`{num_timesteps, total_timesteps, episode, steps_per_second, mean_reward}`"
    )
    sweep_id: Any = Field(default=None, description="The sweep that it is a trial of, or null")
    started_at: Any = Field(default=None, description="When it started", examples=["2026-01-01T12:00:00.000Z"])
    heartbeat_at: Any = Field(default=None, description="When its process last gave a sign of life")
    ended_at: Any = Field(default=None, description="When it ended, or null")
    error: Any = Field(default=None, description="`{type, message}` of what ended it, or null")
    mlflow: Any = Field(default=None, description="`{tracking_uri, experiment_id, run_id}`, or null")
    mirrors: Any = Field(default=None, description="The names of its mirrors")


class ListedRun(RunSummary):
    """A run as the list shows it."""

    checkpoints: CheckpointCounts


class RunList(_Open):
    """A page of runs."""

    items: list[ListedRun]
    next_cursor: str | None = Field(description="`cursor` for the next page; null at the end")
    previous_cursor: str | None = Field(description="`cursor` for the page before: empty for the first, null on it")
    total: int = Field(description="How many runs the question admits")
    first: int = Field(description="The place of the first item among them, from 1; 0 where there is none")
    statuses: dict[str, int] = Field(description="How many runs of each status the rest of the question admits")
    choices: dict[str, list[str]] = Field(description="The values of `algo`, `env_id`, `agent_id` in the store")


class RunUrls(_Open):
    """Where more is to be found, as paths on this server; `mlflow` is a whole address."""

    self: str
    page: str
    metrics: str
    lineage: str
    checkpoints: str
    mlflow: str | None


class Run(RunSummary):
    """A run's whole record."""

    checkpoint_paths: list[CheckpointItem] = Field(description="Every checkpoint, ascending by episode")
    config: Any = Field(default=None, description="The training's configuration, without credentials")
    overrides: Any = Field(default=None, description="What it changed of its parent's: `{key: {from, to}}`")
    resume: Any = Field(default=None, description="What was restored, `exact`, and why not; null where it is no resume")
    urls: RunUrls


class MetricPoint(_Open):
    """A point of a learning curve; what else it holds are the metrics of the training."""

    num_timesteps: int = Field(description="Environment steps of the whole training")
    time: str | float = Field(description="When it was noted", examples=["2026-01-01T12:00:00.000Z"])


class CurveSegment(_Open):
    """A part of a curve, made by one run."""

    run_id: str
    until_timestep: int | None = Field(description="Where the next run went on from it; null for the last part")
    points: list[MetricPoint]


class Metrics(_Open):
    """A learning curve: of the run alone, or behind those of its ancestors."""

    run_id: str
    stitched: bool
    segments: list[CurveSegment] = Field(description="The oldest first; one where it is not stitched")


class MissingRun(_Open):
    """An ancestor that the store lacks."""

    run_id: str
    missing: Literal[True]
    episode: Any = Field(description="The episode of the checkpoint that was taken of it")


class RunLineage(_Open):
    """A run's place among its kin."""

    run_id: str
    root_run_id: str = Field(description="The first run of the chain of resumes")
    ancestors: list[MissingRun | RunSummary] = Field(description="What it came from, the first run first")
    children: list[RunSummary] = Field(description="What went on from it, the newest last")
    family: list[RunSummary] = Field(description="Every run of the chain that the store has, the newest last")


class ConfigDifference(_Open):
    """A setting in which runs differ."""

    key: str = Field(description="Its name, nested ones with dots", examples=["hyperparameters.n_steps"])
    values: dict[str, Any] = Field(description="Its value by run id; a run that does not have it is left out")


class Comparison(_Open):
    """Several runs, and in what they were set differently."""

    runs: list[RunSummary] = Field(description="In the order of the question")
    differences: list[ConfigDifference]


class Health(_Open):
    """The server is up, and its store answers."""

    status: Literal["ok"]


class ParameterProblem(_Open):
    """What is wrong with a parameter."""

    parameter: str
    problem: str


class Problem(_Open):
    """What is wrong (RFC 9457)."""

    type: str = Field(description="Which kind of problem: `urn:sb3-mlflow-ckpt:<name>`")
    title: str = Field(description="The name of the status")
    status: int
    detail: str = Field(description="One sentence for people")
    errors: list[ParameterProblem] | None = Field(default=None, description="With 422: each parameter that is wrong")
    store: str | None = Field(default=None, description="With 503: which store does not answer")
    uri: str | None = Field(default=None, description="With 503: its address, without credentials")
