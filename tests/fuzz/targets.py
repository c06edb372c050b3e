"""What a stranger or an accident can write, and what reads it. Each target takes any bytes.

A target returns, or raises what it must not: anything but an error of the house. `watched` adds what no error tells:
a file written or removed outside of the scratch folder, a process started, a stranger's module imported.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.metadata
import io
import json
import logging
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.errors import CheckpointError, ConfigError, MirrorUnavailableError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.printable import printable

OURS = (CheckpointError, ConfigError, MirrorUnavailableError)
RUN = "0123456789abcdef0123456789abcdef"
TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"[" * 40, b'{"a":' * 40, b"9" * 400, b"-1", b"true", b"null", b"\0",
    b"\xff\xfe", b"../../", b"/etc/passwd", b"\r\n", b'""', b"{}", b"[]", b"1e18", b'"episode"', b'"event"', b"saved",
    b"mirrored", b"pruned", b'"replay"', b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"0x", b"evil:Evil",
    b"\x1b[2J", "\u202e\u2028".encode(), b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04", b"mongodb://u:p@h", b"runs:/",
    b"%2e%2e%2f", b"https://u:p@h/?token=x", b"\n", b": ", b"- ", b"lin_1", b"___", b"1_0", b"inherit", b"={a: ",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: Reads bytes.
        seeds: Makes what the code itself writes.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


class Violation(AssertionError):
    """Something happened that no input may bring about."""


class _Watch(importlib.abc.MetaPathFinder):
    """Refuses what no reader may do, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.content = b""
        self._installed = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "sb3_mlflow_ckpt"}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        # Clients try modules of their own accord; a stranger's is one that the input names.
        top = name.partition(".")[0]
        if self.on and top not in self._installed and top.encode() in self.content:
            raise Violation(f"imports {name}")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes)) and not _is_scratch(os.fsdecode(path)):
                raise Violation(f"writes to {path!r}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod"):
            if not all(_is_scratch(os.fsdecode(p)) for p in arguments[:2] if isinstance(p, (str, bytes))):
                raise Violation(f"{event} {arguments}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            raise Violation(f"{event} {arguments}")


def _is_scratch(path: str) -> bool:
    absolute = os.path.realpath(path)
    return absolute.startswith((os.path.realpath(tempfile.gettempdir()), "/dev/null")) or "__pycache__" in absolute


@cache
def _watch() -> _Watch:
    watch = _Watch()
    sys.meta_path.insert(0, watch)
    sys.addaudithook(watch.audit)
    return watch


@contextlib.contextmanager
def watched(content: bytes) -> Iterator[None]:
    """Watch what the reading of an input brings about."""
    watch = _watch()
    watch.on, watch.content = True, content
    try:
        yield
    finally:
        watch.on = False


def mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield so many inputs made of seeds, the same ones for the same `seed`."""
    rng = random.Random(seed)
    for _ in range(count):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            at = rng.randrange(len(content) + 1)
            kind = rng.randrange(6)
            if kind == 0 and content:
                content[at - 1] = rng.randrange(256)
            elif kind == 1:
                content[at:at] = rng.choice(TOKENS)
            elif kind == 2:
                content[at : at + rng.randrange(1, 20)] = rng.choice(TOKENS)
            elif kind == 3:
                del content[at : at + rng.randrange(1, 40)]
            elif kind == 4:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                content[at:at] = other[start : start + rng.randrange(1, 200)]
            elif rng.random() < 0.2:
                del content[at:]
            else:
                piece = content[at : at + rng.randrange(1, 60)]
                content[at:at] = piece * rng.randrange(1, 4)
        yield bytes(content)


@cache
def scratch() -> Path:
    """Return the folder that targets write their input to; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="sb3_mlflow_ckpt-fuzz-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []


def _printable(error: BaseException) -> None:
    if isinstance(error, CheckpointError) and printable(str(error)) != str(error):
        raise Violation(f"an error steers the terminal: {str(error)!r}")


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except OURS as error:
        _printable(error)


@cache
def checkpoint() -> Path:
    """Return a small real checkpoint; not to be changed."""
    from stable_baselines3 import PPO

    from sb3_mlflow_ckpt import save_checkpoint

    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})
    extra = {"note": "x", "numbers": [1, 2.5, None, True]}
    return save_checkpoint(model, scratch() / "real", agent_id="a", run_id=RUN, episode=1, extra_state=extra)


@cache
def foreign_zip() -> Path:
    """Return a small zip as SB3's own `save` writes it."""
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})
    model.save(scratch() / "foreign.zip")
    return scratch() / "foreign.zip"


def member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


@cache
def _run_folder() -> RunFolder:
    folder = RunFolder(scratch() / "runs", "agent", RUN)
    folder.path.mkdir(parents=True)
    folder.model(7).write_bytes(b"a zip")
    folder.metadata(7).write_bytes(checkpoint().with_name("ep000001_metadata.json").read_bytes())
    return folder


@cache
def _journal_files() -> dict[str, bytes]:
    import journals

    journal = journals.start_run(scratch() / "journal", RUN, mirrors=["MLflow"], error={"type": "E", "message": "m"})
    for episode in (1, 2, 3):
        journals.save(journal, episode)
    journals.mirror(journal, 1, f"runs:/{RUN}/checkpoints/ep000001.zip")
    journals.unmirror(journal, 1)
    journals.prune(journal, 1)
    for steps in (10, 20, 30):
        journals.add_point(journal, steps, ep_rew_mean=steps / 3, ep_len_mean=None, **{"train/loss": 0.1})
    journal.close()
    return {name: (journal.folder.path / name).read_bytes() for name in os.listdir(journal.folder.path)}


def _metadata(content: bytes) -> None:
    from sb3_mlflow_ckpt.ledger import saved_facts
    from sb3_mlflow_ckpt.metadata import parse_metadata
    from sb3_mlflow_ckpt.replay_sweep import needed_chunks
    from sb3_mlflow_ckpt.verification import read_metadata, replacement_of, verify_checkpoint

    folder = _run_folder()
    folder.metadata(7).write_bytes(content)
    with _ours():
        metadata = parse_metadata(content, "here")
        json.dumps(saved_facts(metadata), allow_nan=False)
        parse_metadata(json.dumps(metadata.to_json()), "again")
        replacement_of(metadata)
        needed_chunks(metadata)
    for read in (read_metadata, verify_checkpoint):
        with _ours():
            read(folder.model(7))


def _record(content: bytes) -> None:
    from click.testing import CliRunner

    from sb3_mlflow_ckpt import atomic
    from sb3_mlflow_ckpt.cli import main
    from sb3_mlflow_ckpt.journal import read_record
    from sb3_mlflow_ckpt.runs.mongo_database import decode, encode

    folder = _run_folder()
    folder.record.write_bytes(content)
    with _ours():
        record = read_record(folder)
        if json.loads(atomic.dump_json(record)) != record or decode(encode(record)) != record:
            raise Violation("a record does not survive")
    for words in (["list"], ["show", RUN], ["list", "--json"], ["show", RUN, "--json"]):
        done = CliRunner().invoke(main, ["runs", *words, "--checkpoint-dir", str(folder.checkpoint_dir)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if printable(done.output, keep="\n") != done.output:
            raise Violation(f"output steers the terminal: {done.output!r}")


def _events(content: bytes) -> None:
    from bson import BSON

    from sb3_mlflow_ckpt.runs.folder import entry, read_ledger
    from sb3_mlflow_ckpt.runs.mongo_database import encode

    folder = _run_folder()
    folder.events.write_bytes(content)
    with _ours():
        ledger = read_ledger(folder)
        for episode in sorted(ledger.saved):
            item = entry(folder, ledger, episode, pinned=())
            json.dumps(item, allow_nan=False)
            with contextlib.suppress(UnicodeEncodeError):
                BSON.encode(encode(item))
            for name in ledger.saved[episode].get("replay", ()):
                if folder.chunk(name).parent != folder.replay:
                    raise Violation(f"a chunk elsewhere: {name!r}")
            if folder.model(episode).parent != folder.path:
                raise Violation(f"a checkpoint elsewhere: {episode!r}")
        sorted(ledger.waiting), ledger.copy()


def _metrics(content: bytes) -> None:
    from sb3_mlflow_ckpt.journal import RunJournal
    from sb3_mlflow_ckpt.mirrors import naming
    from sb3_mlflow_ckpt.runs.curve import read_curve

    folder = _run_folder()
    folder.metrics.write_bytes(content)
    with _ours():
        for point in read_curve(folder):
            json.dumps(point, allow_nan=False)
            naming.metrics(point)
    folder.events.unlink(missing_ok=True)
    with _ours():
        RunJournal(folder).close()


def _yaml(content: bytes) -> None:
    from sb3_mlflow_ckpt import atomic, strict_json
    from sb3_mlflow_ckpt.cli.settings import file_layer, flag_layer
    from sb3_mlflow_ckpt.config import build_config
    from sb3_mlflow_ckpt.trust import refusals

    file = scratch() / "config.yaml"
    file.write_bytes(content)
    text = content.decode("utf-8", "surrogateescape")
    layers: list[Callable[[], Any]] = [lambda: file_layer(file)]
    layers += [
        lambda name=name: flag_layer({name: (text,)})  # type: ignore[misc]
        for name in ("hyperparameters", "env_wrappers", "normalize", "n_envs")
    ]
    for layer in layers:
        with _ours():
            config = build_config([layer()])
            document = config.to_json()
            strict_json.loads(atomic.dump_json({"metadata": {"config": document}}))
            [*refusals(document)]


def _zip(content: bytes) -> None:
    from sb3_mlflow_ckpt.loading import read_source
    from sb3_mlflow_ckpt.state.container import open_container
    from sb3_mlflow_ckpt.verification import verify_checkpoint

    file = scratch() / "alone.zip"
    file.write_bytes(content)
    with _ours(), open_container(file) as container:
        if any(name.startswith("/") or ".." in name.split("/") for name in container.names):
            raise Violation(f"members elsewhere: {container.names}")
        container.check_members()
    for read in (verify_checkpoint, lambda path: read_source(path, "ppo")):
        with _ours():
            read(file)


_MEMBERS = (
    "sb3_mlflow_ckpt/state.json", "sb3_mlflow_ckpt/spaces.json", "sb3_mlflow_ckpt/spaces.bin", "policy.pth",
    "pytorch_variables.pth", "sb3_mlflow_ckpt/vec_normalize.npz", "sb3_mlflow_ckpt/exact.json",
)  # fmt: skip


def _member(content: bytes) -> None:
    from sb3_mlflow_ckpt import load_checkpoint
    from sb3_mlflow_ckpt.state.archive import read_exact

    if not content:
        return
    name = _MEMBERS[content[0] % len(_MEMBERS)]
    file = scratch() / "member.zip"
    with zipfile.ZipFile(checkpoint()) as whole, zipfile.ZipFile(file, "w") as archive:
        for info in whole.infolist():
            if info.filename != name:
                archive.writestr(info.filename, whole.read(info))
        archive.writestr(name, content[1:])
        if name == "sb3_mlflow_ckpt/exact.json":
            archive.writestr("sb3_mlflow_ckpt/exact.bin", bytes(64))
    for read in (load_checkpoint, read_exact):
        with _ours():
            read(file)


def _member_seeds() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, returns=np.zeros(1), mean=np.zeros((1, 4)))
    others = {
        "sb3_mlflow_ckpt/vec_normalize.npz": buffer.getvalue(),
        "sb3_mlflow_ckpt/exact.json": json.dumps(
            {
                "a": {"$": "array", "dtype": "<f4", "shape": [2], "at": 0},
                "b": {"$": "tuple", "items": [1, {"$": "integer", "digits": "12345678901234567890123"}]},
                "c": {"$": "map", "items": [[1, 2]]}, "d": {"$": "bytes", "dtype": "|u1", "shape": [3], "at": 8},
            }
        ).encode(),
    }  # fmt: skip
    return [
        bytes([index]) + (others[name] if name in others else member(checkpoint(), name))
        for index, name in enumerate(_MEMBERS)
    ]


def _foreign(content: bytes) -> None:
    from sb3_mlflow_ckpt import load_checkpoint
    from sb3_mlflow_ckpt.loading import read_source

    file = scratch() / "changed.zip"
    with zipfile.ZipFile(foreign_zip()) as whole, zipfile.ZipFile(file, "w") as archive:
        for info in whole.infolist():
            archive.writestr(info.filename, content if info.filename == "data" else whole.read(info))
    for read in (lambda p: read_source(p, "ppo"), load_checkpoint, lambda p: load_checkpoint(p, algo="ppo")):
        with _ours():
            read(file)


@cache
def _chunk_rows() -> Any:
    import numpy as np

    from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows

    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.random((4, 1, 3), dtype=np.float32),
        "next_observations": rng.random((4, 1, 3), dtype=np.float32),
        "actions": rng.random((4, 1, 1), dtype=np.float32),
        "rewards": np.zeros((4, 1), dtype=np.float32),
    }
    return ChunkRows(0, columns, infos=[[{"a": 1}]] * 4)


def _chunk(content: bytes) -> None:
    import zstandard

    from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows, read_chunk

    rows = _chunk_rows()
    # Whole files, and what is in them with a checksum that fits.
    for raw in (content, zstandard.ZstdCompressor(write_checksum=True).compress(content)):
        into = ChunkRows(0, {name: column.copy() for name, column in rows.columns.items()})
        for infos in (False, True):
            with contextlib.suppress(ValueError), _ours():
                read_chunk(io.BytesIO(raw), into, "here", infos=infos)


def _chunk_seeds() -> list[bytes]:
    import zstandard

    from sb3_mlflow_ckpt.state.replay.chunks import write_chunk

    file = io.BytesIO()
    write_chunk(file, _chunk_rows())
    return [file.getvalue(), zstandard.ZstdDecompressor().decompressobj().decompress(file.getvalue())]


def _uri(content: bytes) -> None:
    from sb3_mlflow_ckpt.redaction import redact, redact_argument
    from sb3_mlflow_ckpt.resume import resolve_checkpoint
    from sb3_mlflow_ckpt.runs.mongo_database import connect, redacted

    text = content.decode("utf-8", "surrogateescape")
    for reference in (f"runs:/{text}", f"runs:/{RUN}/{text}", f"{scratch()}/{text}"):
        with _ours():
            resolve_checkpoint(reference, checkpoint_dir=str(scratch()), agent_id="a", tracking_uri=_tracking_uri()[0])
    if "+srv" not in text.lower():  # Its names are looked up at once.
        with _ours():
            connect(text, "database").client.close()
    redact_argument(text)
    redacted(text)
    if redact(redact(text)) != redact(text):
        raise Violation(f"{redact(text)!r} is redacted further")


@cache
def _tracking_uri() -> tuple[str, str]:
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    uri = f"sqlite:///{scratch()}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("e", artifact_location=str(scratch() / "artifacts")))
    for path in (checkpoint(), checkpoint().with_name("ep000001_metadata.json")):
        client.log_artifact(run.info.run_id, str(path), "checkpoints")
    return uri, run.info.run_id


def _id(content: bytes) -> None:
    from sb3_mlflow_ckpt.checkpoints import list_checkpoints
    from sb3_mlflow_ckpt.layout import chunk_path, entry_chunk, id_spellings
    from sb3_mlflow_ckpt.runs.folder import FolderRuns

    text = content.decode("utf-8", "surrogateescape")
    base = scratch() / "ids"
    with _ours():
        folder = RunFolder(base, text, text)
        if folder.path.resolve() != (base.resolve() / text / text) or printable(text) != text:
            raise Violation(f"an id that is no name: {text!r}")
    with _ours():
        if chunk_path(base, text).parent != base / "replay":
            raise Violation(f"a chunk elsewhere: {text!r}")
    entry_chunk(text)
    id_spellings(text)
    with _ours():
        list_checkpoints(base, run_id=text)
    with _ours():
        FolderRuns(base).get(text)


def _lines_of(name: str) -> Callable[[], list[bytes]]:
    return lambda: [_journal_files()[name]]


_CONFIGS = [
    b"algo: ppo\nenv_id: CartPole-v1\nn_envs: 4\nlearning_rate: lin_3e-4\nhyperparameters: {n_steps: 64, ent_coef: 1e-3}\n",
    b"env_wrappers:\n- m:W\n- {m:V: {a: 1}}\nnormalize: {norm_obs: true}\nseed: 7\nmongo_uri: mongodb://u:p@h/d\n",
    b"base: &b {a: 1}\nenv_kwargs: {<<: *b, api_key: x, deep: {list: [1, 2.5, null, ~, yes, .inf, 0x10, 1:30]}}\n",
    b"policy_kwargs={net_arch: [64, 64], activation_fn: Tanh}",
]
_URIS = [
    b"mongodb://user:pa/ss@host:27017/db?authSource=admin&token=x", b"checkpoints/ep000001.zip", RUN.encode(),
    b"../../../etc/passwd", b"%2e%2e/%2e%2e", b"file:///etc/passwd", b"a\0b", b"x#y?z", b"http://u:p@h:1/x?password=y",
    b"postgresql+psycopg://u:p@h/d",
]  # fmt: skip
_IDS = [b"ppo_agent", RUN.encode(), b"..", b"CON", b"nul.txt", b"replay/000000000000-000000000004-0123abcd.zst", b"-rf",
        "\u202eagent".encode(), b"a/b", b"550e8400-e29b-41d4-a716-446655440000", b"{550e8400e29b41d4a716446655440000}"]  # fmt: skip

TARGETS: dict[str, Target] = {
    "metadata": Target(_metadata, lambda: [checkpoint().with_name("ep000001_metadata.json").read_bytes()]),
    "record": Target(_record, _lines_of("run.json")),
    "events": Target(_events, _lines_of("checkpoints.jsonl")),
    "metrics": Target(_metrics, _lines_of("metrics.jsonl")),
    "yaml": Target(_yaml, lambda: _CONFIGS),
    "zip": Target(_zip, lambda: [checkpoint().read_bytes(), foreign_zip().read_bytes()]),
    "member": Target(_member, _member_seeds),
    "foreign": Target(_foreign, lambda: [member(foreign_zip(), "data")]),
    "chunk": Target(_chunk, _chunk_seeds),
    "uri": Target(_uri, lambda: [*_URIS, f"{_tracking_uri()[1]}/checkpoints/ep000001.zip".encode()]),
    "id": Target(_id, lambda: _IDS),
}
