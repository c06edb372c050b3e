"""A signal at each moment of a training: saved if training had begun, recorded, nothing left behind, 128 + n.

The moments are reached for certain: the process waits there. That each ends within its grace period is what the
deadline of a waiting test tells, since the moments themselves last for ever.
"""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from holding_proxy import holding
from mlflow import MlflowClient
from preempted import DQN, PPO, SIGNALS, Preempted, saved_at_signal, shadowing
from processes import TESTS, environment, trainer, wait_for
from servers import SilentServer

from sb3_mlflow_ckpt.checkpoints import list_checkpoints
from sb3_mlflow_ckpt.interruption import EXIT_CODES

_OFFLINE = ("--mlflow", "false")
_SWALLOWING = """
from moments import arrive
while True:
    try:
        arrive("import")
    except:
        pass
"""
_IN_C = 'from moments import arrive\narrive("import", in_c=True)'
# What a slow disk is to the writer: the checkpoint's own bytes do not become durable.
_SLOW_DISK = """
import os
real = os.fsync
def fsync(file):
    name = os.readlink(f"/proc/self/fd/{file}")
    if "/.tmp-" in name and name.endswith("-ep000020.zip"):
        from moments import arrive
        arrive("save")
    return real(file)
os.fsync = fsync
"""


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("source", [_SWALLOWING, _IN_C], ids=["python", "C"])
def test_while_torch_is_imported_it_ends_at_once(tmp_path: Path, signum: signal.Signals, source: str) -> None:
    """Exceptions that a handler raises are swallowed by an `except:` in an import, and never raised in C."""
    training = Preempted(tmp_path, "import", *_OFFLINE, env=shadowing(tmp_path, source))
    training.wait()
    training.send(signum)
    assert training.end() == EXIT_CODES[signum]
    assert training.log.splitlines()[-1] == f"Interrupted by {signum.name}: no training was under way"
    assert not training.records


@pytest.mark.parametrize(
    ("moment", "signum", "flags"),
    [
        ("making", signal.SIGINT, ()),
        ("making workers", signal.SIGTERM, ("--vec-env", "subproc", "--n-envs", 2)),
        ("first reset", signal.SIGUSR1, ()),
    ],
)
def test_while_environments_are_built_it_ends_at_once(
    tmp_path: Path, moment: str, signum: signal.Signals, flags: tuple[object, ...]
) -> None:
    training = Preempted(tmp_path, moment, *_OFFLINE, *flags)
    training.wait()
    training.send(signum, to_group=moment == "making workers")
    assert training.end() == EXIT_CODES[signum]
    assert not training.checkpoint_dir.exists()


def test_while_a_checkpoint_is_looked_for_on_a_server_that_hangs_it_ends_at_once(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    flags = ("--resume-from-checkpoint", f"runs:/{'0' * 32}", "--tracking-uri", f"http://127.0.0.1:{silent_server.port}")
    training = Preempted(tmp_path, "", *flags)
    wait_for(lambda: silent_server.accepted, "the request", training.process)
    training.send(signal.SIGTERM)
    assert training.end() == 143
    assert "no training was under way" in training.log and "does not answer" not in training.log
    assert not training.checkpoint_dir.exists()


@pytest.fixture(scope="module")
def trained(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow run with a checkpoint."""
    cwd = tmp_path_factory.mktemp("trained")
    done = trainer(
        "--tracking-uri", mlflow_uri, "--total-timesteps", 64, "--hyperparameters", "n_steps=64", "--run-name", "trained",
        cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list_checkpoints(cwd / "checkpoints")[-1].parent.name


def test_while_a_checkpoint_is_downloaded_it_ends_at_once_and_the_download_is_gone(
    tmp_path: Path, mlflow_uri: str, trained: str
) -> None:
    with holding(mlflow_uri, r"GET .*/artifacts/.*\.zip") as proxy:
        training = Preempted(
            tmp_path, "", "--env-id", "CartPole-v1", "--env-wrappers", "[]",
            "--resume-from-checkpoint", f"runs:/{trained}", "--tracking-uri", proxy.uri,
        )  # fmt: skip
        wait_for(proxy.reached.is_set, "the download", training.process)
        assert list(training.temporary.glob("sb3_mlflow_ckpt-*"))
        training.send(signal.SIGUSR1)
        assert training.end() == 138
    assert not training.checkpoint_dir.exists()


def test_while_the_mlflow_run_is_made_it_is_taken_back(tmp_path: Path, mlflow_uri: str) -> None:
    """The run exists on the server before the trainer knows its id: leaving then would leave it RUNNING."""
    name = f"preempted {tmp_path.name}"
    with holding(mlflow_uri, "POST .*/runs/create") as proxy:
        training = Preempted(tmp_path, "", *PPO, "--tracking-uri", proxy.uri, "--run-name", name)
        wait_for(proxy.reached.is_set, "the run", training.process)
        training.send(signal.SIGINT)
        proxy.released.set()
        assert training.end() == 130
    [run] = MlflowClient(mlflow_uri).search_runs(["0"], f"tags.mlflow.runName = '{name}'")
    assert run.info.status == "KILLED"
    assert not training.records


def test_a_server_that_hangs_at_the_start_is_no_error_of_somebody_who_stopped_it(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    training = Preempted(tmp_path, "", *PPO, "--tracking-uri", f"http://127.0.0.1:{silent_server.port}")
    wait_for(lambda: silent_server.accepted, "the request", training.process)
    training.send(signal.SIGUSR1)
    assert training.end() == 138
    assert "does not answer" not in training.log
    assert not training.records


@pytest.mark.parametrize(
    ("moment", "signum", "flags", "reason"),
    [
        ("reset", signal.SIGTERM, PPO, "step"),
        ("step", signal.SIGINT, DQN, "step"),
        ("update", signal.SIGUSR1, PPO, "update"),
        ("long update", signal.SIGTERM, PPO, "update"),
        ("long update", signal.SIGINT, DQN, "update"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_in_the_middle_of_something_long_it_is_saved_from_where_it_stands(
    tmp_path: Path, moment: str, signum: signal.Signals, flags: tuple[str, ...], reason: str
) -> None:
    training = Preempted(tmp_path, moment, *_OFFLINE, *flags, "--grace-seconds", 16)
    training.wait()
    training.send(signum)
    assert training.end() == EXIT_CODES[signum]
    record, saved = training.assert_interrupted(), training.newest
    assert saved.num_timesteps == record["progress"]["num_timesteps"]
    assert saved.resume_state["exact"] is False
    assert saved.resume_state["reason"].startswith(f"it was saved in the middle of a{'n' * (reason == 'update')} {reason}")
    steps = _optimizer_steps(list_checkpoints(training.checkpoint_dir)[-1])
    assert len(set(steps)) == 1, "it was saved within a step of the optimizer"
    if moment == "update":
        training.release()
        done = training.resume(*_OFFLINE, *flags)
        assert done.returncode == 0, done.stderr
        assert f"at episode {saved.episode}, {saved.num_timesteps} of" in done.stdout


@pytest.mark.parametrize(("moment", "signum"), [("step in C", signal.SIGUSR1), ("update in C", signal.SIGINT)])
def test_where_the_main_thread_does_not_come_back_the_end_is_recorded_and_told(
    tmp_path: Path, mlflow_uri: str, moment: str, signum: signal.Signals
) -> None:
    training = Preempted(tmp_path, moment, *PPO, "--grace-seconds", 20, "--tracking-uri", mlflow_uri)
    training.wait()
    training.send(signum)
    assert training.end() == EXIT_CODES[signum]
    record, saved = training.assert_interrupted(), training.newest
    assert saved.trigger == "interval"
    assert f"Interrupted by {signum.name}; training did not stop in time. The last checkpoint is " in training.log
    assert record["progress"]["num_timesteps"] >= saved.num_timesteps
    assert MlflowClient(mlflow_uri).get_run(record["run_id"]).info.status == "KILLED"


def test_where_neither_the_main_thread_nor_an_upload_comes_back_the_end_is_recorded_and_told(
    tmp_path: Path, mlflow_uri: str
) -> None:
    with holding(mlflow_uri, r"PUT .*/artifacts/.*\.zip", before=True) as proxy:
        training = Preempted(tmp_path, "step in C", *PPO, "--grace-seconds", 30, "--tracking-uri", proxy.uri)
        training.wait()
        wait_for(proxy.reached.is_set, "the upload", training.process)
        training.send(signal.SIGTERM)
        assert training.end() == 143
        record = training.assert_interrupted()
        [newest] = list_checkpoints(training.checkpoint_dir)[-1:]
        assert f"The last checkpoint is {newest.relative_to(tmp_path)}" in training.log
        assert MlflowClient(mlflow_uri).get_run(record["run_id"]).info.status == "KILLED"


def test_a_step_in_a_worker_that_does_not_end_is_saved_without_it(tmp_path: Path) -> None:
    """The signal reaches every process of the group, as systemd's and a terminal's do."""
    flags = ("--vec-env", "subproc", "--n-envs", 2, "--grace-seconds", 16)
    training = Preempted(tmp_path, "step", *_OFFLINE, *PPO, *flags)
    training.wait()
    training.send(signal.SIGTERM, to_group=True)
    assert training.end() == 143
    training.assert_interrupted()
    assert training.newest.trigger == "signal"


def test_a_save_that_is_under_way_is_finished_and_the_last_state_saved_after_it(tmp_path: Path) -> None:
    slow = shadowing(tmp_path, _SLOW_DISK, "sitecustomize")
    # All are kept: how far training comes beside the slow save is not known.
    training = Preempted(tmp_path, "save", *_OFFLINE, *PPO, "--keep-last-n-checkpoints", 0, env=slow)
    training.wait()
    threads = training.threads
    training.send(signal.SIGTERM)
    # Which of several is heard first is the system's choice where they come at once: so the others come when the
    # first one's grace period is counted, in a thread of its own.
    wait_for(lambda: training.threads > threads, "the grace period", training.process)
    for signum in (signal.SIGINT, signal.SIGUSR1):
        training.send(signum)
    training.release()
    assert training.end() == 143
    record = training.assert_interrupted()
    saved = [path.name for path in list_checkpoints(training.checkpoint_dir)]
    assert "ep000020.zip" in saved
    # Where the interval's own checkpoint falls due at that very moment, it is the one.
    assert training.newest.trigger in ("signal", "interval")
    assert training.newest.num_timesteps == record["progress"]["num_timesteps"]


def test_a_disk_that_hangs_costs_no_committed_checkpoint(tmp_path: Path) -> None:
    slow = shadowing(tmp_path, _SLOW_DISK, "sitecustomize")
    training = Preempted(tmp_path, "save", *_OFFLINE, *PPO, "--grace-seconds", 16, env=slow)
    training.wait()
    training.send(signal.SIGUSR1)
    assert training.end() == 138
    training.assert_interrupted()
    assert training.newest.episode == 10
    training.release()
    done = training.resume(*_OFFLINE, *PPO)
    assert done.returncode == 0, done.stderr
    assert "at episode 10," in done.stdout


def test_an_upload_that_hangs_leaves_no_run_running_in_mlflow(tmp_path: Path, mlflow_uri: str) -> None:
    with holding(mlflow_uri, r"PUT .*/artifacts/.*\.zip", before=True) as proxy:
        training = Preempted(tmp_path, "", *PPO, "--grace-seconds", 16, "--tracking-uri", proxy.uri)
        wait_for(proxy.reached.is_set, "the upload", training.process)
        training.send(signal.SIGTERM)
        assert training.end() == 143
        record = training.assert_interrupted()
        saved_at_signal(training.checkpoint_dir)
        assert MlflowClient(mlflow_uri).get_run(record["run_id"]).info.status == "KILLED"


def test_a_second_signal_hurries_and_loses_nothing(tmp_path: Path) -> None:
    training = Preempted(tmp_path, "step", *_OFFLINE, *PPO, "--grace-seconds", 80_000)
    training.wait()
    training.send(signal.SIGINT)
    # Those that follow at once are the same Ctrl-C; one that comes later is meant.
    deadline = time.monotonic() + 60
    while training.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.3)
        training.send(signal.SIGTERM)
    assert training.end() == 130
    training.assert_interrupted()
    assert training.newest.trigger == "signal"


_SCRIPT = """
import signal, sys
from pathlib import Path
from stable_baselines3 import PPO
from sb3_mlflow_ckpt import EpisodeCheckpointCallback
from moments import Arriving
from toy_environments import FixedLength
callback = EpisodeCheckpointCallback(checkpoint_interval_episodes=10, grace_seconds=16)
signal.signal(signal.SIGUSR1, lambda *_: Path("own").touch())
try:
    PPO("MlpPolicy", Arriving(FixedLength()), n_steps=64, device="cpu").learn(10_000_000, callback=callback)
except SystemExit as ended:
    print("ended with", ended.code, "at", callback.episode)
    raise
"""


def test_in_a_users_own_script_a_handler_of_sigusr1_is_respected_and_sigterm_saves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=environment(MOMENT="step", MOMENT_FOLDER=str(tmp_path)),
    )  # fmt: skip
    wait_for((tmp_path / "reached").exists, "the moment", process)
    process.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "own").exists, "its own handler", process)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "ended with 143 at 29" in out
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "ep000029.zip"


def test_signals_at_random_instants_lose_nothing() -> None:
    """The short form of a campaign that anybody can run."""
    words = [sys.executable, TESTS / "crash" / "preemption.py", "--signals", "3", "--algos", "ppo"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| `auto` to the target | 1 | nothing |" in done.stdout


def _optimizer_steps(path: Path) -> list[float]:
    """Return how many steps each parameter of the policy's first optimizer has made."""
    with zipfile.ZipFile(path) as archive:
        [name, *_] = sorted(name for name in archive.namelist() if name.endswith("optimizer.pth"))
        state = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    return [float(parameter["step"]) for parameter in state["state"].values()]
