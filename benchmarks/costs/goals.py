"""Owns the goals, and whether the figures meet them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from costs.tables import middle, ratio, table

LARGE = 20e6
ENOUGH, MANY = 1000, 10_000
_FRAME = 84 * 84
_VECTOR = 4 * (17 + 6 + 2)
_MLFLOW = {"ours-mlflow": "sb3-mlflow", "ours-server": "sb3-server"}

GOALS = {
    1: "Stall: at most 1.5 memory copies of a state from 20 MB up, 1/20 of SB3's `save` for the 64x64 MLP",
    2: "Lost: at most 0.35 of SB3's `save`; with MLflow at most 0.25 of `save` + `log_artifact`",
    3: "Throughput: 0.99 with MLflow and a checkpoint every episode, 0.999 every 50; memory: at most two states more",
    4: "Durable within twice the time that writing and syncing these bytes takes",
    5: "Replay buffer: at most 1.1 times the new raw data written, and 1 ms of stall for 1,000 transitions",
    6: "Resume: at most 20 ms more than a fresh start, 50 ms from an MLflow server; `--help` 0.1 s more than click",
    7: "One more checkpoint costs at most 0.2 ms more where a run has 10,000",
}


class Check(NamedTuple):
    """A figure against its limit: it is met where `value` is at most `limit`, or for shares at least."""

    goal: int
    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def used(self) -> float:
        """How much of the limit is used: at most 1 where it is met."""
        return self.limit / self.value if self.at_least else max(0.0, self.value) / self.limit


def checks(figures: Mapping[str, Any]) -> list[Check]:
    """Return every check that the figures allow."""
    parts = {"throughput": _throughput, "replay": _replay, "start_up": _start_up}
    found = [*_costs(figures.get("costs", ()), figures["machine"]["write"])]
    found += [check for part, made in parts.items() for check in made(figures.get(part, ()))]
    # With fewer than the goal names it can be missed already, and is not met yet.
    count = figures["options"]["checkpoints"]
    found = [c for c in found if c.goal != 7 or count >= MANY or (count >= ENOUGH and c.used > 1)]
    return sorted(found, key=lambda check: check.goal)


def _costs(rows: Sequence[Mapping[str, Any]], write: float) -> Iterator[Check]:
    measured = {tuple(row["names"]): row for row in rows if row["pairs"]}
    for (policy, method), row in measured.items():
        title, sb3, copy = row["policy"], measured.get((policy, "sb3")), measured.get((policy, "copy"))
        if method == "ours":
            large = row["state"] >= LARGE
            if large and (stall := ratio(row, copy, "stall")) is not None:
                yield Check(1, f"{title}: stall / memory copy", stall, 1.5)
            if policy == "mlp" and (stall := ratio(row, sb3, "stall")) is not None:
                yield Check(1, f"{title}: stall / `save`", stall, 1 / 20)
            if (lost := ratio(row, sb3, "lost")) is not None:
                yield Check(2, f"{title}: lost / `save`", lost, 0.35)
            if large:
                yield Check(3, f"{title}: memory / state", middle(row, "peak") / row["state"], 2)
            writing = middle(row, "bytes") / write
            yield Check(4, f"{title}: time until durable / time of writing", middle(row, "background") / writing, 2)
        elif method in _MLFLOW:
            peer = measured.get((policy, _MLFLOW[method]))
            if (lost := ratio(row, peer, "lost")) is not None:
                yield Check(2, f"{row['method']}, {title}: lost / `save` + `log_artifact`", lost, 0.25)


def _throughput(rows: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    for row in rows:
        if row["names"][0] == "ours" and (row["every"] == 50 or (row["every"] == 1 and row["mlflow"] != "no MLflow")):
            limit = 0.999 if row["every"] == 50 else 0.99
            what = f"steps/s, every {row['every']}, {row['mlflow']}"
            yield Check(3, what, statistics.median(row["ratios"]), limit, at_least=True)


def _replay(rows: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    for row in rows:
        if row["checkpoint"] != "first":
            raw = 1000 * (_FRAME if "uint8" in row["buffer"] else _VECTOR)
            yield Check(5, f"{row['buffer']}: written / new raw data", row["ours_bytes"] / raw, 1.1)
            yield Check(5, f"{row['buffer']}: stall, ms", row["ours_stall_ms"], 1)


def _start_up(rows: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    limits = {"help": (6, 100.0), "resume": (6, 20.0), "resume-server": (6, 50.0), "growth": (7, 0.2)}
    for row in rows:
        name = row["names"][0]
        if name in limits and row["names"] != ["resume", "sb3-load"]:
            more = [own - other for own, other in zip(row["own"], row["other"], strict=True)]
            goal, limit = limits[name]
            yield Check(goal, f"{row['what']}: ms more than {row['against']}", 1e3 * statistics.median(more), limit)


def goals_tables(found: Sequence[Check]) -> str:
    """Return which goals are met, and every check."""
    lines = []
    for goal, text in GOALS.items():
        used = [check.used for check in found if check.goal == goal]
        met = f"{sum(u <= 1 for u in used)} of {len(used)}" if used else "not measured"
        verdict = "" if not used else "yes" if max(used) <= 1 else "**no**"
        worst = f"{max(used):.2g}" if used else ""
        lines.append([f"{goal}. {text}", verdict, met, worst])
    summary = table(["goal", "met", "checks that are met", "largest share of a limit used"], lines)
    return f"{summary}\n\n{_checks_table(found)}"


def _checks_table(found: Sequence[Check]) -> str:
    lines = [
        [
            f"{check.goal}. {check.what}",
            f"{check.value:.3g}",
            f"{'at least' if check.at_least else 'at most'} {check.limit:.3g}",
            "yes" if check.used <= 1 else "**no**",
            f"{check.used:.2g}",
        ]
        for check in found
    ]
    return table(["check", "measured", "limit", "met", "share of the limit used"], lines)
