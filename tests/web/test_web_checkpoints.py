"""Checkpoints as the web hands them out: by id, whole, within the folder, hashed once."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from journals import commit, prune, save, start_run
from processes import trainer
from web_runs import FIRST
from web_server import ServedApp

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.verification import verify_checkpoint

RUNS = "/api/training-runs"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with the run of a real, short training."""
    folder = tmp_path_factory.mktemp("trained")
    done = trainer(
        "--run-id", FIRST, "--env-id", "CartPole-v1", "--total-timesteps", 128, "--hyperparameters", "n_steps=32",
        "--checkpoint-interval-episodes", 2, "--keep-last-n-checkpoints", 0, "--mlflow", "false", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "checkpoints"


@pytest.fixture
def run(serve, trained: Path, tmp_path: Path) -> tuple[ServedApp, RunFolder]:
    """A server of a copy of that run."""
    shutil.copytree(trained, tmp_path / "checkpoints")
    return serve(), RunFolder(tmp_path / "checkpoints", "ppo_agent", FIRST)


@pytest.fixture
def fake(serve, tmp_path: Path) -> tuple[ServedApp, RunFolder]:
    """A server of a run with the checkpoint 50, whose zip is no zip."""
    journal = start_run(tmp_path / "checkpoints", FIRST)
    save(journal, 50, CONTENT)
    journal.close()
    return serve(), journal.folder


def download(app: ServedApp, episode: int, method: str = "GET", **headers: str):
    return app.ask(f"{RUNS}/{FIRST}/checkpoints/{episode}/download", method, headers=headers)


def test_a_trained_checkpoint_is_downloaded_whole_and_verified(run, tmp_path: Path) -> None:
    app, _ = run
    items = app.ask(f"{RUNS}/{FIRST}").json["checkpoint_paths"]
    assert items
    for item in items:
        path = f"{RUNS}/{FIRST}/checkpoints/{item['episode']}"
        shown = app.ask(path).json
        assert shown == {**item, "verification": {"state": "verified", "problem": None}}
        answer = app.ask(f"{path}/download")
        assert hashlib.sha256(answer.body).hexdigest() == item["sha256"]
        assert answer.headers["etag"] == f'"{item["sha256"]}"'
        assert int(answer.headers["content-length"]) == len(answer.body) == item["bytes"]
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-disposition"] == f'attachment; filename="ep{item["episode"]:06d}.zip"'
    copy = tmp_path / "copy.zip"
    copy.write_bytes(answer.body)
    assert verify_checkpoint(copy).episode == item["episode"]
    assert "policy.pth" in zipfile.ZipFile(copy).namelist()


def test_a_content_is_hashed_once_and_again_where_it_has_changed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    app, folder = run
    hashed, sha256 = [], atomic.sha256

    def counted(path: Path) -> str:
        hashed.append((path.name, threading.current_thread().name))
        return sha256(path)

    monkeypatch.setattr(atomic, "sha256", counted)
    episode = app.ask(f"{RUNS}/{FIRST}").json["checkpoint_paths"][-1]["episode"]
    path = f"{RUNS}/{FIRST}/checkpoints/{episode}"
    states: list[str] = []
    asking = [
        threading.Thread(target=lambda: states.append(app.ask(path).json["verification"]["state"])) for _ in range(8)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert states == ["verified"] * 8
    assert len(hashed) == 1
    # Never in the thread that answers everybody.
    assert "AnyIO worker" in hashed[0][1]
    assert app.app.state.checks.known(folder, episode).state == "verified"
    zip_path = folder.model(episode)
    content = bytearray(zip_path.read_bytes())
    content[len(content) // 2] ^= 1
    zip_path.write_bytes(content)
    assert app.app.state.checks.known(folder, episode) is None
    found = app.ask(path).json["verification"]
    assert found["state"] == "corrupt" and "SHA-256" in found["problem"]
    app.ask(path)
    assert len(hashed) == 2


def test_a_checkpoint_that_is_gone_is_absent_and_not_downloaded(serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", FIRST)
    save(journal, 50)
    prune(journal, 50)
    journal.close()
    app = serve()
    assert app.ask(f"{RUNS}/{FIRST}/checkpoints/50").json["verification"]["state"] == "absent"
    assert download(app, 50).status == 404


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=10000-", 10000, 10240), ("bytes=-5", 10235, 10240),
        ("bytes=0-99999999", 0, 10240), ("bytes=-99999", 0, 10240),
    ],
)  # fmt: skip
def test_a_part_is_sent_where_a_part_is_asked_for(fake, asked: str, start: int, end: int) -> None:
    app, _ = fake
    for method in ("GET", "HEAD"):
        answer = download(app, 50, method, Range=asked)
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes {start}-{end - 1}/10240")
        assert int(answer.headers["content-length"]) == end - start
        assert answer.body == (CONTENT[start:end] if method == "GET" else b"")


@pytest.mark.parametrize("asked", ["bytes=", "bytes=-", "bytes=x-", "lines=1-2", "bytes=5-4", "bytes=0-1,5-6", "0-1", "bytes=²-"])
def test_what_is_no_range_is_the_whole(fake, asked: str) -> None:
    app, _ = fake
    answer = download(app, 50, Range=asked)
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_a_part_behind_the_end_is_a_problem_that_names_the_size(fake, asked: str) -> None:
    app, _ = fake
    answer = download(app, 50, Range=asked)
    assert (answer.status, answer.headers["content-range"]) == (416, "bytes */10240")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_download_goes_on_only_where_the_content_is_the_same(fake) -> None:
    app, folder = fake
    tag = download(app, 50, "HEAD").headers["etag"]
    assert download(app, 50, **{"Range": "bytes=5-", "If-Range": tag}).status == 206
    assert download(app, 50, **{"If-None-Match": tag}).status == 304
    commit(folder, 50, CONTENT[::-1])
    answer = download(app, 50, **{"Range": "bytes=5-", "If-Range": tag})
    assert (answer.status, answer.body) == (200, CONTENT[::-1])


def test_head_reads_nothing_of_the_file(fake) -> None:
    app, _ = fake
    answer = download(app, 50, "HEAD")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "10240", b"")


def test_what_is_not_what_was_committed_is_not_sent(fake) -> None:
    app, folder = fake
    folder.model(50).write_bytes(CONTENT[:-1])
    answer = download(app, 50)
    assert answer.status == 409 and "10239" in answer.json["detail"]


def test_a_zip_without_its_metadata_was_never_committed(fake) -> None:
    app, folder = fake
    folder.metadata(50).unlink()
    assert download(app, 50).status == 404


@pytest.mark.parametrize("what", ["zip", "metadata", "run", "agent"])
def test_a_link_that_leads_out_is_not_followed(fake, tmp_path: Path, what: str) -> None:
    app, folder = fake
    outside = tmp_path / "outside"
    place = {
        "zip": folder.model(50), "metadata": folder.metadata(50), "run": folder.path, "agent": folder.path.parent,
    }[what]  # fmt: skip
    place.rename(outside)
    place.symlink_to(outside)
    assert download(app, 50).status == 404
    shown = app.ask(f"{RUNS}/{FIRST}/checkpoints/50")
    assert shown.status == 404 or shown.json["verification"]["state"] in ("absent", "corrupt")


@pytest.mark.parametrize("agent_id", ["..", "../..", "/etc", "a/b", "", "\x00", 5, None, "x" * 999])
def test_a_record_cannot_lead_out_of_the_folder(agent_id, tmp_path: Path) -> None:
    from sb3_mlflow_ckpt.web.checkpoint_files import run_folder

    assert run_folder(tmp_path, {"agent_id": agent_id, "run_id": FIRST}) is None
    assert run_folder(tmp_path, {"agent_id": "ppo_agent", "run_id": agent_id}) is None


def test_pipes_and_folders_in_the_place_of_a_zip_are_not_opened(fake) -> None:
    app, folder = fake
    folder.model(50).unlink()
    os.mkfifo(folder.model(50))
    assert download(app, 50).status == 404
    assert app.ask(f"{RUNS}/{FIRST}/checkpoints/50").json["verification"]["state"] == "absent"


def test_a_download_goes_to_its_end_although_the_checkpoint_is_pruned_meanwhile(serve, tmp_path: Path) -> None:
    import http.client

    content = os.urandom(1 << 20) * 24
    journal = start_run(tmp_path / "checkpoints", FIRST)
    save(journal, 50, content)
    app = serve()
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=300)
    connection.request("GET", f"{RUNS}/{FIRST}/checkpoints/50/download", headers={"Host": "localhost"})
    response = connection.getresponse()
    begin = response.read(1)
    prune(journal, 50)
    journal.close()
    assert begin + response.read() == content
    connection.close()
