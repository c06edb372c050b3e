"""Checkpoints with replay buffers: committed, verified, pruned, mirrored and downloaded with their chunks."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from journals import start_run
from mlflow import MlflowClient
from stable_baselines3 import DQN

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, prune_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.commit import CheckpointCapture, capture_checkpoint, commit_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointCorruptError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.mirrors.artifacts import download_checkpoint
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.runs.document import new_record
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder, restore_replay


class Training:
    """A DQN whose checkpoints are captured every so many steps."""

    def __init__(self) -> None:
        self.model = DQN("MlpPolicy", "CartPole-v1", buffer_size=200, learning_starts=10**9, seed=0)
        self.recorder = ReplayRecorder(self.model)

    def capture(self, episode: int, steps: int = 30) -> CheckpointCapture:
        self.model.learn(steps, reset_num_timesteps=False, callback=lambda *_: self.recorder.protect() >= 0)
        replay = self.recorder.capture()
        return capture_checkpoint(self.model, agent_id="agent", run_id="run", episode=episode, replay=replay)


def _restore(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        state = json.loads(archive.read("sb3_mlflow_ckpt/state.json"))["replay"]
    other = DQN("MlpPolicy", "CartPole-v1", buffer_size=200)
    assert restore_replay(other, state, lambda name: (path.parent / "replay" / name).open("rb")) == []
    return other.replay_buffer


def _chunks(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.replay.iterdir()}


def test_metadata_names_the_zip_first_then_the_chunks_and_a_missing_one_is_corruption(tmp_path: Path) -> None:
    folder, training = RunFolder(tmp_path, "agent", "run"), Training()
    for episode in (1, 2):
        metadata = commit_checkpoint(folder, training.capture(episode))
    assert metadata.files[0].name == "ep000002.zip"
    assert {file.name for file in metadata.files[1:]} == {f"replay/{name}" for name in _chunks(folder)}
    assert verify_checkpoint(folder.model(2)) == metadata
    assert _restore(folder.model(2)).pos == training.model.replay_buffer.pos > 0
    victim = folder.path / metadata.files[1].name
    content = victim.read_bytes()
    for damage, message in (
        (lambda: victim.write_bytes(content[:-1]), "truncated"),
        (lambda: victim.write_bytes(content[:-1] + b"\0"), "altered"),
        (victim.unlink, "missing"),
    ):
        damage()
        with pytest.raises(CheckpointCorruptError, match=message) as caught:
            verify_checkpoint(folder.model(2))
        assert metadata.files[1].name in str(caught.value)


def test_metadata_that_names_a_file_outside_is_corrupt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "agent", "run")
    commit_checkpoint(folder, Training().capture(1))
    document = json.loads(folder.metadata(1).read_bytes())
    document["files"][1]["name"] = "replay/../../../secret"
    folder.metadata(1).write_text(json.dumps(document))
    with pytest.raises(CheckpointCorruptError, match="none of its own"):
        verify_checkpoint(folder.model(1))


def test_pruning_removes_the_chunks_that_no_checkpoint_needs(tmp_path: Path) -> None:
    folder, training = RunFolder(tmp_path, "agent", "run"), Training()
    for episode in range(1, 16):
        commit_checkpoint(folder, training.capture(episode))
    before = _chunks(folder)
    prune_checkpoints(tmp_path, keep_last_n=2)
    assert _chunks(folder) < before
    paths = list_checkpoints(tmp_path)
    assert len(paths) == 2
    named = {file.name.partition("/")[2] for path in paths for file in verify_checkpoint(path).files[1:]}
    assert _chunks(folder) == named


def test_a_live_run_sweeps_and_nobody_else_does_meanwhile(tmp_path: Path) -> None:
    folder, training = RunFolder(tmp_path, "agent", "run"), Training()
    folder.replay.mkdir(parents=True)
    orphan = folder.chunk("000000000000-000000000001-0123abcd.zst")
    orphan.write_bytes(b"of a dead writer")
    (folder.replay / f".tmp-1-x-{orphan.name}").write_bytes(b"of a dead writer")
    record = new_record(
        run_id="run", agent_id="agent", name=None, algo="DQN", env_id=None, config={}, total_timesteps=1, parent=None,
        root_run_id=None, heartbeat_seconds=10.0, environment={},
    )  # fmt: skip
    live = LiveRun(folder, record, (), RunOptions(retention=Retention(2)))
    assert _chunks(folder) == set()
    for episode in range(1, 16):
        live.save(training.capture(episode))
        live.flush()
        assert not [*live.failures()]
    stray = folder.chunk("000000000000-000000000001-0123abcd.zst")
    stray.write_bytes(b"being written")
    prune_checkpoints(tmp_path, keep_last_n=1)
    assert stray.exists()
    live.finish("completed")
    newest = list_checkpoints(tmp_path)[-1]
    verify_checkpoint(newest)
    assert _restore(newest).observations.tobytes() == training.model.replay_buffer.observations.tobytes()
    prune_checkpoints(tmp_path, keep_last_n=1)
    assert not stray.exists()


def test_a_mirror_gets_each_chunk_once_and_gives_checkpoints_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    journal: RunJournal = start_run(tmp_path / "checkpoints", "run", agent_id="agent")
    training, mirror = Training(), MLflowMirror(uri, keep_last_n=2)
    run_id = mirror.open(journal.record)
    client = MlflowClient(uri)
    stamps: dict[str, float] = {}
    for episode in range(1, 13):
        journal.add_saved(commit_checkpoint(journal.folder, training.capture(episode)))
        if episode == 6:
            mirror = MLflowMirror(uri, run_id=run_id, keep_last_n=2)
        mirror.replicate(journal)
        root = Path(client.get_run(str(run_id)).info.artifact_uri.removeprefix("file://")) / "checkpoints" / "replay"
        for path in root.iterdir():
            assert stamps.setdefault(path.name, path.stat().st_mtime) == path.stat().st_mtime
    kept = {name for episode in (11, 12) for name in journal.ledger.saved[episode]["replay"]}
    assert {path.name for path in root.iterdir()} == kept
    destination = tmp_path / "download"
    destination.mkdir()
    download = download_checkpoint(f"runs:/{run_id}", destination, uri)
    assert verify_checkpoint(download.path).episode == 12
    assert _restore(download.path).observations.tobytes() == training.model.replay_buffer.observations.tobytes()


def test_a_chunk_of_which_the_mirror_has_a_part_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    journal: RunJournal = start_run(tmp_path / "checkpoints", "run", agent_id="agent")
    training, mirror = Training(), MLflowMirror(uri)
    run_id = mirror.open(journal.record)
    journal.add_saved(commit_checkpoint(journal.folder, training.capture(1)))
    mirror.replicate(journal)
    root = Path(MlflowClient(uri).get_run(str(run_id)).info.artifact_uri.removeprefix("file://")) / "checkpoints"
    journal.add_saved(commit_checkpoint(journal.folder, training.capture(2)))
    shared = set(journal.ledger.saved[1]["replay"]) & set(journal.ledger.saved[2]["replay"])
    part = root / "replay" / shared.pop()
    content = part.read_bytes()
    # Not in place: it is one file with the run's own.
    part.unlink()
    part.write_bytes(content[:-1])
    # As after a crash: another process lists what is there.
    MLflowMirror(uri, run_id=run_id).replicate(journal)
    assert part.read_bytes() == content
    journal.close()


def test_a_file_that_mlflow_lacks_is_named_and_the_run_alone_means_its_newest_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read as a server that does not answer."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    journal: RunJournal = start_run(tmp_path / "checkpoints", "run", agent_id="agent")
    training, mirror = Training(), MLflowMirror(uri)
    run_id = mirror.open(journal.record)
    for episode in (1, 2):
        journal.add_saved(commit_checkpoint(journal.folder, training.capture(episode)))
    mirror.replicate(journal)
    artifact_uri = MlflowClient(uri).get_run(str(run_id)).info.artifact_uri
    root = Path(artifact_uri.removeprefix("file://")) / "checkpoints"
    chunk = (set(journal.ledger.saved[2]["replay"]) - set(journal.ledger.saved[1]["replay"])).pop()

    def download(name: str, folder: str) -> Path:
        (tmp_path / folder).mkdir()
        return download_checkpoint(f"runs:/{run_id}{name}", tmp_path / folder, uri).path

    for number, lacking in enumerate((f"replay/{chunk}", "ep000002.zip")):
        (root / lacking).unlink()
        with pytest.raises(CheckpointCorruptError) as caught:
            download("/checkpoints/ep000002.zip", f"named-{number}")
        message = str(caught.value)
        assert f"lacks checkpoints/{lacking} of the run {run_id}" in message
        assert "sb3-mlflow-ckpt checkpoints sync, on the machine that has the run's folder" in message
        assert download("", f"newest-{number}").name == "ep000001.zip"
    # What the message says brings it back.
    assert len([*mirror.heal(journal)]) == 2
    assert download("", "healed").name == "ep000002.zip"
    journal.close()
