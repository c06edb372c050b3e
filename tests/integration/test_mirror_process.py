"""A mirror that works in a process of its own: what it sends, what becomes of it, and what is lost when it dies."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from holding_proxy import holding
from journals import add_point, prune, save, start_run
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from processes import DEADLINE, TESTS, environment, lives, script, wait_for

from sb3_mlflow_ckpt import mirror_process, replication
from sb3_mlflow_ckpt.errors import RunTakenOverError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.mirror_process import MirrorFailedError, MirrorPlace
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.replication import Replicator
from sb3_mlflow_ckpt.runs.mongo import MongoRuns

RUN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[RunJournal]:
    journal = start_run(tmp_path / "runs", RUN)
    yield journal
    journal.close()


def moved(mirror: MLflowMirror | MongoMirror, journal: RunJournal) -> MirrorPlace:
    """Return the place of a mirror whose process is at work."""
    mirror.open(journal.record)
    place = MirrorPlace(mirror, journal, 0)
    save(journal, 10)
    place.replicate()
    settle(place)
    return place


def settle(place: MirrorPlace) -> int:
    """Send what there is to send until a process is ready to do it; return its id."""

    def ready() -> bool:
        place.replicate()
        return place.process_id is not None

    wait_for(ready, "a process to be ready")
    assert place.process_id is not None
    return place.process_id


def files(client: MlflowClient, mirror: MLflowMirror) -> set[str]:
    return {file.path for file in client.list_artifacts(str(mirror.run_id), "checkpoints")}


def artifacts(*episodes: int) -> set[str]:
    return {f"checkpoints/ep{e:06d}{end}" for e in episodes for end in (".zip", "_metadata.json")}


def test_mlflow_gets_everything_from_the_process(tmp_path: Path, journal: RunJournal) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror, client = MLflowMirror(uri, "apart", keep_last_n=2), MlflowClient(uri)
    place = moved(mirror, journal)
    try:
        add_point(journal, 100, ep_rew_mean=3.0)
        save(journal, 20)
        save(journal, 30)
        place.replicate()
        assert not journal.waiting_for_mirror()
        assert journal.ledger.retired == {10}
        assert files(client, mirror) == artifacts(20, 30)
        assert journal.ledger.uris[30] == f"runs:/{mirror.run_id}/checkpoints/ep000030.zip"
        journal.update(status="completed", ended_at="2026-01-01T00:01:00.000Z")
        place.replicate()
        run = client.get_run(str(mirror.run_id))
        assert (run.info.status, run.data.metrics["rollout/ep_rew_mean"]) == ("FINISHED", 3.0)
        assert run.data.tags["mlflow.latest_checkpoint_artifact"] == "checkpoints/ep000030.zip"
        assert journal.record["mlflow"]["run_id"] == mirror.run_id
    finally:
        place.close()
    # What it was told of lies in the run's own folder, written by the run's own journal.
    assert '"event": "mirrored"' in journal.folder.events.read_text()


def test_mongodb_gets_everything_from_the_process(tmp_path: Path, journal: RunJournal, mongo_uri: str) -> None:
    mirror, reader = MongoMirror(mongo_uri, "apart"), MongoRuns(mongo_uri, "apart")
    place = moved(mirror, journal)
    try:
        add_point(journal, 100, ep_rew_mean=3.0)
        save(journal, 20)
        prune(journal, 10)
        journal.update(status="completed")
        place.replicate()
        found = reader.get(RUN)
        assert found["status"] == "completed"
        assert {item["episode"]: item["on_disk"] for item in found["checkpoint_paths"]} == {10: False, 20: True}
        assert [point["ep_rew_mean"] for point in reader.curve(RUN)] == [3.0]
    finally:
        place.close()
        mirror.close()
        reader.close()


def test_a_process_that_dies_is_replaced_by_the_thread_and_nothing_is_lost(tmp_path: Path, journal: RunJournal) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MLflowMirror(uri)
    place = moved(mirror, journal)
    assert place.process_id is not None
    save(journal, 20)
    os.kill(place.process_id, signal.SIGSTOP)
    # It dies in the middle of a request.
    dying = psutil.Process(place.process_id)
    save(journal, 30)
    replicator = Replicator(mirror, journal, place)
    replicator.start()
    dying.kill()
    assert replicator.close(60)
    assert files(MlflowClient(uri), mirror) == artifacts(10, 20, 30)
    assert place.process_id is None


def test_another_process_follows_one_that_died_and_none_follows_the_third(
    tmp_path: Path, journal: RunJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_process, "DEFAULT_AFTER_SECONDS", 0.0)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MLflowMirror(uri)
    place = moved(mirror, journal)
    seen = set()
    try:
        for episode in (20, 30, 40):
            process_id = settle(place)
            assert process_id not in seen
            seen.add(process_id)
            os.kill(process_id, signal.SIGKILL)
            save(journal, episode)
            place.replicate()
            assert not journal.waiting_for_mirror()
        place.replicate()
        assert place.process_id is None
        assert files(MlflowClient(uri), mirror) == artifacts(10, 20, 30, 40)
    finally:
        place.close()


def test_an_outage_in_the_process_is_raised_here_and_made_good(journal: RunJournal, mlflow_server: MlflowServer) -> None:
    mirror = MLflowMirror(mlflow_server.uri)
    place = moved(mirror, journal)
    try:
        mlflow_server.stop()
        save(journal, 20)
        with pytest.raises(MirrorFailedError, match="Connection refused"):
            place.replicate()
        save(journal, 30)
        mlflow_server.start()
        place.replicate()
        assert place.process_id is not None
        assert files(MlflowClient(mlflow_server.uri), mirror) == artifacts(10, 20, 30)
    finally:
        place.close()


def test_a_request_that_hangs_ends_with_the_run(
    journal: RunJournal, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_TELL_SECONDS", DEADLINE)
    mirror = MLflowMirror(mlflow_server.uri)
    place = moved(mirror, journal)
    process = psutil.Process(place.process_id)
    process.suspend()
    replicator = Replicator(mirror, journal, place)
    replicator.start()
    journal.update(status="completed", ended_at="2026-01-01T00:01:00.000Z")
    assert not replicator.close(0.5)
    wait_for(lambda: not lives(process.pid), "the process to be ended")
    # It was told the end beside the request that hung.
    assert MlflowClient(mlflow_server.uri).get_run(str(mirror.run_id)).info.status == "FINISHED"


def test_a_token_that_the_training_renews_reaches_the_mirror(
    journal: RunJournal, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_process, "DEFAULT_AFTER_SECONDS", 0.5)
    with holding(mlflow_server.uri) as proxy:

        def renew(token: str) -> None:
            proxy.token = token
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)

        renew("first")
        mirror = MLflowMirror(proxy.uri)
        place = moved(mirror, journal)
        seen = {place.process_id}
        try:
            # Each process that did not last doubles the wait for the next.
            for episode, wait in ((20, 1.0), (30, 2.0)):
                renew(f"for {episode}")
                save(journal, episode)
                for _ in range(3):
                    with pytest.raises(MirrorFailedError, match="401"):
                        place.replicate()
                place.replicate()
                assert (place.process_id, place._wait, journal.waiting_for_mirror()) == (None, wait, set())
                wait_for(lambda: place.replicate() or mirror_processes(), "the next process")
                # The new one has the token.
                process_id = settle(place)
                assert process_id not in seen
                seen.add(process_id)
                save(journal, episode + 1)
                place.replicate()
                assert (place.process_id, journal.waiting_for_mirror()) == (process_id, set())
        finally:
            place.close()


def mirror_processes() -> list[psutil.Process]:
    """Return the processes of mirrors that this one has started."""
    return [child for child in psutil.Process().children() if any("mirrors.process" in word for word in child.cmdline())]


def test_an_outage_starts_no_process_until_it_is_over(
    journal: RunJournal, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_process, "DEFAULT_AFTER_SECONDS", 0.0)
    mirror = MLflowMirror(mlflow_server.uri)
    place = moved(mirror, journal)
    try:
        mlflow_server.stop()
        save(journal, 20)
        for _ in range(8):
            with pytest.raises(Exception, match="Connection refused"):
                place.replicate()
        assert not mirror_processes()
        mlflow_server.start()
        settle(place)
        assert files(MlflowClient(mlflow_server.uri), mirror) == artifacts(10, 20)
    finally:
        place.close()


@pytest.fixture
def many_files_open() -> Iterator[None]:
    """As many descriptors as a training with hundreds of environments has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files_open")
def test_the_process_is_heard_through_a_descriptor_beyond_a_thousand(tmp_path: Path, journal: RunJournal) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MLflowMirror(uri)
    place = moved(mirror, journal)
    try:
        save(journal, 20)
        place.replicate()
        assert place.process_id is not None
        assert files(MlflowClient(uri), mirror) == artifacts(10, 20)
    finally:
        place.close()


def test_what_a_script_puts_on_the_path_keeps_no_process_from_starting(
    tmp_path: Path, journal: RunJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, None])
    place = moved(MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db"), journal)
    place.close()


@pytest.mark.parametrize("python", [None, "", "/nowhere/python", "/nowhere\0"], ids=["None", "none", "gone", "no path"])
def test_a_process_that_cannot_be_started_leaves_the_mirror_in_its_thread(
    tmp_path: Path, journal: RunJournal, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setattr(mirror_process, "DEFAULT_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "executable", python)
    mirror = MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db")
    mirror.open(journal.record)
    place = MirrorPlace(mirror, journal, 0)
    for episode in range(10, 60, 10):
        save(journal, episode)
        place.replicate()
        assert (place.process_id, journal.waiting_for_mirror()) == (None, set())


@pytest.mark.parametrize("end", ["input", "output"])
def test_the_end_does_not_wait_for_a_pipe_that_somebody_holds_open(
    tmp_path: Path, journal: RunJournal, end: str
) -> None:
    mirror = MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db")
    place = moved(mirror, journal)
    assert place.process_id is not None
    # As a process that is in the middle of an access to a dead disk: it is not gone when it is killed.
    held = [*pipes(place.process_id, end)]
    assert held
    psutil.Process(place.process_id).suspend()
    if end == "input":
        # More than a pipe holds.
        journal.update(config={"note": "x" * (1 << 20)})
    replicator = Replicator(mirror, journal, place)
    replicator.start()
    save(journal, 20)
    time.sleep(0.5)
    closing = threading.Thread(target=replicator.close, args=(1.0,), daemon=True)
    closing.start()
    closing.join(15)
    assert not closing.is_alive()
    for descriptor in held:
        os.close(descriptor)


def pipes(process_id: int, end: str) -> Iterator[int]:
    """Open one of the two pipes to a process once more."""
    folder = Path(f"/proc/{process_id}/fd")
    given = str((folder / "0").readlink())
    for entry in folder.iterdir():
        target = str(entry.readlink())
        if target.startswith("pipe:") and (target == given) == (end == "input"):
            yield os.open(entry, os.O_RDONLY if end == "input" else os.O_WRONLY)


def test_a_process_whose_answer_cannot_be_noted_is_asked_nothing_more(tmp_path: Path, journal: RunJournal) -> None:
    place = moved(MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db"), journal)
    try:
        record = json.loads(journal.folder.record.read_bytes())
        # A later attempt has the folder.
        journal.folder.record.write_text(json.dumps({**record, "attempt": record["attempt"] + 1}))
        with pytest.raises(RunTakenOverError):
            save(journal, 20)
        with suppress(RunTakenOverError):
            place.replicate()
        assert place.process_id is None
    finally:
        place.close()


class OwnMirror(MLflowMirror):
    """Does what nobody knows of elsewhere."""


@pytest.mark.parametrize(
    ("kind", "uri", "seconds"),
    [(OwnMirror, "sqlite:///db", 0), (MLflowMirror, "sqlite:///:memory:", 0), (MLflowMirror, "sqlite:///db", math.inf)],
    ids=["a class of one's own", "in memory", "by choice"],
)
def test_what_cannot_work_elsewhere_stays_in_the_thread(
    kind: type[MLflowMirror], uri: str, seconds: float, journal: RunJournal, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    mirror = kind(uri)
    mirror.open(journal.record)
    place = MirrorPlace(mirror, journal, seconds)
    before = psutil.Process().children()
    place.replicate()
    place.replicate()
    assert psutil.Process().children() == before
    mirror.cancel("failed")


TRAINING = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror

class UntilSent(BaseCallback):
    '''Trains until a process of its own has sent checkpoints, then does what it is told.'''
    def _on_step(self):
        live = saving._live
        place = live._replicators[0]._place
        if place.process_id is None:
            return True
        self.since = getattr(self, "since", max(live._journal.ledger.uris, default=0))
        if max(live._journal.ledger.uris, default=0) < self.since + 20:
            return True
        print(place.process_id, flush=True)
        if {dies!r}:
            os.kill(os.getpid(), 9)
        return False

saving = EpisodeCheckpointCallback(5, 3, "runs", agent_id="a", run_id="r", mirrors=[MLflowMirror({uri!r})],
                                   mirror_process_seconds=0)
PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu", seed=0).learn(10**9, callback=[saving, UntilSent()])
"""


@pytest.mark.parametrize("dies", [False, True], ids=["ends", "is killed"])
def test_the_process_ends_with_the_training(tmp_path: Path, dies: bool) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = script(TRAINING.format(tests=str(TESTS), uri=uri, dies=dies), tmp_path, environment())
    assert done.returncode == (-9 if dies else 0), done.stderr
    worker = int(done.stdout.split()[-1])
    wait_for(lambda: not lives(worker), "its end")
    journal = RunJournal(RunFolder(tmp_path / "runs", "a", "r"))
    try:
        run = MlflowClient(uri).get_run(journal.record["mlflow"]["run_id"])
        assert run.info.status == ("RUNNING" if dies else "FINISHED")
        assert dies or not journal.waiting_for_mirror()
        sent = {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id, "checkpoints")}
        # What is noted as sent is there.
        assert artifacts(*journal.ledger.uris) <= sent
    finally:
        journal.close()
