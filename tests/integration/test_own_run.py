"""One run that is started again and again, at machines that do not see each other's disks: `--resume-own-run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from processes import environment, trainer

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.mirrors.naming import ATTEMPT_TAG, LATEST_TAG
from sb3_mlflow_ckpt.reap import reap_runs
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.sync import sync_runs

_FLAGS = (
    *("--env-id", "toy_environments:FixedLength-v0", "--checkpoint-interval-episodes", 10),
    *("--hyperparameters", "{n_steps: 64, policy_kwargs: {net_arch: [8]}}"),
)


class Machines:
    """Launches of one MLflow run, each machine with a checkpoint folder that no other sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.run_id = self.client.create_run("0").info.run_id
        self._env = environment(MLFLOW_TRACKING_URI=self.uri, MLFLOW_RUN_ID=self.run_id)

    def train(self, machine: str, total_timesteps: int, *flags: object) -> dict[str, Any]:
        """Train at a machine up to a target; return the run's record there."""
        words = (*_FLAGS, "--checkpoint-dir", machine, "--total-timesteps", total_timesteps, *flags)
        done = trainer(*words, "--resume-own-run", "true", cwd=self._folder, env=self._env)
        assert done.returncode == 0, done.stderr
        record = FolderRuns(self._folder / machine).get(self.run_id)
        newest = latest_checkpoint(self._folder / machine, self.run_id)
        assert newest is not None and verify_checkpoint(newest).num_timesteps == total_timesteps
        return record


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    return Machines(tmp_path_factory.mktemp("machines"))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of another run."""
    folder = tmp_path_factory.mktemp("donor")
    done = trainer(*_FLAGS, "--total-timesteps", 64, "--mlflow", "false", cwd=folder)
    assert done.returncode == 0, done.stderr
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    return path


def test_a_run_goes_on_at_a_machine_that_has_nothing_of_it_and_is_the_same_run(
    machines: Machines, donor: Path
) -> None:
    given = ("--resume-from-checkpoint", donor)
    first = machines.train("a", 128, *given)
    assert (first["attempt"], first["parent"]["checkpoint"]) == (1, str(donor.absolute()))
    second = machines.train("b", 192, *given)
    assert (second["attempt"], second["status"]) == (2, "completed")
    for key in ("parent", "root_run_id", "started_at", "run_id"):
        assert second[key] == first[key], key
    # From the first machine's last checkpoint, not from the one that the command names.
    assert second["resume"]["exact"] is True
    run = machines.client.get_run(machines.run_id)
    history = machines.client.get_metric_history(machines.run_id, "rollout/episodes")
    steps = [metric.step for metric in history]
    assert steps == sorted(set(steps)) and steps[0] <= 128 < steps[-1] == 192
    assert (run.info.status, run.data.tags["sb3_mlflow_ckpt.attempt"]) == ("FINISHED", "2")
    assert len(machines.client.search_runs(["0"])) == 1


def test_the_first_machines_folder_leaves_mlflow_to_the_attempt_that_took_over(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    [path] = (Path(machines.uri.removeprefix("sqlite:///")).parent / "a").glob(f"*/{machines.run_id}/run.json")
    record, before = json.loads(path.read_text()), machines.client.get_run(machines.run_id)
    assert (record["attempt"], before.data.tags[ATTEMPT_TAG]) == (1, "2")
    # As its machine lost power in the middle of it.
    path.write_text(json.dumps({**record, "status": "running"}))
    [reaped] = reap_runs(path.parents[2], run_id=machines.run_id)
    assert (reaped.action, reaped.problem, json.loads(path.read_text())["status"]) == ("failed", None, "failed")
    [synced] = sync_runs(path.parents[2], run_id=machines.run_id)
    assert (synced.changes, synced.error) == ((), None)
    assert f"MLflow holds a later attempt of the run {machines.run_id}; attempt 1 is not sent" in caplog.text
    after = machines.client.get_run(machines.run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert after.data.tags == before.data.tags


def test_a_run_that_comes_back_to_a_machine_goes_on_from_what_it_did_elsewhere(machines: Machines) -> None:
    third = machines.train("a", 256)
    assert third["attempt"] == 3
    assert third["resume"]["exact"] is True
    tags = machines.client.get_run(machines.run_id).data.tags
    newest = latest_checkpoint(Path(machines.uri.removeprefix("sqlite:///")).parent / "a", machines.run_id)
    assert newest is not None and tags[LATEST_TAG] == f"checkpoints/{newest.name}"


def test_a_run_does_not_begin_anew_where_mlflow_does_not_say_how_far_it_is(machines: Machines, tmp_path: Path) -> None:
    env = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_RUN_ID=machines.run_id)
    words = (*_FLAGS, "--total-timesteps", 64, "--resume-own-run", "true", "--start-offline", "true")
    done = trainer(*words, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "MLflow at http://127.0.0.1:9 does not answer" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_has_nothing_yet_begins_as_the_command_says(tmp_path: Path, donor: Path) -> None:
    machines = Machines(tmp_path)
    assert machines.train("a", 64)["parent"] is None
    # Another run of the same agent lies there: it is not this one's.
    (tmp_path / "other").mkdir()
    other = Machines(tmp_path / "other")
    record = other.train("../a", 64)
    assert (record["parent"], record["attempt"]) == (None, 1)
