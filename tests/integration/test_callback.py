"""The callback in a user's own `model.learn(...)`, in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from toy_environments import FixedLength, ReachGoal

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, list_checkpoints, load_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.curve import CurveSampler
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointLoadError, CheckpointNotFoundError
from sb3_mlflow_ckpt.runs.folder import FolderRuns


def _ppo(n_envs: int = 1, **env_kwargs: Any) -> PPO:
    env = make_vec_env(FixedLength, n_envs=n_envs, env_kwargs=env_kwargs)
    return PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1)


def _names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize("n_envs", [1, 4, 16])
def test_every_crossing_of_the_interval_is_saved_for_environments_that_end_together(
    tmp_path: Path, n_envs: int
) -> None:
    callback = EpisodeCheckpointCallback(10, keep_last_n_checkpoints=0, checkpoint_dir=tmp_path)
    steps = 16 * n_envs * 8
    _ppo(n_envs).learn(steps, callback=callback)
    assert callback.episode == steps // n_envs // 5 * n_envs
    crossed = {e // 10 * 10 for e in range(n_envs, callback.episode + 1, n_envs) if e // 10 > (e - n_envs) // 10}
    episodes = [verify_checkpoint(path).episode for path in list_checkpoints(tmp_path)]
    assert episodes == sorted(crossed | {callback.episode})


def test_the_newest_checkpoints_are_kept_and_all_of_them_on_request(tmp_path: Path) -> None:
    _ppo().learn(160, callback=EpisodeCheckpointCallback(5, 2, tmp_path / "two"))
    _ppo().learn(160, callback=EpisodeCheckpointCallback(5, 0, tmp_path / "all"))
    assert _names(tmp_path / "two") == ["ep000030.zip", "ep000032.zip"]
    assert _names(tmp_path / "all") == [f"ep{e:06d}.zip" for e in (5, 10, 15, 20, 25, 30, 32)]


def test_the_best_reward_of_the_record_is_that_of_the_best_checkpoint_between_two_looks_at_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards fall, and the curve is looked at in the end only."""
    monkeypatch.setattr(CurveSampler, "due", lambda self: False)
    env = TransformReward(FixedLength(), lambda reward: reward / next(steps))
    steps = itertools.count(1)
    model = PPO("MlpPolicy", Monitor(env), n_steps=16, batch_size=16, n_epochs=1)
    model.learn(160, callback=EpisodeCheckpointCallback(5, 0, tmp_path))
    rewards = [verify_checkpoint(path).metrics["mean_reward"] for path in list_checkpoints(tmp_path)]
    [record] = FolderRuns(tmp_path).list()
    assert rewards == sorted(rewards, reverse=True)
    assert record["progress"]["best_mean_reward"] == rewards[0]
    assert record["progress"]["mean_reward"] == rewards[-1]


def test_an_interval_of_zero_saves_only_at_the_end(tmp_path: Path) -> None:
    _ppo().learn(160, callback=EpisodeCheckpointCallback(0, checkpoint_dir=tmp_path))
    assert _names(tmp_path) == ["ep000032.zip"]


def test_the_end_replaces_a_checkpoint_of_the_same_episode_with_the_later_state(tmp_path: Path) -> None:
    _ppo().learn(16, callback=EpisodeCheckpointCallback(3, checkpoint_dir=tmp_path))
    [path] = list_checkpoints(tmp_path)
    metadata = verify_checkpoint(path)
    assert (metadata.episode, metadata.num_timesteps, metadata.trigger) == (3, 16, "end")


def test_the_zip_loads_with_plain_sb3_and_equals_the_model(tmp_path: Path) -> None:
    model = _ppo()
    model.learn(32, callback=EpisodeCheckpointCallback(checkpoint_dir=tmp_path))
    loaded = PPO.load(list_checkpoints(tmp_path)[-1])
    assert loaded.num_timesteps == model.num_timesteps
    for mine, theirs in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(mine, theirs)
    mine, theirs = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert all(th.equal(mine[key]["exp_avg"], theirs[key]["exp_avg"]) for key in mine)


def test_the_layout_and_the_metadata_are_the_documented_ones(tmp_path: Path) -> None:
    callback = EpisodeCheckpointCallback(checkpoint_dir=tmp_path, agent_id="agent", run_id="run123")
    _ppo().learn(16, callback=callback)
    document = json.loads((tmp_path / "agent" / "run123" / "ep000003_metadata.json").read_text())
    assert list(document)[:5] == ["episode", "run_id", "config", "timestamp", "extra_state"]
    assert document["episode"] == 3
    assert document["run_id"] == "run123"
    assert document["config"]["learning_rate"] == 0.0003
    assert document["config"]["total_timesteps"] == 16
    assert document["timestamp"].endswith("Z")
    assert document["extra_state"] == {}


def test_a_loaded_model_goes_on_from_its_episode_in_a_run_of_its_own(tmp_path: Path) -> None:
    first = EpisodeCheckpointCallback(10, checkpoint_dir=tmp_path)
    _ppo().learn(64, callback=first)
    path = list_checkpoints(tmp_path)[-1]
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    model, config, extra_state = load_checkpoint(path, env=make_vec_env(FixedLength))
    assert (config["algo"], extra_state, model.num_timesteps) == ("ppo", {}, 64)
    second = EpisodeCheckpointCallback(10, checkpoint_dir=tmp_path)
    model.learn(64, callback=second, reset_num_timesteps=False)
    assert model.num_timesteps == 128
    # The environment starts anew, so the episode that was under way at the checkpoint does not count.
    assert second.episode == first.episode + 64 // 5
    record = FolderRuns(tmp_path).get(str(second.run_id))
    assert record["parent"]["run_id"] == record["root_run_id"] == first.run_id
    assert record["parent"]["episode"] == 12
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_learn_in_several_calls_is_one_run(tmp_path: Path) -> None:
    model, callback = _ppo(), EpisodeCheckpointCallback(10, 0, tmp_path)
    for _ in range(3):
        model.learn(32, callback=callback, reset_num_timesteps=False)
    [record] = FolderRuns(tmp_path).list()
    assert (record["status"], record["attempt"], record["parent"]) == ("completed", 3, None)
    assert callback.episode == 96 // 5 == record["progress"]["episode"]
    assert len({path.parent for path in list_checkpoints(tmp_path)}) == 1


def test_an_exception_is_recorded_and_the_state_before_it_saved(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the simulator broke"),
        EpisodeCheckpointCallback(10, checkpoint_dir=tmp_path) as callback,
    ):
        _ppo(fails_at=88).learn(1000, callback=callback)
    newest = verify_checkpoint(list_checkpoints(tmp_path)[-1])
    assert (newest.episode, newest.trigger, newest.num_timesteps) == (17, "exception", 87)
    record = FolderRuns(tmp_path).get(str(callback.run_id))
    assert record["status"] == "failed"
    assert record["error"]["type"] == "RuntimeError"
    assert "the simulator broke" in record["error"]["traceback"]


class _Diverge(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps == 80:
            th.nn.init.constant_(next(self.model.policy.parameters()), float("nan"))
        return True


def test_a_diverged_policy_is_not_saved_as_the_newest_checkpoint(tmp_path: Path) -> None:
    model = _ppo()
    with pytest.raises(ValueError, match="invalid values"), EpisodeCheckpointCallback(10, 3, tmp_path) as callback:
        model.learn(1000, callback=[callback, _Diverge()])
    assert _names(tmp_path) == ["ep000010.zip"]
    assert FolderRuns(tmp_path).get(str(callback.run_id))["status"] == "failed"


def test_statistics_of_vec_normalize_travel_inside_the_zip(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(FixedLength, n_envs=2))
    PPO("MlpPolicy", env, n_steps=16, batch_size=16).learn(64, callback=EpisodeCheckpointCallback(0, 3, tmp_path))
    fresh = VecNormalize(make_vec_env(FixedLength, n_envs=2))
    load_checkpoint(list_checkpoints(tmp_path)[0], env=fresh)
    assert (fresh.obs_rms.mean == env.obs_rms.mean).all()
    assert (fresh.obs_rms.var == env.obs_rms.var).all()
    assert fresh.obs_rms.count == env.obs_rms.count
    assert fresh.ret_rms.var == env.ret_rms.var


def test_statistics_of_dictionary_observations_come_back_too(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(ReachGoal))
    PPO("MultiInputPolicy", env, n_steps=16, batch_size=16).learn(
        32, callback=EpisodeCheckpointCallback(0, 3, tmp_path)
    )
    fresh = VecNormalize(make_vec_env(ReachGoal))
    load_checkpoint(list_checkpoints(tmp_path)[0], env=fresh)
    assert {k: v.mean.tolist() for k, v in fresh.obs_rms.items()} == {
        k: v.mean.tolist() for k, v in env.obs_rms.items()
    }


def test_an_off_policy_model_refills_its_buffer_before_it_updates(tmp_path: Path) -> None:
    def env() -> Any:
        return make_vec_env(FixedLength, env_kwargs={"continuous": True})

    model = SAC("MlpPolicy", env(), learning_starts=20, batch_size=8)
    model.learn(40, callback=EpisodeCheckpointCallback(0, 3, tmp_path, save_replay_buffer="never"))
    resumed, _, _ = load_checkpoint(list_checkpoints(tmp_path)[0], env=env())
    updates = resumed._n_updates
    callback = EpisodeCheckpointCallback(2, 0, tmp_path)
    resumed.learn(30, callback=callback, reset_num_timesteps=False)
    assert resumed._n_updates - updates == 30 - 20 + 1
    # A checkpoint from within the pause holds the setting, not the pause.
    assert callback.folder is not None
    assert SAC.load(list_checkpoints(tmp_path, run_id=callback.run_id)[0]).gradient_steps == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "metadata", "rename", "swap"])
def test_a_damaged_checkpoint_is_refused_with_its_reason(tmp_path: Path, damage: str) -> None:
    _ppo().learn(128, callback=EpisodeCheckpointCallback(10, 0, tmp_path))
    path, other = list_checkpoints(tmp_path)[:2]
    content = path.read_bytes()
    reason = {
        "truncate": "it is truncated",
        "flip": "SHA-256 differs",
        "foreign": "it has .* bytes, its metadata says",
        "metadata": "its metadata says num_timesteps",
        "rename": "its file name says episode 77, its metadata episode 10",
        "swap": "its metadata|it has|SHA-256",
    }[damage]
    metadata = path.with_name("ep000010_metadata.json")
    if damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "foreign":
        _ppo().save(path)
    elif damage == "metadata":
        metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "num_timesteps": 7}))
    elif damage == "rename":
        path = path.rename(path.with_name("ep000077.zip"))
        metadata.rename(path.with_name("ep000077_metadata.json"))
    else:
        path.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointCorruptError, match=f"Failed to load model from checkpoint .*{reason}"):
        load_checkpoint(path, env=make_vec_env(FixedLength))


def test_a_zip_of_plain_sb3_is_refused_with_the_way_to_load_it(tmp_path: Path) -> None:
    _ppo().save(tmp_path / "model.zip")
    with pytest.raises(CheckpointLoadError, match=r"not written by sb3_mlflow_ckpt.*PPO\.load"):
        load_checkpoint(tmp_path / "model.zip")


def test_a_zip_that_was_copied_without_its_metadata_still_loads(tmp_path: Path) -> None:
    _ppo().learn(32, callback=EpisodeCheckpointCallback(0, 3, tmp_path / "c"))
    [path] = list_checkpoints(tmp_path / "c")
    (tmp_path / "shared.zip").write_bytes(path.read_bytes())
    model, config, _ = load_checkpoint(tmp_path / "shared.zip", env=make_vec_env(FixedLength))
    assert (model.num_timesteps, config["algo"]) == (32, "ppo")


def test_a_missing_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    _ppo().learn(32, callback=EpisodeCheckpointCallback(0, 3, tmp_path))
    [path] = list_checkpoints(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^Checkpoint not found: .*ep000999\.zip.*The folder holds ep000006\.zip"
    ):
        load_checkpoint(path.with_name("ep000999.zip"))
    with pytest.raises(CheckpointNotFoundError, match="There is no folder"):
        load_checkpoint(tmp_path / "nowhere" / "ep000001.zip")


def test_another_environment_is_refused_with_both_sides_named(tmp_path: Path) -> None:
    _ppo().learn(32, callback=EpisodeCheckpointCallback(0, 3, tmp_path))
    with pytest.raises(RuntimeError, match=r"Failed to load model from checkpoint .*Observation spaces do not match"):
        load_checkpoint(list_checkpoints(tmp_path)[0], env=make_vec_env(FixedLength, env_kwargs={"width": 4}))
