"""What happens to a run when trainings fail, repeat, or share a process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import wait_for
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from toy_environments import FixedLength

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, list_checkpoints, load_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.curve import CurveSampler
from sb3_mlflow_ckpt.errors import CheckpointSaveError, RunFolderTakenError, TrainingInterrupted
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.runs.curve import read_curve
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.trainer import resolve_config, train


def _ppo(**env_kwargs: Any) -> PPO:
    env = make_vec_env(FixedLength, env_kwargs=env_kwargs)
    return PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1)


class _At(BaseCallback):
    """Does something at one step."""

    def __init__(self, step: int, action: Any) -> None:
        super().__init__()
        self._step, self._action = step, action

    def _on_step(self) -> bool:
        if self.num_timesteps == self._step:
            self._action(self.model)
        return True


def test_a_new_training_never_mixes_with_another_ones_folder(tmp_path: Path) -> None:
    _ppo().learn(64, callback=EpisodeCheckpointCallback(5, 0, tmp_path, run_id="run123"))
    before = {path: path.read_bytes() for path in (tmp_path / "ppo_agent" / "run123").iterdir()}
    with pytest.raises(RunFolderTakenError, match="holds the checkpoints of another training"):
        _ppo().learn(64, callback=EpisodeCheckpointCallback(5, 0, tmp_path, run_id="run123"))
    assert {path: path.read_bytes() for path in (tmp_path / "ppo_agent" / "run123").iterdir()} == before


def test_a_callback_that_trains_several_models_keeps_a_run_for_each(tmp_path: Path) -> None:
    callback = EpisodeCheckpointCallback(5, 0, tmp_path)
    for _ in range(2):
        _ppo().learn(64, callback=callback)
        assert callback.episode == 12
    assert len(FolderRuns(tmp_path).list()) == 2


def test_another_callback_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    model = _ppo()
    first, second = (EpisodeCheckpointCallback(5, 0, tmp_path) for _ in range(2))
    model.learn(64, callback=first)
    model.learn(64, callback=second, reset_num_timesteps=False)
    record = FolderRuns(tmp_path).get(str(second.run_id))
    assert (record["parent"]["run_id"], record["parent"]["episode"]) == (first.run_id, 12)
    # The environment goes on in this process: of the fourth step of an episode nothing is lost.
    assert second.episode == 128 // 5


def test_learn_can_be_called_again_after_an_error_without_a_with_block(tmp_path: Path) -> None:
    model, callback = _ppo(fails_at=40), EpisodeCheckpointCallback(5, 0, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="the simulator broke"):
        model.learn(64, callback=callback)
    model.learn(64, callback=callback, reset_num_timesteps=False)
    [record] = FolderRuns(tmp_path).list()
    assert (record["status"], record["attempt"]) == ("completed", 2)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_in_the_last_update_stops_a_loop_of_learn_calls(tmp_path: Path) -> None:
    model, callback = _ppo(), EpisodeCheckpointCallback(5, 0, tmp_path)
    train_once = model.train

    def interrupted_update() -> None:
        train_once()
        signal.raise_signal(signal.SIGTERM)

    model.train = interrupted_update  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted) as stopped:
        model.learn(16, callback=callback)
    assert stopped.value.code == 143
    [record] = FolderRuns(tmp_path).list()
    assert record["status"] == "completed"
    assert verify_checkpoint(list_checkpoints(tmp_path)[-1]).n_updates == 1


def test_two_callbacks_of_one_training_both_hear_the_signal(tmp_path: Path) -> None:
    callbacks = [EpisodeCheckpointCallback(5, 0, tmp_path / name) for name in ("a", "b")]
    stop = _At(40, lambda model: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted), callbacks[0], callbacks[1]:
        _ppo().learn(1000, callback=[stop, *callbacks])
    for name in ("a", "b"):
        [record] = FolderRuns(tmp_path / name).list()
        assert record["status"] == "interrupted"
        assert verify_checkpoint(list_checkpoints(tmp_path / name)[-1]).num_timesteps == 40


def _no_folder_any_more(folder: Path) -> Any:
    def replace_by_a_file(model: Any) -> None:
        folder.rename(folder.with_name("moved"))
        folder.write_text("no folder")

    return replace_by_a_file


def test_a_save_that_fails_at_a_signal_is_an_error_and_not_an_interruption(tmp_path: Path) -> None:
    callback = EpisodeCheckpointCallback(0, 0, tmp_path, agent_id="a", run_id="r")

    def lose_the_folder_and_stop(model: Any) -> None:
        _no_folder_any_more(tmp_path / "a" / "r")(model)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(CheckpointSaveError), callback:
        _ppo().learn(1000, callback=[_At(40, lose_the_folder_and_stop), callback])


def test_a_failed_save_at_the_end_is_told_when_training_goes_on_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EpisodeCheckpointCallback(0, 0, tmp_path, agent_id="a", run_id="r", on_save_failure="continue")
    _ppo().learn(64, callback=[callback, _At(40, _no_folder_any_more(tmp_path / "a" / "r"))])
    assert "Checkpoint saving failed" in caplog.text


class _Unpicklable(nn.Module):
    def get_extra_state(self) -> Any:
        return {"schedule": lambda progress: progress}


def test_a_network_that_cannot_be_written_fails_a_save_like_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was a raw error of pickle's, which `continue` did not know, and the last of a training."""
    for policy in ("continue", "stop"):
        model = _ppo()
        model.policy.odd = _Unpicklable()
        callback = EpisodeCheckpointCallback(5, 0, tmp_path / policy, on_save_failure=policy)
        if policy == "stop":
            with pytest.raises(CheckpointSaveError, match=r"(PicklingError|AttributeError): .* take it out"), callback:
                model.learn(64, callback=callback)
        else:
            model.learn(64, callback=callback)
            assert model.num_timesteps == 64
            assert "Checkpoint saving failed" in caplog.text and "training goes on" in caplog.text


def test_a_reward_that_is_no_number_does_not_stop_the_checkpoints(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        model.ep_info_buffer.append({"r": float("nan"), "l": 5, "t": 0.0})

    callback = EpisodeCheckpointCallback(5, 0, tmp_path)
    _ppo().learn(64, callback=[_At(20, poison), callback])
    assert verify_checkpoint(list_checkpoints(tmp_path)[-1]).metrics["mean_reward"] is None


def test_a_configuration_with_classes_arrays_and_infinities_is_kept_as_plain_values(tmp_path: Path) -> None:
    config = {"activation_fn": nn.Tanh, "sigma": np.float32(0.5), "folder": tmp_path, "limit": float("inf")}
    _ppo().learn(16, callback=EpisodeCheckpointCallback(0, 0, tmp_path / "c", config=config))
    [record] = FolderRuns(tmp_path / "c").list()
    assert record["config"] == {
        "activation_fn": "torch.nn.modules.activation:Tanh", "sigma": 0.5, "folder": str(tmp_path), "limit": "inf",
    }  # fmt: skip


def test_a_users_own_scalars_do_not_replace_the_columns_of_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the last point is to have them.
    monkeypatch.setattr(CurveSampler, "due", lambda self: False)
    callback = EpisodeCheckpointCallback(0, 0, tmp_path)

    def record(model: Any) -> None:
        for name in ("time", "episode", "num_timesteps", "mine"):
            model.logger.record(name, 1.5)
        model.logger.dump(model.num_timesteps)

    _ppo().learn(16, callback=[callback, _At(10, record)])
    assert callback.folder is not None
    point = read_curve(callback.folder)[-1]
    assert (point["num_timesteps"], point["episode"], point["mine"]) == (16, 3, 1.5)


def test_a_step_has_one_point_of_the_curve_the_last_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurveSampler, "due", lambda self: True)
    callback = EpisodeCheckpointCallback(0, 0, tmp_path)
    _ppo().learn(16, callback=callback)
    assert callback.folder is not None
    assert [point["num_timesteps"] for point in read_curve(callback.folder)] == [*range(1, 17)]
    [record] = FolderRuns(tmp_path).list()
    assert record["progress"]["checkpoint_stalls"]["count"] == 1


def test_a_buffer_smaller_than_learning_starts_does_not_hold_updates_for_ever(tmp_path: Path) -> None:
    def env() -> Any:
        return make_vec_env(FixedLength, env_kwargs={"continuous": True})

    model = SAC("MlpPolicy", env(), learning_starts=40, buffer_size=20, batch_size=8)
    model.learn(60, callback=EpisodeCheckpointCallback(0, 3, tmp_path))
    resumed, _, _ = load_checkpoint(list_checkpoints(tmp_path)[0], env=env())
    before = resumed._n_updates
    resumed.learn(40, callback=EpisodeCheckpointCallback(0, 3, tmp_path), reset_num_timesteps=False)
    assert resumed._n_updates > before


def test_the_trainer_resumes_a_users_own_script_with_its_settings(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2), clip_obs=5.0)
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8]}
    PPO(
        "MlpPolicy", env, LinearSchedule(1e-3, 0.0, 1.0), n_steps=32, batch_size=32, clip_range=0.1, policy_kwargs=kwargs
    ).learn(64, callback=EpisodeCheckpointCallback(0, 3, tmp_path))  # fmt: skip
    settings = {"resume_from_checkpoint": str(list_checkpoints(tmp_path)[0]), "total_timesteps": 256}
    config = build_config([Layer("test", {**settings, "checkpoint_dir": str(tmp_path), "mlflow": False})])
    resolved = resolve_config(config)
    assert resolved.config.learning_rate == "lin_0.001"
    assert resolved.config.hyperparameters["clip_range"] == 0.1
    assert resolved.config.env_id == "CartPole-v1"
    assert isinstance(resolved.config.normalize, dict) and resolved.config.normalize["clip_obs"] == 5.0
    assert set(resolved.differences) <= {"total_timesteps", "seed"}
    assert train(config).num_timesteps == 256


def test_another_optimizer_starts_without_the_checkpoints_moments(tmp_path: Path) -> None:
    settings = {"checkpoint_dir": str(tmp_path), "mlflow": False, "hyperparameters": {"n_steps": 32, "batch_size": 32}}
    first = train(build_config([Layer("test", {**settings, "total_timesteps": 32})]))
    other = {"policy_kwargs": {"optimizer_class": "RMSprop"}}
    resume = {"resume_from_checkpoint": str(first.checkpoint), "total_timesteps": 96, "hyperparameters": other}
    assert train(build_config([Layer("test", {**settings, **resume})])).num_timesteps == 96


def test_a_training_that_stands_still_in_its_first_second_is_known_to_have_stepped(tmp_path: Path) -> None:
    """The curve has at most one point a second; a run that waits for its environment for ever has none."""
    callback = EpisodeCheckpointCallback(0, checkpoint_dir=tmp_path, heartbeat_seconds=0.05)
    seen: list[dict[str, Any]] = []

    def stand(_: PPO) -> None:
        assert callback.folder is not None
        record = callback.folder
        wait_for(lambda: read_record(record)["progress"]["num_timesteps"] == 2, "the heartbeat tells of the last step")
        seen.append(read_record(record))

    # Before the callback: what holds it up in the third step holds it up as an environment would.
    _ppo().learn(16, [_At(3, stand), callback])
    [record] = seen
    assert record["status"] == "running"
    assert record["last_step_at"] is not None


def test_a_callback_says_where_its_checkpoints_are_if_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ppo().learn(32, callback=EpisodeCheckpointCallback(0, 0, tmp_path / "mute"))
    assert capsys.readouterr().out == ""
    callback = EpisodeCheckpointCallback(0, 0, tmp_path, run_id="r", verbose=1)
    with pytest.raises(TrainingInterrupted):
        _ppo().learn(1000, callback=[_At(40, lambda model: signal.raise_signal(signal.SIGINT)), callback])
    first, last = capsys.readouterr().out.splitlines()
    [path] = list_checkpoints(tmp_path, "r")
    assert first == f"Run r: checkpoints in {path.parent}"
    assert last.startswith(f"Run r: interrupted; its last checkpoint is {path} (a resume is not exact: ")
