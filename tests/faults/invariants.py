"""What must hold after every fault, looked at by another process."""

from __future__ import annotations

import errno
import time
from collections import Counter
from pathlib import Path
from typing import Any

from injection import FAIL, Fault, Met
from workloads import AGENT, Stage, Workload, content_of, database, read_replay_state, tracking_uri

_KEPT = {"commit, replacement, prune, record, curve": 2}
_REMEDIES = {
    errno.ENOSPC: "keep_last_n_checkpoints", errno.EDQUOT: "keep_last_n_checkpoints", errno.EIO: "checkpoint_dir",
    errno.EROFS: "checkpoint_dir", errno.EMFILE: "ulimit",
}  # fmt: skip


def run_id_of(stage: Stage, workload: Workload) -> str:
    """Return the run that a workload makes; MLflow names it where it is asked first."""
    noted = stage.folder / "run_id"
    if noted.exists() and noted.read_text():
        return noted.read_text()
    return workload.run_id


def after_fault(stage: Stage, workload: Workload, acks: list[dict[str, Any]]) -> tuple[list[str], float]:
    """Return what was lost right after a fault, and how long it took to open the folder and load the newest."""
    from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
    from sb3_mlflow_ckpt.runs.folder import FolderRuns, read_curve

    lost: list[str] = []
    steps: dict[int, int] = {}
    run_id = run_id_of(stage, workload)
    contents = {(a["episode"], a["steps"]): a.get("content") for a in acks if "steps" in a}
    for path in list_checkpoints(stage.checkpoints):
        try:
            metadata = verify_checkpoint(path)
            got = _load(path, workload.replay)
        except Exception as error:
            lost.append(f"{path.name} is listed and does not load: {error}")
            continue
        if path.parent.name == run_id:
            steps[metadata.episode] = metadata.num_timesteps
            expected = contents.get((metadata.episode, metadata.num_timesteps))
            if workload.replay and expected is not None and got != expected:
                lost.append(f"the replay buffer of {path.name} is not what was saved")
        if not workload.replay and not workload.clock and got != metadata.num_timesteps:
            lost.append(f"{path.name} holds the tensors of save {got}, its metadata says {metadata.num_timesteps}")
    lost += _acknowledged(steps, acks, 3 if workload.mirror else 2)
    began = time.perf_counter()
    newest = latest_checkpoint(stage.checkpoints)
    if newest is not None:
        _load(newest, workload.replay)
    recovery = time.perf_counter() - began
    told = [Path(a["newest"]) for a in acks if a.get("newest") and a["newest"] != "None"]
    if told and (newest is None or verify_checkpoint(newest).num_timesteps == 0 or newest.name < told[-1].name):
        lost.append(f"{told[-1].name} was the newest, now it is {newest}")
    runs = FolderRuns(stage.checkpoints)
    for record in runs.list():
        runs.get(record["run_id"])
        runs.curve(record["run_id"])
    points = {a["point"] for a in acks if "point" in a}
    if points:
        present = {point["num_timesteps"] for point in read_curve(_folder(stage, run_id))}
        lost += [f"the acknowledged point {point} is gone" for point in sorted(points - present)]
    return lost, recovery


def _acknowledged(steps: dict[int, int], acks: list[dict[str, Any]], keep: int) -> list[str]:
    saved: dict[int, int] = {}
    for ack in acks:
        if "steps" in ack:
            saved.pop(ack["episode"], None)
            saved[ack["episode"]] = ack["steps"]
    last = max(saved.values(), default=-1)
    # One more may be committed and not acknowledged, and the oldest pruned for it.
    newer = [episode for episode, value in steps.items() if value > last]
    order = [episode for episode in saved if episode not in newer] + newer
    return [
        f"the acknowledged checkpoint of episode {episode} is gone"
        for episode in order[-keep:]
        if steps.get(episode, -1) < saved.get(episode, -1)
    ]


def after_recovery(stage: Stage, workload: Workload) -> list[str]:
    """Return what differs from an undisturbed run after another process went on to the end."""
    from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
    from sb3_mlflow_ckpt.runs.folder import read_run

    if workload.clock:
        newest = max(verify_checkpoint(path).num_timesteps for path in list_checkpoints(stage.checkpoints))
        return [] if newest >= 320 else [f"the resumed training ended at {newest} timesteps"]
    folder = _folder(stage, run_id_of(stage, workload))
    paths = list_checkpoints(stage.checkpoints, run_id=folder.run_id)
    metadata = [verify_checkpoint(path) for path in paths]
    wrong = []
    found = {item.episode: item.num_timesteps for item in metadata}
    if found != workload.expected:
        wrong.append(f"the run ended with {found} in place of {dict(workload.expected)}")
    record = read_run(folder)
    if record["status"] != "completed":
        wrong.append(f"its status is {record['status']}")
    for item in record["checkpoint_paths"]:
        if (item["state"] != "pruned") != (item["episode"] in found):
            wrong.append(f"the ledger says {item['state']} of episode {item['episode']}")
        for own in metadata:
            if own.episode == item["episode"] and own.files[0].sha256 != item["sha256"]:
                wrong.append(f"the ledger holds another hash of episode {own.episode}")
    needed = {f"replay/{path}" for path in ()} | {entry.name for own in metadata for entry in own.files[1:]}
    needed |= {path.name for path in paths} | {f"{path.stem}_metadata.json" for path in paths}
    needed |= {"run.json", "checkpoints.jsonl", "metrics.jsonl", ".lock"}
    there = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    wrong += [f"{name} was left behind" for name in sorted(there - needed)]
    return wrong + _mirror(stage, workload, folder, found)


def errors(fault: Fault, acks: list[dict[str, Any]], trace: list[Met]) -> list[str]:
    """Return what was wrong with how an I/O error was handled."""
    wrong: list[str] = []
    for ack in acks:
        message = ack.get("failure") or ack.get("crash")
        if message is None:
            continue
        if not message.startswith("CheckpointSaveError: Checkpoint saving failed for /"):
            wrong.append(f"no clear error: {message}")
        elif fault.action == FAIL and _REMEDIES.get(fault.error, "") not in message:
            wrong.append(f"no remedy: {message}")
    unsynced = {met.path for met in trace if met.point.startswith("fsync:") and met.action == FAIL}
    wrong += [
        f"{met.path} was renamed after its fsync had failed" for met in trace
        if met.point.startswith("rename:") and met.path in unsynced
    ]  # fmt: skip
    return wrong


def _mirror(stage: Stage, workload: Workload, folder: Any, found: dict[int, int]) -> list[str]:
    from sb3_mlflow_ckpt.sync import sync_runs

    if not workload.mirror:
        return []
    addresses = {"tracking_uri": tracking_uri(stage)} if workload.mirror == "mlflow" else {
        "mongo_uri": stage.addresses["mongo"], "mongo_db": database(stage)
    }  # fmt: skip
    wrong = [f"sync: {result.error}" for result in sync_runs(stage.checkpoints, **addresses) if result.error]
    if workload.mirror == "mongo":
        from sb3_mlflow_ckpt.runs.mongo import MongoRuns

        run = MongoRuns(stage.addresses["mongo"], database(stage)).get(folder.run_id)
        episodes = Counter(item["episode"] for item in run["checkpoint_paths"] if item["state"] != "pruned")
        points = Counter(p["num_timesteps"] for p in MongoRuns(stage.addresses["mongo"], database(stage)).curve(folder.run_id))
    else:
        from mlflow import MlflowClient

        from sb3_mlflow_ckpt.journal import read_record
        from sb3_mlflow_ckpt.mirrors import naming

        client, run_id = MlflowClient(tracking_uri(stage)), read_record(folder)["mlflow"]["run_id"]
        names = Counter(Path(item.path).name for item in client.list_artifacts(run_id, "checkpoints"))
        episodes = Counter(episode for episode in found if names[f"ep{episode:06d}.zip"] == names[f"ep{episode:06d}_metadata.json"] == 1)
        points = Counter(int(metric.step) for metric in client.get_metric_history(run_id, naming.EPISODES_METRIC))
    if episodes != Counter(list(found)):
        wrong.append(f"the mirror has the checkpoints {dict(episodes)}")
    here = Counter(steps for steps in range(1, len(points) + 1))
    if points != here or len(points) < len(found):
        wrong.append(f"the mirror has the points {dict(points)}")
    return wrong


def _folder(stage: Stage, run_id: str) -> Any:
    from sb3_mlflow_ckpt.layout import RunFolder

    return RunFolder(stage.checkpoints, AGENT, run_id)


def _load(path: Path, replay: bool) -> Any:
    from sb3_mlflow_ckpt.checkpoints import load_checkpoint

    model: Any = load_checkpoint(path, device="cpu").model
    if not replay:
        values = {float(value) for parameter in model.policy.parameters() for value in parameter.flatten()[:3]}
        return int(values.pop()) if len(values) == 1 else values
    import gymnasium
    from stable_baselines3 import DQN

    from sb3_mlflow_ckpt.state.replay.restore import restore_replay

    state = read_replay_state(path)
    other: Any = DQN("MlpPolicy", gymnasium.make("CartPole-v1"), buffer_size=state["buffer_size"], device="cpu")
    problems = restore_replay(other, state, lambda name: (path.parent / "replay" / name).open("rb"))
    assert problems == []

    class _Has:
        buffer = other.replay_buffer

    return content_of(_Has())
