"""The order of the house: layers, styles, types, and what is not imported."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sb3_mlflow_ckpt"
HEAVY = ("torch", "stable_baselines3", "sb3_contrib", "mlflow", "pymongo")


def run(*words: str, **settings) -> subprocess.CompletedProcess[str]:
    settings = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, **settings}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=550, **settings)


def imported_by(arguments: list[str], cwd: Path) -> set[str]:
    code = (
        "import json, sys\n"
        "from sb3_mlflow_ckpt.cli import main\n"
        "try:\n    main(json.loads(sys.argv[1]))\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = run("-c", code, json.dumps(arguments), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_modules_import_only_from_lower_rows() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = run("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_row() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / "setup.cfg")
    rows = set(re.findall(r"sb3_mlflow_ckpt[\w.]*", contracts["importlinter:contract:layers"]["layers"]))
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert {m for m in modules if not any(m == row or m.startswith(f"{row}.") for row in rows)} == set()


@pytest.mark.parametrize("words", [["ruff", "check", "--no-cache", "."], ["mypy"]], ids=["style", "types"])
def test_the_code_is_clean(words: list[str]) -> None:
    done = run("-m", *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_lint_rule_that_is_ignored_has_a_reason() -> None:
    ignored = re.findall(r'^    "[A-Z]+\d+",(.*)$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert ignored
    assert all(re.match(r"\s*# \w", reason) for reason in ignored)


def test_the_package_itself_imports_nothing_heavy() -> None:
    done = run("-c", "import sys, sb3_mlflow_ckpt; print(*sys.modules)")
    assert not {*HEAVY, "pydantic", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["checkpoints", "--help"], ["runs", "list", "--help"]])
def test_help_imports_nothing_but_click(arguments: list[str], tmp_path: Path) -> None:
    assert not {*HEAVY, "pydantic", "rich", "yaml", "numpy"} & imported_by(arguments, tmp_path)


@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["checkpoints", "list"], ["checkpoints", "list", "--json"], ["runs", "list"]]
)
def test_what_trains_nothing_imports_nothing_of_the_training(arguments: list[str], tmp_path: Path) -> None:
    assert not {*HEAVY} & imported_by(arguments, tmp_path)


def test_verifying_and_pruning_import_nothing_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for arguments in (["checkpoints", "verify"], ["checkpoints", "prune", "--keep-last-n", "3"]):
        assert not {*HEAVY} & imported_by(arguments, tmp_path)


def test_a_wrong_flag_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom sb3_mlflow_ckpt.cli import train_command\n"
        "try:\n    train_command(['--n-envs', '0'])\n"
        "except SystemExit as ended:\n    assert ended.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
