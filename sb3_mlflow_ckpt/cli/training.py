"""Owns the command `train`, which is also what `python -m sb3_mlflow_ckpt.trainer` runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from sb3_mlflow_ckpt.cli.commands import Command, find_modules_here
from sb3_mlflow_ckpt.cli.options import training_options
from sb3_mlflow_ckpt.printable import printable

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.config import TrainingConfig
    from sb3_mlflow_ckpt.trainer import ResolvedTraining


@click.command("train", cls=Command, make_params=training_options)
def train_command(config_file: str | None, dry_run: bool, **flags: str | tuple[str, ...] | None) -> None:
    """Train an agent, or resume one from a checkpoint.

    A setting comes from the first of: its flag, the file of --config, its environment variable
    (SB3_MLFLOW_CKPT_N_ENVS and so on), the checkpoint that is resumed, its default. The value "inherit" of a flag
    stands for "not given".
    """
    from sb3_mlflow_ckpt.cli.settings import environment_layer, file_layer, flag_layer
    from sb3_mlflow_ckpt.config import INHERIT, build_config

    find_modules_here()
    layers = [flag_layer(flags)]
    if config_file is not None and config_file != INHERIT:
        layers.append(file_layer(config_file))
    # Validated before torch is imported: a wrong flag is answered at once.
    config = build_config([*layers, environment_layer(os.environ)])

    if dry_run:
        from sb3_mlflow_ckpt.trainer import resolve_config

        _print_resolved(resolve_config(config))
    else:
        _train(config)


def _train(config: TrainingConfig) -> None:
    from rich.console import Console

    from sb3_mlflow_ckpt.cli.progress import TerminalReporter, configure_logging
    from sb3_mlflow_ckpt.errors import TrainingInterrupted
    from sb3_mlflow_ckpt.trainer import train

    console = Console()
    configure_logging(console)
    reporter = TerminalReporter(console)
    try:
        result = train(config, reporter=reporter)
    except TrainingInterrupted as interruption:
        reporter.close()
        reporter.interrupted(config, interruption.checkpoint)
        raise
    finally:
        reporter.close()
    reporter.finished(result)


def _print_resolved(resolved: ResolvedTraining) -> None:
    """Print a configuration as a YAML file that --config takes, with the differences as comments."""
    import yaml

    if resolved.source is not None:
        click.echo(printable(f"# resumes {resolved.source.uri}"))
        for key, change in resolved.differences.items():
            click.echo(printable(f"# differs from the checkpoint: {key}: {change['from']!r} -> {change['to']!r}"))
    click.echo(yaml.safe_dump(resolved.config.to_json(), sort_keys=False, allow_unicode=True), nl=False)
