"""Owns what callbacks and the logger have counted up so far: whatever of it changed since training began.

Settings are left alone: a resumed run may be given other ones.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.logger import Logger

from sb3_mlflow_ckpt import tree

State = dict[str, Any]

_NOT_STATE = frozenset({"model", "parent", "locals", "globals", "verbose", "callback", "callbacks", "num_timesteps"})
_OWN_PACKAGE = __name__.partition(".")[0]
OWN_BOOKS = "_own_books"
"""The attribute of a callback of this package that names those of its attributes which a resume makes anew."""


class CallbackStates:
    """Watches the callbacks of one `learn`.

    Args:
        root: The callback that `learn` was given; None if it is not known.
    """

    def __init__(self, root: BaseCallback | None) -> None:
        self._callbacks = dict(_named(root)) if root is not None else {}
        self._before = {name: _forms(callback) for name, callback in self._callbacks.items()}

    def capture(self) -> State:
        """Return the attributes of each callback that changed since this was made, as copies."""
        state: State = {}
        for name, callback in self._callbacks.items():
            before = self._before[name]
            changed = [key for key, form in _forms(callback).items() if before.get(key) != form]
            state[name] = {key: copy.deepcopy(_listed(vars(callback)[key])) for key in changed}
        return state

    def restore(self, state: Mapping[str, Any]) -> str | None:
        """Give callbacks that are there again, at the same place and of the same class, what they had.

        Returns:
            What of it was not restored, or None.
        """
        for name, callback in self._callbacks.items():
            for key, value in dict(state.get(name) or {}).items():
                # The names come from a file: no method and no property may be hidden by one.
                if key in _NOT_STATE or key.startswith("__") or hasattr(type(callback), key):
                    continue
                if _holds_text(value):
                    # It could be where the callback writes to, and the file a stranger's.
                    return f"{type(callback).__name__}.{key} is a text, which is not taken from a file"
                setattr(callback, key, value)
        for name, changed in state.items():
            if name not in self._callbacks and set(changed) - {"n_calls"}:
                return f"the callback {name.rpartition('.')[2]} of the checkpoint is not there, or at another place"
        return None

    def unknown(self) -> str | None:
        """Return which callback decides by what is not captured, or None."""
        for callback in self._callbacks.values():
            if isinstance(callback, EvalCallback) and (not callback.deterministic or _listens(callback)):
                return "an EvalCallback draws or decides by episodes whose environment is not part of the checkpoint"
        return None


def capture_logger(logger: Logger) -> State:
    """Return the means that the logger has collected since its last dump; images and figures are left out."""
    numbers = (bool, int, float, np.number)
    kept = {key: value for key, value in logger.name_to_value.items() if isinstance(value, (*numbers, str))}
    return {
        key: [value.item() if isinstance(value, np.generic) else value, int(logger.name_to_count.get(key, 0)),
              list(logger.name_to_excluded.get(key) or ())]
        for key, value in kept.items()
    }  # fmt: skip


def restore_logger(logger: Logger, state: Mapping[str, Any]) -> None:
    """Put collected means back."""
    for key, (value, count, excluded) in state.items():
        logger.name_to_value[key] = value
        logger.name_to_count[key] = int(count)
        logger.name_to_excluded[key] = tuple(str(name) for name in excluded)


def _named(callback: BaseCallback, place: str = "") -> Iterator[tuple[str, BaseCallback]]:
    """Yield a callback and those within it, each under its place and class."""
    kind = type(callback)
    name = f"{place}/{kind.__module__}.{kind.__qualname__}"
    # Ours keep their own books; what a user's subclass of one adds to them does not.
    if not kind.__module__.startswith(f"{_OWN_PACKAGE}."):
        yield name, callback
    if isinstance(callback, CallbackList):
        within: list[Any] = list(callback.callbacks)
    else:
        within = [getattr(callback, key, None) for key in ("callback", "callback_on_new_best")]
    for index, inner in enumerate(within):
        if isinstance(inner, BaseCallback):
            yield from _named(inner, f"{name}[{index}]")


def _forms(callback: BaseCallback) -> dict[str, str]:
    """Return a text for each attribute that has a plain form; it differs where the attribute does."""
    forms, own = {}, vars(callback).get(OWN_BOOKS, ())
    for key, value in vars(callback).items():
        if key in _NOT_STATE or key in own:
            continue
        try:
            document, arrays = tree.encode(_listed(value))
        except (TypeError, ValueError):
            continue
        forms[key] = json.dumps(document) + "".join(str(zlib.crc32(piece.data)) for piece in tree.pieces(arrays))
    return forms


def _listens(callback: EvalCallback) -> bool:
    return callback.callback is not None or callback.callback_on_new_best is not None


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_text(item) for item in value)
    return isinstance(value, (str, bytes)) or (isinstance(value, np.ndarray) and value.dtype.kind in "SU")


def _listed(value: Any) -> Any:
    """Turn numpy scalars into numbers; everything else stays."""
    if isinstance(value, np.generic):
        return value.item()
    return [_listed(item) for item in value] if isinstance(value, list) else value
