"""Programs that tests start are what `subprocess.Popen` would have started."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import prefork
import psutil
import pytest
from processes import DEADLINE, environment, start_python, wait_for

_SLEEP = "import time; time.sleep(600)"
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfds, else every program starts anew")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("raise ValueError", 1),
    ],
)
def test_its_end_is_told(tmp_path: Path, code: str, expected: int) -> None:
    process = start_python("-c", code, cwd=tmp_path, log=tmp_path / "log")
    assert process.wait(DEADLINE) == process.returncode == process.poll() == expected
    assert ("ValueError" in (tmp_path / "log").read_text()) == (expected == 1)


def test_its_id_is_its_own_until_somebody_has_learnt_of_its_end(tmp_path: Path) -> None:
    process = start_python("-c", "", cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "the end")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(DEADLINE) == 0
    assert not psutil.pid_exists(process.pid)


def test_one_that_nobody_waits_for_ends_no_other(tmp_path: Path) -> None:
    dropped = start_python("-c", _SLEEP, cwd=tmp_path, log=tmp_path / "log")
    pid = dropped.pid
    del dropped
    gc.collect()
    assert psutil.Process(pid).is_running()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid), "its end")
    assert start_python("-c", "", cwd=tmp_path, log=tmp_path / "log").wait(DEADLINE) == 0


def test_it_takes_over_what_it_was_given(tmp_path: Path) -> None:
    told = "[sys.argv, os.getcwd(), os.environ['NAME'], os.getsid(0), sys.stdin.read()]"
    code = f"import json, os, sys; print(json.dumps({told}))"
    process = start_python(
        "-c", code, "word", cwd=tmp_path, log=tmp_path / "log", env=environment(NAME="value"), new_session=True
    )
    assert process.wait(DEADLINE) == 0
    expected = [["-c", "word"], str(tmp_path), "value", process.pid, ""]
    assert json.loads((tmp_path / "log").read_text()) == expected


def test_nothing_of_the_product_is_imported_before_and_no_descriptor_of_another_is_open(tmp_path: Path) -> None:
    others = [start_python("-c", _SLEEP, cwd=tmp_path, log=tmp_path / "log") for _ in range(3)]
    ended = start_python("-c", "", cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE, "the end")
    code = (
        "import os, sys; print([name for name in sys.modules if name.startswith('sb3_mlflow_ckpt')],"
        " [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if int(fd) > 2])"
    )
    try:
        done = prefork.run(["-c", code], cwd=tmp_path, env=environment(), timeout=DEADLINE)
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert ended.wait() == done.returncode == 0, done.stderr
    modules, _, descriptors = done.stdout.partition("] ")
    assert modules == "["
    assert "socket:" not in descriptors and "anon_inode" not in descriptors, descriptors
