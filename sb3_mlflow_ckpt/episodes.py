"""Owns finding out how many episodes have ended, over all environments and for every algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


class EndedEpisodes:
    """Looks at what SB3 shows its callbacks."""

    def __init__(self) -> None:
        self._monitored = (0, 0)

    def ended(self, model: BaseAlgorithm, shown: Mapping[str, Any]) -> int:
        """Return how many episodes ended since the last call.

        Args:
            model: The algorithm that is learning.
            shown: The callback's `locals`; ARS shows no `dones`, and what its monitors noted is counted.
        """
        dones = shown.get("dones")
        if dones is not None:
            return int(np.count_nonzero(dones))
        infos = model.ep_info_buffer
        identity, seen = self._monitored
        count = len(infos) if infos is not None else 0
        self._monitored = (id(infos), count)
        return count - seen if id(infos) == identity else count
