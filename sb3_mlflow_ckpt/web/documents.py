"""Owns the documents that the API answers with, made of what a store tells. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from sb3_mlflow_ckpt.runs.comparison import MISSING, config_differences
from sb3_mlflow_ckpt.runs.lineage import Lineage, Segment
from sb3_mlflow_ckpt.runs.reader import Document, Documents, Glance
from sb3_mlflow_ckpt.runs.summaries import Page, summarize
from sb3_mlflow_ckpt.web.settings import WebSettings

_POINT_BEGINS = ("num_timesteps", "episode", "time")


def run_list(page: Page, glances: Mapping[str, Glance]) -> Document:
    """Return a page of runs."""
    return {
        "items": [listed_run(run, glances) for run in page.items],
        "next_cursor": page.next_cursor,
        "previous_cursor": page.previous_cursor,
        "total": page.total,
        "first": page.first,
        "statuses": page.statuses,
        "choices": page.choices,
    }


def listed_run(run: Mapping[str, Any], glances: Mapping[str, Glance]) -> Document:
    """Return a run as a list shows it: its summary, and what there is of its checkpoints."""
    return {**run, "checkpoints": _counts(glances.get(run["run_id"], Glance()))}


def _counts(glance: Glance) -> Document:
    return {
        "count": glance.checkpoints,
        "resumable": glance.resumable,
        "waiting": glance.waiting,
        "latest": glance.latest,
    }


def run_document(run: Document, settings: WebSettings) -> Document:
    """Return a run's whole record with where more is to be found."""
    run_id = quote(str(run["run_id"]), safe="")
    own = f"{settings.root_path}/api/training-runs/{run_id}"
    urls = {
        "self": own,
        "page": f"{settings.root_path}/training/{run_id}",
        "metrics": f"{own}/metrics",
        "lineage": f"{own}/lineage",
        "checkpoints": f"{own}/checkpoints",
        "mlflow": mlflow_url(run, settings.mlflow_ui_url),
    }
    return {**run, "urls": urls}


def mlflow_url(run: Mapping[str, Any], ui_url: str | None) -> str | None:
    """Return where MLflow shows a run, or None where that is not known.

    Args:
        run: Its record or summary.
        ui_url: Where MLflow's pages are; the run's own tracking server where it is None.
    """
    mlflow = run.get("mlflow")
    if not isinstance(mlflow, Mapping):
        return None
    base, experiment, run_id = ui_url or mlflow.get("tracking_uri"), mlflow.get("experiment_id"), mlflow.get("run_id")
    if not isinstance(base, str) or not experiment or not run_id:
        return None
    try:
        address = urlsplit(base)
    except ValueError:
        return None
    if address.scheme not in ("http", "https") or not address.netloc:
        return None
    # A browser asks for the password that was removed from the record.
    host = re.sub(r".*@", "", address.netloc, flags=re.DOTALL)
    place = f"{address.scheme}://{host}{quote(address.path.rstrip('/'), safe='/%~')}"
    return f"{place}/#/experiments/{quote(str(experiment), safe='')}/runs/{quote(str(run_id), safe='')}"


def checkpoint_page(items: Documents, limit: int) -> Document:
    """Return a page of checkpoints, given one more than it holds if there is one."""
    page = items[-limit:]
    return {"items": page, "next_before": page[0]["episode"] if len(items) > limit else None}


def metrics_document(run_id: str, segments: Iterable[Segment], *, stitched: bool) -> Document:
    """Return a learning curve."""
    parts = [
        {
            "run_id": part.run_id,
            "until_timestep": part.until_timestep,
            "points": [_ordered(point) for point in part.points],
        }
        for part in segments
    ]
    return {"run_id": run_id, "stitched": stitched, "segments": parts}


def _ordered(point: Document) -> Document:
    # A database does not keep the order in which keys were written.
    first = [key for key in _POINT_BEGINS if key in point]
    return {key: point[key] for key in (*first, *sorted(point.keys() - {*first}))}


def lineage_document(line: Lineage) -> Document:
    """Return a run's place among its kin."""
    return {
        "run_id": line.run_id,
        "root_run_id": line.root_run_id,
        "ancestors": line.ancestors,
        "children": line.children,
        "family": line.family,
    }


def comparison_document(records: Sequence[Document]) -> Document:
    """Return several runs, and in what their configurations differ."""
    ids = [record["run_id"] for record in records]
    rows = config_differences({record["run_id"]: record.get("config") for record in records})
    differences = [
        {
            "key": row.key,
            "values": {run_id: value for run_id, value in zip(ids, row.values, strict=True) if value is not MISSING},
        }
        for row in rows
    ]
    return {"runs": [summarize(record) for record in records], "differences": differences}
