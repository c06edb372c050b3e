"""Owns what the comparison of runs shows: their curves over each other, their facts and their differences. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sb3_mlflow_ckpt.runs.comparison import MISSING, config_differences, flat_config
from sb3_mlflow_ckpt.runs.reader import Document, Documents, Glance
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.charts import Series, comparison_chart
from sb3_mlflow_ckpt.web.formats import Moment, mapping
from sb3_mlflow_ckpt.web.run_facts import (
    Progress,
    RunLink,
    Span,
    Status,
    algo_name,
    is_live,
    parent_link,
    progress_of,
    run_link,
    span_of,
    status_of,
)

_CHART_WIDTH = 1280


@dataclass(frozen=True)
class Compared:
    """One run of a comparison: a column."""

    run: RunLink
    status: Status
    algo: str
    env: str
    agent: str
    last: str
    best: str
    progress: Progress
    episodes: str
    checkpoints: str
    started: Moment | None
    span: Span
    parent: RunLink | None
    seed: str


@dataclass(frozen=True)
class SettingRow:
    """One setting in every run; `differs` where they are not all one."""

    key: str
    values: tuple[str, ...]
    differs: bool


@dataclass(frozen=True)
class Comparison:
    """The page of a comparison."""

    runs: tuple[Compared, ...]
    chart: Markup
    settings: tuple[SettingRow, ...]
    differences: int
    is_live: bool


def comparison(records: Sequence[Document], curves: Sequence[Documents], glances: Sequence[Glance]) -> Comparison:
    """Return the comparison of some runs, in their order.

    Args:
        records: The runs.
        curves: The curve of each.
        glances: What is known of the checkpoints of each.
    """
    runs = tuple(_compared(record, glance) for record, glance in zip(records, glances, strict=True))
    series = [
        Series(str(record["run_id"]), run.run.name, curve)
        for record, run, curve in zip(records, runs, curves, strict=True)
    ]
    rows = settings(records)
    return Comparison(
        runs=runs,
        chart=comparison_chart(series, width=_CHART_WIDTH),
        settings=rows,
        differences=sum(row.differs for row in rows),
        is_live=any(is_live(run.status) for run in runs),
    )


def settings(records: Sequence[Document]) -> tuple[SettingRow, ...]:
    """Return every setting of some runs, those first in which they differ."""
    configs = {str(record["run_id"]): record.get("config") for record in records}
    differing = {row.key for row in config_differences(configs)}
    flat = [flat_config(config) for config in configs.values()]
    keys = sorted({key for config in flat for key in config}, key=lambda key: (key not in differing, key))
    return tuple(
        SettingRow(
            formats.text(key),
            tuple(formats.setting(config.get(key, MISSING)) for config in flat),
            key in differing,
        )
        for key in keys
    )


def _compared(record: Document, glance: Glance) -> Compared:
    progress = mapping(record.get("progress"))
    return Compared(
        run=run_link(record),
        status=status_of(record),
        algo=algo_name(record.get("algo")),
        env=formats.text(record.get("env_id")),
        agent=formats.text(record.get("agent_id")),
        last=formats.reward(progress.get("mean_reward")),
        best=formats.reward(progress.get("best_mean_reward")),
        progress=progress_of(progress),
        episodes=formats.count(progress.get("episode")),
        checkpoints=formats.count(glance.checkpoints),
        started=formats.moment(record.get("started_at")),
        span=span_of(record),
        parent=parent_link(record),
        seed=formats.text(mapping(record.get("config")).get("seed")),
    )
