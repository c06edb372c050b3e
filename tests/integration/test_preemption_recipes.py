"""The recipes of docs/preemption.md as they stand there, run by what does for them what their schedulers do."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import DEADLINE, ROOT, Leash, environment, wait_for

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, OneLineUsageError
from sb3_mlflow_ckpt.cli.options import training_options
from sb3_mlflow_ckpt.interruption import DEFAULT_GRACE_SECONDS, EXIT_CODES
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_DOCUMENT = (ROOT / "docs" / "preemption.md").read_text()
_CONFIG = """
env_id: toy_environments:FixedLength-v0
env_wrappers: [WRAPPER]
total_timesteps: 256
checkpoint_interval_episodes: 10
hyperparameters: {n_steps: 64}
mlflow: false
"""


def _recipe(kind: str) -> str:
    [text] = re.findall(rf"^```{kind}\n(.*?)^```$", _DOCUMENT, re.MULTILINE | re.DOTALL)
    return text


def _unit() -> dict[str, str]:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(_recipe("systemd"))
    return dict(unit["Service"])


def _pod() -> tuple[dict[str, Any], dict[str, Any]]:
    job = yaml.safe_load(_recipe("manifest"))["spec"]
    return job, job["template"]["spec"]


class Scheduler:
    """Starts one command again and again in one folder, as a scheduler does."""

    def __init__(self, cwd: Path, command: list[str], path: str = "") -> None:
        self.cwd = cwd
        self._command = command
        self._env = environment(PATH=f"{path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        self._env["SLURM_JOB_ID"] = "7"
        self._leash = Leash(cwd, 0)
        (cwd / "train.yaml").write_text(_CONFIG.replace("WRAPPER", self._leash.wrapper))

    def start(self, steps: int = sys.maxsize) -> subprocess.Popen[str]:
        """Start it; it takes so many steps and then waits."""
        self._leash.allow(steps)
        before = len(list_checkpoints(self.cwd / "checkpoints"))
        with (self.cwd / "log").open("a") as log:
            process = subprocess.Popen(
                self._command, cwd=self.cwd, env=self._env, stdout=log, stderr=log, text=True, start_new_session=True
            )
        if steps < sys.maxsize:
            wait_for(lambda: len(list_checkpoints(self.cwd / "checkpoints")) > before, "a checkpoint", process)
        return process

    def stop(self, process: subprocess.Popen[str], signum: int, grace: float, *, group: bool = False) -> int:
        """Send a signal, and after the grace period SIGKILL; return the exit code that is reported."""
        self._leash.release()
        os.killpg(process.pid, signum) if group else process.send_signal(signum)
        try:
            code = process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(DEADLINE)
        return 128 - code if code < 0 else code

    def assert_trained(self) -> None:
        """The launches were one training, which has reached its target."""
        records = FolderRuns(self.cwd / "checkpoints").list()
        assert records[0]["status"] == "completed"
        assert len({record["root_run_id"] for record in records}) == 1
        newest = latest_checkpoint(self.cwd / "checkpoints")
        assert newest is not None and verify_checkpoint(newest).num_timesteps >= 256


def test_the_slurm_script_saves_before_its_time_is_over_and_goes_on_in_the_queue(tmp_path: Path) -> None:
    (tmp_path / "train.sbatch").write_text(_recipe("sbatch"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (programs / "scontrol").chmod(0o755)
    scheduler = Scheduler(tmp_path, ["bash", "train.sbatch"], str(programs))
    assert "#SBATCH --signal=B:USR1@60" in _recipe("sbatch")
    assert scheduler.stop(scheduler.start(100), signal.SIGUSR1, 60) == 138
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    # Requeued by SLURM itself: it tells every process of the job, and puts it into the queue on its own.
    assert scheduler.stop(scheduler.start(60), signal.SIGTERM, 30, group=True) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert scheduler.start().wait(DEADLINE) == 0
    scheduler.assert_trained()


def test_the_kubernetes_job_replaces_its_pod_until_the_training_has_ended(tmp_path: Path) -> None:
    job, pod = _pod()
    [container] = pod["containers"]
    arguments = [word.replace("/config/", "").replace("=/", f"={tmp_path}/") for word in container["args"]]
    command = [sys.executable if word == "python" else word for word in container["command"]]
    scheduler = Scheduler(tmp_path, [*command, *arguments])
    grace = pod["terminationGracePeriodSeconds"]
    codes = [scheduler.stop(scheduler.start(100), signal.SIGTERM, grace), scheduler.start().wait(DEADLINE)]
    assert codes == [143, 0]
    assert _action(job, 143) == "Ignore"
    scheduler.assert_trained()


def test_the_kubernetes_job_ends_at_a_wrong_setting_and_counts_errors(tmp_path: Path) -> None:
    job, pod = _pod()
    assert {code: _action(job, code) for code in EXIT_CODES.values()} == dict.fromkeys(EXIT_CODES.values(), "Ignore")
    assert _action(job, OneLineUsageError.exit_code) == "FailJob"
    assert [_action(job, code) for code in (FAILURE_EXIT_CODE, 137)] == ["Count", "Count"]
    # A policy for failures is refused for pods that restart their containers themselves.
    assert pod["restartPolicy"] == "Never"
    assert _grace(pod["containers"][0]["args"]) < pod["terminationGracePeriodSeconds"]


def _action(job: dict[str, Any], code: int) -> str:
    """Return what Kubernetes does with a pod whose container ended with a code: the first rule that fits decides."""
    for rule in job["podFailurePolicy"]["rules"]:
        requirement = rule.get("onExitCodes")
        if requirement and (code in requirement["values"]) == (requirement["operator"] == "In"):
            return str(rule["action"])
    return "Count"


def test_the_unit_goes_on_after_a_crash_and_stays_stopped(tmp_path: Path) -> None:
    unit = _unit()
    words = shlex.split(unit["ExecStart"])
    scheduler = Scheduler(tmp_path, [sys.executable, *words[1:]])
    process = scheduler.start(100)
    process.kill()
    assert _restarts(unit, process.wait(DEADLINE))
    # `systemctl stop` tells every process of the service.
    code = scheduler.stop(scheduler.start(60), signal.SIGTERM, float(unit["TimeoutStopSec"]), group=True)
    assert code == 143 and not _restarts(unit, code)
    assert not _restarts(unit, OneLineUsageError.exit_code)
    assert _restarts(unit, FAILURE_EXIT_CODE)
    # The next boot.
    code = scheduler.start().wait(DEADLINE)
    assert code == 0 and not _restarts(unit, code)
    scheduler.assert_trained()
    assert _grace(words) < float(unit["TimeoutStopSec"])


def _restarts(unit: dict[str, str], code: int) -> bool:
    """Return what `Restart=on-failure` does: not after a success, nor after a status that prevents it."""
    assert unit["Restart"] == "on-failure"
    success = {0, *map(int, unit["SuccessExitStatus"].split())}
    return code not in success | {int(status) for status in unit["RestartPreventExitStatus"].split()}


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT TESTED: systemd-analyze is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / "train.service"
    unit.write_text(_recipe("systemd").replace("/srv/train", str(tmp_path)))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_of_exit_codes_is_the_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+)", _DOCUMENT, re.MULTILINE)
    signals = {str(code): signal.Signals(signum).name for signum, code in EXIT_CODES.items()}
    expected = {"0": "trained", str(FAILURE_EXIT_CODE): "an", str(OneLineUsageError.exit_code): "a", "137": "SIGKILL"}
    assert dict(rows) == expected | signals
    assert len(rows) == len(expected) + len(signals)
    assert f"`--grace-seconds` ({DEFAULT_GRACE_SECONDS:.0f})" in _DOCUMENT


def _grace(words: list[str]) -> float:
    """Return the grace period that a command gives, whose flags must all be the trainer's."""
    text = " ".join(words)
    known = {flag for option in training_options() for flag in option.opts}
    assert set(re.findall(r"--[a-z-]+", text)) <= known
    return float(re.findall(r"--grace-seconds[= ](\d+)", text)[0])
