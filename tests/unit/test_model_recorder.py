"""Captures: copies that training cannot change, in memory that is used again, and everything anew each time."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch as th
from processes import wait_for
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.save_util import data_to_json, json_to_data, load_from_zip_file

from sb3_mlflow_ckpt.checkpoints import save_checkpoint
from sb3_mlflow_ckpt.state.images import ImagePool
from sb3_mlflow_ckpt.state.model import ModelRecorder
from sb3_mlflow_ckpt.state.sb3_data import DataRecorder


def _tensors(value: Any) -> list[th.Tensor]:
    if isinstance(value, th.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _trained() -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", n_steps=32, seed=0, device="cpu").learn(32)


def test_training_changes_no_capture_and_a_released_one_is_filled_again_in_its_place() -> None:
    model = _trained()
    recorder = ModelRecorder(model)
    first = recorder.capture()
    before = [tensor.clone() for tensor in _tensors(first.state_dicts)]
    places = [tensor.data_ptr() for tensor in _tensors(first.state_dicts)]
    model.learn(32, reset_num_timesteps=False)
    assert all(map(th.equal, _tensors(first.state_dicts), before))
    second = recorder.capture()
    assert not any(map(th.equal, _tensors(second.state_dicts["policy"]), _tensors(first.state_dicts["policy"])))
    first.release()
    third = recorder.capture()
    assert [tensor.data_ptr() for tensor in _tensors(third.state_dicts)] == places
    now = _tensors(model.get_parameters())
    assert all(map(th.equal, _tensors(third.state_dicts), now))


def test_a_third_capture_waits_until_one_is_released_and_a_release_counts_once() -> None:
    pool = ImagePool()
    (one, release), (two, _) = pool.take(), pool.take()
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(pool.take()[0]), daemon=True)
    thread.start()
    thread.join(0.2)
    assert not got
    release()
    wait_for(lambda: bool(got), "the image is taken")
    assert got == [one]
    release()
    waiting = threading.Thread(target=lambda: got.append(pool.take()[0]), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert got == [one], "released a second time, it was handed out while it is held"
    assert two is not one


def test_tensors_that_share_memory_are_one_copy_and_others_are_not() -> None:
    image, _ = ImagePool().take()
    weight = th.arange(6.0).reshape(2, 3)
    copied = image.copy("p", {"a": weight, "b": weight, "row": weight[0], "turned": weight.t(), "none": None, "lr": 0.5}).value
    assert copied["a"] is copied["b"]
    assert len({copied[key].data_ptr() for key in ("a", "row", "turned")}) == 3
    for key, expected in {"a": weight, "row": weight[0], "turned": weight.t()}.items():
        assert th.equal(copied[key], expected)
    assert copied["turned"].stride() == weight.t().stride()
    assert (copied["none"], copied["lr"]) == (None, 0.5)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16, th.bool, th.complex64, th.int64], ids=str)
def test_every_type_of_number_is_copied(dtype: th.dtype) -> None:
    image, _ = ImagePool().take()
    source = th.arange(4).to(dtype)
    (copied,) = image.copy("p", [source]).value
    image.end()
    assert copied.dtype == dtype
    assert th.equal(copied, source)


def test_a_learning_rate_that_is_changed_in_mid_run_is_in_the_next_checkpoint(tmp_path: Path) -> None:
    model = _trained()
    recorder = ModelRecorder(model)
    rates = []
    for rate in (0.5, 0.25):
        model.lr_schedule.value_schedule.val = rate
        model.policy.optimizer.param_groups[0]["lr"] = rate
        capture = recorder.capture()
        assert capture.data is not None
        data = json_to_data(capture.data())
        rates.append((data["lr_schedule"](1.0), capture.state_dicts["policy.optimizer"]["param_groups"][0]["lr"]))
        capture.release()
    assert rates == [(0.5, 0.5), (0.25, 0.25)]


def test_what_cannot_be_copied_is_pickled_at_once() -> None:
    class Own:
        value = 1

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("it is not asked")

    own = Own()
    own.value = 2
    text = DataRecorder().capture({"own": own, "n": 3})
    own.value = 4
    data = json_to_data(text())
    assert (data["own"].value, data["n"]) == (2, 3)


@pytest.mark.parametrize("kind", [PPO, DQN])
def test_sb3s_json_is_what_sb3_itself_writes(kind: Any, tmp_path: Path) -> None:
    model = kind("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(64)
    path = save_checkpoint(model, checkpoint_dir=tmp_path, agent_id="agent", run_id="run", episode=1)
    model.save(tmp_path / "own.zip")
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "own.zip") as own:
        mine, theirs = (set(_lines(archive.read("data").decode())) for archive in (ours, own))
        assert ours.testzip() is None
    assert mine == theirs
    data, parameters, variables = load_from_zip_file(path, device="cpu")
    assert data is not None
    assert data["observation_space"] == model.observation_space
    assert parameters.keys() == model.get_parameters().keys()
    assert data_to_json({"n": data["num_timesteps"]}) == data_to_json({"n": model.num_timesteps})
    assert not variables


def _lines(text: str) -> list[str]:
    # Addresses of objects and pickles of them differ from one to the next.
    return [line for line in text.splitlines() if ":serialized:" not in line and " at 0x" not in line]
