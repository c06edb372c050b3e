"""Owns the protocols that faults are put into: each a function that does on the real component what a user's process does.

A workload runs in a process that dies. It tells what it is about to save (`saving`), and what it was told is saved
(`saved`): the checks compare that with what is on disk afterwards. Run again in the same folder it goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from zygote import Report

from sb3_mlflow_ckpt.checkpoints import (
    latest_checkpoint,
    pin_checkpoint,
    prune_checkpoints,
    run_folders,
    unpin_checkpoint,
    verify_checkpoint,
)
from sb3_mlflow_ckpt.commit import capture_checkpoint
from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX, RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.provenance import hostname
from sb3_mlflow_ckpt.reap import reap_runs
from sb3_mlflow_ckpt.repair import repair_runs
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.runs.document import new_record
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder, restore_replay
from sb3_mlflow_ckpt.sync import MirrorAddresses, sync_runs

CHECKPOINTS = Path("checkpoints")
AGENT = "agent"
KEPT = 2
EXPERIMENT = "faults"

# Made once: processes that are forked have a copy each.
_PPO = PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu", seed=0)
_DQN = DQN(
    "MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu", seed=0, buffer_size=200,
    learning_starts=10**9,
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Where a workload's mirrors are, and what it does when a checkpoint cannot be saved.

    Attributes:
        mlflow: MLflow's tracking URI, or nothing.
        mongo: The address of a MongoDB, or nothing.
        database: The name of a database of this trial.
        ids: What its run ids begin with.
        goes_on: Whether a checkpoint that cannot be saved is only told.
    """

    mlflow: str = ""
    mongo: str = ""
    database: str = "faults"
    ids: str = "run"
    goes_on: bool = False


@dataclass(frozen=True)
class Workload:
    """A protocol.

    Attributes:
        run: What the process does.
        prepare: What lies there before, made by an undisturbed process.
        kept: How many checkpoints of a run are kept; 0 for all.
        mirrored: Whether `sync` must complete MLflow and MongoDB afterwards.
        links: Whether the file system has hard links.
        stride: At how many of its named points it dies: 1 is each, 12 is every twelfth.
    """

    run: Callable[[Report, Context], None]
    prepare: Callable[[Report, Context], None] | None = None
    kept: int = KEPT
    mirrored: bool = False
    links: bool = True
    stride: int = 1


def digest(model: BaseAlgorithm) -> str:
    """Return a hash of a model's parameters and of the transitions in its replay buffer."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.policy.state_dict().items()):
        whole.update(name.encode() + tensor.numpy().tobytes())
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        size = buffer.size()
        for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones):
            whole.update(array[:size].tobytes())
    return whole.hexdigest()


def restored_digest(path: Path) -> str:
    """Return the hash of what a checkpoint's files hold."""
    from sb3_mlflow_ckpt.checkpoints import load_checkpoint

    model = load_checkpoint(path, device="cpu").model
    if isinstance(model, DQN):
        _restore_buffer(model, path)
    return digest(model)


def commits(report: Report, context: Context) -> None:
    """Commit, replace and prune checkpoints; append to the curve; rewrite the record; tell the mirrors."""
    live = _live(context, "a", fresh=False)
    for steps, episode in enumerate([1, 2, 2, 3, 4], start=1):
        live.add_metrics(_point(steps))
        report(point=steps, run=live.folder.run_id)
        live.report(num_timesteps=steps, episode=episode)
        with torch.no_grad():
            for parameter in _PPO.policy.parameters():
                parameter.fill_(steps)
        _save(live, _PPO, steps, episode, report, context)
    _finish(live, report)


def chunks(report: Report, context: Context) -> None:
    """Save checkpoints with replay buffers; then go on from them in a run of its own, which takes over the chunks."""
    first = RunFolder(CHECKPOINTS, AGENT, f"{context.ids}a")
    if _newest(first, 5) is None:
        live = _live(context, "a", fresh=False)
        recorder = ReplayRecorder(_DQN)
        for episode in range(1, 6):
            _explore(_DQN, recorder, live, episode, report, context)
        _finish(live, report)
    source = _newest(first, 5)
    if source is None:
        return  # Its disk refused the last checkpoint, which was told.
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu", buffer_size=200, seed=1,
                learning_starts=10**9)  # fmt: skip
    state = _restore_buffer(model, source)
    model.num_timesteps = verify_checkpoint(source).num_timesteps
    recorder = ReplayRecorder(model)
    recorder.continue_from(state, source.parent)
    live = _live(context, "b", fresh=False)
    for episode in (6, 7, 7, 8):
        _explore(model, recorder, live, episode, report, context)
    _finish(live, report)


def many(report: Report, context: Context) -> None:
    """Leave six checkpoints with replay buffers, of which nothing was removed and nothing mirrored yet."""
    live = _live(context, "a", fresh=False, kept=0, mirrors=())
    recorder = ReplayRecorder(_DQN)
    for episode in range(1, 7):
        live.add_metrics(_point(episode))
        _explore(_DQN, recorder, live, episode, report, context)
    _finish(live, report)


def prune(report: Report, context: Context) -> None:
    """Remove all but the newest checkpoints, as the command does."""
    prune_checkpoints(CHECKPOINTS, keep_last_n=KEPT)


def pin(report: Report, context: Context) -> None:
    """Pin two old checkpoints, prune, take one pin back, prune again."""
    folder = RunFolder(CHECKPOINTS, AGENT, f"{context.ids}a")
    for episode in (2, 4):
        if folder.metadata(episode).exists():
            pin_checkpoint(folder.model(episode))
    prune_checkpoints(CHECKPOINTS, keep_last_n=KEPT)
    if folder.metadata(4).exists():
        unpin_checkpoint(folder.model(4))
    prune_checkpoints(CHECKPOINTS, keep_last_n=KEPT)


def damaged(report: Report, context: Context) -> None:
    """Leave six checkpoints with replay buffers, one without metadata, one with a flipped byte, and no record."""
    many(report, context)
    folder = RunFolder(CHECKPOINTS, AGENT, f"{context.ids}a")
    folder.metadata(3).unlink()
    content = bytearray(folder.model(2).read_bytes())
    content[len(content) // 2] ^= 1
    folder.model(2).write_bytes(content)
    folder.record.unlink()
    with folder.events.open("ab") as ledger:
        ledger.write(b'{"event": "sav')
    (folder.path / f"{TEMPORARY_PREFIX}1-0-run.json").write_bytes(b"{")
    report(damaged=[2])


def repair(report: Report, context: Context) -> None:
    """Bring run folders in order, as the command does."""
    for found in repair_runs(run_folders(CHECKPOINTS)):
        report(repaired=found.defect)


def left_running(report: Report, context: Context) -> None:
    """Die in the middle of a run."""
    live = _live(context, "a", fresh=False, mirrors=())
    for episode in (1, 2):
        _save(live, _PPO, episode, episode, report, context)


def reap(report: Report, context: Context) -> None:
    """Settle the runs whose process is dead, as the command does."""
    reap_runs(CHECKPOINTS)


def sync(report: Report, context: Context) -> None:
    """Send what the mirrors miss, as the command does."""
    _in_experiment(context)
    results = sync_runs(
        CHECKPOINTS, MirrorAddresses(context.mlflow or None, context.mongo or None, context.database)
    )
    failed = [result.error for result in results if result.error]
    if failed:
        report(unsent=failed)


def _in_experiment(context: Context) -> None:
    if context.mlflow:
        os.environ["MLFLOW_EXPERIMENT_NAME"] = EXPERIMENT + context.database


def train(report: Report, context: Context, algo: str) -> None:
    """Train with the trainer, from the newest checkpoint if there is one."""
    from sb3_mlflow_ckpt.config import Layer, build_config
    from sb3_mlflow_ckpt.trainer import train as train_agent

    settings = {
        "algo": algo,
        "hyperparameters": {"n_steps": 64, "n_epochs": 2} if algo == "ppo" else {"learning_starts": 50},
        "total_timesteps": 1024 if algo == "ppo" else 600,
        "checkpoint_interval_episodes": 2,
        "resume_from_checkpoint": "auto",
        "agent_id": AGENT,
        "mlflow": False,
        "seed": 0,
        "device": "cpu",
    }
    train_agent(build_config([Layer("the workload", settings)]))
    report(trained=True)


def train_ppo(report: Report, context: Context) -> None:
    """Train a PPO."""
    train(report, context, "ppo")


def train_dqn(report: Report, context: Context) -> None:
    """Train a DQN with its replay buffer."""
    train(report, context, "dqn")


WORKLOADS: dict[str, Workload] = {
    "commit, replace, prune, record, curve": Workload(commits),
    "replay chunks, resume by hard link": Workload(chunks),
    "replay chunks, resume by copy": Workload(chunks, links=False),
    "checkpoints prune": Workload(prune, prepare=many),
    "checkpoints pin, unpin": Workload(pin, prepare=many),
    "checkpoints repair": Workload(repair, prepare=damaged, kept=0),
    "runs reap": Workload(reap, prepare=left_running),
    "mirrors to MLflow and MongoDB": Workload(commits, mirrored=True, stride=12),
    "checkpoints sync": Workload(sync, prepare=many, kept=0, mirrored=True, stride=12),
    "training of a PPO": Workload(train_ppo, kept=3),
    "training of a DQN": Workload(train_dqn, kept=3),
}


def _live(
    context: Context, name: str, *, fresh: bool, kept: int = KEPT, mirrors: Sequence[Mirror] | None = None
) -> LiveRun:
    logging.getLogger("sb3_mlflow_ckpt").setLevel(logging.DEBUG)
    wanted = _mirrors(context) if mirrors is None else mirrors
    run_id = f"{context.ids}{name}"
    record = new_record(
        run_id="" if wanted else run_id, agent_id=AGENT, name=None, algo="ppo", env_id=None, config={},
        total_timesteps=9, parent=None, root_run_id=None, heartbeat_seconds=3600, environment={"host": hostname()},
    )  # fmt: skip
    for mirror in wanted:
        run_id = mirror.open(record) or run_id
        record |= mirror.describe()
    record |= {"run_id": run_id, "root_run_id": run_id}
    options = RunOptions(retention=Retention(kept), heartbeat_seconds=0.05, sync_timeout_seconds=30.0)
    return LiveRun(RunFolder(CHECKPOINTS, AGENT, run_id), record, wanted, options, fresh=fresh)


def _mirrors(context: Context) -> list[Mirror]:
    from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
    from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

    mirrors: list[Mirror] = []
    if context.mlflow:
        # A restarted job goes on in its folder and in its MLflow run, as one that `mlflow run` started does.
        known = [folder.run_id for folder in run_folders(CHECKPOINTS)]
        mirrors.append(MLflowMirror(context.mlflow, EXPERIMENT + context.database, run_id=known[0] if known else None))
    if context.mongo:
        mirrors.append(MongoMirror(context.mongo, context.database))
    return mirrors


def _save(
    live: LiveRun, model: BaseAlgorithm, steps: int, episode: int, report: Report, context: Context, replay: Any = None
) -> None:
    model.num_timesteps = steps
    facts = {"run": live.folder.run_id, "episode": episode, "steps": steps, "digest": digest(model)}
    report(saving=facts)
    live.save(capture_checkpoint(model, agent_id=AGENT, run_id=live.folder.run_id, episode=episode, replay=replay))
    live.flush()
    failures = [*live.failures()]
    for failure in failures:
        report(failure=[base.__name__ for base in type(failure).__mro__], message=str(failure))
        if not context.goes_on:
            live.finish("failed", failure)
            raise failure
    if not failures:
        report(saved=facts)


def _explore(
    model: DQN, recorder: ReplayRecorder, live: LiveRun, episode: int, report: Report, context: Context
) -> None:
    model.learn(25, reset_num_timesteps=False, callback=lambda *_: recorder.protect() >= 0)
    _save(live, model, model.num_timesteps, episode, report, context, recorder.capture())


def _finish(live: LiveRun, report: Report) -> None:
    behind = live.finish("completed")
    report(finished=live.folder.run_id, behind=behind)


def _newest(folder: RunFolder, episode: int) -> Path | None:
    path = latest_checkpoint(folder.checkpoint_dir, folder.run_id, folder.agent_id)
    return path if path is not None and path == folder.model(episode) else None


def _restore_buffer(model: DQN, path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        state = json.loads(archive.read("sb3_mlflow_ckpt/state.json"))["replay"]
    reasons = restore_replay(model, state, lambda name: (path.parent / "replay" / name).open("rb"))
    assert reasons == [], reasons
    return state


def _point(steps: int) -> dict[str, Any]:
    return {
        "num_timesteps": steps,
        "episode": steps,
        "time": f"2026-01-01T00:00:{steps:02d}.000Z",
        "ep_rew_mean": float(steps),
        "ep_len_mean": None,
        "steps_per_second": 1.0,
    }
