"""Owns the mapping between ids and paths. Pure: touches no disk. Nobody else joins path strings.

checkpoints/<agent_id>/<run_id>/ep000050.zip and its siblings; see docs/checkpointing.md.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.errors import InvalidIdError

RECORD_NAME = "run.json"
SWEEP_NAME = "sweep.json"
"""The record of a sweep, in its own folder."""
METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "checkpoints.jsonl"
LOCK_NAME = ".lock"
SAVING_NAME = ".saving"
METADATA_SUFFIX = "_metadata.json"
PIN_SUFFIX = ".pin"
LEASE_SUFFIX = ".lease"
TEMPORARY_PREFIX = ".tmp-"
FETCH_PREFIX = ".fetch-"
"""How the folders begin into which a repair downloads."""
REPLAY_FOLDER = "replay"
"""Where a run folder holds the chunks of replay buffers."""
SET_ASIDE_FOLDER = "set-aside"
"""Where a run folder holds what a repair took out of use: nothing that is damaged is deleted."""
ARTIFACT_FOLDER = "checkpoints"
"""Where MLflow runs hold checkpoints among their artifacts."""

LARGEST_EPISODE = 10**18 - 1
"""The greatest number that a file's name, and every reader of JSON, can hold."""

_MODEL_NAME = re.compile(r"ep(\d{6,18})\.zip", re.ASCII)
_METADATA_NAME = re.compile(r"ep(\d{6,18})_metadata\.json", re.ASCII)
_MARKER_NAME = re.compile(r"\.?ep(\d{6,18})\.(pin|lease)", re.ASCII)
_CHUNK_NAME = re.compile(r"(\d{12,18})-(\d{12,18})-[0-9a-f]{8}\.zst", re.ASCII)
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY_PREFIX) + r"\d+-[0-9a-f]+-(.+)", re.DOTALL)
_FORBIDDEN = frozenset('/\\:*?"<>|')
# Names that Windows keeps for devices: a folder of a shared drive must be readable there too.
_PORTS = "123456789\u00b9\u00b2\u00b3"
_RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in _PORTS)})
# Control and format characters, surrogates, what is not assigned, and what ends a line.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def check_id(value: str, what: str) -> str:
    """Return an agent id or run id unchanged if it can name a folder.

    Raises:
        InvalidIdError: The id is empty, too long, or could leave its folder.
    """
    problem = _id_problem(value)
    if problem:
        raise InvalidIdError(
            f"{what} {_shown(value)} {problem}. Use letters, digits, '-', '_' or '.', for example 'ppo_agent'"
        )
    return value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # An integer of more digits than Python writes out.
        text = f"of the type {type(value).__name__}"
    return text if len(text) <= 250 else f"{text[:250]}..."


def _id_problem(value: str) -> str | None:
    if not isinstance(value, str):
        return "is not a text"
    if not value:
        return "is empty"
    if len(value.encode("utf-8", "surrogatepass")) > 200:
        return "is longer than 200 bytes"
    if any(character in _FORBIDDEN for character in value):
        return "holds a character that separates or is reserved in paths"
    if any(unicodedata.category(character) in _UNSEEN for character in value):
        return "holds a control character"
    if value[0] in ".-" or value[-1] == "." or value != value.strip():
        return "begins or ends with a character that paths or shells treat specially"
    if value.split(".")[0].strip().lower() in _RESERVED:
        return "is a reserved device name"
    return None


def id_spellings(run_id: str) -> tuple[str, ...]:
    """Return the folder names that may hold a run: as given, and a UUID with and without its dashes."""
    try:
        parsed = uuid.UUID(run_id)
    except (ValueError, AttributeError):
        return (run_id,)
    return tuple(dict.fromkeys((run_id, parsed.hex, str(parsed))))


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run and the names in it.

    Raises:
        InvalidIdError: An id could leave the folder.
    """

    checkpoint_dir: Path
    agent_id: str
    run_id: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint_dir", Path(self.checkpoint_dir))
        check_id(self.agent_id, "agent_id")
        check_id(self.run_id, "run_id")

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """Return the run folder that a path of the form `<checkpoint_dir>/<agent_id>/<run_id>` names."""
        path = Path(path).absolute()
        return cls(path.parent.parent, path.parent.name, path.name)

    @cached_property
    def path(self) -> Path:
        return self.checkpoint_dir / self.agent_id / self.run_id

    @property
    def record(self) -> Path:
        return self.path / RECORD_NAME

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_NAME

    @property
    def events(self) -> Path:
        return self.path / EVENTS_NAME

    @property
    def lock(self) -> Path:
        return self.path / LOCK_NAME

    @property
    def saving(self) -> Path:
        """What is locked, shared, by who saves without a run; who sweeps must have it alone."""
        return self.path / SAVING_NAME

    @property
    def replay(self) -> Path:
        return self.path / REPLAY_FOLDER

    @property
    def set_aside(self) -> Path:
        return self.path / SET_ASIDE_FOLDER

    def aside(self, name: str, number: int = 0) -> Path:
        """Return where a file is set aside; the number tells those of one name apart."""
        return self.set_aside / (f"{name}.{number}" if number else name)

    @property
    def adopted(self) -> Path:
        """What metadata that a repair makes for a zip is called while it is written."""
        return self.path / "adopted.json"

    def chunk(self, name: str) -> Path:
        """Return the path of a replay chunk.

        Raises:
            InvalidIdError: No chunk can have this name.
        """
        return chunk_path(self.path, name)

    def model(self, episode: int) -> Path:
        return self.path / f"ep{episode:06d}.zip"

    def metadata(self, episode: int) -> Path:
        return self.path / f"ep{episode:06d}{METADATA_SUFFIX}"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep: what Ray Tune keeps of it, and what is told of it at the end.

    Raises:
        InvalidIdError: The id could leave the folder.
    """

    storage_path: Path
    sweep_id: str

    def __post_init__(self) -> None:
        check_id(self.sweep_id, "sweep id")

    @property
    def path(self) -> Path:
        return self.storage_path / self.sweep_id

    @property
    def record(self) -> Path:
        return self.path / SWEEP_NAME

    @property
    def lock(self) -> Path:
        return self.path / LOCK_NAME

    @property
    def plot(self) -> Path:
        return self.path / "curves.png"

    @property
    def table(self) -> Path:
        return self.path / "trials.json"

    def run_id(self, trial_id: str) -> str:
        """Return the id of a trial's run: the sweep's, and the number that Ray Tune gave the trial."""
        return f"{self.sweep_id}-{trial_id.rpartition('_')[2]}"


def pin_path(model_path: Path) -> Path:
    """Return the marker whose presence pins a checkpoint: `ep000050.zip` -> `ep000050.pin`."""
    return model_path.with_name(model_path.name.removesuffix(".zip") + PIN_SUFFIX)


def lease_path(model_path: Path) -> Path:
    """Return the file whose lock says that a checkpoint is in use: `ep000050.zip` -> `.ep000050.lease`."""
    return model_path.with_name("." + model_path.name.removesuffix(".zip") + LEASE_SUFFIX)


def marker_episode(name: str) -> tuple[int, str] | None:
    """Return the episode and the kind (`pin`, `lease`) of a marker's file name, or None for any other name."""
    match = _MARKER_NAME.fullmatch(name)
    if match is None or name.startswith(".") != (match[2] == "lease"):
        return None
    return int(match[1]), match[2]


def model_episode(name: str) -> int | None:
    """Return the episode of a file name such as `ep000050.zip`, or None for any other name."""
    match = _MODEL_NAME.fullmatch(name)
    return int(match[1]) if match else None


def metadata_episode(name: str) -> int | None:
    """Return the episode of a file name such as `ep000050_metadata.json`, or None for any other name."""
    match = _METADATA_NAME.fullmatch(name)
    return int(match[1]) if match else None


def temporary_target(name: str) -> str | None:
    """Return the name that a temporary was to have, or None for a name that is no temporary's."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match[1] if match else None


def chunk_name(start: int, end: int, token: str) -> str:
    """Return the name of the chunk that holds the rows from `start` to before `end`; `token` makes it unique."""
    return f"{start:012d}-{end:012d}-{token}.zst"


def chunk_range(name: str) -> tuple[int, int] | None:
    """Return the rows that a chunk's file name tells, or None for any other name."""
    match = _CHUNK_NAME.fullmatch(name) if isinstance(name, str) else None
    return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def chunk_path(run_folder: Path, name: str) -> Path:
    """Return the path of a replay chunk in the folder that also holds the zips which need it.

    Raises:
        InvalidIdError: No chunk can have this name: it may come from a stranger's file and must not leave the folder.
    """
    if chunk_range(name) is None:
        raise InvalidIdError(f"{name!r} is not the name of a replay chunk; the checkpoint is damaged or not ours")
    return run_folder / REPLAY_FOLDER / name


def chunk_entry(name: str) -> str:
    """Return how metadata names a chunk: `replay/<name>`."""
    return f"{REPLAY_FOLDER}/{name}"


def entry_chunk(entry: str) -> str | None:
    """Return the chunk that a name in metadata means, or None where it means something else."""
    folder, _, name = entry.partition("/")
    return name if folder == REPLAY_FOLDER and chunk_range(name) is not None else None


def metadata_path(model_path: Path) -> Path:
    """Return where the metadata of a checkpoint's zip lies: `ep000050.zip` -> `ep000050_metadata.json`."""
    return model_path.with_name(model_path.name.removesuffix(".zip") + METADATA_SUFFIX)


def model_path(path: Path) -> Path:
    """Return the zip that a zip's or a metadata file's path names."""
    if path.name.endswith(METADATA_SUFFIX):
        return path.with_name(path.name.removesuffix(METADATA_SUFFIX) + ".zip")
    return path
