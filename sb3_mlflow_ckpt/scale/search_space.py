"""Owns the search space of a sweep: its distributions, their values as settings, and what a perturbation did.

Imports Ray only to make its domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["choice", "uniform", "loguniform", "randint", "grid"]
KINDS: tuple[str, ...] = get_args(Kind)
_GOLDEN = (3 - 5**0.5) / 2
PERTURBATION_FACTORS = (0.8, 1.2)
"""What population-based training multiplies a number by."""


@dataclass(frozen=True)
class Distribution:
    """Where the values of one setting come from.

    Attributes:
        kind: choice, uniform, loguniform, randint (the upper end is left out) or grid.
        values: What is chosen from, or the two ends.
    """

    kind: Kind
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, value: Any) -> Distribution:
        """Return the distribution that `{loguniform: [1e-5, 1e-2]}` says.

        Raises:
            ValueError: It says none; the message is the cause and the remedy.
        """
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
            raise ValueError(f"is none of {', '.join(KINDS)}: write, for example, {{loguniform: [1e-5, 1e-2]}}")
        kind, values = next(iter(value.items()))
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"{kind} needs a list: write {kind}: [..., ...]")
        if kind in ("choice", "grid"):
            return cls(kind, tuple(values))
        return cls(kind, _ends(kind, values))

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values whose being valid settings tells that all are: each, or the ends."""
        if self.kind == "randint":
            return (self.values[0], self.values[1] - 1)
        if self.is_continuous:
            # One between the ends, and hardly a whole number, which some settings need.
            low, high = self.values
            return (low, high, low + (high - low) * _GOLDEN)
        return self.values

    @property
    def is_continuous(self) -> bool:
        """Whether it draws fractions."""
        return self.kind in ("uniform", "loguniform")

    def domain(self) -> Any:
        """Return it as Ray Tune takes it."""
        from ray import tune

        if self.kind == "grid":
            return tune.grid_search([*self.values])
        if self.kind == "choice":
            return tune.choice([*self.values])
        return getattr(tune, self.kind)(*self.values)

    def mutation(self) -> Any:
        """Return it as Ray's population-based training takes it: a list is walked along, a domain sampled again."""
        return [*self.values] if self.kind == "choice" else self.domain()

    def within(self, value: Any) -> Any:
        """Return a value, brought back between the ends where a multiplication led beyond them."""
        if self.kind in ("choice", "grid"):
            return value
        low, high = self.values
        return min(max(value, low), high - 1 if self.kind == "randint" else high)

    def operation(self, before: Any, after: Any) -> str:
        """Return what a perturbation did to a value: kept, `* 1.2`, clamped (to an end), shift or resample."""
        if after == before:
            return "kept"
        if self.kind == "choice":
            near = before in self.values and abs(self.values.index(before) - self.values.index(after)) == 1
            return "shift" if near else "resample"
        for factor in PERTURBATION_FACTORS:
            product = round(before * factor) if self.kind == "randint" else before * factor
            if math.isclose(after, self.within(product), rel_tol=1e-12):
                return f"* {factor}" if self.within(product) == product else "clamped"
        return "resample"


def short(value: Any) -> str:
    """Return a value as a person reads it: a drawn number has far more digits than matter."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ends(kind: str, values: Sequence[Any]) -> tuple[Any, Any]:
    if len(values) != 2 or any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in values):
        raise ValueError(f"{kind} needs two numbers: write {kind}: [low, high]")
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{kind} needs a lower and then a higher number, not {low} and {high}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform needs numbers above 0, not {low}")
    if kind == "randint" and not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"randint needs two integers, not {low} and {high}")
    return low, high
