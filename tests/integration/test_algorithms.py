"""Every algorithm of SB3 and sb3-contrib is trained, checkpointed and resumed through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mlflow_ckpt.algorithms import ALGORITHMS, algorithm_class, algorithm_name
from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.environments import make_env
from sb3_mlflow_ckpt.errors import CheckpointLoadError, ConfigError, IncompatibleCheckpointError
from sb3_mlflow_ckpt.layout import metadata_path
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.trainer import TrainingResult, train

_ON_POLICY = {"env_id": "CartPole-v1", "hyperparameters": {"n_steps": 32}}
_DISCRETE = {"env_id": "CartPole-v1", "hyperparameters": {"learning_starts": 20}}
# CrossQ's own critics are 1,024 wide: a minute and a half for what is tested with any width.
_SMALL = {"policy_kwargs": {"net_arch": [32, 32]}}
_CONTINUOUS = {"env_id": "Pendulum-v1", "env_kwargs": {}, "hyperparameters": {"learning_starts": 210, **_SMALL}}
_NOISE = {"action_noise": {"type": "normal", "sigma": 0.1}}
CASES: dict[str, dict[str, Any]] = {
    "a2c": _ON_POLICY,
    "ppo": {"env_id": "CartPole-v1", "hyperparameters": {"n_steps": 32, "batch_size": 32}},
    "trpo": {"env_id": "CartPole-v1", "hyperparameters": {"n_steps": 32, "batch_size": 32}},
    "recurrent_ppo": {"env_id": "CartPole-v1", "hyperparameters": {"n_steps": 32, "batch_size": 32}},
    "maskable_ppo": {"env_id": "toy_environments:FixedLength-v0", "hyperparameters": {"n_steps": 32, "batch_size": 32}},
    "ars": {"env_id": "CartPole-v1", "hyperparameters": {"n_delta": 2}},
    "dqn": _DISCRETE,
    "qrdqn": _DISCRETE,
    "sac": _CONTINUOUS,
    "tqc": _CONTINUOUS,
    "crossq": _CONTINUOUS,
    "td3": {**_CONTINUOUS, "hyperparameters": {"learning_starts": 210, **_NOISE, **_SMALL}},
    "ddpg": {**_CONTINUOUS, "hyperparameters": {"learning_starts": 210, **_NOISE, **_SMALL}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sac with HER": {
        "algo": "sac",
        "env_id": "toy_environments:ReachGoal-v0",
        "hyperparameters": {"replay_buffer_class": "HerReplayBuffer", "learning_starts": 20, **_SMALL},
    },
    "sac with gSDE and a fixed entropy coefficient": {
        "algo": "sac",
        **_CONTINUOUS,
        "hyperparameters": {"learning_starts": 210, "use_sde": True, "ent_coef": 0.1, **_SMALL},
    },
    "ppo with gSDE, schedules, normalization and stacked frames": {
        "algo": "ppo",
        "env_id": "Pendulum-v1",
        "n_envs": 2,
        "normalize": True,
        "frame_stack": 2,
        "learning_rate": "lin_3e-4",
        "hyperparameters": {"n_steps": 64, "use_sde": True, "clip_range": "lin_0.2"},
    },
    "ars with a network": {
        "algo": "ars",
        "policy": "MlpPolicy",
        "hyperparameters": {"n_delta": 2, "zero_policy": False},
    },
    "a class of one's own": {"algo": "toy_algorithms:MyPPO", **_ON_POLICY},
    "subprocesses": {"algo": "ppo", **_ON_POLICY, "n_envs": 2, "vec_env": "subproc"},
    "policy_kwargs by name": {
        "algo": "ppo",
        **_ON_POLICY,
        "hyperparameters": {
            "n_steps": 32,
            "policy_kwargs": {"activation_fn": "ReLU", "net_arch": [8], "optimizer_class": "torch.optim:RMSprop"},
        },
    },
}


class Snapshot:
    """A reporter that keeps the model's state at the moment when training starts."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.counters: tuple[int, ...] = ()
        self.model: BaseAlgorithm | None = None

    def starting(self, resolved: Any) -> None: ...

    def callback(self, resolved: Any, checkpoints: Any) -> BaseCallback:
        snapshot = self

        class _Take(BaseCallback):
            def _on_training_start(self) -> None:
                snapshot.model = self.model
                snapshot.parameters = th.utils._pytree.tree_map(  # type: ignore[attr-defined]
                    lambda v: v.clone() if isinstance(v, th.Tensor) else v, self.model.get_parameters()
                )
                snapshot.counters = (self.model.num_timesteps, self.model._n_updates)

            def _on_step(self) -> bool:
                return True

        return _Take()


def _train(folder: Path, reporter: Any = None, **settings: Any) -> TrainingResult:
    settings = {"checkpoint_dir": str(folder), "mlflow": False, "checkpoint_interval_episodes": 2, **settings}
    return train(build_config([Layer("the test", settings)]), reporter=reporter)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, th.Tensor):
        return th.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


def test_every_algorithm_of_sb3_and_sb3_contrib_has_a_case() -> None:
    import sb3_contrib
    import stable_baselines3

    public = {
        name
        for module in (stable_baselines3, sb3_contrib)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseAlgorithm)
    }
    assert {algorithm_class(name).__name__ for name in ALGORITHMS} == public
    assert set(CASES) == set(ALGORITHMS)
    assert [algorithm_name(algorithm_class(name)) for name in ALGORITHMS] == list(ALGORITHMS)


@pytest.mark.parametrize("name", [*CASES, *VARIANTS])
def test_training_goes_on_where_the_checkpoint_was_saved(name: str, tmp_path: Path) -> None:
    settings = VARIANTS.get(name) or {"algo": name, **CASES[name]}
    first = _train(tmp_path, total_timesteps=450, seed=1, **settings)
    assert first.checkpoint is not None and first.num_timesteps >= 450
    # HER's buffer asks for an environment even to look at the parameters.
    env = make_env(first.resolved.config) if "HER" in name else None
    saved = algorithm_class(settings["algo"]).load(first.checkpoint, env=env)
    snapshot = Snapshot()
    second = _train(tmp_path, snapshot, resume_from_checkpoint=str(first.checkpoint), total_timesteps=900)
    assert second.resolved.config.hyperparameters == settings.get("hyperparameters", {})
    assert snapshot.counters == (first.num_timesteps, saved._n_updates)
    assert _equal(
        {key: value for key, value in snapshot.parameters.items() if "optimizer" not in key},
        {key: value for key, value in saved.get_parameters().items() if "optimizer" not in key},
    )
    for key in (key for key in saved.get_parameters() if "optimizer" in key):
        assert _equal(snapshot.parameters[key]["state"], saved.get_parameters()[key]["state"])
    assert second.num_timesteps >= 900
    assert second.episode > first.episode
    assert snapshot.model is not None and snapshot.model._n_updates > saved._n_updates
    if hasattr(saved, "weights"):
        assert snapshot.model.weights.shape == saved.weights.shape  # type: ignore[attr-defined]
    episodes = [verify_checkpoint(path).episode for path in list_checkpoints(tmp_path, run_id=second.run_folder.name)]
    assert min(episodes) > first.episode


def test_overrides_take_effect_from_the_first_update_and_are_recorded(tmp_path: Path) -> None:
    first = _train(tmp_path, total_timesteps=128, **CASES["ppo"])
    rates: list[float] = []

    class Watch(Snapshot):
        def callback(self, resolved: Any, checkpoints: Any) -> BaseCallback:
            class _Rate(BaseCallback):
                def _on_rollout_start(self) -> None:
                    rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

                def _on_step(self) -> bool:
                    return True

            return _Rate()

    second = _train(
        tmp_path,
        Watch(),
        resume_from_checkpoint=str(first.checkpoint),
        total_timesteps=256,
        learning_rate=1e-5,
        hyperparameters={"clip_range": 0.05, "ent_coef": 0.01, "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-3}}},
    )
    assert rates[1:] == [1e-5] * len(rates[1:])
    record = FolderRuns(tmp_path).get(second.run_folder.name)
    assert record["overrides"] == {
        "total_timesteps": {"from": 128, "to": 256},
        "learning_rate": {"from": 0.0003, "to": 1e-5},
        "hyperparameters.clip_range": {"from": None, "to": 0.05},
        "hyperparameters.ent_coef": {"from": None, "to": 0.01},
        "hyperparameters.policy_kwargs.optimizer_kwargs.eps": {"from": None, "to": 1e-3},
    }
    resumed = PPO.load(second.checkpoint)
    assert resumed.clip_range(0.5) == 0.05
    assert resumed.ent_coef == 0.01
    assert resumed.policy.optimizer.param_groups[0]["eps"] == 1e-3
    assert record["config"]["hyperparameters"]["n_steps"] == 32


def test_the_entropy_coefficient_can_change_between_learned_and_fixed(tmp_path: Path) -> None:
    first = _train(tmp_path, total_timesteps=250, algo="sac", **_CONTINUOUS)
    fixed = _train(
        tmp_path, total_timesteps=500, resume_from_checkpoint=str(first.checkpoint), hyperparameters={"ent_coef": 0.3}
    )
    snapshot = Snapshot()
    learned = _train(
        tmp_path, snapshot, total_timesteps=750, resume_from_checkpoint=str(fixed.checkpoint),
        hyperparameters={"ent_coef": "auto_0.5"},
    )  # fmt: skip
    assert learned.num_timesteps == 750
    assert snapshot.model is not None and snapshot.model.log_ent_coef is not None  # type: ignore[attr-defined]


def test_schedules_continue_over_a_resume_and_never_turn_negative(tmp_path: Path) -> None:
    settings = {**CASES["ppo"], "learning_rate": "lin_1.0e-3", "checkpoint_interval_episodes": 0}
    first = _train(tmp_path, total_timesteps=1024, **settings)
    second = _train(tmp_path, resume_from_checkpoint=str(first.checkpoint), total_timesteps=2000)
    rate = PPO.load(second.checkpoint).policy.optimizer.param_groups[0]["lr"]
    # The last update comes after 2016 of 2000 steps.
    assert second.num_timesteps == 2016
    assert rate == 0.0


def test_the_target_is_of_the_whole_training_and_nothing_is_done_twice(tmp_path: Path) -> None:
    first = _train(tmp_path, total_timesteps=128, **CASES["ppo"])
    again = _train(tmp_path, resume_from_checkpoint="auto")
    assert again.run_folder is None
    assert again.num_timesteps == first.num_timesteps
    assert len(FolderRuns(tmp_path).list()) == 1


def test_a_training_that_has_nothing_to_do_removes_what_a_dead_one_left_half_written(tmp_path: Path) -> None:
    first = _train(tmp_path, total_timesteps=128, **CASES["ppo"])
    # What a kill leaves between the two renames of the last checkpoint: the next training has no run of its own.
    for name in (first.checkpoint.name, metadata_path(first.checkpoint).name):
        (first.run_folder / f".tmp-1-ab-{name}").write_bytes(b"half")
    before = {path.name: path.read_bytes() for path in first.run_folder.glob("ep*")}
    _train(tmp_path, resume_from_checkpoint="auto")
    assert [path.name for path in first.run_folder.glob(".tmp-*")] == []
    assert {path.name: path.read_bytes() for path in first.run_folder.glob("ep*")} == before


def test_auto_starts_and_then_resumes_with_the_same_settings(tmp_path: Path) -> None:
    settings = {"resume_from_checkpoint": "auto", **CASES["ppo"]}
    first = _train(tmp_path, total_timesteps=64, **settings)
    second = _train(tmp_path, total_timesteps=128, **settings)
    third = _train(tmp_path, total_timesteps=192, **settings)
    assert first.resolved.source is None
    record = FolderRuns(tmp_path).get(third.run_folder.name)
    assert record["parent"]["run_id"] == second.run_folder.name
    assert record["root_run_id"] == first.run_folder.name


def test_latest_passes_over_a_checkpoint_that_does_not_verify(tmp_path: Path) -> None:
    first = _train(tmp_path, total_timesteps=256, **CASES["ppo"])
    good, newest = list_checkpoints(tmp_path)[-2:]
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = _train(tmp_path, resume_from_checkpoint="latest", total_timesteps=512)
    assert resumed.resolved.source.path == good.absolute()
    with pytest.raises(CheckpointLoadError, match=f"truncated.*The newest beside it that verifies is .*{good.name}"):
        _train(tmp_path, resume_from_checkpoint=str(first.checkpoint))


@pytest.mark.parametrize("form", ["zip", "metadata", "folder"])
def test_a_checkpoint_is_named_by_its_zip_its_metadata_or_its_run_folder(tmp_path: Path, form: str) -> None:
    first = _train(tmp_path, total_timesteps=64, **CASES["ppo"])
    zip_path = first.checkpoint
    reference = {
        "zip": zip_path,
        "metadata": zip_path.with_name(f"{zip_path.stem}_metadata.json"),
        "folder": zip_path.parent,
    }[form]
    resumed = _train(tmp_path, resume_from_checkpoint=str(reference), total_timesteps=128)
    assert resumed.resolved.source.path == zip_path.absolute()


def test_another_algorithm_or_space_is_refused_with_both_sides_named(tmp_path: Path) -> None:
    path = str(_train(tmp_path, total_timesteps=64, **CASES["ppo"]).checkpoint)
    with pytest.raises(IncompatibleCheckpointError, match="it was trained with 'ppo', this run asks for 'a2c'"):
        _train(tmp_path, resume_from_checkpoint=path, algo="a2c", total_timesteps=128)
    with pytest.raises(IncompatibleCheckpointError, match=r'observation space is .*"shape": \[4\].*"shape": \[6\]'):
        _train(tmp_path, resume_from_checkpoint=path, env_id="Acrobot-v1", total_timesteps=128)
    with pytest.raises(CheckpointLoadError, match="size mismatch"):
        _train(
            tmp_path, resume_from_checkpoint=path, total_timesteps=128,
            hyperparameters={"policy_kwargs": {"net_arch": [8]}},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algo": "pppo"}, "algo: 'pppo' is not an algorithm. Did you mean 'ppo'?"),
        ({"algo": "gymnasium:Env"}, "algo: 'gymnasium:Env' is not a subclass"),
        ({"algo": "nowhere:PPO"}, "algo: 'nowhere:PPO' cannot be imported"),
        ({"env_id": "CartPole-v9"}, "env_id: 'CartPole-v9' cannot be made: .*`v1`"),
        ({"env_id": "CartPol-v1"}, "env_id: 'CartPol-v1' cannot be made: .*CartPole"),
        ({"env_id": "CartPol-v1", "vec_env": "subproc"}, "env_id: 'CartPol-v1' cannot be made: .*CartPole"),
        ({"env_kwargs": {"gravity": 1}}, "env_kwargs: 'CartPole-v1' refuses {'gravity': 1}"),
        ({"env_wrappers": ["Flat"]}, "env_wrappers: 'Flat' is not a wrapper. Write it as module:Wrapper"),
        ({"policy": "MlpPolice"}, "policy: 'MlpPolice' is no policy of PPO. Did you mean 'MlpPolicy'?"),
        (
            {"hyperparameters": {"n_step": 3}},
            r"hyperparameters\.n_step: PPO takes no such argument. Did you mean 'n_steps'?",
        ),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters: PPO refuses the configuration: "),
        ({"hyperparameters": {"clip_range": "fast"}}, r"hyperparameters\.clip_range: 'fast' is not a schedule"),
        ({"normalize": {"gama": 1}}, "normalize: VecNormalize refuses"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_clear_line(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _train(tmp_path, total_timesteps=10, **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_smoke_is_a_short_trial_of_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_mlflow_ckpt.trainer.SMOKE_SECONDS", 300.0)
    result = _train(tmp_path, mode="smoke", hyperparameters={"n_steps": 256})
    assert 2048 <= result.num_timesteps < 4096
    [record] = FolderRuns(tmp_path).list()
    assert record["config"]["total_timesteps"] == 1_000_000
    assert record["status"] == "completed"
