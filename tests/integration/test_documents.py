"""Every command and snippet of the README and of docs/ is run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import DEADLINE, ROOT, environment, python, script, start_python, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.metadata import parse_metadata

DOCUMENTS = ("README.md", "docs/checkpointing.md", "docs/exact-resume.md", "docs/safe-loading.md", "docs/training.md")
_BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# So that a training that a document starts reaches its first update within a second, and is not through before it is
# stopped: what is left of run123 takes one more second.
_QUICK = {
    "SB3_MLFLOW_CKPT_HYPERPARAMETERS": "{n_steps: 64, batch_size: 64}",
    "SB3_MLFLOW_CKPT_MLFLOW": "false",
    "SB3_MLFLOW_CKPT_TOTAL_TIMESTEPS": "100000000",
}


def _blocks(kind: str) -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        blocks = _BLOCK.finditer((ROOT / document).read_text())
        found += [(document, block["text"]) for block in blocks if block["kind"] == kind]
    return found


def _commands(program: str) -> list[str]:
    lines = [line for _, text in _blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if not line.startswith("#")]
    return list(dict.fromkeys(command for command in commands if command.startswith(program)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the run of the documents, run123, was trained to beyond episode 200."""
    folder = tmp_path_factory.mktemp("documents")
    flags = ["--run-id", "run123", "--keep-last-n-checkpoints", "0", "--hyperparameters", "{n_steps: 64, n_epochs: 1}"]
    done = trainer(*flags, "--total-timesteps", 7000, "--mlflow", "false", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {"ep000100.zip", "ep000200.zip"} <= {path.name for path in list_checkpoints(folder / "checkpoints")}
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with the files that YAML blocks name in their first line."""
    folder = tmp_path / "workspace"
    shutil.copytree(trained, folder)
    for _, text in _blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name is not None, f"the block does not say which file it is:\n{text}"
        (folder / name[1]).write_text(text)
    return folder


def test_the_documents_have_no_command_that_is_not_run_here() -> None:
    known = (
        "python -m sb3_mlflow_ckpt.trainer",
        "sb3-mlflow-ckpt",
        "mlflow run",
        "python -m pip",
        "python -m pytest",
        "python tests/exactness/matrix.py",
        "python benchmarks/",
        "#",
    )
    lines = [line.strip() for _, text in _blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    assert not [line for line in lines if line and not line.startswith((*known, "export SB3_MLFLOW_CKPT_"))]


@pytest.mark.parametrize("command", _commands("python -m sb3_mlflow_ckpt.trainer"))
def test_a_documented_training_trains_and_is_saved_when_it_is_stopped(workspace: Path, command: str) -> None:
    before = set(list_checkpoints(workspace / "checkpoints"))
    words = shlex.split(command)[1:]
    process = start_python(*words, cwd=workspace, log=workspace / "log", env=environment(**_QUICK))
    if "--dry-run" in words:
        assert process.wait(DEADLINE) == 0
        return

    def trains() -> bool:
        curves = (workspace / "checkpoints").glob("*/*/metrics.jsonl")
        return any(curve.stat().st_size > 0 for curve in curves if curve.parent.name != "run123")

    try:
        wait_for(trains, "the training", process)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 128 + signal.SIGTERM, (workspace / "log").read_text()
    new = [path for path in list_checkpoints(workspace / "checkpoints") if path not in before]
    parent = re.search(r"ep000(\d00)\.zip", command) or re.search(r"config_resume\.yaml", command)
    for path in new:
        metadata = verify_checkpoint(path)
        if parent is not None:
            assert metadata.parent is not None and metadata.episode >= metadata.parent.episode
    assert new


# A server does not end by itself: tests/web/test_training_history_document.py has it.
@pytest.mark.parametrize("command", [c for c in _commands("sb3-mlflow-ckpt") if c != "sb3-mlflow-ckpt serve"])
def test_a_documented_command_succeeds(workspace: Path, command: str) -> None:
    done = python("-m", "sb3_mlflow_ckpt", *shlex.split(_tried(command))[1:], cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def _tried(command: str) -> str:
    """Return a command with an environment that is there in place of the reader's own, and no longer than it must be."""
    if "check-env" in command:
        command += " --points 2 --steps 20"
    return command.replace("my_package:MyEnv-v0", "toy_environments:ReachGoal-v0")


@pytest.mark.parametrize("command", _commands("python tests/exactness/matrix.py"))
def test_the_documented_matrix_prints_a_table_in_which_every_training_is_exact(command: str) -> None:
    words = [sys.executable, *shlex.split(command)[1:], "--only", "MaskablePPO"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 trainings" in done.stdout and "0 not exact" in done.stdout


@pytest.mark.parametrize("command", _commands("python benchmarks/"))
def test_a_documented_benchmark_prints_its_rows(command: str) -> None:
    words = [sys.executable, *shlex.split(command)[1:], "--fills", "0.01", "--repeats", "1", "--json"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 6 and all(row["ours_bytes"] > 0 for row in rows)


@pytest.mark.parametrize(("document", "source"), _blocks("python"))
def test_a_documented_snippet_runs(workspace: Path, document: str, source: str) -> None:
    done = script(source, workspace)
    assert done.returncode == 0, done.stderr


def test_a_documented_configuration_file_is_valid() -> None:
    import yaml

    for _, text in _blocks("yaml"):
        build_config([Layer("the document", yaml.safe_load(text))])


def test_the_documented_metadata_is_of_this_version() -> None:
    [(document, text)] = _blocks("json")
    documented = parse_metadata(text, document)
    assert not documented.model_extra
    assert set(documented.to_json()) == set(type(documented).model_fields)


def test_a_documented_mlflow_run_passes_parameters_that_the_project_has() -> None:
    import yaml

    project = yaml.safe_load((ROOT / "MLproject").read_text())
    commands = [shlex.split(command) for command in _commands("mlflow run")]
    assert len(commands) >= 2
    for words in commands:
        assert words[2:5] == [".", "--env-manager", "local"]
        names = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-P"}
        assert names <= set(project["entry_points"]["main"]["parameters"])


def test_the_drawing_in_the_readme_shows_every_module() -> None:
    drawing = (ROOT / "README.md").read_text().partition("## The house")[2].partition("## Make it yours")[0]
    package = ROOT / "sb3_mlflow_ckpt"
    modules = {path.stem for path in package.glob("*.py")} | {
        f"{p.parent.name}/" for p in package.glob("*/__init__.py")
    }
    modules -= {"__init__", "__main__"}
    words = set(re.findall(r"[a-z_]+/|[a-z_]+", drawing))
    assert modules <= words, f"not in the drawing: {sorted(modules - words)}"
