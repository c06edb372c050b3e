"""Services that hang, answer nonsense, crawl or cut uploads, under a real trainer: it goes on, and nothing is missing."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import MODES, FaultProxy
from mlflow import MlflowClient
from outage_scenes import FLAGS, Services, Training
from processes import trainer, wait_for

from sb3_mlflow_ckpt.errors import CheckpointNotFoundError
from sb3_mlflow_ckpt.mirrors.artifacts import download_checkpoint
from sb3_mlflow_ckpt.sync import MirrorAddresses, sync_runs

FAULTS = MODES[1:]


class Proxied(Services):
    """Both services, each with a proxy before it that the trainer is sent to; a test looks behind them."""

    def __init__(self, tracking_uri: str, mongo_uri: str) -> None:
        self.tracking_uri, self.mongo_uri = tracking_uri, mongo_uri
        self.proxies = [FaultProxy(urllib.parse.urlsplit(uri).port or 0) for uri in (tracking_uri, mongo_uri)]

    @property
    def flags(self) -> tuple[str, ...]:
        tracking, mongo = (f"127.0.0.1:{proxy.port}" for proxy in self.proxies)
        # The client's own look-out would learn of a hanging server only after its longest wait.
        options = "?directConnection=true&journal=true&socketTimeoutMS=4000"
        return ("--tracking-uri", f"http://{tracking}", "--mongo-uri", f"mongodb://{mongo}/{options}")

    def set(self, mode: str) -> None:
        for proxy in self.proxies:
            proxy.set(mode)

    @property
    def faults(self) -> list[int]:
        """How often each was asked for something in vain."""
        return [proxy.faults for proxy in self.proxies]


@pytest.fixture
def proxied(mlflow_uri: str, mongo_uri: str) -> Iterator[Proxied]:
    services = Proxied(mlflow_uri, mongo_uri)
    yield services
    for proxy in services.proxies:
        proxy.close()


def test_a_training_passes_through_every_fault_and_misses_nothing(tmp_path: Path, proxied: Proxied) -> None:
    training = Training(
        tmp_path, *proxied.flags, "--total-timesteps", 1500, "--heartbeat-seconds", 0.3,
        "--max-unmirrored-checkpoints", 100,
    )  # fmt: skip
    steps = 100
    training.advance(steps)
    wait_for(lambda: training.is_mirrored(proxied), "the first checkpoints in both", training.process)
    for mode in FAULTS:
        mirrored, points, faults = training.mirrored, len(training.points), proxied.faults
        proxied.set(mode)
        # Progress is counted in steps: each of these is taken while nobody answers as he should.
        steps += 100
        training.advance(steps)
        training.add_point()
        assert len(training.saved) >= steps // 50
        assert len(training.points) > points
        if mode in ("refuse", "hang", "http-500", "http-503", "cut", "reset"):
            assert training.mirrored == mirrored, f"{mode}: something went through"
        if mode in ("hang", "hang-answer", "http-500", "http-503"):
            wait_for(lambda before=faults: all(map(int.__gt__, proxied.faults, before)), mode, training.process)
        proxied.set("pass")
        wait_for(lambda: training.is_mirrored(proxied), f"catching up after {mode}", training.process)
    training.release()
    log = training.end()
    training.assert_nothing_is_missing(proxied, tmp_path / "download")
    assert "Traceback" not in log
    assert "Retrying (" not in log
    for name in ("MLflow", "MongoDB"):
        # Once an outage, not once an attempt.
        assert log.count(f"{name} is behind") <= len(FAULTS)
        assert log.count(f"{name} is behind") == log.count(f"{name} answers again")


def test_an_upload_that_is_cut_is_never_taken_for_whole_and_is_sent_again(tmp_path: Path, proxied: Proxied) -> None:
    training = Training(tmp_path, *proxied.flags, "--total-timesteps", 150)
    training.advance(50)
    wait_for(lambda: training.is_mirrored(proxied), "the first checkpoint", training.process)
    proxied.proxies[0].cut_after = 3000
    proxied.proxies[0].set("cut")
    before = proxied.proxies[0].faults
    training.advance(100)
    wait_for(lambda: proxied.proxies[0].faults >= before + 2, "two uploads cut in the middle", training.process)
    run_id = training.folder.run_id
    names = {Path(f.path).name for f in MlflowClient(proxied.tracking_uri).list_artifacts(run_id, "checkpoints")}
    assert "ep000020_metadata.json" not in names
    found = download_checkpoint(f"runs:/{run_id}", _folder(tmp_path / "newest"), proxied.tracking_uri)
    assert found.path.name == "ep000010.zip"
    if "ep000020.zip" not in names:
        with pytest.raises(CheckpointNotFoundError, match=r"The run holds checkpoints/ep000010\.zip"):
            uri = f"runs:/{run_id}/checkpoints/ep000020.zip"
            download_checkpoint(uri, _folder(tmp_path / "named"), proxied.tracking_uri)
    proxied.proxies[0].set("pass")
    training.release()
    training.end()
    training.assert_nothing_is_missing(proxied, tmp_path / "download")


@pytest.mark.parametrize("mode", ["hang", "http-500"])
def test_services_that_are_broken_from_the_start_to_the_end_are_sent_everything_later(
    tmp_path: Path, proxied: Proxied, mode: str
) -> None:
    """A request that hangs when the end has waited long enough is left behind, and must not hold the process."""
    proxied.set(mode)
    training = Training(
        tmp_path, *proxied.flags, "--start-offline", "true", "--sync-timeout-seconds", 1, "--total-timesteps", 250
    )
    training.advance(100)
    training.add_point()
    training.release()
    log = training.end()
    assert log.count("misses a part of this run") == 2
    assert "Traceback" not in log
    proxied.set("pass")
    results = sync_runs(training.checkpoint_dir, MirrorAddresses(proxied.tracking_uri, proxied.mongo_uri))
    assert [result.error for result in results] == [None, None]
    training.assert_nothing_is_missing(proxied, tmp_path / "download")
    assert [result.changes for result in sync_runs(training.checkpoint_dir, verify=True)] == [(), ()]


def test_services_that_hang_when_training_ends_and_wake_up_are_sent_the_rest(tmp_path: Path, proxied: Proxied) -> None:
    training = Training(tmp_path, *proxied.flags, "--total-timesteps", 250)
    training.advance(50)
    wait_for(lambda: training.is_mirrored(proxied), "the first checkpoint", training.process)
    proxied.set("hang")
    training.release()
    wait_for(lambda: training.record["status"] == "completed", "the end of training", training.process)
    proxied.set("pass")
    assert "misses a part" not in training.end()
    training.assert_nothing_is_missing(proxied, tmp_path / "download")


@pytest.mark.parametrize(("name", "mode"), [("MLflow", "http-503"), ("MongoDB", "reset")])
def test_a_service_that_is_broken_at_the_start_is_one_clear_line(
    tmp_path: Path, proxied: Proxied, name: str, mode: str
) -> None:
    proxied.set(mode)
    flags = proxied.flags[:2] if name == "MLflow" else ("--mlflow", "false", *proxied.flags[2:])
    done = trainer(*FLAGS, *flags, "--total-timesteps", 64, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"Error: {name} at ")
    assert "does not answer: " in line
    assert not [*tmp_path.rglob("run.json"), *tmp_path.rglob("ep*")]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
