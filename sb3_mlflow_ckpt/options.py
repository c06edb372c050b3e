"""Owns the command's options: `TrainingConfig`'s fields as click options, and a command that makes them lazily.

Values are taken as texts, so that one authority, `config.build_config`, checks them and names the flag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.settings import Setting


def training_options() -> list[click.Parameter]:
    """Return the options of the training command: one for each setting, `--config` and `--dry-run`."""
    from sb3_mlflow_ckpt.settings import settings

    return [
        click.Option(
            ["--config", "config_file"], metavar="FILE.yaml", help="Settings as YAML; flags win over the file"
        ),
        click.Option(["--dry-run"], is_flag=True, help="Print the resolved configuration and train nothing"),
        *(_option(setting) for setting in settings()),
    ]


def _option(setting: Setting) -> click.Option:
    shown = "" if setting.default in (None, "{}", "[]") else f"  [default: {setting.default}]"
    extra: dict[str, Any] = {}
    if setting.is_switch:
        # `--normalize` alone means `--normalize true`.
        extra = {"is_flag": False, "flag_value": "true"}
    return click.Option(
        [setting.flag, setting.name],
        type=str,
        multiple=setting.takes_mapping or setting.takes_list,
        metavar=setting.metavar,
        help=setting.description.replace("`", "") + shown,
        **extra,
    )
