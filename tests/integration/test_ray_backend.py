"""`mlflow run --backend ray`: on a cluster of two nodes that share no disk, one of which goes; and what it refuses."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import MlflowServer
from processes import Leash, environment, lives, script, wait_for
from ray_nodes import TwoNodes
from sweeps import SWEEP_DEADLINE, start_sweep, write_sweep

from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import committed_episodes
from sb3_mlflow_ckpt.runs.folder import read_ledger

ray = pytest.importorskip("ray", reason="NOT TESTED: the extra [ray] is not installed")

from sb3_mlflow_ckpt.scale.ray_backend import RayBackend, RayLaunchError  # noqa: E402
from sb3_mlflow_ckpt.scale.ray_settings import RaySettings  # noqa: E402

pytestmark = pytest.mark.usefixtures("only_ray")

DOCUMENT = Path(__file__).parents[2] / "docs" / "scale-out.md"
PROJECT = """
name: cartpole
entry_points:
  main:
    parameters:
      total_timesteps: {type: string, default: "1000"}
    command: >-
      python -m sb3_mlflow_ckpt.trainer --total-timesteps {total_timesteps} --checkpoint-interval-episodes 5
      --keep-last-n-checkpoints 0 --device cpu --seed 1 --config leash.yaml
"""


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server.uri
    server.stop()


@pytest.fixture
def leash(tmp_path: Path) -> Leash:
    """Holds a training where it has saved some checkpoints, until it is released."""
    return Leash(tmp_path, 1500)


@pytest.fixture
def settings(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch, leash: Leash) -> Path:
    """The environment of whoever types `mlflow run`, and a project."""
    for name, value in environment(RAY_USAGE_STATS_ENABLED="0", MLFLOW_TRACKING_URI=tracking).items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text(PROJECT)
    (project / "leash.yaml").write_text(f"env_wrappers: [{leash.wrapper}]\n")
    return project


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, only_ray: None) -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(RAY_USAGE_STATS_ENABLED="0").items():
            patch.setenv(name, value)
        nodes = TwoNodes(tmp_path_factory.mktemp("nodes"))
        yield nodes
        nodes.shutdown()


@pytest.fixture
def cluster(two_nodes: TwoNodes) -> TwoNodes:
    """The cluster, both of whose nodes are there."""
    two_nodes.complete()
    return two_nodes


def submit(project: Path, address: str, /, **given: Any) -> Any:
    config = {"address": address, "ENV_MANAGER": "local", "SYNCHRONOUS": False, **given}
    steps = {"total_timesteps": str(given.pop("total_timesteps", 8_000))}
    config.pop("total_timesteps", None)
    return RayBackend().run(str(project), "main", steps, None, config, os.environ["MLFLOW_TRACKING_URI"], "0")


def sent(client: MlflowClient, run_id: str) -> list[int]:
    names = (file.path.rpartition("/")[2] for file in client.list_artifacts(run_id, "checkpoints"))
    return sorted(int(name[2:8]) for name in names if name.endswith("_metadata.json"))


def lose_node(cluster: TwoNodes, run_id: str) -> tuple[RunFolder, RunFolder, list[int]]:
    """Take the node of a run away; return the run's folder there, the one at the other node, and what is in the first."""
    [lost] = cluster.nodes_of(run_id)
    [other] = set(cluster.folders) - {lost}
    before, after = (RunFolder(cluster.folders[name], "ppo_agent", run_id) for name in (lost, other))
    trainer = read_record(before)["pid"]
    cluster.kill(lost)
    wait_for(lambda: not lives(trainer), "the end of the node's trainer")
    return before, after, committed_episodes(before)


def test_a_node_is_lost_and_the_run_goes_on_at_the_other_from_mlflow(
    settings: Path, cluster: TwoNodes, tracking: str, leash: Leash
) -> None:
    client = MlflowClient(tracking)
    submitted = submit(settings, cluster.address)
    run_id = submitted.run_id
    wait_for(lambda: len(sent(client, run_id)) >= 3, "checkpoints in MLflow")
    before, after, left = lose_node(cluster, run_id)
    leash.release()
    assert submitted.wait()
    # Nothing was written beside the replacement.
    assert committed_episodes(before) == left
    record = read_record(after)
    first = min(read_ledger(after).saved)
    assert 0 < first - 5 <= max(left), "it went on from a checkpoint of the lost node, and not from zero"
    assert (record["status"], record["attempt"], record["progress"]["num_timesteps"] >= 8_000) == ("completed", 2, True)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    named = client.search_runs(["0"], f"tags.`sb3_mlflow_ckpt.run_id` = '{run_id}'")
    assert [one.info.run_id for one in named] == [run_id]
    assert set(sent(client, run_id)) >= set(read_ledger(after).saved)


def test_a_trials_node_is_lost_and_it_goes_on_at_the_other_from_mlflow(
    tmp_path: Path, cluster: TwoNodes, tracking: str, leash: Leash
) -> None:
    client = MlflowClient(tracking)
    file = write_sweep(
        tmp_path,
        training={
            "total_timesteps": 4_000, "mlflow": True, "tracking_uri": tracking, "checkpoint_interval_episodes": 5,
            "env_wrappers": yaml.safe_load(f"[{leash.wrapper}]"),
        },
        report_interval_timesteps=1_000_000,  # What Tune knows is no help.
        resources={"cpu": 1},
    )  # fmt: skip
    driver = start_sweep(file, "--address", cluster.gcs)

    def trials() -> list[Run]:
        runs = client.search_runs(["0"], "tags.`sb3_mlflow_ckpt.sweep.trial` = '00000'")
        return [run for run in runs if run.data.tags["sb3_mlflow_ckpt.run_id"].startswith("quick-")]

    wait_for(lambda: trials() and len(sent(client, trials()[0].info.run_id)) >= 3, "checkpoints in MLflow", driver)
    [run] = trials()
    run_id = run.data.tags["sb3_mlflow_ckpt.run_id"]
    before, after, left = lose_node(cluster, run_id)
    leash.release()
    assert driver.wait(SWEEP_DEADLINE) == 0, (tmp_path / "sweep.log").read_text()
    assert committed_episodes(before) == left
    record = read_record(after)
    assert 0 < min(read_ledger(after).saved) - 5 <= max(left)
    assert (record["status"], record["attempt"]) == ("completed", 2)
    assert [(one.info.run_id, one.info.status) for one in trials()] == [(run.info.run_id, "FINISHED")]
    # The driver sees neither disk, and tells what it came to all the same.
    printed = (tmp_path / "sweep.log").read_text()
    command = re.search(r"^Resume with: (.*)$", printed, re.MULTILINE)
    assert command is not None and f"runs:/{run.info.run_id}/checkpoints/ep" in command[1], printed
    assert next(tmp_path.glob("sweeps/*/curves.png")).exists()


def test_a_trainer_that_is_killed_is_started_again_and_one_that_is_cancelled_saves_first(
    settings: Path, cluster: TwoNodes, tracking: str, leash: Leash
) -> None:
    leash.release()
    client = MlflowClient(tracking)
    submitted = submit(settings, cluster.address, total_timesteps=10_000_000)
    run_id = submitted.run_id

    def folders() -> list[RunFolder]:
        return [RunFolder(cluster.folders[name], "ppo_agent", run_id) for name in cluster.nodes_of(run_id)]

    wait_for(lambda: len(sent(client, run_id)) >= 2, "checkpoints in MLflow")
    [folder] = folders()
    os.kill(read_record(folder)["pid"], signal.SIGKILL)
    wait_for(lambda: any(read_record(f).get("attempt") == 2 for f in folders()), "the second attempt")
    [second] = [f for f in folders() if read_record(f).get("attempt") == 2]
    count = len(read_ledger(second).saved)
    wait_for(lambda: len(read_ledger(second).saved) > count, "a further checkpoint")
    assert submitted.get_status() == "RUNNING"
    submitted.cancel()
    assert submitted.get_status() == "KILLED"
    record = read_record(second)
    assert record["status"] == "interrupted"
    newest = [*read_ledger(second).saved.values()][-1]
    # Where the interval's own checkpoint falls due at that very moment, it is the one.
    assert newest["trigger"] in ("signal", "interval")
    assert newest["num_timesteps"] == record["progress"]["num_timesteps"]
    assert client.get_run(run_id).info.status == "KILLED"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"address": "http://127.0.0.1:9"}, "No Ray cluster answers at http://127.0.0.1:9: .*ray start --head"),
        ({"address": "head:8265"}, "is not the address of a Ray dashboard"),
        ({"max_retry": 3}, "max_retry: is not a key .*max_retries"),
        ({"max_retries": "many"}, "max_retries: 'many' is not valid"),
        ({"num_cpus": True}, "num_cpus: True is not valid: a number|num_cpus: True is not valid: not a number"),
        ({"ENV_MANAGER": "conda"}, "env_manager: 'conda' is not possible on Ray.*--env-manager local"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_told_in_one_line(settings: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(RayLaunchError, match=told) as raised:
        submit(settings, "http://127.0.0.1:9", **given)
    assert "\n" not in str(raised.value)


def test_without_ray_it_says_what_to_install(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from sb3_mlflow_ckpt.scale.ray_backend import RayBackend\n"
        f"RayBackend().run({str(settings)!r}, 'main', {{}}, None, {{'address': 'http://127.0.0.1:9'}}, '', '0')\n"
    )
    done = script(code, tmp_path, environment())
    assert done.returncode == 1
    assert "pip install 'sb3-mlflow-ckpt[ray]'" in done.stderr.splitlines()[-1]


def test_the_document_has_every_key_with_its_default() -> None:
    rows = [line.split("|")[1:3] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    told = {name.strip().strip("`"): default.strip() for name, default in rows}
    for name, field in RaySettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert told[name] == ("unset" if default in (None, {}) else f"`{default}`"), name
