"""Credentials in every place where a user can put one: in nothing that is printed, recorded, sent, or shown by `ps`."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import DEADLINE, Leash, environment, start_trainer, wait_for
from servers import MongoServer, SilentServer

from sb3_mlflow_ckpt import launch
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.redaction import redact, redact_all, redact_argument, redact_arguments
from sb3_mlflow_ckpt.runs.mongo_database import CHECKPOINTS, METRICS, RUNS, connect
from sb3_mlflow_ckpt.trainer import resolve_config

SECRET = "hunter2xyzzy"
ENVIRONMENT = """
import gymnasium, numpy as np

class Leaky(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fails_after, **credentials):
        assert all("SECRET" in str(value) for value in credentials.values()), credentials
        self.credentials, self.left, self.steps = credentials, fails_after, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError(
                "no answer from postgresql://me:SECRET/x@db/train (password=SECRET, 'api_key': 'SECRET', "
                "Authorization: Bearer SECRET)"
            )
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps % 5 == 0, False, {}

class Signed(gymnasium.Wrapper):
    def __init__(self, env, auth_token):
        assert auth_token == "SECRET"
        super().__init__(env)

gymnasium.register("Leaky-v0", Leaky)
""".replace("SECRET", SECRET)
SETTINGS = f"""
env_id: leaky:Leaky-v0
env_kwargs: {{api_key: {SECRET}, login: {{user: me, db_password: [{SECRET}]}}, fails_after: 70}}
env_wrappers: [{{leaky:Signed: {{auth_token: {SECRET}}}}}]
hyperparameters: {{n_steps: 32}}
run_name: trained for https://me:{SECRET}@example.org/?token={SECRET}
checkpoint_interval_episodes: 2
"""
OWN = ("leaky.py", "train.yaml", "leash")
MongoServerFactory = Callable[[], MongoServer]


def _content(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file below a folder that the user did not write, and every member of every zip."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name in OWN or {".git", "__pycache__"} & set(path.parts):
            continue
        yield str(path), path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path}!{name}", archive.read(name)) for name in archive.namelist())


def test_one_secret_in_every_place_comes_out_in_none(
    tmp_path: Path, mongo_server: MongoServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mongo = mongo_server()
    (tmp_path / "leaky.py").write_text(ENVIRONMENT)
    (tmp_path / "train.yaml").write_text(SETTINGS)
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git"],
        ["-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    variables = dict.fromkeys(("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY"), SECRET)  # fmt: skip
    process = start_trainer(
        "--config", "train.yaml", "--env-kwargs", f"token={SECRET} with a space",
        "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--mongo-uri", mongo.uri, "--mongo-db", "credentials", "--total-timesteps", 320,
        cwd=tmp_path, env=environment(**variables),
    )  # fmt: skip
    assert process.wait(DEADLINE) == 1
    log = (tmp_path / "trainer.log").read_text()
    assert "RuntimeError: no answer from postgresql://***@db/train" in log

    [record_file] = tmp_path.glob("checkpoints/*/*/run.json")
    record = json.loads(record_file.read_text())
    assert record["status"] == "failed" and "***" in record["error"]["message"]
    assert record["config"]["env_kwargs"] == {
        "api_key": "***", "token": "***", "login": {"user": "me", "db_password": ["***"]}, "fails_after": 70,
    }  # fmt: skip
    found = dict(_content(tmp_path))
    assert sum(name.endswith(".zip") for name in found) >= 3
    assert any(name.endswith("mlflow.db") for name in found)
    assert [name for name, content in found.items() if SECRET.encode() in content] == []
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = [*database.iterdump()]
    assert any("postgresql://***@db" in row for row in rows) and not any(SECRET in row for row in rows)
    stored = connect(mongo.uri, "credentials")
    for name in (RUNS, CHECKPOINTS, METRICS):
        documents = [str(document) for document in stored[name].find()]
        assert documents and not any(SECRET in document for document in documents)
    stored.client.close()

    # A resume says which credentials it needs, and takes them.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "leaky", __import__("leaky"))
    given = {"resume_from_checkpoint": "latest", "checkpoint_dir": str(tmp_path / "checkpoints")}
    with pytest.raises(ConfigError, match=r"env_kwargs\.api_key: looked like a credential .* --env-kwargs api_key="):
        resolve_config(build_config([Layer("t", given)]))
    again = {"api_key": SECRET, "token": SECRET, "login": {"db_password": [SECRET]}}
    wrappers = [{"leaky:Signed": {"auth_token": SECRET}}]
    with pytest.raises(ConfigError, match=r"env_wrappers: .* --env-wrappers"):
        resolve_config(build_config([Layer("t", {**given, "env_kwargs": again})]))
    config = resolve_config(build_config([Layer("t", {**given, "env_kwargs": again, "env_wrappers": wrappers})])).config
    assert config.env_kwargs == {**again, "fails_after": 70}


def test_neither_the_process_nor_its_workers_show_a_credential_and_a_flag_still_wins(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    silent_server.close()
    shown, leash = f"127.0.0.1:{silent_server.port}", Leash(tmp_path, 40)
    (tmp_path / "train.yaml").write_text("mongo_uri: mongodb://file\ntracking_uri: http://file\nn_envs: 2\n")
    process = start_trainer(
        "--config=train.yaml", f"--mongo-uri=mongodb://me:{SECRET}@{shown}/?directConnection=true",
        "--tracking-uri", f"http://me:{SECRET}@{shown}", "--start-offline", "true", "--vec-env", "subproc",
        "--env-id", "toy_environments:FixedLength-v0", "--env-wrappers", leash.wrapper, "--total-timesteps", 128,
        "--hyperparameters", "n_steps=32", "--sync-timeout-seconds", 0,
        cwd=tmp_path, env=environment(SB3_MLFLOW_CKPT_MONGO_URI=f"mongodb://me:{SECRET}@environment"),
    )  # fmt: skip
    wait_for(lambda: [*tmp_path.glob("checkpoints/*/*/run.json")], "the start", process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 3
    lines = [Path(f"/proc/{member.pid}/cmdline").read_bytes() for member in family]
    assert f"--mongo-uri=mongodb://***@{shown}/?directConnection=true".encode() in lines[0].split(b"\0")
    assert not [line for line in lines if SECRET.encode() in line]
    # Nor do the workers have it in their environment.
    hidden = launch._VARIABLE.encode()
    assert not [m for m in family[1:] if hidden in Path(f"/proc/{m.pid}/environ").read_bytes()]
    leash.release()
    assert process.wait(DEADLINE) == 0, (tmp_path / "trainer.log").read_text()
    [record_file] = tmp_path.glob("checkpoints/*/*/run.json")
    record = json.loads(record_file.read_text())
    assert record["pid"] == process.pid
    assert record["config"]["mongo_uri"] == f"mongodb://***@{shown}/?directConnection=true"
    assert record["config"]["tracking_uri"] == f"http://***@{shown}"
    assert record["config"]["n_envs"] == 2
    assert f"mongodb://***@{shown}" in record["command"]
    assert [name for name, content in _content(tmp_path) if SECRET.encode() in content and name != "train.yaml"] == []


@pytest.mark.parametrize("program", ["module", "script"])
def test_every_way_to_start_the_command_hides_its_words(
    tmp_path: Path, silent_server: SilentServer, program: str
) -> None:
    script = Path(sys.executable).with_name("sb3-mlflow-ckpt")
    start = [sys.executable, "-m", "sb3_mlflow_ckpt"] if program == "module" else [sys.executable, str(script)]
    if program == "script" and not script.exists():
        script = tmp_path / "sb3-mlflow-ckpt"
        script.write_text("from sb3_mlflow_ckpt.cli import main\nmain()\n")
        start = [sys.executable, str(script)]
    uri = f"mongodb://me:{SECRET}@127.0.0.1:{silent_server.port}/?directConnection=true"
    process = subprocess.Popen(
        [*start, "runs", "list", "--mongo-uri", uri], env=environment(), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    def line() -> bytes:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()

    wait_for(lambda: b"***@127.0.0.1" in line(), "the hiding", process)
    assert SECRET.encode() not in line()
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    # It did ask the server that was named, with the words that were given.
    assert f"MongoDB at mongodb://***@127.0.0.1:{silent_server.port}/ does not answer" in err
    assert SECRET not in out + err


@pytest.mark.parametrize(
    "text",
    [
        "mongodb://u:§/x@h/d", "mongodb+srv://u:§@h/?a=b", "http://§@h", "https://h/?token=§&x=1", "api_key=§",
        "--env-kwargs=api_key=§", "{api_key: §, n: 1}", '{"token": "§"}', "{'db_password': '§'}", "password: §",
        "Authorization: Bearer §", "x-api-key: §", "access_token: §", "{token: §}", "my_secret='§ §'", "PGPASSWORD=§",
        "aws_secret_access_key = §", "postgresql+psycopg2://u:§@h,i/d mysql://v:§/§@k", "ftp://a://§@b",
    ],
)  # fmt: skip
def test_what_looks_like_a_credential_in_a_text_goes(text: str) -> None:
    text = text.replace("§", SECRET)
    for shown in (redact(text), redact_all({"x": [text]})["x"][0], redact_argument(text)):
        assert SECRET not in shown and "***" in shown
        assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["unexpected token: x", "max_tokens=5", "n_steps=32", "sqlite:///a/b.db", "http://h:80/x@y", "secretary: x", "a@b.org",
     "--total-timesteps", "lin_3e-4", "runs:/0123/checkpoints/ep000001.zip", "tokenizer=bpe", "monkey=1"],
)  # fmt: skip
def test_an_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == redact_argument(text) == text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["serve", "--token", "§", "--port", "0"], ["serve", "--token", "***", "--port", "0"]),
        (["--token=§"], ["--token=***"]), (["--api-key", "§"], ["--api-key", "***"]),
        (["--token", "--port", "0"], ["--token", "--port", "0"]), (["token", "x"], ["token", "x"]), ([], []),
        (["--mongo-uri", "mongodb://u:§@h"], ["--mongo-uri", "mongodb://***@h"]),
    ],
    ids=["two words", "one word", "another flag", "no value", "no flag", "nothing", "address"],
)  # fmt: skip
def test_a_credential_that_is_a_word_of_its_own_goes_from_a_command_line(words: list[str], shown: list[str]) -> None:
    assert redact_arguments([word.replace("§", SECRET) for word in words]) == shown


def test_numbers_of_tokens_and_empty_values_stay() -> None:
    value = {"start_token": 3, "password": "", "api_key": None, "secret": 5, "keep": {"token": ["a"]}, "max_token": True}
    assert redact_all(value) == {**value, "secret": "***", "keep": {"token": ["***"]}}
