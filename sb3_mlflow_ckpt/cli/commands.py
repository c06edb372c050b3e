"""Owns how commands behave: errors as one line and an exit code, flags with `_` for `-`, options made when needed.

Importing it imports neither pydantic nor anything heavier.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from sb3_mlflow_ckpt.errors import (
    CheckpointError,
    ConfigError,
    IncompatibleCheckpointError,
    InvalidIdError,
    InvalidQueryError,
    MirrorUnavailableError,
)
from sb3_mlflow_ckpt.launch import arguments
from sb3_mlflow_ckpt.printable import printable, printable_json

FAILURE_EXIT_CODE = 1


class OneLineError(click.ClickException):
    """An error as a person at a terminal reads it.

    Args:
        line: What is printed on stderr.
    """

    exit_code = FAILURE_EXIT_CODE

    def __init__(self, line: str) -> None:
        super().__init__(printable(" ".join(part.strip() for part in line.splitlines())))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file, err=file is None)


class OneLineUsageError(OneLineError):
    """An error in what was typed or configured."""

    exit_code = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that a person can act on into `OneLineError`; everything else keeps its traceback."""
    try:
        yield
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            raise  # Its message is the help, in many lines.
        raise OneLineUsageError(f"Error: {_usage_line(error)}") from error
    except (ConfigError, InvalidQueryError) as error:
        raise OneLineUsageError(f"Error: {error}") from error
    except MirrorUnavailableError as error:
        raise OneLineError(f"Error: {error}") from error
    except CheckpointError as error:
        # To start the same command again would not help.
        wrong = isinstance(error, (InvalidIdError, IncompatibleCheckpointError))
        kind = OneLineUsageError if wrong else OneLineError
        raise kind(f"{builtin_name(error)}: {error}") from error


def builtin_name(error: BaseException) -> str:
    """Return the name of the builtin exception that an error is: the documented words begin with it."""
    too_general = (Exception, BaseException, object)
    builtin = (t for t in type(error).__mro__ if t.__module__ == "builtins" and t not in too_general)
    return next(builtin, type(error)).__name__


def _usage_line(error: click.UsageError) -> str:
    from sb3_mlflow_ckpt.runs.document import redact

    if isinstance(error, click.NoSuchOption):
        return f"No such option {error.option_name}.{_nearest_option(error)}"
    # A value without its flag ends up here, and may be the URI of a database.
    return redact(error.format_message())


def _nearest_option(error: click.NoSuchOption) -> str:
    context = error.ctx
    parameters = context.command.get_params(context) if context else []
    switches = {flag for p in parameters if isinstance(p, click.Option) and p.flag_value == "true" for flag in p.opts}
    if error.option_name.removeprefix("--no-") in {flag.removeprefix("--") for flag in switches}:
        return f" Type {error.option_name.replace('--no-', '--', 1)} false"
    known = [flag for p in parameters if isinstance(p, click.Option) for flag in p.opts if flag.startswith("--")]
    close = difflib.get_close_matches(error.option_name, known, n=1)
    if close:
        return f" Did you mean {close[0]}?"
    path = context.command_path if context else ""
    return f" List them with: {path} --help" if path else ""


def _dashes(token: str) -> str:
    return token.replace("_", "-")


class Command(click.Command):
    """A command whose errors are one line.

    `--total_timesteps` is `--total-timesteps`: `mlflow run -P x_y=1` passes what MLproject does not declare as
    `--x_y 1`.

    Args:
        make_params: Makes further options when they are first needed, so that listing the commands costs nothing.
        settings: What `click.Command` takes.
    """

    def __init__(
        self, *args: Any, make_params: Callable[[], Sequence[click.Parameter]] | None = None, **settings: Any
    ) -> None:
        own = settings.get("context_settings") or {}
        settings["context_settings"] = {"token_normalize_func": _dashes, **own}
        super().__init__(*args, **settings)
        self._make_params = make_params

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if self._make_params is not None:
            self.params = [*self.params, *self._make_params()]
            self._make_params = None
        return super().get_params(ctx)

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        # Not a setting of the context: click keeps the option as the first one has it, and that may be anybody's.
        return ["-h", "--help"]

    def main(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:
        return super().main(arguments() if args is None else args, *more, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with one_line_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A group of commands whose errors are one line."""

    command_class = Command
    group_class = type


def print_json(value: Any) -> None:
    """Print a value as JSON that a terminal can show."""
    click.echo(printable_json(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


def find_modules_here() -> None:
    """Have environments and wrappers of the folder that a command is given in be found, as `python -m` has them."""
    try:
        here = str(Path.cwd())
    except FileNotFoundError:
        return  # Somebody removed it.
    if here not in sys.path and "" not in sys.path and not getattr(sys.flags, "safe_path", False):
        # At the end: a file there is not to stand for an installed package.
        sys.path.append(here)
