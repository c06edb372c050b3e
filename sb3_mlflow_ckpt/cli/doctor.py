"""Owns the command `doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from sb3_mlflow_ckpt.cli.commands import FAILURE_EXIT_CODE, Command, print_json
from sb3_mlflow_ckpt.cli.options import (
    checkpoint_dir_option,
    json_option,
    mongo_db_option,
    mongo_uri_option,
    tracking_uri_option,
    with_options,
)
from sb3_mlflow_ckpt.printable import printable


@click.command("doctor", cls=Command)
@with_options(checkpoint_dir_option, tracking_uri_option, mongo_uri_option, mongo_db_option, json_option)
@click.pass_context
def doctor_command(
    ctx: click.Context,
    checkpoint_dir: str,
    tracking_uri: str | None,
    mongo_uri: str | None,
    mongo_db: str,
    as_json: bool,
) -> None:
    """Examine what a training needs: versions, folder, disk, runs, MLflow, MongoDB; a line each, with the remedy.

    Changes nothing. Exits with 1 if something fails.
    """
    from sb3_mlflow_ckpt.doctor import examine

    findings = []
    for finding in examine(checkpoint_dir, tracking_uri=tracking_uri, mongo_uri=mongo_uri, mongo_db=mongo_db):
        findings.append(finding)
        if not as_json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            click.echo(printable(f"{finding.status:<4} {' '.join(finding.what.split())}{remedy}"))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.status == "FAIL" for finding in findings):
        ctx.exit(FAILURE_EXIT_CODE)
