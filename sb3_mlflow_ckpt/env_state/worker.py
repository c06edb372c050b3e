"""Owns what a process that steps environments does with the signals that reach every process of a job.

Ctrl-C at a terminal reaches the whole process group; systemd and SLURM tell every process. A worker that dies of it
breaks the pipe that the training needs to save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType

from sb3_mlflow_ckpt.signal_watch import SIGNALS

_SB3_WORKERS = "stable_baselines3.common.vec_env.subproc_vec_env"


def leave_signals_to_the_trainer() -> None:
    """In a worker of the trainer, which ends its workers itself: take no notice of any, and end when it is gone."""
    if multiprocessing.parent_process() is None:
        return
    _take_no_notice(*SIGNALS)
    threading.Thread(target=_end_with_the_trainer, name="trainer-lives", daemon=True).start()


def leave_ctrl_c_to_the_training() -> None:
    """In a worker that SB3 started for anybody's own script: take no notice of Ctrl-C and of SIGUSR1.

    SIGTERM is how Python ends these workers when the script ends, so that one stays as it is.
    """
    # What the process runs, as `multiprocessing` keeps it: another child process may be the one that trains.
    target = getattr(multiprocessing.current_process(), "_target", None)
    is_worker = multiprocessing.parent_process() is not None and getattr(target, "__module__", None) == _SB3_WORKERS
    if is_worker and threading.current_thread() is threading.main_thread():
        _take_no_notice(*(signum for signum in SIGNALS if signum != signal.SIGTERM))


def _take_no_notice(*signums: signal.Signals) -> None:
    for signum in signums:
        # Not ignored: that, a simulator which the worker starts would inherit.
        signal.signal(signum, _leave_it)


def _leave_it(signum: int, frame: FrameType | None) -> None:
    """Do nothing: the worker ends when the training closes its end of the pipe, or when that dies."""


def _end_with_the_trainer() -> None:
    """End this worker when its trainer is gone, be it in the middle of a step that takes for ever."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
