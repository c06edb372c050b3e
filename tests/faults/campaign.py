"""Puts faults into every protocol of the product, in real processes, and prints what was lost: nothing.

    python tests/faults/campaign.py --kills 1000 --errors 500

kills processes with SIGKILL at every named point and at random instants, makes calls to the disk fail, and prints a
table. Each fault follows from `--seed` and is told if something was lost by it.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
        self._prepared: dict[str, tuple[Path, list[dict[str, Any]]]] = {}
        self._undisturbed: dict[str, tuple[list[str], float, list[Any]]] = {}

    def points(self, protocol: str) -> list[str]:
        """Return the names of the calls that an undisturbed process makes, in order."""
        return self._measured(protocol)[0]

    def kill_each(self, protocol: str, at_most: int | None = None) -> Row:
        """Kill the process at its named points, one after the other: before the call, after it, or in its middle.

        Calls of one name in a row, such as the writes of a file, are one point; which of them it is, is drawn.

        Args:
            protocol: What it does.
            at_most: At how many of them, at equal distances from an offset that is drawn.
        """
        row = Row(protocol, "SIGKILL at a named point")
        calls = itertools.groupby(enumerate(self.points(protocol), start=1), key=lambda call: call[1])
        points = [(name, [at for at, _ in group]) for name, group in calls]
        stride = max(self.workloads[protocol].stride, -(-len(points) // (at_most or len(points))))
        for name, at in points[self._random.randrange(stride) :: stride]:
            action = self._random.choice(("before", "after", "tear"))
            self._trial(row, protocol, injector.Fault(action, self._random.choice(at)), name)
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

            workload, cwd, context, before = self.workloads[protocol], *self._place(protocol)
            trace = cwd.with_suffix(".trace")
            ended = zygote.run(
                lambda report: workload.run(report, context), cwd, injector.Fault(), trace=trace, ports=self._ports(),
                links=workload.links,
            )  # fmt: skip
            looked = zygote.run(lambda report: examine(report, workload, before + ended.reports), cwd)
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

        final = self._measured(protocol)[2]
        workload, cwd, context, before = self.workloads[protocol], *self._place(protocol)
        fails = fault is not None and fault.action in ("fail", "fail-on", "short")
        if fails and self._random.random() < 0.5:
            context = type(context)(**{**vars(context), "goes_on": True})
        ended = zygote.run(
            lambda report: workload.run(report, context), cwd, fault, kill_after=kill_after, ports=self._ports(),
            links=workload.links,
        ) if fault is not None or not workload.links else zygote.run(
            lambda report: workload.run(report, context), cwd, kill_after=kill_after
        )  # fmt: skip
        if ended.code != -signal.SIGKILL and not any(ended.told("came")):
            # The process was quicker, or went another way: nothing was put to the test.
            shutil.rmtree(cwd)
            return False
        problems: list[str] = []
        if fails:
            problems += [wrong for wrong in [sane_error(ended.reports)] if wrong]
        told = before + ended.reports
        if fault is not None and fault.action == "fail-on" and fault.name.endswith(":curve"):
            # A file that takes nothing until the process ends has none of its points, and the user was told.
            told = [report for report in told if "point" not in report]
        looked = zygote.run(lambda report: examine(report, workload, told), cwd)
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
        # A run that was resumed from in another one stays as the fault left it.
        if final[-1:] != after.told("final")[-1:] and "training" not in protocol and not problems:
            problems.append(f"the next process left {after.told('final')}, an undisturbed one {final}")
        if "training" in protocol and not gone_on.told("trained"):
            problems.append("the training did not come to its end")
        if workload.mirrored:
            compared = zygote.run(lambda report: mirrors(report, context), cwd)
            problems += compared.told("lost") + ([f"comparing: {compared.told('message')}"] if compared.code else [])
        row.times += 1
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

    def _place(self, protocol: str) -> tuple[Path, Any, list[dict[str, Any]]]:
        """Return a folder for a trial, where its mirrors are, and what was told of what lies there before."""
        import zygote
        from workloads import EXPERIMENT, Context

        workload, cwd = self.workloads[protocol], self._folder / f"{next(self._count):05d}"
        database = f"f{uuid.uuid4().hex}"
        context = Context(database=database)
        if workload.mirrored:
            context = Context(self._services["mlflow"], self._services.get("mongo", ""), database)
        before: list[dict[str, Any]] = []
        if workload.prepare is None:
            cwd.mkdir()
        else:
            # What is sent to a mirror has an identity there: each trial needs a run of its own.
            if protocol not in self._prepared or workload.mirrored:
                ready = self._folder / f"prepared-{next(self._count)}"
                ready.mkdir()
                ended = zygote.run(lambda report: workload.prepare(report, context), ready)  # type: ignore[misc]
                assert ended.code == 0, ready.with_suffix(".output").read_text()
                self._prepared[protocol] = ready, ended.reports
            ready, before = self._prepared[protocol]
            shutil.copytree(ready, cwd)
        if workload.mirrored:

            def make(report: Any) -> None:
                from mlflow import MlflowClient

                MlflowClient(context.mlflow).create_experiment(EXPERIMENT + database)

            assert zygote.run(make, cwd).code == 0
        return cwd, context, before

    def _ports(self) -> str:
        addresses = {name: uri.rpartition(":")[2].partition("/")[0] for name, uri in self._services.items()}
        return ",".join(f"{name}={port}" for name, port in addresses.items() if port.isdigit())


@contextmanager
def services(folder: Path, *, wanted: bool) -> Iterator[dict[str, str]]:
    """Start an MLflow server and a MongoDB-compatible one, and stop them afterwards; give their addresses."""
    from mlflow_server import MlflowServer
    from servers import MongoServer

    if not wanted:
        yield {}
        return
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


def run_protocol(protocol: str, kills: int, errors: int, seed: int, at_most: int | None = None) -> list[Row]:
    """Put faults into one protocol.

    Args:
        protocol: Its name.
        kills: How many processes are killed at instants that a clock chooses, beside those at its named points.
        errors: How many calls to the disk fail.
        seed: What the faults follow from.
        at_most: At how many named points.
    """
    from workloads import WORKLOADS

    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    rows: list[Row] = []
    with services(folder / "services", wanted=WORKLOADS[protocol].mirrored) as addresses:
        campaign = Campaign(folder, addresses, seed)
        # A training's calls are those of the protocols that it is made of, in an order that differs by its speed.
        whole = "training" in protocol
        if not whole:
            rows.append(campaign.kill_each(protocol, at_most))
        rows.append(campaign.kill_at_random(protocol, kills))
        if errors and not whole:
            rows.append(campaign.fail(protocol, errors))
    if not any(row.lost for row in rows):
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def points() -> dict[str, list[str]]:
    """Return the named points of each protocol whose calls are always the same, as an undisturbed process meets them."""
    from workloads import WORKLOADS

    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    with services(folder / "services", wanted=True) as addresses:
        campaign = Campaign(folder, addresses, 0)
        found = {name: sorted(set(campaign.points(name))) for name in WORKLOADS if "training" not in name}
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _in_processes(options: argparse.Namespace, protocols: list[str]) -> list[Row]:
    """Run each protocol in a process of its own, several at a time."""
    from workloads import WORKLOADS

    # A trial with servers takes ten times as long.
    weights = {name: 0.25 if WORKLOADS[name].mirrored else 1.0 for name in protocols}
    failing = {name: weight for name, weight in weights.items() if "training" not in name}

    def run_one(protocol: str) -> list[Row]:
        kills = math.ceil(options.kills * weights[protocol] / sum(weights.values()))
        errors = math.ceil(options.errors * failing.get(protocol, 0.0) / sum(failing.values()))
        words = ["--only", protocol, "--seed", str(options.seed), "--kills", str(kills), "--errors", str(errors), "--json"]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False)
        *told, last = done.stdout.splitlines() or [""]
        for line in told:
            print(line, flush=True)
        if not last.startswith("["):
            return [Row(protocol, f"ended with {done.returncode}: {last}", lost=["all"])]
        rows = [Row(**{**row, "points": Counter(row["points"])}) for row in json.loads(last)]
        print(last, file=sys.stderr, flush=True)
        for row in rows:
            print(f"{row.protocol}: {row.fault}: {row.times} times, {len(row.lost)} losses", flush=True)
        return rows

    with ThreadPoolExecutor(options.jobs) as pool:
        return [row for rows in pool.map(run_one, protocols) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign and print its table; return 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="Processes that are killed at random instants")
    parser.add_argument("--errors", type=int, default=500, help="Calls to the disk that fail")
    parser.add_argument("--seed", type=int, default=0, help="What the faults follow from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Protocols at a time")
    parser.add_argument("--only", help="One protocol, by its name")
    parser.add_argument("--json", action="store_true", help="Print the rows as JSON")
    parser.add_argument("--points-at-most", type=int, help="At how many named points of each protocol it dies")
    parser.add_argument("--points", action="store_true", help="Print the named points")
    options = parser.parse_args(arguments)
    if not injector.preloaded():
        environment = {**os.environ, injector.PRELOAD: str(injector.library())}
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], environment)
    if options.points:
        print(json.dumps(points(), indent=2))
        return 0
    started = time.monotonic()
    if options.only:
        rows = run_protocol(options.only, options.kills, options.errors, options.seed, options.points_at_most)
    else:
        from workloads import WORKLOADS

        rows = _in_processes(options, [*WORKLOADS])
    if options.json:
        print(json.dumps([vars(row) for row in rows]))
        return 0
    print(table(rows))
    lost = sum(len(row.lost) for row in rows)
    at_random = sum(row.times for row in rows if row.fault == "SIGKILL at a random instant")
    at_points = sum(row.times for row in rows if row.fault == "SIGKILL at a named point")
    errors = sum(row.times for row in rows) - at_random - at_points
    print(
        f"{at_random} kills at random instants, {at_points} at named points, {errors} errors of the disk, "
        f"{lost} losses, {time.monotonic() - started:.0f} s, seed {options.seed}"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
