"""Owns the command line: parse, call, print, exit code. What a command needs is imported when it runs."""

from __future__ import annotations

import click

from sb3_mlflow_ckpt.cli.checkpoints import checkpoints_group
from sb3_mlflow_ckpt.cli.commands import Group
from sb3_mlflow_ckpt.cli.doctor import doctor_command
from sb3_mlflow_ckpt.cli.environments import check_env_command
from sb3_mlflow_ckpt.cli.runs import runs_group
from sb3_mlflow_ckpt.cli.serve import serve_command
from sb3_mlflow_ckpt.cli.sweep import sweep_command
from sb3_mlflow_ckpt.cli.training import train_command

__all__ = ["main", "train_command"]


@click.group(cls=Group)
@click.version_option(package_name="sb3-mlflow-ckpt", prog_name="sb3-mlflow-ckpt", message="%(prog)s %(version)s")
def main() -> None:
    """Checkpoints, resume and run history for Stable-Baselines3, mirrored to MLflow and MongoDB."""


for _command in (
    train_command,
    sweep_command,
    checkpoints_group,
    runs_group,
    serve_command,
    doctor_command,
    check_env_command,
):
    main.add_command(_command)
