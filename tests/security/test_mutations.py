"""Whatever is done to a checkpoint's bytes, members or metadata: an error of ours comes out, or a model."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malicious import read_member, rewrite
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import load_checkpoint, save_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointError

MEMBERS = [
    "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "sb3_mlflow_ckpt/state.json",
    "sb3_mlflow_ckpt/spaces.json", "sb3_mlflow_ckpt/spaces.bin",
]  # fmt: skip
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})
    return save_checkpoint(model, tmp_path_factory.mktemp("whole"), agent_id="a", run_id="r", episode=1)


def copy(whole: Path, tmp_path: Path, *, metadata: bool = True) -> Path:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    path = Path(shutil.copy(whole, folder))
    if metadata:
        shutil.copy(whole.with_name("ep000001_metadata.json"), folder)
    return path


def attempt(path: Path, **options: Any) -> None:
    messages = []
    for read in (verify_checkpoint, lambda p: load_checkpoint(p, **options)):
        try:
            read(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)


@SLOW
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 30), cut=st.integers(0, 3000))
def test_bytes_of_a_zip_without_metadata(whole: Path, tmp_path: Path, seed: int, flips: int, cut: int) -> None:
    path, rng = copy(whole, tmp_path, metadata=False), random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(flips):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content[: len(content) - cut if rng.random() < 0.3 else None])
    attempt(path)
    attempt(path, algo="ppo")


@SLOW
@given(
    member=st.sampled_from(MEMBERS), seed=st.integers(0, 2**32), flips=st.integers(0, 20), junk=st.binary(max_size=9)
)
def test_bytes_of_a_member_with_hashes_that_fit(
    whole: Path, tmp_path: Path, member: str, seed: int, flips: int, junk: bytes
) -> None:
    path, rng = copy(whole, tmp_path), random.Random(seed)
    content = bytearray(read_member(path, member))
    for _ in range(flips if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    rewrite(path, {member: bytes(content) + junk})
    attempt(path)


@SLOW
@given(data=st.data())
def test_values_of_the_state_and_the_metadata(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = copy(whole, tmp_path)
    name = data.draw(st.sampled_from(["sb3_mlflow_ckpt/state.json", "sb3_mlflow_ckpt/spaces.json", "metadata"]))
    file = path.with_name("ep000001_metadata.json")
    document = json.loads(file.read_text() if name == "metadata" else read_member(path, name))
    at: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(VALUES)
    text = json.dumps(document)
    if name == "metadata":
        file.write_text(text)
    else:
        rewrite(path, {name: text.encode()})
    attempt(path)
