"""Owns how documents become bytes: strict JSON whatever a record holds. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# Python refuses to write out longer ones.
_MOST_BITS = 14_000


def dump(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8; NaN and infinities, which JSON lacks, become null.

    Half of a surrogate pair, which UTF-8 lacks, is written as JSON's own escape.
    """
    try:
        text = _dumps(value)
    except (ValueError, TypeError):
        # Somebody edited a record: what JSON cannot hold is shown as far as it can be.
        text = _dumps(_plain(value))
    return text.encode("utf-8", "backslashreplace")


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if value.bit_length() < _MOST_BITS else None
    return value if value is None or isinstance(value, str) else str(value)
