"""Owns the first moment of the command: credentials leave the command line, which `ps` shows to everybody.

Called before anything heavy is imported. Does nothing where the package is used from somebody's own program.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

from sb3_mlflow_ckpt.redaction import redact, redact_arguments

_MODULES = ("sb3_mlflow_ckpt.__main__", "sb3_mlflow_ckpt.trainer")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SCRIPT = "sb3-mlflow-ckpt"
# Where the words wait for the program that takes this one's place; nobody but the user can read it there.
_VARIABLE = "_SB3_MLFLOW_CKPT_HIDDEN_WORDS"


def conceal() -> None:
    """Start this command again, in the same process, without the credentials among its words, if there are some.

    From then on the process shows `mongodb://***@host`; what a traceback prints is without credentials, too.
    """
    if not _is_command():
        return
    sys.excepthook = _print_redacted
    given = sys.argv[1:]
    words = redact_arguments(given)
    own = len(sys.orig_argv) - len(given)
    hidden = {index: word for index, word in enumerate(given) if word != words[index]}
    # On Windows another process would take this one's place, with another id.
    if not hidden or _VARIABLE in os.environ or os.name != "posix" or sys.orig_argv[own:] != given:
        return
    try:
        environ = {**os.environ, _VARIABLE: json.dumps(hidden)}
        # They wait until somebody hears them: Python's own start answers Ctrl-C with a traceback and the code 1.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        os.execve(sys.executable, [*sys.orig_argv[:own], *words], environ)
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        print(f"Credentials stay visible in the command line: {error}", file=sys.stderr)


def listening() -> None:
    """Let the signals come that have waited since the command was started again."""
    if _VARIABLE in os.environ:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def arguments() -> list[str] | None:
    """Return the words that the command was given, whatever its command line shows; None for those in `sys.argv`."""
    if not _is_command():
        return None
    conceal()
    # Taken out: what this process starts has no use for it.
    hidden = json.loads(os.environ.pop(_VARIABLE, "{}"))
    return [hidden.get(str(index), word) for index, word in enumerate(sys.argv[1:])]


def _is_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) in _MODULES or Path(sys.argv[0]).name.startswith(_SCRIPT)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")
