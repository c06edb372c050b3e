"""Owns the command `check-env`."""

from __future__ import annotations

import click

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Command, find_modules_here, print_json
from sb3_mlflow_ckpt.cli.options import json_option


@click.command("check-env", cls=Command)
@click.argument("env_ids", nargs=-1, required=True, metavar="ENV_ID...")
@click.option("--env-kwargs", multiple=True, metavar="MAPPING", help="Arguments of the environments, as for train")
@click.option("--env-wrappers", multiple=True, metavar="LIST", help="Wrappers around them, as for train")
@click.option("--points", type=click.IntRange(min=1), default=8, show_default=True, help="How many states to restore")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="How many steps to compare")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="What seeds all of it")
@json_option
@click.pass_context
def check_env_command(
    ctx: click.Context,
    env_ids: tuple[str, ...],
    env_kwargs: tuple[str, ...],
    env_wrappers: tuple[str, ...],
    points: int,
    steps: int,
    seed: int,
    as_json: bool,
) -> None:
    """Tell whether a resume is exact in an environment, and how its state is captured.

    Exits with 1 if one is not exact.
    """
    from sb3_mlflow_ckpt.cli.settings import flag_layer
    from sb3_mlflow_ckpt.env_check import EnvSpecification, check_env

    find_modules_here()
    given = flag_layer({"env_kwargs": env_kwargs, "env_wrappers": env_wrappers}).values
    reports = [
        check_env(
            EnvSpecification(env_id, given.get("env_kwargs", {}), given.get("env_wrappers", ())),
            points=points,
            steps=steps,
            seed=seed,
        )
        for env_id in env_ids
    ]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        from sb3_mlflow_ckpt.cli.tables import print_env_reports

        print_env_reports([report.to_json() for report in reports])
    if not all(report.exact for report in reports):
        ctx.exit(FAILURE_EXIT_CODE)
