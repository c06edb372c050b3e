"""Owns what differs between the configurations of runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sb3_mlflow_ckpt.config import flatten


class _Missing:
    """Stands where a run's configuration lacks a key that another has."""

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


MISSING: Final = _Missing()


@dataclass(frozen=True)
class Difference:
    """One setting in which runs differ.

    Attributes:
        key: The setting, nested ones with dots: `hyperparameters.n_steps`.
        values: Its value in each run, in the order of the runs; `MISSING` where a run does not have it.
    """

    key: str
    values: tuple[Any, ...]


def flat_config(config: Any) -> dict[str, Any]:
    """Return a configuration with one entry a setting; empty for what is no configuration."""
    return dict(sorted(flatten(config).items())) if isinstance(config, Mapping) else {}


def config_differences(configs: Mapping[str, Any]) -> list[Difference]:
    """Return the settings in which configurations differ, by name.

    Args:
        configs: The configuration of each run, by its id.
    """
    flat = [flat_config(config) for config in configs.values()]
    keys = sorted({key for config in flat for key in config})
    rows = [Difference(key, tuple(config.get(key, MISSING) for config in flat)) for key in keys]
    return [row for row in rows if any(_differ(row.values[0], value) for value in row.values[1:])]


def changes_from_parent(record: Mapping[str, Any]) -> list[Difference]:
    """Return what a resumed run changed of its parent's configuration: each with two values, before and after."""
    overrides = record.get("overrides")
    if not isinstance(overrides, Mapping):
        return []
    return [
        Difference(str(key), (change.get("from", MISSING), change.get("to", MISSING)))
        for key, change in sorted(overrides.items())
        if isinstance(change, Mapping)
    ]


def _differ(one: Any, other: Any) -> bool:
    # True is 1 in Python and another setting here; 3e-4 and 0.0003 are one.
    return isinstance(one, bool) is not isinstance(other, bool) or bool(one != other)
