"""Errors that go to another process: Ray hands a trial's to the driver, and Python's own pools do the same."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest

from sb3_mlflow_ckpt import errors

_ARGUMENTS = {
    errors.CheckpointNotFoundError: ("a.zip", "Look elsewhere"),
    errors.CheckpointLoadError: ("a.zip", "it is empty", "Take another"),
    errors.CheckpointCorruptError: ("a.zip", "it is empty"),
    errors.IncompatibleCheckpointError: ("a.zip", "it is of another algorithm"),
    errors.ForeignCheckpointError: ("a.zip", ("ppo", "a2c")),
    errors.UntrustedCheckpointError: ("a.zip", "it runs code"),
    errors.CheckpointSaveError: ("a.zip", OSError(28, "No space left on device"), "Make room"),
    errors.ForeignFileError: ("a.zip",),
    errors.RunTakenOverError: (Path("run"),),
    errors.InvalidQueryError: ("sort", "is not a field"),
    errors.RunNotFoundError: ("a", "runs"),
    errors.RunFolderTakenError: (Path("run"),),
    errors.RunFolderBusyError: (Path("run"),),
    errors.ConfigError: ("n_envs", "2.5 is not valid", "s.yaml", "Give a whole number"),
    errors.MirrorUnavailableError: ("MLflow", "http://x", "timed out", "go on"),
    errors.ClusterError: ("No cluster", "Start one"),
    errors.ClusterUnavailableError: ("No cluster", "Start one"),
    errors.MissingRayError: (ImportError("No module named ray"),),
    errors.TrainingInterrupted: (15, Path("a.zip")),
    errors.TrainingStopped: (),
}
_ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]


@pytest.mark.parametrize("kind", _ALL, ids=lambda kind: kind.__name__)
def test_an_error_comes_whole_from_another_process(kind: type[BaseException]) -> None:
    error = kind(*_ARGUMENTS.get(kind, ("a message",)))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error) and again.args == error.args
        assert again.__dict__ == error.__dict__
        assert getattr(again, "code", None) == getattr(error, "code", None)
