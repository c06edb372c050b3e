"""The protocols that are broken: each a function that does real work in a folder, and can be run again to go on.

To add one, write a function that takes a `Stage` and name it in WORKLOADS.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from injection import FAIL, Fault

AGENT, RUN = "agent", "0123456789abcdef0123456789abcdef"


class Stage:
    """Where a workload works, and how it tells what it was promised.

    Args:
        folder: Its working folder; `checkpoints` in it is the checkpoint folder.
        pipe: A descriptor for acknowledgements, or None.
        addresses: The servers that run, by name.
    """

    def __init__(self, folder: Path, pipe: int | None, addresses: Mapping[str, str]) -> None:
        self.folder, self.addresses = folder, addresses
        self.checkpoints = folder / "checkpoints"
        self.warnings: list[str] = []
        self._pipe = pipe

    def acknowledge(self, **fact: Any) -> None:
        """Tell the parent of something that must not be lost from now on."""
        if self._pipe is not None:
            os.write(self._pipe, (json.dumps(fact) + "\n").encode())


@dataclass(frozen=True)
class Workload:
    """A protocol.

    Attributes:
        run: Does the work, from the beginning or from where an earlier process left it.
        points: Every named point that it must meet.
        prepare: Makes what it begins with, once.
        faults: Faults that are always there (a file system without hard links, say).
        mirror: The server that must have everything after `sync`, or nothing.
        replay: Whether its checkpoints hold replay buffers.
        share: Its part of a campaign.
        clock: Whether it is killed by a clock in place of at a call.
    """

    run: Callable[[Stage], None]
    points: frozenset[str]
    prepare: Callable[[Stage], None] | None = None
    faults: Sequence[Fault] = ()
    mirror: str = ""
    replay: bool = False
    share: int = 10
    clock: bool = False
    run_id: str = RUN
    expected: Mapping[int, int] = field(default_factory=dict)


class _Collected(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())


def listen(stage: Stage) -> None:
    """Collect the product's warnings."""
    logger = logging.getLogger("sb3_mlflow_ckpt")
    logger.handlers, logger.propagate = [_Collected(stage.warnings)], False


def _ppo() -> Any:
    from stable_baselines3 import PPO

    return PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu", n_steps=16, seed=0)


def mark(model: Any, value: int) -> None:
    """Make a model's content tell which save it is of."""
    import torch as th

    model.num_timesteps = value
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.fill_(float(value))


def _record(run_id: str = RUN) -> dict[str, Any]:
    from sb3_mlflow_ckpt.runs.document import new_record

    return new_record(run_id=run_id, agent_id=AGENT, name="a run", algo="ppo", env_id="CartPole-v1", config={"a": 1},
                      total_timesteps=9, parent=None, root_run_id=None, heartbeat_seconds=3600, environment={})  # fmt: skip


def _live(stage: Stage, mirrors: Sequence[Any] = (), keep: int = 2, run_id: str = RUN, **fields: Any) -> Any:
    from sb3_mlflow_ckpt.layout import RunFolder
    from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
    from sb3_mlflow_ckpt.policies import KeepLastN

    options = RunOptions(retention=KeepLastN(keep), heartbeat_seconds=3600, sync_timeout_seconds=20)
    record = {**_record(run_id), **fields}
    return LiveRun(RunFolder(stage.checkpoints, AGENT, run_id), record, mirrors, options, fresh=False)


def _add_point(stage: Stage, live: Any, steps: int) -> None:
    warned = len(stage.warnings)
    # The time of a point is a function of its steps, so that a run that goes on makes the same points.
    live.add_metrics({"num_timesteps": steps, "episode": steps, "time": f"2026-01-01T00:00:{steps:02d}.000Z",
                      "ep_rew_mean": float(steps), "ep_len_mean": 1.0, "steps_per_second": 1.0})  # fmt: skip
    if len(stage.warnings) == warned:
        stage.acknowledge(point=steps)


def _save(stage: Stage, live: Any, capture: Any) -> None:
    live.save(capture)
    live.flush()
    failures = [*live.failures()]
    for failure in failures:
        stage.acknowledge(failure=f"{type(failure).__name__}: {failure}", episode=capture.metadata.episode)
    if not failures:
        stage.acknowledge(
            episode=capture.metadata.episode, steps=capture.metadata.num_timesteps, content=content_of(capture.replay)
        )


def content_of(replay: Any) -> str | None:
    """Return the hash of a replay buffer's rows, given something that has a `buffer`."""
    import hashlib

    from sb3_mlflow_ckpt.state.replay.columns import columns

    if replay is None:
        return None
    buffer = replay.buffer
    hashed = hashlib.sha256(f"{buffer.pos} {buffer.full}".encode())
    for _, column in sorted(columns(buffer).items()):
        hashed.update(column[: buffer.size()].tobytes())
    return hashed.hexdigest()


def _train(stage: Stage, live: Any, episodes: Sequence[int] = (1, 2, 2, 3)) -> None:
    from sb3_mlflow_ckpt.commit import capture_checkpoint

    model = _ppo()
    for steps, episode in enumerate(episodes, start=1):
        _add_point(stage, live, steps)
        mark(model, steps)
        _save(stage, live, capture_checkpoint(model, agent_id=AGENT, run_id=RUN, episode=episode))
    live.finish("completed")


def commit(stage: Stage) -> None:
    """Save episodes 1 to 3, the second twice, keeping two, with record, curve and ledger."""
    _train(stage, _live(stage))


class _OffPolicy:
    """A DQN that fills its replay buffer and never updates."""

    def __init__(self) -> None:
        from stable_baselines3 import DQN

        from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder

        self.model: Any = DQN("MlpPolicy", "CartPole-v1", buffer_size=120, learning_starts=10**9, seed=0, device="cpu",
                              policy_kwargs={"net_arch": [4]})  # fmt: skip
        self.recorder = ReplayRecorder(self.model)

    def saves(self, stage: Stage, live: Any, episodes: Sequence[int]) -> None:
        from sb3_mlflow_ckpt.commit import capture_checkpoint

        for episode in episodes:
            self.model.learn(17, reset_num_timesteps=False, callback=lambda *_: self.recorder.protect() >= 0)
            replay = self.recorder.capture()
            _save(stage, live, capture_checkpoint(self.model, agent_id=AGENT, run_id=live.folder.run_id,
                                                  episode=episode, replay=replay))  # fmt: skip


def replay(stage: Stage) -> None:
    """Save an off-policy model with its buffer: chunks that are written, merged, overtaken by the ring and swept."""
    live = _live(stage)
    _OffPolicy().saves(stage, live, (1, 2, 3, 3, 4, 5, 6))
    live.finish("completed")


_PARENT = "f" * 32


def prepare_takeover(stage: Stage) -> None:
    live = _live(stage, run_id=_PARENT)
    _OffPolicy().saves(stage, live, (1, 2))
    live.finish("completed")


def takeover(stage: Stage) -> None:
    """Go on in a new run from a checkpoint of another, whose chunks are linked or copied, and save on."""
    from sb3_mlflow_ckpt.layout import RunFolder
    from sb3_mlflow_ckpt.state.replay.restore import restore_replay

    parent = RunFolder(stage.checkpoints, AGENT, _PARENT)
    state = read_replay_state(parent.model(2))
    training = _OffPolicy()
    training.model.learn(1, callback=lambda *_: True)
    assert restore_replay(training.model, state, lambda name: parent.chunk(name).open("rb")) == []
    training.model.num_timesteps = 40
    training.recorder.continue_from(state, parent.path)
    live = _live(stage)
    training.saves(stage, live, (3, 4))
    live.finish("completed")


def read_replay_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its replay buffer."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        state: dict[str, Any] = json.loads(archive.read("sb3_mlflow_ckpt/state.json"))["replay"]
    return state


def _mlflow(stage: Stage) -> Any:
    from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror

    return MLflowMirror(tracking_uri(stage), "faults")


def tracking_uri(stage: Stage) -> str:
    """Return the MLflow that a workload's folder is mirrored to."""
    return stage.addresses.get("mlflow") or f"sqlite:///{stage.folder}/mlflow.db"


def _mirrored(stage: Stage, mirrors: list[Any]) -> None:
    described: dict[str, Any] = {}
    run_id = RUN
    noted = stage.folder / "run_id"
    if noted.exists():
        run_id = noted.read_text()
    for mirror in mirrors:
        given = mirror.open({**_record(), "run_id": run_id if noted.exists() else ""})
        if given is not None and not noted.exists():
            run_id = given
        described |= mirror.describe()
    if not noted.exists():
        noted.write_text(run_id)
    _train(stage, _live(stage, mirrors, keep=3, run_id=run_id, **described), (1, 2, 2, 3))


def prepare_mlflow(stage: Stage) -> None:
    """Make the database, which takes MLflow seconds, and an experiment with its artifacts in the folder."""
    from mlflow import MlflowClient

    if "mlflow" in stage.addresses:
        return
    MlflowClient(tracking_uri(stage)).search_experiments()


def _make_experiment(stage: Stage) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(stage))
    if "mlflow" not in stage.addresses and client.get_experiment_by_name("faults") is None:
        client.create_experiment("faults", artifact_location=f"{stage.folder}/artifacts")


def mlflow(stage: Stage) -> None:
    """Train with a mirror in MLflow."""
    _make_experiment(stage)
    _mirrored(stage, [_mlflow(stage)])


def mongo(stage: Stage) -> None:
    """Train with a mirror in a database."""
    from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

    _mirrored(stage, [MongoMirror(stage.addresses["mongo"], database(stage))])


def database(stage: Stage) -> str:
    """Return the database of a workload's folder."""
    return f"faults_{stage.folder.name.replace('-', '_')}"


def prepare_run(stage: Stage) -> None:
    live = _live(stage, keep=0)
    _OffPolicy().saves(stage, live, (1, 2, 3, 4))
    live.finish("completed")


def prune(stage: Stage) -> None:
    """`checkpoints prune --keep-last-n 2`."""
    _command("checkpoints", "prune", "--keep-last-n", "2", "--checkpoint-dir", str(stage.checkpoints))


def prepare_sync(stage: Stage) -> None:
    prepare_mlflow(stage)
    _train(stage, _live(stage, keep=0, mlflow={"experiment_name": "faults"}), (1, 2, 3))


def sync(stage: Stage) -> None:
    """`checkpoints sync` of a run that its mirror never saw."""
    _make_experiment(stage)
    _command("checkpoints", "sync", "--checkpoint-dir", str(stage.checkpoints), "--tracking-uri", tracking_uri(stage))


def _command(*arguments: str) -> None:
    from sb3_mlflow_ckpt.cli import main

    try:
        code = main([*arguments])
    except SystemExit as leave:
        code = leave.code
    if code not in (0, None):
        raise SystemExit(code)


def _whole_training(stage: Stage, **settings: Any) -> None:
    from stable_baselines3.common.callbacks import BaseCallback

    from sb3_mlflow_ckpt.config import Layer, build_config
    from sb3_mlflow_ckpt.trainer import train

    class _Tell(BaseCallback):
        def __init__(self, checkpoints: Any) -> None:
            super().__init__()
            self._checkpoints, self._told = checkpoints, None

        def _on_step(self) -> bool:
            newest = self._checkpoints.latest_checkpoint
            if newest != self._told:
                self._told = newest
                stage.acknowledge(newest=str(newest))
            return True

    class _Reporter:
        def starting(self, resolved: Any) -> None: ...

        def callback(self, resolved: Any, checkpoints: Any) -> Any:
            return _Tell(checkpoints)

    whole = {"mlflow": False, "seed": 7, "device": "cpu", "env_id": "CartPole-v1", "checkpoint_interval_episodes": 1,
             "keep_last_n_checkpoints": 2, "checkpoint_dir": str(stage.checkpoints), "agent_id": AGENT,
             "resume_from_checkpoint": "auto", **settings}  # fmt: skip
    os.chdir(stage.folder)
    train(build_config([Layer("the campaign", whole)]), reporter=_Reporter())


def ppo(stage: Stage) -> None:
    """A whole training, killed by a clock and resumed with `auto`."""
    _whole_training(stage, algo="ppo", total_timesteps=320,
                    hyperparameters={"n_steps": 64, "batch_size": 32, "n_epochs": 2})  # fmt: skip


def dqn(stage: Stage) -> None:
    """The same, off-policy with a replay buffer."""
    _whole_training(stage, algo="dqn", total_timesteps=320,
                    hyperparameters={"learning_starts": 60, "batch_size": 16, "buffer_size": 200})  # fmt: skip


def _points(*texts: str) -> frozenset[str]:
    return frozenset(f"{operation}:{role}" for text in texts for role, _, operations in [text.partition(" ")]
                     for operation in operations.split())  # fmt: skip


_STAGED = "open write fsync close rename"
_RUN = _points(f"record {_STAGED}", "ledger open append fsync close", "folder mkdir fsync", "lock open close")
_CHECKPOINT = _points(f"zip {_STAGED} unlink", f"metadata {_STAGED} withdraw", "temporary unlink")
_METRICS = _points("metrics open append close")
_CHUNK = _points(f"replay-chunk {_STAGED} unlink", "replay-folder mkdir fsync")
_DATABASE = _points("database open write fsync close")
_ARTIFACTS = _points("artifact-zip open write close", "artifact-metadata open write close", "artifact-folder mkdir")

WORKLOADS: dict[str, Workload] = {
    "commit, replacement, prune, record, curve": Workload(
        commit, _RUN | _CHECKPOINT | _METRICS, share=30, expected={2: 3, 3: 4}
    ),
    "replay chunks": Workload(
        replay, _RUN | _CHECKPOINT | _CHUNK, replay=True, share=20, expected={5: 120, 6: 140}
    ),
    "replay chunks taken over by link": Workload(
        takeover, _RUN | _points("replay-chunk link"), prepare_takeover, replay=True, expected={3: 60, 4: 80}
    ),
    "replay chunks taken over by copy": Workload(
        takeover,
        _RUN | _points(f"replay-chunk link {_STAGED}"),
        prepare_takeover,
        faults=[Fault(FAIL, 1, "link:replay-chunk", 18, forever=True)],
        replay=True,
        expected={3: 60, 4: 80},
    ),
    "checkpoints prune": Workload(
        prune, _points("metadata withdraw", "zip unlink", "folder fsync"), prepare_run, replay=True,
        expected={3: 60, 4: 80},
    ),
    "MLflow, files": Workload(
        mlflow, _RUN | _METRICS | _DATABASE | _ARTIFACTS, prepare_mlflow, mirror="mlflow", share=6,
        expected={1: 1, 2: 3, 3: 4},
    ),
    "checkpoints sync": Workload(
        sync, _DATABASE | _ARTIFACTS | _points("ledger append fsync"), prepare_sync, mirror="mlflow", share=4,
        expected={1: 1, 2: 2, 3: 3},
    ),
    "MongoDB": Workload(
        mongo, _points("mongo connect send recv"), mirror="mongo", share=8, expected={1: 1, 2: 3, 3: 4}
    ),
    "MLflow, server": Workload(
        mlflow, _points("mlflow connect send recv"), mirror="mlflow", share=3, expected={1: 1, 2: 3, 3: 4}
    ),
    "a whole PPO training": Workload(ppo, frozenset(), clock=True, share=8),
    "a whole DQN training": Workload(dqn, frozenset(), clock=True, replay=True, share=8),
}


def copy_prepared(prepared: Path, folder: Path) -> None:
    """Give a trial its own copy of what a workload begins with."""
    shutil.copytree(prepared, folder)
