"""Owns the exception tree. Every error subclasses a builtin, carries its data and names the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.printable import printable

# How `requests` ends: (Caused by NewConnectionError("HTTPConnection(host='h', port=1): ...")).
_BENEATH = re.compile(r"\(Caused by \w+\(['\"]?(?:<[^>]*>: |\w+\([^)]*\): )?(?P<cause>.*?)['\"]?\)+$")


def _made_again(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    # Of several builtins among its bases, this one has a layout of its own.
    error = (OSError if issubclass(kind, OSError) else kind).__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    if isinstance(error, SystemExit):
        error.code = args[0]
    return error


class _Portable:
    """An error that can be copied, and can come from another process.

    As a rule `__init__` would be called again, with the message alone.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        assert isinstance(self, BaseException)
        return _made_again, (type(self), self.args, self.__dict__)


class CheckpointError(_Portable, Exception):
    """Root of everything that this package raises about checkpoints and run folders."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint where one was asked for.

    Args:
        what: The path or URI as the caller gave it.
        hint: What was there instead, and what to type.
    """

    def __init__(self, what: object, hint: str = "") -> None:
        self.what = str(what)
        super().__init__(printable(f"Checkpoint not found: {what}" + (f". {hint}" if hint else "")))


class CheckpointLoadError(CheckpointError, RuntimeError):
    """A checkpoint exists but cannot be turned into a model.

    Args:
        path: The checkpoint's zip.
        cause: One sentence that says what is wrong.
        hint: The remedy, or versions side by side where they differ.
    """

    def __init__(self, path: object, cause: str, hint: str = "") -> None:
        self.path = str(path)
        self.cause = printable(cause)
        message = f"Failed to load model from checkpoint {path}: {cause.rstrip('.')}"
        # The cause may quote what a stranger wrote.
        super().__init__(printable(message + (f". {hint}" if hint else "")))


class CheckpointCorruptError(CheckpointLoadError):
    """A file of the checkpoint differs from what its metadata promises."""


class IncompatibleCheckpointError(CheckpointLoadError):
    """The checkpoint is whole, but belongs to another algorithm, space or format."""


class ForeignCheckpointError(IncompatibleCheckpointError):
    """The zip was written by SB3's own `save`: its weights can be loaded, its run is unknown.

    Args:
        path: The zip.
        candidates: Algorithms that its members fit.
    """

    def __init__(self, path: object, candidates: tuple[str, ...] = ()) -> None:
        fitting = f" (its members fit {', '.join(candidates)})" if candidates else ""
        super().__init__(
            path,
            "it was not written by sb3_mlflow_ckpt, and does not say which algorithm it is of",
            f"Name the algorithm{fitting}: --algo ppo, or load_checkpoint(path, env=env, algo='ppo'), reads its "
            "weights and runs nothing of it; PPO.load(path) runs what is pickled in it",
        )


class UntrustedCheckpointError(CheckpointLoadError):
    """The checkpoint asks for something that could run code, or write or fill something, and is not trusted."""


class CheckpointSaveError(CheckpointError, OSError):
    """A checkpoint could not be made durable; the ones before it are untouched.

    Args:
        path: The zip that was being written.
        cause: The error beneath, or what is said of it.
        hint: The remedy.
    """

    def __init__(self, path: object, cause: BaseException | str, hint: str = "") -> None:
        self.path = str(path)
        message = f"Checkpoint saving failed for {path}: {cause}"
        super().__init__(message + (f". {hint}" if hint else ""))


class ForeignFileError(CheckpointError, OSError):
    """Something else lies where a file of a run folder belongs: a link, a folder, a pipe, a device.

    Args:
        path: Where.
    """

    def __init__(self, path: object) -> None:
        self.path = str(path)
        super().__init__(
            printable(
                f"{path} is not a file of its own (a link, a folder, a pipe or a device lies there), and is not "
                "followed. Put the file itself there, or remove it"
            )
        )


class RunTakenOverError(CheckpointSaveError):
    """Another process writes to the run folder now: this one must not any more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cause = RuntimeError("another process has taken over this run folder")
        super().__init__(folder, cause, "This one stops, and leaves the folder and its mirrors to it")


class InvalidIdError(CheckpointError, ValueError):
    """An agent id or run id could leave its folder, or cannot name one everywhere."""


class InvalidQueryError(_Portable, ValueError):
    """A question about runs that cannot be answered as it is asked.

    Args:
        parameter: What is wrong with it: `sort`, `cursor`, ...
        problem: Why, and what would do.
    """

    def __init__(self, parameter: str, problem: str) -> None:
        self.parameter = parameter
        self.problem = printable(problem)
        super().__init__(f"{parameter}: {self.problem}")


class RunNotFoundError(CheckpointError, LookupError):
    """No run record with this id.

    Args:
        run_id: The id as the caller gave it.
        where: The store that was searched.
    """

    def __init__(self, run_id: str, where: object) -> None:
        self.run_id = run_id
        super().__init__(f"Run not found: {run_id!r} in {where}. List what is there with: sb3-mlflow-ckpt runs list")

    def __str__(self) -> str:
        return str(self.args[0])


class RunFolderTakenError(CheckpointError, FileExistsError):
    """A new training would mix its checkpoints with those of another in one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"{folder} holds the checkpoints of another training. Resume it with --resume-from-checkpoint, "
            "or give this training a run id of its own"
        )


class RunFolderBusyError(CheckpointError, RuntimeError):
    """Another training is writing to this run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"Another training is writing to {folder}; stop it first, or leave out --run-id to start a run of its own"
        )


class ConfigError(_Portable, ValueError):
    """One setting cannot be used.

    Args:
        key: The setting's dotted name.
        problem: What is wrong with it, with the value in it.
        source: Where the value came from ("--n-envs", "train.yaml", ...).
        hint: The nearest valid name, or what is accepted.
    """

    def __init__(self, key: str, problem: str, source: str = "", hint: str = "") -> None:
        self.key = key
        self.source = source
        origin = f" (from {source})" if source else ""
        super().__init__(f"{key}: {problem}{origin}" + (f". {hint}" if hint else ""))


class MirrorUnavailableError(_Portable, ConnectionError):
    """An MLflow server or a database does not answer, or refuses what it is asked.

    Args:
        name: "MLflow" or "MongoDB".
        uri: Its address, with credentials removed.
        cause: The client's own error.
        hint: What else can be done.
        refused: Whether it did answer, and said no.
    """

    def __init__(self, name: str, uri: str, cause: object, hint: str = "", *, refused: bool = False) -> None:
        self.name, self.uri, self.cause, self.refused = name, uri, cause, refused
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        # pymongo appends its timeouts and a dump of its topology.
        reason = reason.partition(" (configured timeouts")[0].partition(", Timeout:")[0].rstrip(" .")
        if beneath := _BENEATH.search(reason):
            reason = beneath["cause"]
        if len(reason) > 300:
            reason = f"{reason[:300].rpartition(' ')[0]} ..."
        if refused:
            super().__init__(f"{name} at {uri} refuses: {reason}")
        else:
            remedy = "Start it or correct the address" + (f"; {hint}" if hint else "")
            super().__init__(f"{name} at {uri} does not answer: {reason}. {remedy}")

    def again(self) -> MirrorUnavailableError:
        """Return a copy to raise in another thread: each keeps a traceback of its own."""
        copy = MirrorUnavailableError(self.name, self.uri, self.cause, refused=self.refused)
        copy.args = self.args
        return copy


class ClusterError(_Portable, RuntimeError):
    """A cluster cannot be used as it is asked for.

    Args:
        cause: One sentence that says what is wrong.
        remedy: What to do.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause, self.remedy = printable(cause), remedy
        super().__init__(f"{self.cause.rstrip('.')}. {remedy}")


class ClusterUnavailableError(ClusterError, ConnectionError):
    """No cluster answers."""


class MissingRayError(ClusterError, ImportError):
    """Ray is not installed.

    Args:
        cause: What was raised when it was imported.
    """

    def __init__(self, cause: object) -> None:
        super().__init__(f"Ray cannot be imported ({cause})", "Install it with: pip install 'sb3-mlflow-ckpt[ray]'")


class TrainingInterrupted(_Portable, SystemExit):
    """Training stopped on a signal after its state was saved; the exit code is 128 + the signal's number.

    Args:
        signum: The signal.
        checkpoint: The checkpoint that was saved, if any.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        super().__init__(128 + signum)


class TrainingStopped(_Portable, SystemExit):
    """Whoever runs the training has it stop here; the last checkpoint is what it may go on from. The exit code is 0."""

    def __init__(self) -> None:
        super().__init__(0)


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as the record stores it: `type`, `message`, `traceback` (strings)."""
    import traceback

    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
