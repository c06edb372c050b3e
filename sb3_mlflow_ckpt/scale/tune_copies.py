"""Owns which of a population's checkpoints Ray Tune keeps: not those that nobody will read any more.

Tune's own rule counts a trial's checkpoints alone, and removes what another, that waits for its turn, is to go on from.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.tune import Checkpoint

logger = logging.getLogger(__name__)


def remove_copies(newest: Checkpoint, trials: Sequence[Any], keep: int) -> list[str]:
    """Remove older checkpoints of a trial that no trial goes on from; return their paths.

    Args:
        newest: What the trial has reported now.
        trials: All of Tune's trials: each names the checkpoint that it starts from, its own or its donor's.
        keep: How many of the trial's newest stay in any case: its donors' last perturbation may lie so far back.
    """
    from pyarrow.fs import FileSelector

    needed = {trial.checkpoint.path for trial in trials if trial.checkpoint is not None}
    removed = []
    try:
        storage = newest.filesystem
        assert storage is not None
        there = storage.get_file_info(FileSelector(posixpath.dirname(newest.path)))
        copies = sorted(info.path for info in there if info.base_name.startswith("checkpoint_"))
        # After a resume from an older snapshot the numbers begin lower: what lies above is removed when they reach it.
        for path in [path for path in copies if path <= newest.path][:-keep]:
            if path not in needed:
                storage.delete_dir(path)
                removed.append(path)
    except OSError as error:
        logger.warning("Older checkpoints of the sweep stay: %s", error)
    return removed
