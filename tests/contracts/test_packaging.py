"""What is installed, and what the checks run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TEST_COMMAND = "python -m pip install -e '.[dev]' && python -m pytest"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def conda() -> dict:
    return yaml.safe_load((ROOT / "conda.yaml").read_text())


def test_conda_lists_what_pyproject_depends_on() -> None:
    pip = next(item["pip"] for item in conda()["dependencies"] if isinstance(item, dict))
    assert pip == project()["project"]["dependencies"]


def test_conda_names_one_python_that_the_package_admits() -> None:
    python = next(str(item) for item in conda()["dependencies"] if str(item).startswith("python"))
    # Ranges are ignored, or taken for their lower bound, where conda.yaml is turned into a virtual environment.
    assert re.fullmatch(r"python=3\.1[0-3]", python)


def test_mlproject_names_an_environment_file_that_exists() -> None:
    mlproject = yaml.safe_load((ROOT / "MLproject").read_text())
    assert (ROOT / mlproject["conda_env"]).is_file()
    assert "python_env" not in mlproject


def test_every_dependency_has_a_lower_bound() -> None:
    assert [d for d in project()["project"]["dependencies"] if ">=" not in d] == []


def test_type_information_is_shipped() -> None:
    assert (ROOT / "sb3_mlflow_ckpt" / "py.typed").is_file()
    assert "py.typed" in project()["tool"]["setuptools"]["package-data"]["sb3_mlflow_ckpt"]


def test_the_console_script_is_what_python_m_runs() -> None:
    module, _, name = project()["project"]["scripts"]["sb3-mlflow-ckpt"].partition(":")
    assert module == "sb3_mlflow_ckpt.__main__"
    called = [sys.executable, "-c", f"from {module} import {name}; {name}()", "--help"]
    run = [sys.executable, "-m", "sb3_mlflow_ckpt", "--help"]
    shown = [subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in (called, run)]
    assert [text.partition("\n")[2] for text in shown] == [shown[0].partition("\n")[2]] * 2
    assert "train" in shown[0]


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_the_documented_test_command_is_the_one_that_is_checked(file: str) -> None:
    assert TEST_COMMAND in (ROOT / file).read_text().splitlines()


def test_the_checks_pin_torch_exactly() -> None:
    pins = [line for line in (ROOT / "constraints-ci.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)


def test_setup_cfg_holds_the_import_contract_alone() -> None:
    sections = re.findall(r"^\[([^\]]+)\]", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert all(section.startswith("importlinter") for section in sections)
