"""Owns the command `serve`."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sb3_mlflow_ckpt.cli.commands import Command
from sb3_mlflow_ckpt.cli.options import checkpoint_dir_option, mongo_db_option, mongo_uri_option, with_options
from sb3_mlflow_ckpt.errors import MirrorUnavailableError, RunNotFoundError
from sb3_mlflow_ckpt.printable import printable

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.runs.reader import RunReader


@click.command("serve", cls=Command)
@with_options(
    checkpoint_dir_option,
    mongo_uri_option,
    mongo_db_option,
    click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen"),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        metavar="INTEGER",
        help="The API's port; 0 for a free one",
    ),
    click.option(
        "--ui-port",
        type=click.IntRange(0, 65535),
        default=5173,
        show_default=True,
        metavar="INTEGER",
        help="The pages' port; 0 for a free one, that of the API for one port alone",
    ),
    click.option(
        "--token",
        envvar="SB3_MLFLOW_CKPT_TOKEN",
        metavar="TEXT",
        help="What everybody must know who asks; auto makes one. Better given as SB3_MLFLOW_CKPT_TOKEN",
    ),
    click.option(
        "--allowed-host",
        "allowed_hosts",
        multiple=True,
        metavar="NAME",
        help="A name of this server besides localhost, as browsers write it; may be repeated",
    ),
    click.option("--mlflow-ui-url", metavar="URL", help="Where MLflow's pages are; each run's own server by default"),
    click.option("--root-path", default="", metavar="PATH", help="Where a reverse proxy has put the pages: /history"),
    click.option(
        "--trusted-proxy",
        "trusted_proxies",
        multiple=True,
        metavar="ADDRESS",
        help="A proxy whose X-Forwarded headers are believed; may be repeated",
    ),
    click.option("--open", "open_browser", is_flag=True, help="Open the pages in a browser"),
)
def serve_command(
    checkpoint_dir: str,
    mongo_uri: str | None,
    mongo_db: str,
    host: str,
    port: int,
    ui_port: int,
    token: str | None,
    allowed_hosts: tuple[str, ...],
    mlflow_ui_url: str | None,
    root_path: str,
    trusted_proxies: tuple[str, ...],
    open_browser: bool,
) -> None:
    """Serve the Training History: the pages, and the REST API. Everything is read and nothing is changed.

    Runs are read from their folders, or from MongoDB with --mongo-uri. Whoever has an account on this machine can
    open the pages unless there is a token.
    """
    from sb3_mlflow_ckpt.web.settings import LOOPBACK, WebSettings, check_exposure, check_names, check_token

    made = token == "auto"
    if made:
        token = secrets.token_urlsafe(32)
    if token:
        check_token(token)
    settings = WebSettings(
        checkpoint_dir=Path(checkpoint_dir),
        token=token or None,  # A variable may be empty.
        allowed_hosts=allowed_hosts,
        mlflow_ui_url=mlflow_ui_url,
        root_path=root_path,
    )
    check_names(settings, trusted_proxies)
    check_exposure(host, settings)
    from sb3_mlflow_ckpt.web.app import create_app
    from sb3_mlflow_ckpt.web.serving import listen, make_server, port_of, serve

    store = _reader(checkpoint_dir, mongo_uri, mongo_db)
    listeners = [listen(host, port, "--port")]
    if ui_port != port or port == 0:
        listeners.append(listen(host, ui_port, "--ui-port"))
    shown = "localhost" if host in LOOPBACK else allowed_hosts[0]
    api, pages = (f"http://{shown}:{port_of(end)}{settings.root_path}" for end in (listeners[0], listeners[-1]))
    pages = f"{pages}/training" + (f"?token={token}" if made else "")

    def announce() -> None:
        click.echo(printable(f"Training History: {pages}"))
        click.echo(printable(f"REST API:         {api}/api/training-runs"))
        # In a thread: the pages say themselves that a database is down, and must not wait for it.
        threading.Thread(target=_warn_of_outage, args=(store,), daemon=True).start()
        if open_browser:
            click.launch(pages)

    serve(make_server(create_app(store, settings), trusted_proxies), listeners, announce)


def _warn_of_outage(store: RunReader) -> None:
    try:
        store.version("0")
    except RunNotFoundError:
        return
    except MirrorUnavailableError as error:
        click.echo(printable(f"Warning: {error}. Until it does, every answer is 503"), err=True)


def _reader(checkpoint_dir: str, mongo_uri: str | None, mongo_db: str) -> RunReader:
    if mongo_uri:
        from sb3_mlflow_ckpt.runs.mongo import MongoRuns
        from sb3_mlflow_ckpt.runs.mongo_database import connect

        # An address that can never be reached is an error now.
        connect(mongo_uri, mongo_db).client.close()
        return MongoRuns(mongo_uri, mongo_db)
    from sb3_mlflow_ckpt.runs.folder import FolderRuns

    return FolderRuns(checkpoint_dir)
