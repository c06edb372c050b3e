"""Owns the options: those of training, made from `TrainingConfig`'s fields, and those that commands share.

Importing it imports no pydantic, so the shared options repeat names and defaults that a test holds to the fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.cli.settings import Setting
    from sb3_mlflow_ckpt.sync import MirrorAddresses

_F = TypeVar("_F", bound=Callable[..., Any])

checkpoint_dir_option = click.option(
    "--checkpoint-dir",
    default="checkpoints",
    show_default=True,
    envvar="SB3_MLFLOW_CKPT_CHECKPOINT_DIR",
    metavar="FOLDER",
    help="The folder that holds agents' folders",
)
agent_id_option = click.option("--agent-id", metavar="TEXT", help="Only this agent")
run_id_option = click.option("--run-id", metavar="TEXT", help="Only this run; a UUID with or without dashes")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON")
tracking_uri_option = click.option(
    "--tracking-uri", envvar="SB3_MLFLOW_CKPT_TRACKING_URI", metavar="URI", help="MLflow tracking URI"
)
mongo_uri_option = click.option(
    "--mongo-uri", envvar="SB3_MLFLOW_CKPT_MONGO_URI", metavar="URI", help="The MongoDB that holds run records"
)
mongo_db_option = click.option(
    "--mongo-db",
    default="sb3_mlflow_ckpt",
    show_default=True,
    envvar="SB3_MLFLOW_CKPT_MONGO_DB",
    metavar="TEXT",
    help="Its database",
)


def with_options(*decorators: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Return one decorator that applies several options, listed in the help in the order given."""

    def decorate(function: _F) -> _F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def mirror_addresses(
    ctx: click.Context, tracking_uri: str | None, mongo_uri: str | None, mongo_db: str
) -> MirrorAddresses:
    """Return the addresses that a command names; the database's default must not win over the one that a run has."""
    from sb3_mlflow_ckpt.sync import MirrorAddresses

    is_default = ctx.get_parameter_source("mongo_db") is ParameterSource.DEFAULT
    return MirrorAddresses(tracking_uri, mongo_uri, None if is_default else mongo_db)


def training_options() -> list[click.Parameter]:
    """Return the options of the training command: one for each setting, `--config` and `--dry-run`.

    Values are taken as texts, so that one authority, `config.build_config`, checks them and names the flag.
    """
    from sb3_mlflow_ckpt.cli.settings import settings

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
