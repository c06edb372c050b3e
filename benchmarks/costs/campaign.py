"""Owns the processes and servers of a benchmark, and the rounds in which methods take turns."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow_server import MlflowServer
from processes import environment

from costs.methods import METHODS
from costs.policies import POLICIES
from costs.saving import Place
from costs.training import Task, work

_FORKS = multiprocessing.get_context("forkserver")


class Stores:
    """Where MLflow keeps things: a local store and a server, both in one folder."""

    def __init__(self, folder: Path, *, server: bool) -> None:
        self.folder = folder
        self.local = f"sqlite:///{folder}/local.db"
        self._server = MlflowServer(folder / "server") if server else None

    def __enter__(self) -> Stores:
        os.environ.update(environment(PYTHONPATH=os.pathsep.join(sys.path[:3])))
        os.environ["GIT_PYTHON_REFRESH"] = "quiet"
        _FORKS.set_forkserver_preload(["costs.training"])
        # Its tables are made once, not by two processes at the same time.
        made = _FORKS.Process(target=_make_store, args=(self.local, self.folder))
        made.start()
        if self._server is not None:
            self._server.start()
        made.join()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.stop()

    @property
    def server(self) -> str:
        """The server's address."""
        return self._server.uri if self._server is not None else ""

    def place(self, name: str) -> Place:
        """Return where something may save, in a folder that is still to be made."""
        return Place(self.folder / name, self.local, self.server, self.folder)

    @property
    def artifacts(self) -> tuple[Path, ...]:
        """Where the artifacts of both lie."""
        return self.folder / "mlruns", self.folder / "server" / "artifacts"


def _make_store(uri: str, folder: Path) -> None:
    from mlflow import MlflowClient

    os.chdir(folder)
    MlflowClient(tracking_uri=uri).create_run("0")


class Worker:
    """A process that measures when it is told to.

    Args:
        target: What it runs; it is given a connection and the arguments.
        arguments: What it needs.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._connection, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(target=target, args=(theirs, *arguments), daemon=False)
        self._process.start()
        theirs.close()

    def hear(self) -> Any:
        """Return what it says next.

        Raises:
            RuntimeError: It died.
        """
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("A training process died: its error is above") from None

    def ask(self, question: Any) -> Any:
        """Tell it what to measure; return what it answers."""
        self._connection.send(question)
        return self.hear()

    def close(self) -> None:
        """Let it end by itself; end it where it is in the middle of something."""
        try:
            self._connection.send(None)
        except OSError:
            self._process.kill()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def checkpoint_costs(stores: Stores, options: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each policy and method: its pairs, or why it was skipped."""
    for policy in options.policies:
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for method in options.methods:
                place = stores.place(f"{policy}-{method}")
                task = Task(policy, method, place, stores.artifacts, options.transitions, options.threads)
                workers[method] = Worker(work, task)
                stack.callback(workers[method].close)
            facts = {method: worker.hear() for method, worker in workers.items()}
            able = [method for method in workers if "skipped" not in facts[method]]
            pairs: dict[str, list[Any]] = {method: [] for method in able}
            for number in range(options.rounds):
                for method in random.Random(number).sample(able, len(able)):
                    pairs[method] += workers[method].ask(options.seconds)
                tell(f"{POLICIES[policy].title}: round {number + 1} of {options.rounds}")
            for method in workers:
                titles = {"policy": POLICIES[policy].title, "method": METHODS[method][0]}
                yield titles | {"names": [policy, method], "pairs": pairs.get(method, []), **facts[method]}


def interleaved(
    measure: Callable[[str], Mapping[str, Any]], baseline: str, modes: Sequence[str], rounds: int
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Return pairs of figures for each mode: its own, and the baseline's right before or after it."""
    pairs: dict[str, list[Any]] = {mode: [] for mode in modes}
    for number in range(rounds):
        chance = random.Random(number)
        for mode in chance.sample(list(modes), len(modes)):
            figures = {name: measure(name) for name in chance.sample([mode, baseline], 2)}
            pairs[mode].append((figures[mode], figures[baseline]))
    return pairs


def tell(line: str) -> None:
    """Say on standard error how far it is."""
    print(line, file=sys.stderr, flush=True)
