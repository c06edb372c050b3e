"""Owns the state of single environments: recorded, captured and put back inside the process that steps them.

There is no pickled environment: many rebuild themselves from their constructor's arguments when they are unpickled
(gymnasium's EzPickle), which looks like a copy and is not where the original was; and unpickling a file runs its code.
"""

from sb3_mlflow_ckpt.env_state.wrapper import CheckpointableEnv

__all__ = ["CheckpointableEnv"]
