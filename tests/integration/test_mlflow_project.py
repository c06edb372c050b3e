"""`mlflow run` of the project as a user types it: one run, its artifacts, its resumes, and how it ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import prefork
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from processes import DEADLINE, ROOT, TESTS, Leash, environment, wait_for
from stable_baselines3 import PPO

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.runs.document import derived_status
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_HYPERPARAMETERS = "{n_steps: 64, policy_kwargs: {net_arch: [8, 8]}}"
_TEMPORARY = "tmp"
_URL = "https://git.invalid/project.git"


class Launcher:
    """Types `mlflow run` in a folder: the runs are in that folder's default store, or on a server.

    PYTHONPATH does not name the package: what runs is the project.
    """

    def __init__(self, cwd: Path, uri: str | None = None) -> None:
        self.cwd = cwd
        self.uri = uri or f"sqlite:///{cwd}/mlflow.db"
        self.log = cwd / "mlflow-run.log"
        self.temporary = cwd / _TEMPORARY
        self.temporary.mkdir(parents=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        named = {"MLFLOW_TRACKING_URI": uri} if uri else {}
        self.env = environment(PATH=path, PYTHONPATH=str(TESTS), TMPDIR=str(self.temporary), **named)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def runs(self) -> set[str]:
        """Return the ids of all the runs that there are, in whichever experiment."""
        if self.uri.startswith("sqlite") and not (self.cwd / "mlflow.db").exists():
            return set()
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments(ViewType.ALL)]
        found = self.client.search_runs(experiments, run_view_type=ViewType.ALL, max_results=10_000)
        return {run.info.run_id for run in found}

    def run(self, project: object, *options: str, **parameters: object) -> subprocess.CompletedProcess[str]:
        """Run a project to its end."""
        return prefork.run(_command(project, options, parameters), cwd=self.cwd, env=self.env, timeout=DEADLINE)

    def start(self, project: object, **parameters: object) -> Any:
        """Start a project; the output goes to `mlflow-run.log`."""
        with self.log.open("a") as log:
            files = {"output": log.fileno(), "errors": log.fileno()}
            return prefork.start(
                _command(project, (), parameters), cwd=self.cwd, env=self.env, new_session=True, **files
            )


def _command(project: object, options: tuple[str, ...], parameters: dict[str, object]) -> list[str]:
    pairs = [word for key, value in parameters.items() for word in ("-P", f"{key}={value}")]
    return ["-m", "mlflow", "run", str(project), "--env-manager", "local", *options, *pairs]


@dataclass(frozen=True)
class Trained:
    """A run that has ended well, as it was at its end."""

    launcher: Launcher
    checkpoint_dir: Path
    done: subprocess.CompletedProcess[str]
    made: set[str]
    run: Run
    record: dict[str, Any]
    artifacts: set[str]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project as it is in the working tree, with everything committed."""
    clone = tmp_path_factory.mktemp("clone") / "project"
    listed = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    _git(clone, "init", "--quiet")
    _git(clone, "add", "--all")
    _git(clone, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "The project")
    return clone


@pytest.fixture(scope="module", params=["sqlite", "server"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    uri = str(request.getfixturevalue("mlflow_uri")) if request.param == "server" else None
    return Launcher(tmp_path_factory.mktemp("launch") / "another folder", uri)


@pytest.fixture(scope="module")
def trained(launcher: Launcher, project: Path) -> Trained:
    """A run of the project that was launched from another folder."""
    before = launcher.runs()
    checkpoint_dir = launcher.cwd / "checkpoints"
    done = launcher.run(
        project,
        total_timesteps=256, hyperparameters=_HYPERPARAMETERS, checkpoint_interval_episodes=3,
        keep_last_n_checkpoints=2, checkpoint_dir=checkpoint_dir, seed=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = launcher.runs() - before
    [record] = FolderRuns(checkpoint_dir).list()
    run_id = record["run_id"]
    return Trained(
        launcher, checkpoint_dir, done, made, launcher.client.get_run(run_id),
        FolderRuns(checkpoint_dir).get(run_id), set(_artifacts(launcher.client, run_id)),
    )  # fmt: skip


@pytest.fixture
def own(project: Path, tmp_path: Path) -> Launcher:
    """A launcher in a copy of the project: what `mlflow run .` does by default stays in there."""
    return Launcher(shutil.copytree(project, tmp_path / "project"))


def test_the_run_that_mlflow_made_is_continued_and_never_doubled(trained: Trained) -> None:
    run_id = trained.run.info.run_id
    assert trained.made == {run_id}
    assert trained.run.info.status == "FINISHED"
    assert trained.record["status"] == "completed"
    assert trained.record["mlflow"]["run_id"] == run_id
    assert [path.name for path in (trained.checkpoint_dir / "ppo_agent").iterdir()] == [run_id]
    assert f"MLflow run:  {run_id}" in trained.done.stdout
    assert trained.run.data.tags["mlflow.project.entryPoint"] == "main"


def test_every_checkpoint_is_an_artifact_of_that_run_and_the_tag_names_the_newest(trained: Trained) -> None:
    entries = trained.record["checkpoint_paths"]
    names = {f"checkpoints/{Path(entry['path']).stem}" for entry in entries}
    assert len(entries) > 3
    assert trained.artifacts == {f"{name}{suffix}" for name in names for suffix in (".zip", "_metadata.json")}
    newest = Path(entries[-1]["path"])
    assert trained.run.data.tags[LATEST_TAG] == f"checkpoints/{newest.name}"
    assert [entry["on_disk"] for entry in entries] == [False] * (len(entries) - 2) + [True] * 2
    assert entries[-1]["num_timesteps"] == verify_checkpoint(newest).num_timesteps == 256
    assert newest.parent == trained.checkpoint_dir / "ppo_agent" / trained.run.info.run_id


def test_what_was_not_given_is_recorded_as_inherit_beside_what_it_came_to(trained: Trained) -> None:
    params = trained.run.data.params
    for key, value in {"learning_rate": "0.0003", "algo": "ppo", "env_id": "CartPole-v1", "n_envs": "1"}.items():
        assert (params[key], params[f"resolved.{key}"]) == ("inherit", value)
    # What was given says what it came to itself.
    assert params["total_timesteps"] == "256"
    assert "resolved.total_timesteps" not in params
    assert "resolved.seed" not in params


def test_a_mapping_with_quotes_and_braces_arrives_whole(trained: Trained) -> None:
    # MLflow records a parameter as it goes into the shell.
    assert trained.run.data.params["hyperparameters"] == shlex.quote(_HYPERPARAMETERS)
    assert trained.run.data.params["hyperparameters.policy_kwargs.net_arch"] == "[8, 8]"
    assert trained.record["config"]["hyperparameters"] == {"n_steps": 64, "policy_kwargs": {"net_arch": [8, 8]}}
    model = PPO.load(trained.record["checkpoint_paths"][-1]["path"], device="cpu")
    assert (model.n_steps, model.policy.net_arch) == (64, [8, 8])


def test_a_checkpoint_among_the_artifacts_is_resumed_where_it_was_saved(trained: Trained, project: Path) -> None:
    launcher, old = trained.launcher, trained.run.info.run_id
    # It was pruned from the disk: it can only come from MLflow.
    source = trained.record["checkpoint_paths"][1]
    assert not Path(source["path"]).exists()
    before, folder, in_mlflow = launcher.runs(), _files(trained.checkpoint_dir), _everything(launcher.client, old)

    done = launcher.run(
        project,
        total_timesteps=320, checkpoint_dir=trained.checkpoint_dir, resume_from_checkpoint=source["uri"],
        learning_rate=0.001,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert source["uri"] == f"runs:/{old}/checkpoints/{Path(source['path']).name}"
    told = f"Resuming {source['uri']} at episode {source['episode']}, {source['num_timesteps']} of 320 timesteps"
    assert told in done.stdout
    assert "override learning_rate: 0.0003 -> 0.001" in done.stdout

    [new] = launcher.runs() - before
    record = FolderRuns(trained.checkpoint_dir).get(new)
    assert record["status"] == "completed"
    assert record["parent"] == {
        "run_id": old, "checkpoint": source["uri"], "episode": source["episode"], "sha256": source["sha256"],
        "timestamp": source["timestamp"],
    }  # fmt: skip
    assert record["config"]["hyperparameters"] == trained.record["config"]["hyperparameters"]
    first = record["checkpoint_paths"][0]
    assert first["episode"] == source["episode"] + 3
    assert first["num_timesteps"] > source["num_timesteps"]
    # The rollout that was under way is finished, so it ends where a training that was never stopped ends.
    assert record["progress"]["num_timesteps"] == _rounded(320)

    run = launcher.client.get_run(new)
    assert run.info.status == "FINISHED"
    tags = {key.removeprefix("sb3_mlflow_ckpt."): value for key, value in run.data.tags.items()}
    assert tags["parent.run_id"] == tags["root_run_id"] == tags["mlflow.parentRunId"] == old
    assert tags["parent.checkpoint"] == source["uri"]
    assert (tags["parent.episode"], tags["parent.sha256"]) == (str(source["episode"]), source["sha256"])
    assert tags["mlflow.note.content"].startswith(f"Resumed from episode {source['episode']} of run {old}")
    steps = [metric.step for metric in launcher.client.get_metric_history(new, "rollout/episodes")]
    assert min(steps) > source["num_timesteps"]

    now = _files(trained.checkpoint_dir)
    assert {name: now.get(name) for name in folder} == folder
    assert {Path(name).parts[1] for name in now.keys() - folder.keys()} == {new}
    assert _everything(launcher.client, old) == in_mlflow
    assert not list(launcher.temporary.glob("sb3_mlflow_ckpt-*")), "the download is still there"


def test_a_run_is_resumed_from_mlflow_alone_at_its_newest_complete_checkpoint(
    trained: Trained, project: Path, tmp_path: Path
) -> None:
    launcher, old = trained.launcher, trained.run.info.run_id
    # A death between the two files of a checkpoint leaves a zip without metadata.
    torn = tmp_path / "ep000900.zip"
    torn.write_bytes(b"PK")
    launcher.client.log_artifact(old, str(torn), "checkpoints")
    newest = trained.record["checkpoint_paths"][-1]
    before = launcher.runs()
    with _gone(trained.checkpoint_dir):
        done = launcher.run(
            project, total_timesteps=320, checkpoint_dir=tmp_path / "new", resume_from_checkpoint=f"runs:/{old}"
        )
    assert done.returncode == 0, done.stderr
    assert f"Resuming {newest['uri']} at episode {newest['episode']}, 256 of 320 timesteps" in done.stdout
    [new] = launcher.runs() - before
    record = FolderRuns(tmp_path / "new").get(new)
    assert (record["status"], record["parent"]["run_id"]) == ("completed", old)
    assert record["parent"]["checkpoint"] == newest["uri"]
    assert [entry["num_timesteps"] for entry in record["checkpoint_paths"]][-1] == 320
    assert launcher.client.get_run(new).info.status == "FINISHED"


@pytest.mark.parametrize("address", ["file", "url"])
def test_the_project_runs_from_a_git_uri(project: Path, tmp_path: Path, address: str) -> None:
    launcher = Launcher(tmp_path / "elsewhere")
    uri = f"file://{project}" if address == "file" else _URL
    # What stands for a host: git itself turns the URL into the clone's, after MLflow took it for a remote one.
    launcher.env |= {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{project}.insteadOf", "GIT_CONFIG_VALUE_0": _URL,
    }  # fmt: skip
    commit = _git(project, "rev-parse", "HEAD").strip()
    before = _files(project)
    done = launcher.run(
        uri, *(["--version", commit] if address == "url" else []),
        total_timesteps=64, hyperparameters="{n_steps: 64}", checkpoint_dir=tmp_path / "checkpoints",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [run_id] = launcher.runs()
    record = FolderRuns(tmp_path / "checkpoints").get(run_id)
    assert record["status"] == "completed"
    assert record["git"]["commit"] == commit
    run = launcher.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert verify_checkpoint(record["checkpoint_paths"][-1]["path"]).num_timesteps == 64
    assert _files(project) == before, "the run left something in the project"


@pytest.fixture(scope="module")
def killed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Launcher, Run]:
    """A launcher and its run, whose trainer was killed with SIGKILL under a living `mlflow run`, as it was then."""
    launcher = Launcher(shutil.copytree(project, tmp_path_factory.mktemp("killed") / "project"))
    process, leash = _training(launcher)
    os.kill(_record(launcher)["pid"], signal.SIGKILL)
    assert process.wait(300) != 0, launcher.log.read_text()
    leash.release()
    [run_id] = launcher.runs()
    return launcher, launcher.client.get_run(run_id)


def test_a_trainer_that_is_killed_is_failed_in_mlflow_and_lost_in_its_record(killed: tuple[Launcher, Run]) -> None:
    launcher, run = killed
    record = _record(launcher)
    assert (run.info.run_id, run.info.status) == (record["run_id"], "FAILED")
    assert (record["status"], record["ended_at"]) == ("running", None)
    assert derived_status(record, datetime.now(timezone.utc) + timedelta(minutes=5)) == "lost"
    assert verify_checkpoint(list_checkpoints(launcher.cwd / "checkpoints")[-1]).run_id == run.info.run_id


def test_sending_what_a_killed_trainer_left_does_not_bring_it_back_to_life_in_mlflow(
    killed: tuple[Launcher, Run],
) -> None:
    launcher, run_id = killed[0], killed[1].info.run_id
    words = ("-m", "sb3_mlflow_ckpt", "checkpoints", "sync")
    done = prefork.run(words, cwd=launcher.cwd, env=launcher.env, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert launcher.runs() == {run_id}, "it was sent to a run of its own"
    names = {f"checkpoints/{path.name}" for path in list_checkpoints(launcher.cwd / "checkpoints")}
    assert names <= set(_artifacts(launcher.client, run_id))
    assert launcher.client.get_run(run_id).info.status == "FAILED"


def test_a_trainer_that_is_terminated_saves_and_is_no_success(own: Launcher) -> None:
    process, leash = _training(own)
    # Before it may go on: where an interval falls due in the same step, its checkpoint is that of the signal too.
    os.kill(_record(own)["pid"], signal.SIGTERM)
    leash.release()
    assert process.wait(300) != 0, own.log.read_text()
    record = _record(own)
    assert (record["status"], record["error"]) == ("interrupted", None)
    newest = list_checkpoints(own.cwd / "checkpoints")[-1]
    assert verify_checkpoint(newest).trigger == "signal"
    [run_id] = own.runs()
    run = own.client.get_run(run_id)
    # The trainer says KILLED; its parent sees only that it did not exit with 0.
    assert run.info.status in ("KILLED", "FAILED")
    assert run.data.tags["sb3_mlflow_ckpt.status"] == "interrupted"
    assert run.data.tags[LATEST_TAG] == f"checkpoints/{newest.name}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_mlflow_run_and_its_trainer_saves_and_both_say_so(own: Launcher, signum: signal.Signals) -> None:
    """Ctrl-C reaches both: MLflow then tells the trainer once more, with SIGTERM."""
    process, leash = _training(own)
    leash.release()
    os.killpg(process.pid, signum)
    assert process.wait(300) != 0, own.log.read_text()
    # `mlflow run` may be gone first.
    wait_for(lambda: _record(own)["status"] != "running", "the end of the trainer")
    record = _record(own)
    assert (record["status"], record["error"]) == ("interrupted", None)
    newest = verify_checkpoint(list_checkpoints(own.cwd / "checkpoints")[-1])
    assert newest.num_timesteps == record["progress"]["num_timesteps"]
    assert newest.resume_state["exact"] is True
    wait_for(lambda: own.client.get_run(record["run_id"]).info.status in ("KILLED", "FAILED"), "the end in MLflow")
    tags = own.client.get_run(record["run_id"]).data.tags
    assert tags["sb3_mlflow_ckpt.status"] == "interrupted"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_trainer_whose_mlflow_run_is_ended_goes_on_and_ends_well(own: Launcher, signum: signal.Signals) -> None:
    process, leash = _training(own, total_timesteps=200)
    pid = _record(own)["pid"]
    try:
        process.send_signal(signum)
        process.wait(300)
        [run_id] = own.runs()
        assert own.client.get_run(run_id).info.status == "RUNNING"
        leash.release()
        wait_for(lambda: own.client.get_run(run_id).info.status != "RUNNING", "the end of the orphan")
    finally:
        leash.release()
        if _record(own)["status"] == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert own.client.get_run(run_id).info.status == "FINISHED"
    assert _record(own)["status"] == "completed"
    entries = FolderRuns(own.cwd / "checkpoints").get(run_id)["checkpoint_paths"]
    assert entries[-1]["num_timesteps"] == 256
    assert {entry["state"] for entry in entries} == {"mirrored"}


def test_a_setting_that_is_wrong_fails_the_run_with_one_line(own: Launcher) -> None:
    done = own.run(".", n_envs=0)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert lines == ["Error: n_envs: '0' is not valid: input should be greater than or equal to 1 (from --n-envs)"]
    assert "Traceback" not in done.stdout + done.stderr
    [run_id] = own.runs()
    assert own.client.get_run(run_id).info.status == "FAILED"
    assert not (own.cwd / "checkpoints").exists()


def test_an_error_of_the_environment_fails_the_run_and_is_told(own: Launcher) -> None:
    done = own.run(
        ".",
        env_id="toy_environments:FixedLength-v0", env_kwargs="{fails_at: 100}", hyperparameters="{n_steps: 64}",
        checkpoint_interval_episodes=10,
    )  # fmt: skip
    assert done.returncode != 0
    assert "RuntimeError: the simulator broke" in done.stderr
    [run_id] = own.runs()
    run = own.client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["sb3_mlflow_ckpt.error"] == "RuntimeError: the simulator broke"
    record = _record(own)
    assert (record["status"], record["error"]["message"]) == ("failed", "the simulator broke")
    assert verify_checkpoint(list_checkpoints(own.cwd / "checkpoints")[-1]).trigger == "exception"


def _training(launcher: Launcher, **parameters: object) -> tuple[subprocess.Popen[str], Leash]:
    """Return a `mlflow run .` whose trainer has saved a checkpoint and waits for its leash."""
    # The second checkpoint is due after 50 steps.
    leash = Leash(launcher.cwd, 60)
    process = launcher.start(
        ".",
        env_id="toy_environments:FixedLength-v0", env_wrappers=leash.wrapper, hyperparameters="{n_steps: 64}",
        checkpoint_interval_episodes=5, **parameters,
    )  # fmt: skip
    wait_for(lambda: len(list_checkpoints(launcher.cwd / "checkpoints")) >= 2, "the second checkpoint", process)
    return process, leash


def _record(launcher: Launcher) -> dict[str, Any]:
    [record] = FolderRuns(launcher.cwd / "checkpoints").list()
    return record


def _rounded(steps: int) -> int:
    """Return how many steps PPO takes for so many: whole rollouts."""
    return -(-steps // 64) * 64


def _git(cwd: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def _files(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder, without what Python and git keep there for themselves."""
    own = {"__pycache__", ".git"}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (folder / path).read_bytes() for path in paths if not own & set(path.parts)}


def _artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> dict[str, int]:
    """Return the paths and sizes of a run's artifacts."""
    found: dict[str, int] = {}
    for item in client.list_artifacts(run_id, path):
        found |= _artifacts(client, run_id, item.path) if item.is_dir else {item.path: item.file_size}
    return found


def _everything(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """Return all that MLflow has of a run."""
    run = client.get_run(run_id)
    metrics = {key: [dict(metric) for metric in client.get_metric_history(run_id, key)] for key in run.data.metrics}
    return {**run.to_dictionary(), "metrics": metrics, "artifacts": _artifacts(client, run_id)}


@contextlib.contextmanager
def _gone(folder: Path) -> Iterator[None]:
    away = folder.with_name("away")
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)
