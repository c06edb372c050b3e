"""The copy in MLflow, over a real server and over the default sqlite store."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from journals import commit, prune, save, start_run
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from processes import wait_for
from servers import SilentServer

from sb3_mlflow_ckpt.errors import CheckpointNotFoundError, MirrorUnavailableError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.pins import pin_checkpoint
from sb3_mlflow_ckpt.replication import Replicator
from sb3_mlflow_ckpt.resume import resolve_checkpoint


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow keeps its settings in the environment and in globals of the process."""
    for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)
    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.fixture(params=["server", "sqlite"])
def tracking_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("mlflow_uri"))
    return f"sqlite:///{tmp_path}/mlflow.db"


def _point(steps: int, seconds: int, **values: Any) -> dict[str, Any]:
    time = f"2026-01-01T00:00:{seconds:02d}.000Z"
    return {"num_timesteps": steps, "episode": steps // 10, "time": time, "ep_rew_mean": None, **values}


def _opened(mirror: MLflowMirror, folder: Path, **record: Any) -> RunJournal:
    journal = start_run(folder, "run", **record)
    run_id = mirror.open(journal.record)
    assert run_id is not None
    return journal


def test_a_run_is_copied_whole(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri, "cart poles")
    journal = _opened(mirror, tmp_path, config={"learning_rate": 0.1, "hyperparameters": {"n_steps": 8}})
    journal.add_metrics(_point(10, 1, ep_rew_mean=1.5, **{"train/loss": 0.5}))
    journal.add_metrics(_point(20, 2))
    for episode in (50, 100):
        save(journal, episode)
    mirror.replicate(journal)
    journal.update(status="completed", ended_at="2026-01-01T00:01:00.000Z")
    mirror.replicate(journal)

    client = MlflowClient(tracking_uri)
    run = client.get_run(str(mirror.run_id))
    assert client.get_experiment(run.info.experiment_id).name == "cart poles"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.1", "hyperparameters.n_steps": "8"}
    assert run.data.metrics["rollout/ep_rew_mean"] == 1.5
    assert run.data.metrics["train/loss"] == 0.5
    assert [m.step for m in client.get_metric_history(run.info.run_id, "rollout/episodes")] == [10, 20]
    assert run.data.tags[LATEST_TAG] == "checkpoints/ep000100.zip"
    assert run.data.tags["sb3_mlflow_ckpt.status"] == "completed"
    files = {file.path for file in client.list_artifacts(run.info.run_id, "checkpoints")}
    assert files == {f"checkpoints/ep000{e}{s}" for e in ("050", "100") for s in (".zip", "_metadata.json")}
    assert journal.record["mlflow"]["run_id"] == run.info.run_id
    assert journal.ledger.uris[50] == f"runs:/{run.info.run_id}/checkpoints/ep000050.zip"


def test_copying_again_from_another_process_changes_nothing(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path, config={"seed": 1})
    journal.add_metrics(_point(10, 1))
    save(journal, 50)
    mirror.replicate(journal)
    journal.add_metrics(_point(20, 2))
    for _ in range(2):
        MLflowMirror(tracking_uri).replicate(journal)
    client = MlflowClient(tracking_uri)
    assert len(client.search_runs([client.get_run(str(mirror.run_id)).info.experiment_id])) >= 1
    history = client.get_metric_history(str(mirror.run_id), "rollout/episodes")
    assert [metric.step for metric in history] == [10, 20]


def test_the_run_of_mlflow_run_is_continued_and_its_parameters_stand(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri)
    made = client.create_run("0")
    for key, value in {"learning_rate": "inherit", "total_timesteps": "5000", "seed": "7.0"}.items():
        client.log_param(made.info.run_id, key, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path, config={"learning_rate": 0.1, "total_timesteps": 5000, "seed": 7})
    mirror.replicate(journal)
    assert mirror.run_id == made.info.run_id
    assert client.get_run(made.info.run_id).data.params == {
        "learning_rate": "inherit", "resolved.learning_rate": "0.1", "total_timesteps": "5000", "seed": "7.0",
    }  # fmt: skip


def test_the_run_that_the_caller_opened_is_continued_and_left_for_the_caller_to_end(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as active:
        mirror = MLflowMirror()
        journal = _opened(mirror, tmp_path)
        journal.update(status="failed", ended_at="2026-01-01T00:01:00.000Z")
        mirror.replicate(journal)
        assert mirror.run_id == active.info.run_id
        assert MlflowClient().get_run(active.info.run_id).info.status == "RUNNING"
    assert MlflowClient().get_run(active.info.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("status", "expected"), [("completed", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_each_terminal_status_is_set(tmp_path: Path, status: str, expected: str) -> None:
    mirror = MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db")
    journal = _opened(mirror, tmp_path)
    mirror.replicate(journal)
    error = {"type": "ValueError", "message": "no", "traceback": "..."}
    journal.update(status=status, ended_at="2026-01-01T00:01:00.000Z", error=error)
    mirror.replicate(journal)
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(str(mirror.run_id))
    assert run.info.status == expected
    assert run.info.end_time == 1767225660000
    assert run.data.tags["sb3_mlflow_ckpt.error"] == "ValueError: no"


def test_the_newest_n_stay_in_the_mirror_and_removed_ones_are_not_sent_again(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri, keep_last_n=2)
    journal = _opened(mirror, tmp_path)
    for episode in (50, 100, 150, 200):
        save(journal, episode)
        mirror.replicate(journal)
    mirror.replicate(journal)
    files = MlflowClient(tracking_uri).list_artifacts(str(mirror.run_id), "checkpoints")
    assert {Path(file.path).name for file in files if file.path.endswith(".zip")} == {"ep000150.zip", "ep000200.zip"}
    assert len(files) == 4
    assert journal.waiting_for_mirror() == set()


def test_the_best_milestones_and_pins_stay_in_the_mirror_beside_the_last(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri, keep_last_n=1, keep_best_n=1, keep_every_n_episodes=200)
    journal = _opened(mirror, tmp_path)
    for episode, reward in ((50, 1.0), (100, 9.0), (150, 2.0), (200, 3.0), (250, 4.0), (300, 5.0)):
        metadata = commit(journal.folder, episode).model_copy(update={"metrics": {"mean_reward": reward}})
        journal.add_saved(metadata)
        if episode == 50:
            pin_checkpoint(journal.folder.model(50))
        mirror.replicate(journal)
    files = MlflowClient(tracking_uri).list_artifacts(str(mirror.run_id), "checkpoints")
    kept = {Path(file.path).name for file in files if file.path.endswith(".zip")}
    assert kept == {"ep000050.zip", "ep000100.zip", "ep000200.zip", "ep000300.zip"}


def test_an_episode_that_is_saved_again_while_it_is_sent_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db")
    journal = _opened(mirror, tmp_path)
    save(journal, 50)
    send = MlflowClient.log_artifact

    def send_slowly(client: MlflowClient, run_id: str, path: str, folder: str) -> None:
        send(client, run_id, path, folder)
        if path.endswith("ep000050.zip") and Path(path).read_bytes() != b"a later state":
            save(journal, 50, b"a later state")

    monkeypatch.setattr(MlflowClient, "log_artifact", send_slowly)
    mirror.replicate(journal)
    assert journal.waiting_for_mirror() == {50}
    mirror.replicate(journal)
    assert journal.waiting_for_mirror() == set()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    copy = mlflow.artifacts.download_artifacts(run_id=mirror.run_id, artifact_path="checkpoints/ep000050.zip")
    assert Path(copy).read_bytes() == b"a later state"


def test_names_that_mlflow_refuses_do_not_keep_the_rest_back(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path, config={"a$b": 1, "(x)": 2, "y" * 300: 3, "../z": 4, "long": "v" * 9000})
    journal.add_metrics(_point(10, 1, **{"win rate (%)": 0.5, "loss[0]": 1.0, "/abs": 2.0, "a//b": 3.0}))
    save(journal, 50)
    mirror.replicate(journal)
    run = MlflowClient(tracking_uri).get_run(str(mirror.run_id))
    assert {"a_b", "_x_", "y" * 250, "___z", "long"} <= set(run.data.params)
    assert run.data.metrics["win rate ___"] == 0.5
    assert run.data.metrics["loss_0_"] == 1.0


def test_a_second_training_of_the_process_gets_a_run_of_its_own_below_the_first(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as active:
        first, second = MLflowMirror(), MLflowMirror()
        assert first.open({"name": None}) == active.info.run_id
        below = second.open({"name": None})
        assert below != active.info.run_id
        assert MlflowClient().get_run(str(below)).data.tags["mlflow.parentRunId"] == active.info.run_id


def test_a_training_that_does_not_start_leaves_no_running_run(tmp_path: Path) -> None:
    mirror = MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = mirror.open({"name": None})
    mirror.cancel("failed")
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(str(run_id)).info.status == "FAILED"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_an_unknown_run_is_told_as_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(MirrorUnavailableError, match=r"refuses: .*not found"):
        MLflowMirror(f"sqlite:///{tmp_path}/mlflow.db").open({"name": None})


def test_an_episode_that_was_saved_again_is_sent_again(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path)
    save(journal, 50)
    mirror.replicate(journal)
    save(journal, 50, b"a later state")
    mirror.replicate(journal)
    mlflow.set_tracking_uri(tracking_uri)
    copy = mlflow.artifacts.download_artifacts(run_id=mirror.run_id, artifact_path="checkpoints/ep000050.zip")
    assert Path(copy).read_bytes() == b"a later state"


def test_an_outage_is_raised_and_made_good_afterwards(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    mirror = MLflowMirror(mlflow_server.uri)
    journal = _opened(mirror, tmp_path)
    replicator = Replicator(mirror, journal)
    replicator.start()
    journal.add_metrics(_point(10, 1))
    mlflow_server.stop()
    for second in range(2, 40):
        journal.add_metrics(_point(10 * second, second))
    for episode in (50, 100, 150):
        save(journal, episode)
    journal.update(status="completed", ended_at="2026-01-01T00:01:00.000Z")
    wait_for(lambda: replicator.failure is not None, "the outage to be seen")
    mlflow_server.start()
    assert replicator.close(120)
    client = MlflowClient(mlflow_server.uri)
    assert len(client.list_artifacts(str(mirror.run_id), "checkpoints")) == 6
    history = client.get_metric_history(str(mirror.run_id), "rollout/episodes")
    assert [metric.step for metric in history] == list(range(10, 400, 10))
    assert client.get_run(str(mirror.run_id)).info.status == "FINISHED"


def test_a_server_that_does_not_answer_at_start_is_a_clear_error(silent_server: SilentServer) -> None:
    for port in (silent_server.port, 9):
        with pytest.raises(
            MirrorUnavailableError, match=rf"MLflow at http://\*\*\*@127\.0\.0\.1:{port} does not answer"
        ):
            MLflowMirror(f"http://user:secret@127.0.0.1:{port}").open({"name": None})


def test_a_run_that_started_offline_is_made_when_the_server_is_back(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    mlflow_server.stop()
    mirror = MLflowMirror(mlflow_server.uri)
    journal = start_run(tmp_path, "run")
    with pytest.raises(MirrorUnavailableError):
        mirror.open(journal.record)
    save(journal, 50)
    mlflow_server.start()
    mirror.replicate(journal)
    assert len(MlflowClient(mlflow_server.uri).list_artifacts(journal.record["mlflow"]["run_id"], "checkpoints")) == 2


def test_a_checkpoint_that_mlflow_lacks_says_what_it_has(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path)
    save(journal, 50)
    mirror.replicate(journal)

    def resolve(uri: str) -> None:
        resolve_checkpoint(uri, checkpoint_dir="c", agent_id="a", tracking_uri=tracking_uri)

    with pytest.raises(CheckpointNotFoundError, match=r"ep000100\.zip\. The run holds checkpoints/ep000050\.zip"):
        resolve(f"runs:/{mirror.run_id}/checkpoints/ep000100.zip")
    with pytest.raises(CheckpointNotFoundError, match=r"has no run 'f{32}'"):
        resolve(f"runs:/{'f' * 32}")
    with pytest.raises(CheckpointNotFoundError):
        resolve(f"runs:/{mirror.run_id}/../../etc/passwd")


def _stored(client: MlflowClient, run_id: str) -> Path:
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "checkpoints" / "ep000050.zip"


def test_a_store_on_the_same_file_system_takes_no_second_copy(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MLflowMirror(uri)
    journal = _opened(mirror, tmp_path / "runs")
    save(journal, 50)
    mirror.replicate(journal)
    client, run_id = MlflowClient(uri), str(mirror.run_id)
    artifact = _stored(client, run_id)
    assert artifact.samefile(journal.folder.model(50))
    # Each side replaces and removes its own name alone.
    before = journal.folder.model(50).read_bytes()
    other = tmp_path / "ep000050.zip"
    other.write_bytes(b"somebody's own")
    client.log_artifact(run_id, str(other), "checkpoints")
    assert journal.folder.model(50).read_bytes() == before
    save(journal, 50, b"saved again")
    mirror.replicate(journal)
    copied = Path(client.download_artifacts(run_id, "checkpoints/ep000050.zip", str(tmp_path)))
    assert copied.read_bytes() == b"saved again"
    prune(journal, 50)
    assert Path(client.download_artifacts(run_id, "checkpoints/ep000050.zip")).read_bytes() == b"saved again"


def test_a_store_that_cannot_link_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MLflowMirror(uri)
    journal = _opened(mirror, tmp_path / "runs")
    save(journal, 50)
    mirror.replicate(journal)
    artifact = _stored(MlflowClient(uri), str(mirror.run_id))
    assert artifact.read_bytes() == journal.folder.model(50).read_bytes()
    assert not artifact.samefile(journal.folder.model(50))


def test_one_more_checkpoint_is_a_request_a_file_and_one_for_the_tag(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = MLflowMirror(mlflow_uri)
    journal = _opened(mirror, tmp_path)
    save(journal, 50)
    mirror.replicate(journal)
    asked: list[tuple[str, str, str]] = []
    whole = requests.adapters.HTTPAdapter.send

    def counted(adapter: Any, request: Any, **options: Any) -> Any:
        body = "a file" if hasattr(request.body, "read") else "text"
        asked.append((request.method, request.url.rpartition("/")[2], body))
        return whole(adapter, request, **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", counted)
    save(journal, 100)
    mirror.replicate(journal)
    assert asked == [
        ("PUT", "ep000100.zip", "a file"),
        ("PUT", "ep000100_metadata.json", "a file"),
        ("POST", "set-tag", "text"),
    ]
    asked.clear()
    mirror.replicate(journal)
    assert asked == []


def test_an_attempt_that_wakes_up_beside_its_replacement_sends_nothing_more(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(tracking_uri)
    run_id = client.create_run("0").info.run_id
    journals, mirrors = [], []
    for number, folder in enumerate(("slept", "replacement"), start=1):
        mirror = MLflowMirror(tracking_uri, run_id=run_id)
        journal = start_run(tmp_path / folder, run_id, attempt=number)
        mirror.open(journal.record)
        save(journal, number * 10, str(number).encode())
        mirror.replicate(journal)
        journals.append(journal)
        mirrors.append(mirror)
    before = client.get_run(run_id)

    # It slept, which only the clock on the wall has seen.
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda now=time.time: now() + 3600)
        save(journals[0], 20, b"of the one that slept")
        mirrors[0].replicate(journals[0])
    # At once: it is about to end the run.
    for status in ("failed", "completed"):
        journals[0].update(status=status, ended_at="2026-01-01T00:01:00.000Z")
        mirrors[0].replicate(journals[0])
        mirrors[0].tell_end(journals[0].record)
    assert journals[0].waiting_for_mirror() == {20}
    assert f"MLflow holds a later attempt of the run {run_id}; attempt 1 is not sent" in caplog.text
    after = client.get_run(run_id)
    assert (after.info.status, after.data.tags) == ("RUNNING", before.data.tags)
    sent = Path(client.download_artifacts(run_id, "checkpoints/ep000020.zip", str(tmp_path)))
    assert sent.read_bytes() == journals[1].folder.model(20).read_bytes()

    journals[1].update(status="completed", ended_at="2026-01-01T00:02:00.000Z")
    mirrors[1].replicate(journals[1])
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_checkpoint_that_is_removed_while_it_is_sent_is_no_outage(tmp_path: Path, tracking_uri: str) -> None:
    mirror = MLflowMirror(tracking_uri)
    journal = _opened(mirror, tmp_path)
    save(journal, 50)
    mirror.replicate(journal)
    assert mirror._uploads is not None
    whole = mirror._uploads._put

    def put(path: Path, name: str) -> None:
        if name == "ep000100_metadata.json":
            # Retention is quicker where the backlog is longer than its limit.
            prune(journal, 100)
        whole(path, name)

    mirror._uploads._put = put  # type: ignore[method-assign]
    save(journal, 100)
    save(journal, 150)
    mirror.replicate(journal)
    names = {file.path for file in MlflowClient(tracking_uri).list_artifacts(str(mirror.run_id), "checkpoints")}
    assert {name for name in names if "ep000100" in name} == set()
    assert {50, 150} == set(journal.ledger.uris)
