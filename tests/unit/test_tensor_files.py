"""The `.pth` members: torch's own file, in which tensors are exchanged."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, latest_checkpoint, load_checkpoint
from sb3_mlflow_ckpt.state import images
from sb3_mlflow_ckpt.state.images import ImagePool
from sb3_mlflow_ckpt.state.model import VARIABLES, ModelRecorder
from sb3_mlflow_ckpt.state.tensor_files import TensorPickler


def same(one: Any, other: Any) -> bool:
    if isinstance(one, th.Tensor):
        return one.dtype == other.dtype and th.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def loaded(pieces: Iterable[Any]) -> Any:
    raw = b"".join(pieces)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
    return th.load(io.BytesIO(raw), weights_only=True)


def fill(value: Any, part: str = "p", pool: ImagePool | None = None) -> Any:
    image, release = (pool or ImagePool()).take()
    filled = image.copy(part, value)
    image.end()
    return filled, release


VALUES: dict[str, Any] = {
    "types": {str(t): th.arange(5).to(t) for t in (th.float32, th.float64, th.float16, th.bfloat16, th.int64, th.int32,
                                                   th.int16, th.int8, th.uint8, th.bool, th.complex64)},
    "shapes": [th.zeros(()), th.zeros(0), th.zeros(0, 3), th.ones(2, 3).t(), th.ones(2, 3, 4, 5).to(memory_format=th.channels_last)],
    "nested": {"state": {0: {"step": th.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": None, "params": [0]}]},
    "nothing": {},
    "no tensor": {"a": 1, "b": "text", "c": 2**40, "d": -1.5, "e": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_it_is_pickled_as_torch_pickles_it(name: str) -> None:
    part, _ = fill(VALUES[name])
    torchs = io.BytesIO()
    th.save(part.value, torchs)
    with zipfile.ZipFile(torchs) as archive:
        assert TensorPickler().dump(part.value)[0] == archive.read("archive/data.pkl")


@pytest.mark.parametrize("name", VALUES)
def test_what_comes_back_is_what_was_copied_the_first_time_and_later(name: str) -> None:
    pool = ImagePool()
    for _ in range(4):
        part, release = fill(VALUES[name], pool=pool)
        assert same(loaded(part.pieces()), VALUES[name])
        release()


W = th.arange(9.0).reshape(3, 3)
C = th.tensor([[1 + 2j, 3 - 4j], [5j, 6]])
Pair = namedtuple("Pair", "one other")
RARE: dict[str, Callable[[], Any]] = {
    "a matrix and its transpose": lambda: {"w": W, "t": W.t(), "again": W, "t again": W.t()},
    "a part that begins where the whole does": lambda: {"w": W, "row": W[0], "column": W[:, 0]},
    "conjugates": lambda: {"c": C, "conjugate": C.conj()},
    "types of their own": lambda: {str(t): th.arange(4.0).to(t) for t in (th.uint16, th.uint32, th.uint64, th.float8_e4m3fn, th.complex32)},
    "sparse": lambda: {"s": th.eye(3).to_sparse(), "w": W},
    "quantized": lambda: {"q": th.quantize_per_tensor(th.ones(3), 0.1, 0, th.qint8), "w": W},
    "containers": lambda: {"pair": Pair(W, 2), "default": defaultdict(list, w=W), "size": th.Size([1, 2])},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RARE)
def test_what_hardly_anybody_trains_with_is_saved_as_sb3_saves_it(name: str) -> None:
    pool, value = ImagePool(), RARE[name]()
    for _ in range(4):
        part, release = fill(value, pool=pool)
        again = th.load(io.BytesIO(b"".join(part.pieces())), weights_only=False)
        assert repr(again) == repr(loaded_as_saved(value, trusted=True))
        release()


class Tied(BaseFeaturesExtractor):
    """An autoencoder's weights, a counter of a type of its own, and a form that older files do not have."""

    _version = 2

    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.encoder, self.decoder = th.nn.Linear(4, 4, bias=False), th.nn.Linear(4, 4, bias=False)
        self.decoder.weight = th.nn.Parameter(self.encoder.weight.data.t())
        self.register_buffer("count", th.zeros(1, dtype=th.uint16))
        self.scale = 0.0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.decoder(th.tanh(self.encoder(observations)))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        self.scale = float(metadata.get("version", 1))
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_network_of_ones_own_comes_back_as_it_was(tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Tied, "net_arch": [8]}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu", policy_kwargs=kwargs)
    model.learn(64, EpisodeCheckpointCallback(1, 0, tmp_path))
    path = latest_checkpoint(tmp_path)
    assert path is not None
    observations = th.ones(1, 4)
    for again in (PPO.load(path, device="cpu"), load_checkpoint(path, env=model.get_env(), device="cpu")[0]):
        assert again.policy.features_extractor.scale == 2
        assert th.equal(again.policy.predict_values(observations), model.policy.predict_values(observations))


def test_what_is_no_tensor_is_copied_too() -> None:
    counts, names = np.zeros(2), {"a"}
    part, _ = fill({"counts": counts, "names": names})
    counts += 1
    names.add("b")
    again = th.load(io.BytesIO(b"".join(part.pieces())), weights_only=False)
    assert again["counts"].tolist() == [0, 0] and again["names"] == {"a"}


@pytest.mark.parametrize("kind", [PPO, A2C, DQN, SAC, TQC], ids=lambda kind: kind.__name__)
def test_a_training_has_torch_write_once_for_both_images(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = "CartPole-v1" if kind in (PPO, A2C, DQN) else "Pendulum-v1"
    options = {"learning_starts": 8} if kind in (DQN, SAC, TQC) else {"n_steps": 16}
    updates = itertools.count(1)
    model = kind("MlpPolicy", env, seed=0, device="cpu", learning_rate=lambda _: 1e-3 / next(updates), **options)
    model.learn(32)
    recorder, wrote = ModelRecorder(model), []
    whole = images.saved
    monkeypatch.setattr(images, "saved", lambda *given: wrote.append(None) or whole(*given))
    for round_ in range(6):
        model.learn(32, reset_num_timesteps=False)
        capture = recorder.capture()
        # What it was captured from goes on changing.
        expected = {name: loaded_as_saved(value) for name, value in model.get_parameters().items()}
        model.learn(16, reset_num_timesteps=False)
        for name, value in expected.items():
            assert same(loaded(capture.files[name]()), value), name
        loaded(capture.files[VARIABLES]())
        capture.release()
        if round_ == 1:
            # SB3's RMSprop counts its steps in the pickle: one that grows by a byte is written anew.
            wrote.clear()
    assert len(wrote) <= (2 if kind is A2C else 0), "a checkpoint was pickled and written by torch again"


def loaded_as_saved(value: Any, *, trusted: bool = False) -> Any:
    file = io.BytesIO()
    th.save(value, file)
    file.seek(0)
    return th.load(file, weights_only=not trusted)


def test_a_number_that_changes_is_in_the_next_file_and_so_is_one_that_takes_more_bytes() -> None:
    pool, weight = ImagePool(), th.ones(3)
    for value in (0.5, 0.25, 1, 300, 70000, 2**40, "text", None, 0.125):
        weight += 1
        part, release = fill({"lr": value, "weight": weight}, pool=pool)
        assert same(loaded(part.pieces()), {"lr": value, "weight": weight})
        release()


def test_tensors_that_come_in_another_form_get_a_file_of_their_own() -> None:
    pool = ImagePool()
    for shape in ((3,), (3,), (4, 2), (4, 2), (3,), (1, 1)):
        value = {"a": th.rand(shape), "b": th.rand(2)}
        part, release = fill(value, pool=pool)
        assert same(loaded(part.pieces()), value)
        release()
    for length in (3, 1, 2):
        values = [th.rand(2) for _ in range(length)]
        part, release = fill(values, pool=pool)
        assert same(loaded(part.pieces()), values)
        release()


def test_where_torch_pickles_otherwise_only_what_is_pickled_alike_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TensorPickler.dump
    monkeypatch.setattr(TensorPickler, "dump", lambda self, value: (whole(self, value)[0] + b"another", whole(self, value)[1]))
    pool = ImagePool()
    for lr in (0.5, 0.5, 0.25, 0.25):
        value = {"lr": lr, "weight": th.rand(3)}
        part, release = fill(value, pool=pool)
        assert same(loaded(part.pieces()), value)
        release()


def test_the_pieces_of_a_large_file_are_whole_when_they_come() -> None:
    """Each is written while those behind it are still without their checksums."""
    pool = ImagePool()
    for count in range(4):
        value = {name: th.full((size,), count + 0.5) for name, size in (("a", 3), ("b", 3 << 20), ("c", 5), ("d", 2 << 20))}
        part, release = fill(value, pool=pool)
        written = [bytes(piece) for piece in part.pieces()]
        assert len(written) > 3
        assert same(loaded(written), value)
        release()


def test_a_device_is_copied_from_beside_the_training() -> None:
    if not th.cuda.is_available():
        pytest.skip("NOT TESTED ON A GPU: torch finds none here")
    pool, weight = ImagePool(), th.zeros(1 << 22, device="cuda")
    for count in range(4):
        part, release = fill({"weight": weight, "step": th.tensor(float(count))}, pool=pool)
        # What comes next on the device must come after the copy.
        weight += 1
        copied = loaded(part.pieces())
        assert copied["weight"].device.type == "cpu"
        assert th.equal(copied["weight"], th.full((1 << 22,), float(count)))
        assert part.value["weight"].is_pinned()
        release()
