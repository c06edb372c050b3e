"""Whatever a stranger or an accident wrote is a value or an error of ours; what was saved can be read back."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import script
from stable_baselines3 import PPO
from targets import TARGETS, TOKENS, watched

from sb3_mlflow_ckpt import atomic, load_checkpoint, save_checkpoint, strict_json, tree, verify_checkpoint
from sb3_mlflow_ckpt.cli.settings import file_layer, flag_layer
from sb3_mlflow_ckpt.config import Layer, TrainingConfig, build_config
from sb3_mlflow_ckpt.errors import CheckpointLoadError, CheckpointSaveError, ConfigError, InvalidIdError
from sb3_mlflow_ckpt.layout import LARGEST_EPISODE, check_id
from sb3_mlflow_ckpt.ledger import CheckpointLedger
from sb3_mlflow_ckpt.resume import resolve_checkpoint
from sb3_mlflow_ckpt.spaces import decode_space

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
    | st.sampled_from([10**400, "../x", "\ud800", "\x1b[2J", "\u202e", "a\0b", "saved", "mirrored", 1e308, "***"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@cache
def _made(name: str) -> list[bytes]:
    """Return a target's seeds; what it reads from is made by the first use, which nobody watches."""
    seeds = TARGETS[name].seeds()
    for seed in seeds:
        TARGETS[name].run(seed)
    return seeds


def _read(name: str, content: bytes) -> None:
    _made(name)
    with watched(content):
        TARGETS[name].run(content)


@QUICK
@given(data=st.data(), name=st.sampled_from(["record", "metadata", "events", "metrics"]))
def test_any_field_of_any_kind_in_a_document(data: st.DataObject, name: str) -> None:
    first = _made(name)[0]
    document = json.loads(first if name in ("record", "metadata") else first.splitlines()[0])
    for _ in range(data.draw(st.integers(1, 3))):
        at: Any = document
        while True:
            key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
            if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
                break
            at = at[key]
        at[key] = data.draw(VALUES)
    _read(name, json.dumps(document).encode() + b"\n")


@QUICK
@given(lines=st.lists(st.dictionaries(st.sampled_from(["event", "episode", "sha256", "uri", "replay", "bytes", "mean_reward"]), VALUES, max_size=5), max_size=6))  # fmt: skip
def test_any_lines_make_a_ledger_of_plain_facts(lines: list[dict[str, Any]]) -> None:
    ledger = CheckpointLedger()
    for line in [{"event": "saved", "episode": 1, "sha256": None}, *lines]:
        ledger.apply(line)
    for episode in {*ledger.saved, *ledger.uris, *ledger.pruned, *ledger.retired}:
        assert type(episode) is int and 0 <= episode <= LARGEST_EPISODE
    assert all(isinstance(uri, str) for uri in ledger.uris.values())


@pytest.mark.parametrize("episode", [True, -1, 10**18, 1.0, "1", None, [], 10**400], ids=range(8))
def test_a_line_whose_episode_is_none_is_not_understood(episode: Any) -> None:
    assert CheckpointLedger().apply({"event": "saved", "episode": episode}) is None


@QUICK
@given(value=VALUES, key=st.sampled_from(sorted(TrainingConfig.model_fields)))
def test_any_value_of_a_setting(value: Any, key: str) -> None:
    message = ""
    try:
        atomic.dump_json(build_config([Layer("the test", {key: value})]).to_json())
    except ConfigError as error:
        message = str(error)
    assert len(message) < 2000


@QUICK
@given(pieces=st.lists(st.sampled_from([*TOKENS, b"a: ", b"  - ", b"b: 1\n", b"[", b"]", b"{", b"}", b"? ", b"|\n", b"'"]), max_size=12))  # fmt: skip
def test_any_yaml(pieces: list[bytes]) -> None:
    _read("yaml", b"".join(pieces))


@QUICK
@given(text=st.text(max_size=40) | st.sampled_from(["a" * 300, "/" * 5000, "~nobody/x", "latest/../..", "CON .txt", "COM\u00b9", "a\u2028b"]))  # fmt: skip
def test_any_uri_and_any_id(text: str) -> None:
    _read("id", text.encode("utf-8", "surrogatepass"))
    _read("uri", text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("bad", ["COM\u00b9", "CON .txt", "a\u2028b", "\u00a0a", "a\ud800", "\u202ea", 5, None, 10**5000], ids=range(9))
def test_an_id_that_is_no_name_everywhere_is_refused_in_a_short_line(bad: Any) -> None:
    with pytest.raises(InvalidIdError) as caught:
        check_id(bad, "run_id")
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_path_that_is_too_long_or_nobodys_is_not_found(tmp_path: Path) -> None:
    from sb3_mlflow_ckpt.errors import CheckpointNotFoundError

    for reference in ("x" * 5000, "~nobody_at_all/x.zip", "a\0b", f"{'y' * 250}.zip", f"runs:/{'z' * 5000}", "runs:/"):
        with pytest.raises(CheckpointNotFoundError):
            resolve_checkpoint(
                reference, checkpoint_dir=str(tmp_path), agent_id="a", tracking_uri=f"sqlite:///{tmp_path}/m.db"
            )


def _laughs(start: str, body: str) -> str:
    return start + "".join(f"a{i}: &a{i} {body.replace('@', f'*a{i - 1}')}\n" for i in range(1, 25))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (_laughs("a0: &a0 [x]\n", "[@, @, @, @, @, @, @, @, @]"), "stands for more than"),
        (_laughs("a0: &a0 {x: 1}\n", "{a: @, b: @, c: @, d: @}"), "stands for more than"),
        ("hyperparameters: &a {x: *a}", "holds itself"),
        ("hyperparameters: {x: " + "[" * 33 + "]" * 33 + "}", "nested too deeply"),
        ("<<: [" + "{}, " * 100 + "]", "merges too many"),
        ("seed: 0x" + "f" * 5000, "too long"),
        ("seed: 1" + ":1" * 5000, "too long"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!omap [a: 1]", "could not determine a constructor"),
        ("a: !!binary x", "could not determine a constructor"),
        ("algo: ppo\nalgo: sac", "given twice"),
        ("#" * 2**20 + "\n", "larger than"),
        ("a: \0", "not valid YAML"),
    ],
    ids=range(13),
)
def test_yaml_that_is_more_than_it_looks_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        build_config([file_layer(file)])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["1e20", "1e300", "12345678901234567890123", "1e18"])
def test_a_large_number_among_hyperparameters_can_be_saved_and_read(text: str) -> None:
    config = build_config([flag_layer({"hyperparameters": (f"max_grad_norm={text}",)})])
    document = strict_json.loads(atomic.dump_json(config.to_json()))
    assert document["hyperparameters"]["max_grad_norm"] == pytest.approx(float(text), rel=0)


@pytest.fixture(scope="module")
def model() -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})


def _save(model: PPO, folder: Path, state: Any, episode: int = 1) -> Path:
    return save_checkpoint(model, folder, agent_id="a", run_id="r", episode=episode, extra_state={"x": state})


@pytest.mark.parametrize("name", ["a generator", "half a surrogate", "a large integer"])
def test_what_a_user_adds_to_a_checkpoint_comes_back(model: PPO, tmp_path: Path, name: str) -> None:
    state: Any = {
        "a generator": np.random.default_rng(7).bit_generator.state,
        "half a surrogate": "caf\udce9 \\ud800",
        "a large integer": -(10**290),
    }[name]
    path = _save(model, tmp_path, state)
    verify_checkpoint(path)
    assert load_checkpoint(path).extra_state == {"x": state}


@pytest.mark.parametrize(
    "state",
    [json.loads("[" * 70 + "]" * 70), 10**400, float("nan"), "x" * 5 * 2**20, object()],
    ids=["deep", "huge", "nan", "long", "object"],
)
def test_what_could_not_be_read_again_is_refused_when_it_is_saved(model: PPO, tmp_path: Path, state: Any) -> None:
    """It was committed before, and no reader took it: the checkpoint was lost, and the one that it replaced with it."""
    whole = _save(model, tmp_path, "whole")
    before = whole.read_bytes()
    with pytest.raises(CheckpointSaveError, match="plain JSON"):
        _save(model, tmp_path, state)
    assert whole.read_bytes() == before
    assert load_checkpoint(whole).extra_state == {"x": "whole"}


def test_a_name_that_is_no_utf8_does_not_end_a_training(tmp_path: Path) -> None:
    source = (
        "from stable_baselines3 import PPO\n"
        "from sb3_mlflow_ckpt import EpisodeCheckpointCallback, latest_checkpoint\n"
        "callback = EpisodeCheckpointCallback(5, run_name='caf\\udce9', config={'note': '\\ud800'})\n"
        "PPO('MlpPolicy', 'CartPole-v1', n_steps=64).learn(64, callback=callback)\n"
        "assert latest_checkpoint()\n"
    )
    done = script(source, tmp_path)
    assert done.returncode == 0, done.stderr
    [record] = tmp_path.glob("checkpoints/*/*/run.json")
    assert json.loads(record.read_bytes())["name"] == "caf\udce9"


def test_a_key_that_stands_twice_is_no_json() -> None:
    for text in ('{"a": 1, "a": 2}', '{"b": [{"a": 1, "\\u0061": 2}]}'):
        with pytest.raises(ValueError, match="'a' twice"):
            strict_json.loads(text)


def _patched_directory(path: Path, out: Path) -> None:
    """Point every member's entry of a zip at the first member."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 42 : at + 46] = bytes(4)
        at = content.find(b"PK\x01\x02", at + 4)
    out.write_bytes(content)


@pytest.mark.parametrize("damage", ["overlapping", "wrong CRC", "truncated", "link", "size of 2**64"])
def test_a_zip_whose_members_lie(model: PPO, tmp_path: Path, damage: str) -> None:
    path, bad = _save(model, tmp_path, 1), tmp_path / "bad.zip"
    content = path.read_bytes()
    if damage == "overlapping":
        _patched_directory(path, bad)
    elif damage == "wrong CRC":
        at = content.find(b"policy.pth")
        bad.write_bytes(content[: at + 200] + bytes([content[at + 200] ^ 1]) + content[at + 201 :])
    elif damage == "truncated":
        bad.write_bytes(content[:-30])
    elif damage == "size of 2**64":
        at = content.find(b"PK\x01\x02")
        bad.write_bytes(content[: at + 20] + b"\xff" * 8 + content[at + 28 :])
    else:
        with zipfile.ZipFile(bad, "w") as archive:
            info = zipfile.ZipInfo("policy.pth")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    for read in (verify_checkpoint, load_checkpoint, lambda p: load_checkpoint(p, algo="ppo")):
        with pytest.raises(CheckpointLoadError):
            read(bad)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", bad]


@pytest.mark.parametrize("name", ["f4,(", "(2,)f4", "<f4, <f4", "f4;import os", "{}", "O", "V8", "<U9999999999", "", 5, None], ids=range(11))  # fmt: skip
def test_a_type_of_numbers_that_is_none_is_a_value_error_everywhere(name: Any) -> None:
    """numpy reads the text of a type as source, and raises a SyntaxError; the fuzzer found it in a replay chunk."""
    for document in ({"$": "array", "dtype": name, "shape": [1], "at": 0},):
        with pytest.raises(ValueError, match="state holds an array"):
            tree.decode(document, bytes(64))
    with pytest.raises(ValueError, match=r"spaces|type of numbers"):
        decode_space({"kind": "Box", "low": 0, "high": 1, "shape": [1], "dtype": name})
    content = json.dumps({"format": 1, "start": 0, "plain": {"$": "array", "dtype": name, "shape": [1], "at": 0}}).encode()
    _read("chunk", len(content).to_bytes(8, "little") + content + bytes(64))


def test_a_deflated_member_that_is_garbage_is_corrupt(tmp_path: Path) -> None:
    """zlib raises an error of its own, which is neither zipfile's nor a builtin; the fuzzer found it."""
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy.pth", bytes(range(256)) * 40)
    content = path.read_bytes()
    at = content.find(b"policy.pth") + len("policy.pth")
    path.write_bytes(content[:at] + b"\x00" * 40 + content[at + 40 :])
    for read in (verify_checkpoint, lambda p: load_checkpoint(p, algo="ppo")):
        with pytest.raises(CheckpointLoadError, match=r"damaged|cannot be read"):
            read(path)
