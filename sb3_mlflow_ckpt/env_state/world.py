"""Owns the Box2D world of BipedalWalker: each episode gets a world of its own.

The environment keeps one world for all its episodes. What is left in it of those before, the order of its free memory,
decides the order in which contacts are solved, and with it the last bits of the numbers: an episode could not be
replayed without all the episodes before it. gymnasium's LunarLander makes a new world at each reset for that reason.
"""

from __future__ import annotations

from typing import Any


def renew(env: Any) -> None:
    """Give a BipedalWalker that is about to be reset a new world; any other environment is left alone."""
    if not any(kind.__module__ == "gymnasium.envs.box2d.bipedal_walker" for kind in type(env).__mro__):
        return
    import Box2D

    # The bodies belong to the old world, and only it may destroy them.
    env._destroy()
    env.world = Box2D.b2World()
