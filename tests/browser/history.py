"""Owns where things are on the pages of the Training History, and what a record says should be there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from playwright.sync_api import Locator, Page

from sb3_mlflow_ckpt.web import formats


def shown_runs(page: Page) -> list[str]:
    """Return the ids of the runs that a list shows, in its order."""
    rows = page.locator("#runs tbody tr").evaluate_all("rows => rows.map(row => row.id)")
    return [str(row).removeprefix("run-") for row in rows]


def run_row(page: Page, run_id: str) -> Locator:
    """Return a run's row in a list."""
    return page.locator(f"[id='run-{run_id}']")


def checkpoint_row(page: Page, episode: int) -> Locator:
    """Return all that a run's page says of a checkpoint."""
    return page.locator(f"#ep-{episode}")


def copy_button(where: Locator, program: str = "trainer", source: str = "path") -> Locator:
    """Return the button that copies a command."""
    return where.locator(f".command[data-program='{program}'][data-source='{source}'] button")


def primary_button(page: Page) -> Locator:
    """Return the button of the newest checkpoint that can be resumed."""
    return copy_button(page.locator(".resume"))


def text_of(element: Locator) -> str:
    """Return an element's text with single spaces, whatever a style sheet does to it."""
    return re.sub(r"\s+", " ", element.text_content() or "").strip()


def texts_of(elements: Locator) -> list[str]:
    """Return the texts of elements."""
    return [re.sub(r"\s+", " ", text).strip() for text in elements.all_text_contents()]


def times_in(element: Locator) -> list[str]:
    """Return the times in an element as machines read them."""
    return [str(found) for found in element.locator("time").evaluate_all("all => all.map(time => time.dateTime)")]


def terms(element: Locator) -> dict[str, str]:
    """Return what a description list says."""
    return dict(zip(texts_of(element.locator("dt")), texts_of(element.locator("dd")), strict=True))


def lacking(text: str, wanted: Iterable[str]) -> list[str]:
    """Return what a text does not hold."""
    return [part for part in wanted if part not in text]


def facts_of_row(record: Mapping[str, Any]) -> list[str]:
    """Return what a list must say of a run."""
    progress, saved = record["progress"], record["checkpoint_paths"]
    found = [record["name"], record["run_id"][:8], record["status"], record["agent_id"], record["algo"].upper()]
    found += [record["env_id"], formats.count(progress["num_timesteps"]), formats.count(progress["total_timesteps"])]
    found += [f"{min(100, 100 * progress['num_timesteps'] // progress['total_timesteps'])} %"]
    found += [formats.reward(progress["mean_reward"]), formats.reward(progress["best_mean_reward"])]
    found += [f"{len(saved)} saved", f"ep {resumable(record)[-1]['episode']}"]
    if record["parent"]:
        found.append(f"ep {record['parent']['episode']} of {record['parent']['run_id'][:8]}")
    return [part for part in found if part]


def resumable(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the checkpoints that are on disk or in MLflow."""
    return [item for item in record["checkpoint_paths"] if item["state"] != "pruned"]
