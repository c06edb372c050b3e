"""A checkpoint from a stranger: nothing in it runs, writes, or fills the memory, unless it is trusted."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch as th
from click.testing import CliRunner
from malicious import Payload, pickled_npz, read_member, rewrite, with_config, with_malicious_data
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import load_checkpoint, save_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointLoadError, UntrustedCheckpointError
from sb3_mlflow_ckpt.trainer import resolve_config, train

CONFIG = {
    "algo": "ppo", "env_id": "CartPole-v1", "total_timesteps": 64,
    "hyperparameters": {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
}  # fmt: skip


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    return save_checkpoint(model, agent_id="ppo_agent", run_id="run", episode=1, config=CONFIG).absolute()


def resume(path: Path, **settings: Any) -> Any:
    settings = {"total_timesteps": 16, "mlflow": False, "checkpoint_dir": str(path.parents[2]), **settings}
    return train(build_config([Layer("the test", {"resume_from_checkpoint": str(path), **settings})]))


def everywhere(path: Path) -> list[str]:
    """Read a checkpoint in every way that there is, and return the errors."""
    errors = []
    for read in (
        verify_checkpoint,
        load_checkpoint,
        lambda p: load_checkpoint(p, env=gymnasium.make("CartPole-v1")),
        resume,
    ):
        try:
            read(path)
        except CheckpointLoadError as error:
            errors.append(str(error))
    assert not any("\n" in error for error in errors)
    for words in (["checkpoints", "list", "--json"], ["checkpoints", "verify"], ["runs", "list"]):
        done = CliRunner().invoke(main, [*words, "--checkpoint-dir", str(path.parents[2])])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return errors


def test_a_pickle_in_data_runs_only_where_the_file_is_trusted(checkpoint: Path, marker: Path) -> None:
    with_malicious_data(checkpoint, marker)
    assert everywhere(checkpoint) == []
    assert not marker.exists()
    load_checkpoint(checkpoint, trusted=True)
    assert marker.exists()
    marker.unlink()
    resume(checkpoint, trust_checkpoint=True, total_timesteps=32)
    assert marker.exists()


def test_a_pickle_in_place_of_tensors_never_runs(checkpoint: Path, marker: Path) -> None:
    buffer = io.BytesIO()
    th.save({"log_std": Payload(marker)}, buffer)
    rewrite(checkpoint, {"policy.pth": buffer.getvalue()})
    assert all("policy.pth cannot be read" in error for error in everywhere(checkpoint)[-3:])
    assert len(everywhere(checkpoint)) == 3
    with pytest.raises(CheckpointLoadError):
        load_checkpoint(checkpoint, trusted=True)
    assert not marker.exists()


def test_a_pickle_among_the_statistics_never_runs(checkpoint: Path, marker: Path) -> None:
    rewrite(checkpoint, {"sb3_mlflow_ckpt/vec_normalize.npz": pickled_npz(marker)})
    assert len(everywhere(checkpoint)) == 3
    assert not marker.exists()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"algo": "evil:Algo"}, "'evil' is neither a known package nor imported here"),
        ({"policy": "evil:Policy"}, "'evil' is neither a known package nor imported here"),
        ({"policy": "stable_baselines3.common.save_util:load_from_pkl"}, "which is no BasePolicy"),
        ({"policy": "subprocess:Popen"}, "'subprocess' is neither"),
        ({"hyperparameters": {"policy_kwargs": {"activation_fn": "os:system"}}}, "'os' is neither"),
        ({"hyperparameters": {"policy_kwargs": {"activation_fn": "torch:load"}}}, "which is no Module"),
        ({"hyperparameters": {"policy_kwargs": {"activation_fn": "functional"}}}, "which is no Module"),
        ({"hyperparameters": {"policy_kwargs": {"optimizer_class": "evil:Adam"}}}, "'evil' is neither"),
        ({"hyperparameters": {"policy_kwargs": {"features_extractor_class": "torch.nn:Linear"}}}, "no BaseFeatures"),
        ({"hyperparameters": {"rollout_buffer_class": "stable_baselines3:PPO"}}, "which is no BaseBuffer"),
        ({"hyperparameters": {"gamma": "torch.nn:Linear"}}, "where no name is expected"),
        ({"hyperparameters": {"policy_kwargs": {"activation_fn": "sb3_mlflow_ckpt.__main__:main"}}}, "neither a known"),
        ({"hyperparameters": {"n_steps": 10**11}}, "more than 10000000"),
        ({"hyperparameters": {"ent_coef": "/etc/passwd"}}, "which may be a path or an address"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_could_run_code_is_refused_before_anything_is_imported(
    checkpoint: Path,
    marker: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with_config(checkpoint, **settings)
    with pytest.raises(UntrustedCheckpointError, match=r"--trust-checkpoint, or load_checkpoint") as caught:
        load_checkpoint(checkpoint)
    assert cause in str(caught.value)
    with pytest.raises(UntrustedCheckpointError):
        resume(checkpoint)
    assert not marker.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"env_id": "evil:Env-v0"}, "--env-id evil:Env-v0"),
        ({"env_wrappers": ["evil:Wrapper"]}, """--env-wrappers '["evil:Wrapper"]'"""),
        ({"env_wrappers": [{"gymnasium.wrappers:RecordVideo": {"video_folder": "x"}}]}, "--env-wrappers"),
        ({"env_wrappers": ["gymnasium:make"]}, "--env-wrappers"),
        ({"env_kwargs": {"xml_file": "ant.xml"}}, "--env-kwargs xml_file=ant.xml"),
        ({"env_kwargs": {"entry": "evil:main"}}, "--env-kwargs entry=evil:main"),
        ({"n_envs": 10**9}, "--n-envs 1000000000"),
        ({"frame_stack": 10**9}, "--frame-stack"),
        ({"n_envs": 1000, "vec_env": "subproc"}, "--n-envs"),
        ({"total_timesteps": 2**62}, "--total-timesteps"),
    ],
    ids=str,
)
def test_an_environment_that_could_run_code_or_fill_the_machine_is_refused(
    checkpoint: Path, marker: Path, tmp_path: Path, settings: dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with_config(checkpoint, **settings)
    given = {} if "total_timesteps" in settings else {"total_timesteps": 16}
    with pytest.raises(UntrustedCheckpointError) as caught:
        train(build_config([Layer("t", {"resume_from_checkpoint": str(checkpoint), "mlflow": False, **given})]))
    assert f"give it on this launch: {flag}" in str(caught.value)
    assert not marker.exists()


def test_a_setting_that_is_given_again_is_the_users_own(checkpoint: Path) -> None:
    with_config(checkpoint, env_id="toy_environments_not_imported:Env-v0", env_kwargs={"data": "/tmp/x"})
    with pytest.raises(UntrustedCheckpointError):
        resume(checkpoint, env_id="CartPole-v1")
    resolved = resolve_config(
        build_config(
            [
                Layer(
                    "t",
                    {"resume_from_checkpoint": str(checkpoint), "env_id": "CartPole-v1", "env_kwargs": {"data": "/b"}},
                )
            ]
        )
    )
    assert resolved.config.env_kwargs == {"data": "/b"}


def test_a_network_beyond_the_size_of_the_file_is_not_allocated(checkpoint: Path) -> None:
    with_config(checkpoint, hyperparameters={"policy_kwargs": {"net_arch": [10**6, 10**6]}})
    for read in (load_checkpoint, resume):
        with pytest.raises((CheckpointLoadError, ValueError), match="its own size allows for"):
            read(checkpoint)


def test_tensorboard_is_not_written_where_a_checkpoint_says(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_config(checkpoint, hyperparameters={**CONFIG["hyperparameters"], "tensorboard_log": str(tmp_path / "log")})
    resume(checkpoint)
    assert not (tmp_path / "log").exists()
    assert "tensorboard_log is not taken over" in caplog.text


@pytest.mark.parametrize(
    "counters",
    [{"num_timesteps": "1"}, {"num_timesteps": -1}, {"_n_updates": 1e400}, {"exploration_rate": float("nan")}, [], 5],
    ids=str,
)
def test_counters_that_are_none_are_refused(checkpoint: Path, counters: Any) -> None:
    state = json.loads(read_member(checkpoint, "sb3_mlflow_ckpt/state.json"))
    state["counters"] = counters
    rewrite(checkpoint, {"sb3_mlflow_ckpt/state.json": json.dumps(state).encode()})
    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(checkpoint)


def test_a_counter_that_a_model_does_not_have_becomes_no_attribute(checkpoint: Path) -> None:
    state = json.loads(read_member(checkpoint, "sb3_mlflow_ckpt/state.json"))
    state["counters"] |= {"tensorboard_log": "/tmp/x", "predict": 1}
    state["info_buffers"] |= {"policy": []}
    rewrite(checkpoint, {"sb3_mlflow_ckpt/state.json": json.dumps(state).encode()})
    model = load_checkpoint(checkpoint).model
    assert model.tensorboard_log is None and callable(model.predict) and isinstance(model.policy, th.nn.Module)


def _tensor_without_elements() -> bytes:
    buffer = io.BytesIO()
    th.save({"log_std": th.zeros(1).expand(10**12)}, buffer)
    return buffer.getvalue()


def _deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 * 2**20))
    return buffer.getvalue()


def _claiming_npz() -> bytes:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("returns.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("policy.pth", _tensor_without_elements),
        ("policy.pth", _deflated),
        ("policy.pth", lambda: b"\x80\x02}q\x00."),
        ("pytorch_variables.pth", lambda: b""),
        ("sb3_mlflow_ckpt/vec_normalize.npz", _claiming_npz),
        ("sb3_mlflow_ckpt/spaces.json", lambda: b"[" * 100_000),
        ("sb3_mlflow_ckpt/spaces.json", lambda: b'{"observation": {"kind": "MultiBinary", "shape": [9999999999], "flat": true}}'),
        ("sb3_mlflow_ckpt/state.json", lambda: b'{"metadata": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("sb3_mlflow_ckpt/state.json", lambda: b'{"metadata": 1' + b"0" * 5000 + b"}"),
        ("../outside.pth", lambda: b"x"),
        ("/absolute.pth", lambda: b"x"),
        ("c:\\x.pth", lambda: b"x"),
        ("a\x1b[2J.pth", lambda: b"x"),
    ],
    ids=[str(number) for number in range(13)],
)  # fmt: skip
def test_a_member_that_is_not_what_it_claims_is_an_error_of_ours(checkpoint: Path, member: str, content: Any) -> None:
    rewrite(checkpoint, {member: content()})
    errors = everywhere(checkpoint)
    assert errors and all(error.isprintable() for error in errors)


def test_a_bomb_and_a_zip_with_two_members_of_one_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    bomb, twice = tmp_path / "bomb.zip", tmp_path / "twice.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy.pth", bytes(500 * 2**20))
    twice.write_bytes(checkpoint.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("data", b"{}")
    for path, cause in ((bomb, "claims to hold"), (twice, "two members of one name")):
        with pytest.raises(CheckpointCorruptError, match=cause):
            load_checkpoint(path)


def test_what_is_read_is_what_was_verified(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_mlflow_ckpt import loading

    metadata = verify_checkpoint(checkpoint)
    rewrite(checkpoint, {"system_info.txt": b"another"}, commit=False)
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(CheckpointCorruptError, match="the content was altered"):
        loading.restore(model, checkpoint, checkpoint, metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"episode": 2**70}, {"num_timesteps": float("nan")}, {"agent_id": "\x1b[2J"}, {"run_id": "../.."},
        {"config": []}, {"metrics": {"mean_reward": float("inf")}}, {"versions": {"python": "\x1b[2J\u202e\ud800"}},
        {"trigger": "\x1b]0;x\x07"}, {"extra_state": {"a": json.loads("[" * 80 + "]" * 80)}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_hostile_metadata_is_an_error_or_harmless(checkpoint: Path, change: dict[str, Any]) -> None:
    file = checkpoint.with_name("ep000001_metadata.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert all(error.isprintable() for error in everywhere(checkpoint))
    done = CliRunner().invoke(main, ["checkpoints", "list", "--json", "--checkpoint-dir", str(checkpoint.parents[2])])
    assert all(line.isprintable() for line in done.output.splitlines())


def test_a_run_record_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "agent" / "run"
    folder.mkdir(parents=True)
    text = "\x1b[2J\u202e\x9b1m\ud800"
    record = {"run_id": "run", "agent_id": text, "status": text, "name": text, "error": {"type": text, "message": text}}
    for more in ({}, {"progress": text}, {"parent": [text]}, {"progress": {"episode": {"a": text}}, "error": 5}):
        (folder / "run.json").write_text(json.dumps({**record, **more}))
        for words in (["list"], ["list", "--json"], ["show", "run"], ["show", "run", "--json"]):
            done = CliRunner().invoke(main, ["runs", *words, "--checkpoint-dir", str(tmp_path)])
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
            assert all(line.isprintable() for line in done.output.splitlines())


def test_the_printed_resume_command_repeats_what_a_resume_would_refuse() -> None:
    import shlex

    from sb3_mlflow_ckpt.resume_commands import resume_command

    config = build_config(
        [
            Layer(
                "t",
                {
                    "env_id": "toy_environments:FixedLength-v0", "env_wrappers": ["mine:Wrapper"],
                    "env_kwargs": {"data": "/x y", "length": 3}, "policy": "MlpPolicy",
                    "hyperparameters": {
                        "n_steps": 16, "tensorboard_log": "logs", "policy_kwargs": {"activation_fn": "mine:Relu"}
                    },
                },
            )
        ]
    )  # fmt: skip
    item = {"path": "c.zip", "on_disk": True}
    words = shlex.split(resume_command({"config": config.to_json()}, item, program="trainer", source="path") or "")
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--env-id"] == "toy_environments:FixedLength-v0"
    assert given["--env-wrappers"] == '["mine:Wrapper"]'
    assert given["--env-kwargs"] == "data=/x y"
    assert 'policy_kwargs={"activation_fn": "mine:Relu"}' in words
    assert "tensorboard_log=logs" in words
    assert "--policy" not in words
