"""Puts faults into every protocol of the product, in real processes, and prints what was lost: nothing.

    python tests/faults/campaign.py --kills 1000 --errors 500

kills processes with SIGKILL at every named point and at random instants, makes calls to the disk fail, and prints a
table. Each fault follows from `--seed` and is told if something was lost by it.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import injector  # noqa: E402

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE)
_DISK = ("open", "write", "fsync", "rename", "unlink", "link", "mkdir", "truncate")
_HEADER = ("protocol", "fault", "times", "points met", "lost", "recovery median", "max")


@dataclass
class Row:
    """A line of the table: what became of one kind of fault in one protocol."""

    protocol: str
    fault: str
    times: int = 0
    hit: int = 0
    points: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        median = statistics.median(self.seconds) if self.seconds else 0.0
        return (
            *(self.protocol, self.fault, str(self.times), str(len(self.points) or "any")),
            "**nothing**" if not self.lost else f"{len(self.lost)} (!)",
            *(f"{median:.2f} s", f"{max(self.seconds, default=0.0):.2f} s"),
        )


class Campaign:
    """Runs trials, each in folders of its own.

    Args:
        folder: Where they are.
        services: Addresses for the protocols that have mirrors: `mlflow`, `mongo`.
        seed: What the faults follow from.
    """

    def __init__(self, folder: Path, services: dict[str, str], seed: int) -> None:
        from workloads import WORKLOADS

        self._folder = folder
        self._services = services
        self._random = random.Random(seed)
        self._count = itertools.count()
        self.workloads = WORKLOADS
        self._prepared: dict[str, Path] = {}
        self._undisturbed: dict[str, tuple[list[str], float, list[Any]]] = {}

    def points(self, protocol: str) -> list[str]:
        """Return the names of the calls that an undisturbed process makes, in order."""
        return self._measured(protocol)[0]

    def kill_each(self, protocol: str, actions: tuple[str, ...] = ("before", "after", "tear"), every: int = 1) -> Row:
        """Kill the process once at every call, or at every so many with an offset that is drawn."""
        row = Row(protocol, "SIGKILL at each call" if every == 1 else "SIGKILL at a named point")
        names = self.points(protocol)
        for at in range(1 + self._random.randrange(every), len(names) + 1, every):
            action = self._random.choice(actions)
            self._trial(row, protocol, injector.Fault(action, at), names[at - 1])
        return row

    def kill_at_random(self, protocol: str, times: int) -> Row:
        """Kill the process at instants that a clock chooses."""
        row = Row(protocol, "SIGKILL at a random instant")
        for _ in range(times):
            # Some end before it: a kill that comes too late tests nothing, and is not counted.
            while not self._trial(row, protocol, None, None, self._random.uniform(0.0, self._measured(protocol)[1])):
                pass
        return row

    def fail(self, protocol: str, times: int) -> Row:
        """Let calls to the disk fail, once or from then on, or write a part only."""
        row = Row(protocol, "error of the disk")
        names = [name for name in self.points(protocol) if name.partition(":")[0] in _DISK]
        order = self._random.sample(range(len(names)), len(names))
        for index in itertools.islice(itertools.cycle(order), times):
            action = self._random.choice(("fail", "fail", "fail-on", "short"))
            error = self._random.choice(ERRORS) if action != "short" else 0
            name, at = names[index], names[: index + 1].count(names[index])
            self._trial(row, protocol, injector.Fault(action, at, name, error), name)
        return row

    def _measured(self, protocol: str) -> tuple[list[str], float, list[Any]]:
        if protocol not in self._undisturbed:
            import zygote
            from checks import examine, settled

            workload, cwd, context = self.workloads[protocol], *self._place(protocol)
            trace = cwd.with_suffix(".trace")
            ended = zygote.run(
                lambda report: workload.run(report, context), cwd, injector.Fault(), trace=trace, ports=self._ports(),
                links=workload.links,
            )  # fmt: skip
            looked = zygote.run(lambda report: examine(report, workload, ended.reports), cwd)
            after = zygote.run(lambda report: settled(report, workload), cwd)
            problems = [*ended.told("failure"), *looked.told("lost"), *after.told("lost")]
            if ended.code or looked.code or after.code or problems:
                raise SystemExit(f"{protocol}: undisturbed, it does not work: {problems}, see {cwd}.output")
            self._undisturbed[protocol] = trace.read_text().split(), ended.seconds, after.told("final")
        return self._undisturbed[protocol]

    def _trial(
        self, row: Row, protocol: str, fault: injector.Fault | None, point: str | None, kill_after: float | None = None
    ) -> bool:
        import zygote
        from checks import examine, mirrors, sane_error, settled

        names, _, final = self._measured(protocol)
        del names
        workload, cwd, context = self.workloads[protocol], *self._place(protocol)
        fails = fault is not None and fault.action in ("fail", "fail-on", "short")
        if fails and self._random.random() < 0.5:
            context = type(context)(**{**vars(context), "goes_on": True})
        ended = zygote.run(
            lambda report: workload.run(report, context), cwd, fault, kill_after=kill_after, ports=self._ports(),
            links=workload.links,
        ) if fault is not None or not workload.links else zygote.run(
            lambda report: workload.run(report, context), cwd, kill_after=kill_after
        )  # fmt: skip
        if kill_after is not None and ended.code != -9:
            shutil.rmtree(cwd)
            return False
        problems: list[str] = []
        if fails:
            problems += [wrong for wrong in [sane_error(ended.reports)] if wrong]
        looked = zygote.run(lambda report: examine(report, workload, ended.reports), cwd)
        gone_on = zygote.run(lambda report: workload.run(report, context), cwd)
        if workload.mirrored:
            from workloads import sync

            synced = zygote.run(lambda report: sync(report, context), cwd)
            problems += [f"sync: {why}" for why in synced.told("unsent")]
        after = zygote.run(lambda report: settled(report, workload), cwd)
        problems += [*looked.told("lost"), *after.told("lost")]
        for what, process in (("looking", looked), ("going on", gone_on), ("looking again", after)):
            if process.code:
                problems.append(f"{what} ended with {process.code}: {process.told('message')}")
        if final != after.told("final") and "training" not in protocol and not problems:
            problems.append(f"the next process left {after.told('final')}, an undisturbed one {final}")
        if "training" in protocol and not gone_on.told("trained"):
            problems.append("the training did not come to its end")
        if workload.mirrored:
            compared = zygote.run(lambda report: mirrors(report, context), cwd)
            problems += compared.told("lost") + ([f"comparing: {compared.told('message')}"] if compared.code else [])
        row.times += 1
        row.hit += ended.code != 0
        if point:
            row.points[point] += 1
        row.seconds += looked.told("recovered")
        how = str(fault) if fault is not None else f"SIGKILL after {kill_after:.4f} s"
        if problems:
            for problem in dict.fromkeys(map(str, problems)):
                print(f"LOST  {protocol}: {how} ({point or 'by the clock'}): {problem}  [{cwd}]", flush=True)
            row.lost.append(how)
        else:
            shutil.rmtree(cwd)
            cwd.with_suffix(".output").unlink(missing_ok=True)
        return True

    def _place(self, protocol: str) -> tuple[Path, Any]:
        """Return a folder for a trial with what lies there before, and where its mirrors are."""
        import zygote
        from workloads import EXPERIMENT, Context

        workload, cwd = self.workloads[protocol], self._folder / f"{next(self._count):05d}"
        database = f"f{uuid.uuid4().hex}"
        context = Context(database=database)
        if workload.mirrored:
            context = Context(self._services["mlflow"], self._services.get("mongo", ""), database)
        if workload.prepare is None:
            cwd.mkdir()
        else:
            if protocol not in self._prepared:
                ready = self._folder / f"prepared-{len(self._prepared)}"
                ready.mkdir()
                ended = zygote.run(lambda report: workload.prepare(report, context), ready)  # type: ignore[misc]
                assert ended.code == 0, ready.with_suffix(".output").read_text()
                self._prepared[protocol] = ready
            shutil.copytree(self._prepared[protocol], cwd)
        if workload.mirrored:

            def make(report: Any) -> None:
                from mlflow import MlflowClient

                MlflowClient(context.mlflow).create_experiment(EXPERIMENT + database)

            assert zygote.run(make, cwd).code == 0
        return cwd, context

    def _ports(self) -> str:
        addresses = {name: uri.rpartition(":")[2].partition("/")[0] for name, uri in self._services.items()}
        return ",".join(f"{name}={port}" for name, port in addresses.items() if port.isdigit())


def services(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the addresses of an MLflow server and a MongoDB-compatible one that live as long as it is used."""
    from mlflow_server import MlflowServer
    from servers import MongoServer

    tracking, mongo = MlflowServer(folder / "mlflow"), MongoServer(folder / "mongo")
    addresses = {}
    try:
        tracking.start()
        addresses["mlflow"] = tracking.uri
        if MongoServer.program() is not None:
            mongo.start()
            addresses["mongo"] = mongo.uri
        yield addresses
    finally:
        tracking.stop()
        mongo.stop()


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [_HEADER, tuple("---" for _ in _HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign and print its table; return 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="How many processes are killed")
    parser.add_argument("--errors", type=int, default=500, help="How many calls to the disk fail")
    parser.add_argument("--seed", type=int, default=0, help="What the faults follow from")
    parser.add_argument("--only", default="", help="Only protocols whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="Kill at every so many named points")
    parser.add_argument("--points", action="store_true", help="Print the named points and end")
    parser.add_argument("--keep", action="store_true", help="Leave the folders where something was lost")
    options = parser.parse_args(arguments)
    if not injector.preloaded():
        environment = {**os.environ, injector.PRELOAD: str(injector.library())}
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], environment)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    rows: list[Row] = []
    for addresses in services(folder / "services"):
        campaign = Campaign(folder, addresses, options.seed)
        protocols = [name for name in campaign.workloads if options.only in name]
        if options.points:
            for name in protocols:
                counted = Counter(campaign.points(name))
                print(f"{name}: " + ", ".join(f"{point} x{times}" for point, times in counted.items()))
            return 0
        for name in protocols:
            if "training" not in name:
                rows.append(_told(campaign.kill_each(name, every=options.every)))
        left = max(0, options.kills - sum(row.times for row in rows))
        for name in protocols:
            rows.append(_told(campaign.kill_at_random(name, -(-left // len(protocols)))))
        failing = [name for name in protocols if "training" not in name]
        for name in failing if options.errors else []:
            rows.append(_told(campaign.fail(name, -(-options.errors // len(failing)))))
    print(table(rows))
    lost = sum(len(row.lost) for row in rows)
    kills = sum(row.times for row in rows if row.fault.startswith("SIGKILL"))
    errors = sum(row.times for row in rows) - kills
    print(f"{kills} kills, {errors} errors, {lost} losses, {time.monotonic() - started:.0f} s, seed {options.seed}")
    if not lost and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if lost else 0


def _told(row: Row) -> Row:
    print(f"{row.protocol}: {row.fault}: {row.times} times, {row.hit} ended by it, {len(row.lost)} losses", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
