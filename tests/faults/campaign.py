"""Kills real processes at the points of every protocol, injects I/O errors, and counts what was lost.

The whole of it: python tests/faults/campaign.py --kills 1000 --errors 500
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import injection  # noqa: E402 # the path comes first
import invariants  # noqa: E402
from injection import FAIL, KILL_AFTER, KILL_BEFORE, SHORT, TEAR, Fault, read_trace  # noqa: E402
from workloads import WORKLOADS, Stage, Workload, copy_prepared, listen  # noqa: E402

DEADLINE = 120.0
_KILLS = (KILL_BEFORE, KILL_AFTER, TEAR)
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE)
_NETWORK_ERRORS = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)


@dataclass
class Row:
    """What a campaign found out about one protocol."""

    name: str
    kills: int = 0
    errors: int = 0
    unmet: int = 0
    points: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How a process of a trial ended: its exit code (negative: the signal), and the facts that it told."""

    code: int
    facts: list[dict[str, Any]]


def fork(work: Callable[[int], None], kill_after: float | None = None) -> Ended:
    """Run `work` in a fork of this process, which has imported everything; its argument is where it tells facts."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(reading)
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            work(writing)
            code = 0
        except BaseException as error:
            where = "".join(traceback.format_exception(error))[-1500:]
            os.write(writing, (json.dumps({"crash": f"{type(error).__name__}: {error}", "where": where}) + "\n").encode())
        finally:
            os._exit(code)
    os.close(writing)
    began, content, code = time.monotonic(), b"", None
    os.set_blocking(reading, False)
    while code is None:
        try:
            content += os.read(reading, 1 << 16)
        except BlockingIOError:
            pass
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - began > (DEADLINE if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if kill_after is None:
                content += b'{"crash": "it hung"}\n'
        else:
            time.sleep(0.002)
    os.set_blocking(reading, True)
    while piece := os.read(reading, 1 << 16):
        content += piece
    os.close(reading)
    return Ended(code, [json.loads(line) for line in content.splitlines() if line.endswith(b"}")])


class Campaign:
    """Runs trials in a folder.

    Args:
        folder: Where.
        addresses: The servers that run, by name.
        seed: Decides what befalls which call.
    """

    def __init__(self, folder: Path, addresses: dict[str, str], seed: int = 0) -> None:
        self._folder, self._addresses, self._seed = folder, addresses, seed
        self._count = 0
        self._met: dict[str, list[str]] = {}
        self._seconds: dict[str, float] = {}
        self.rows = {name: Row(name) for name in WORKLOADS}

    def available(self) -> list[str]:
        """Return the workloads whose server runs."""
        return [name for name, workload in WORKLOADS.items() if _server(name, workload) in ("", *self._addresses)]

    def rehearse(self, name: str) -> None:
        """Run a workload undisturbed, once: which points it meets, how long it takes, that nothing is lost."""
        workload = WORKLOADS[name]
        if workload.prepare is not None:
            prepared = self._stage(name, self._folder / f"prepared-{len(self._met)}", None)
            prepared.folder.mkdir()
            ended = fork(lambda pipe: workload.prepare(prepared) if workload.prepare else None)
            if ended.code != 0:
                raise RuntimeError(f"{name} cannot be prepared: {ended.facts}")
            self._prepared(name).parent.mkdir(exist_ok=True)
            prepared.folder.rename(self._prepared(name))
        began = time.monotonic()
        trace, ended, losses = self._trial(name, None)
        if ended.code != 0 or losses:
            raise RuntimeError(f"{name} fails undisturbed: {losses} {ended.facts[-3:]}")
        self._seconds[name] = next((f["seconds"] for f in ended.facts if "seconds" in f), time.monotonic() - began)
        self._met[name] = [met.point for met in trace]
        self.rows[name].points.update(self._met[name])

    def every_point(self, name: str) -> Iterator[Fault]:
        """Yield a kill at a random occurrence of every named point."""
        rng = random.Random(f"{self._seed} {name}")
        for point, times in sorted(Counter(self._met[name]).items()):
            yield Fault(rng.choice(_KILLS), rng.randint(1, times), point)

    def kills(self, name: str, count: int) -> Iterator[Fault]:
        """Yield kills at random calls."""
        rng = random.Random(f"{self._seed} {name} kills")
        for _ in range(count):
            yield Fault(rng.choice(_KILLS), rng.randint(1, max(1, len(self._met[name]))))

    def errors(self, name: str, count: int) -> Iterator[Fault]:
        """Yield errors at random points, each as likely as any other."""
        rng = random.Random(f"{self._seed} {name} errors")
        counted = sorted(Counter(self._met[name]).items())
        for _ in range(count):
            point, times = rng.choice([*counted, ("read:zip", 2)])
            network = point.partition(":")[2] in ("mlflow", "mongo")
            short = point.partition(":")[0] in ("write", "append", "send") and rng.random() < 0.15
            yield Fault(SHORT if short else FAIL, rng.randint(1, times), point,
                        0 if short else rng.choice(_NETWORK_ERRORS if network else _ERRORS), rng.random() < 0.3)  # fmt: skip

    def inject(self, name: str, fault: Fault) -> None:
        """Run one trial and note what came out."""
        row, workload = self.rows[name], WORKLOADS[name]
        self._count += 1
        trace, ended, losses = self._trial(name, fault)
        struck = [met.point for met in trace if met.action] or (["a random instant"] if workload.clock else [])
        if workload.faults:
            struck = [met.point for met in trace if met.action and (met.action, met.error) == (fault.action, fault.error)]
        if ended.code == -signal.SIGKILL:
            row.kills += 1
        elif not fault.kills and struck:
            row.errors += 1
        else:
            row.unmet += 1
        row.struck.update(struck)
        row.points.update(met.point for met in trace)
        row.losses += [f"{fault}: {loss}" for loss in losses]
        row.recoveries += [fact["recovery"] for fact in ended.facts if "recovery" in fact]

    def _trial(self, name: str, fault: Fault | None) -> tuple[list[Any], Ended, list[str]]:
        workload = WORKLOADS[name]
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="trial-") as parent:
            folder = Path(parent) / f"w{self._seed}-{os.getpid()}-{self._count}"
            if workload.prepare is not None:
                copy_prepared(self._prepared(name), folder)
            else:
                folder.mkdir()
            trace = Path(parent) / "trace"

            def perform(pipe: int, armed: bool = True) -> None:
                stage = self._stage(name, folder, pipe)
                listen(stage)
                faults = [*workload.faults, *([fault] if armed and fault is not None and not workload.clock else [])]
                injection.arm(folder, trace if armed else Path(os.devnull), faults, self._ports(name))
                began = time.monotonic()
                workload.run(stage)
                stage.acknowledge(seconds=time.monotonic() - began)

            after = None
            if workload.clock and fault is not None:
                rng = random.Random(f"{self._seed} {name} {self._count}")
                after = rng.uniform(0.1, 1.05) * self._seconds[name]
            ended = fork(perform, after)
            losses: list[str] = []
            met = read_trace(trace)
            if fault is not None:
                losses += invariants.errors(fault, ended.facts, met) if not fault.kills else []
                checked = fork(lambda pipe: self._check(name, folder, pipe, ended.facts))
                losses += [loss for fact in checked.facts for loss in fact.get("lost", [])]
                losses += [f"the check broke: {f['crash']} {f['where']}" for f in checked.facts if "crash" in f]
                ended = Ended(ended.code, ended.facts + checked.facts)
                again = fork(lambda pipe: perform(pipe, False))
                losses += [f"going on failed: {f['crash']} {f.get('where')}" for f in again.facts if "crash" in f]
            done = fork(lambda pipe: self._compare(name, folder, pipe))
            losses += [loss for fact in done.facts for loss in fact.get("lost", [])]
            losses += [f"the end cannot be read: {f['crash']} {f['where']}" for f in done.facts if "crash" in f]
            return met, ended, losses

    def _check(self, name: str, folder: Path, pipe: int, facts: list[dict[str, Any]]) -> None:
        stage = self._stage(name, folder, pipe)
        listen(stage)
        lost, recovery = invariants.after_fault(stage, WORKLOADS[name], facts)
        stage.acknowledge(lost=lost, recovery=recovery)

    def _compare(self, name: str, folder: Path, pipe: int) -> None:
        stage = self._stage(name, folder, pipe)
        listen(stage)
        stage.acknowledge(lost=invariants.after_recovery(stage, WORKLOADS[name]))

    def _stage(self, name: str, folder: Path, pipe: int | None) -> Stage:
        server = _server(name, WORKLOADS[name])
        return Stage(folder, pipe, {server: self._addresses[server]} if server else {})

    def _ports(self, name: str) -> dict[int, str]:
        server = _server(name, WORKLOADS[name])
        if not server:
            return {}
        return {int(self._addresses[server].partition("://")[2].partition("/")[0].rpartition(":")[2]): server}

    def _prepared(self, name: str) -> Path:
        return self._folder / "prepared" / str([*WORKLOADS].index(name))


def _server(name: str, workload: Workload) -> str:
    return {"MongoDB": "mongo", "MLflow, server": "mlflow"}.get(name, "")


def warm_up() -> None:
    """Import everything that a trial uses: forks have it then."""
    import logging

    import mlflow
    import mlflow.store.tracking.sqlalchemy_store
    import torch as th

    import sb3_mlflow_ckpt.callback
    import sb3_mlflow_ckpt.cli
    import sb3_mlflow_ckpt.loading
    import sb3_mlflow_ckpt.mirrors.mongo
    import sb3_mlflow_ckpt.trainer
    from sb3_mlflow_ckpt.state.archive import _system_info

    th.set_num_threads(1)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    _system_info()
    assert mlflow and sb3_mlflow_ckpt
    # Building a first model imports half of torch.
    fork(lambda pipe: None)
    from stable_baselines3 import DQN, PPO

    PPO("MlpPolicy", "CartPole-v1", device="cpu")
    DQN("MlpPolicy", "CartPole-v1", device="cpu", buffer_size=10)


def print_rows(rows: Sequence[Row], out: Any = sys.stdout) -> None:
    """Print the table."""
    print("| protocol | named points | SIGKILLs | I/O errors | lost | recovery, median / longest |", file=out)
    print("|---|---|---|---|---|---|", file=out)
    for row in rows:
        times = row.recoveries or [0.0]
        lost = f"**{len(row.losses)}**" if row.losses else "nothing"
        print(
            f"| {row.name} | {len(row.points)} | {row.kills} | {row.errors} | {lost} "
            f"| {statistics.median(times):.2f} s / {max(times):.2f} s |",
            file=out,
        )
    kills, errors = sum(row.kills for row in rows), sum(row.errors for row in rows)
    lost = sum(len(row.losses) for row in rows)
    print(f"| all | | {kills} | {errors} | {lost or 'nothing'} | |", file=out, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign and print its table; return 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--errors", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="decides what befalls which call")
    parser.add_argument("--only", default="", help="only protocols whose name holds this text")
    parser.add_argument("--every-point", action="store_true", help="first kill at every named point once")
    parser.add_argument("--without-servers", action="store_true", help="leave out what needs MLflow's server or MongoDB")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args(arguments)
    library = str(injection.library())
    if library not in os.environ.get("LD_PRELOAD", ""):
        plain = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        os.execve(sys.executable, [sys.executable, __file__, *(arguments or sys.argv[1:])],
                  {**os.environ, **plain, "LD_PRELOAD": library})  # fmt: skip
    warm_up()
    # Memory, where there is some to be had as a file system: what is proved is about processes, not about disks.
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", dir=base))).resolve()
        addresses = {} if options.without_servers else _start_servers(stack, folder)
        campaign = Campaign(folder, addresses, options.seed)
        names = [name for name in campaign.available() if options.only in name]
        total = sum(WORKLOADS[name].share for name in names)
        for name in names:
            share = WORKLOADS[name].share / total
            began = time.monotonic()
            campaign.rehearse(name)
            faults = [*campaign.every_point(name)] if options.every_point and not WORKLOADS[name].clock else []
            faults += campaign.kills(name, round(options.kills * share))
            if not WORKLOADS[name].clock:
                faults += campaign.errors(name, round(options.errors * share))
            for fault in faults:
                before = len(campaign.rows[name].losses)
                campaign.inject(name, fault)
                for loss in campaign.rows[name].losses[before:]:
                    print(f"LOST in {name} (seed {options.seed}): {loss}", file=sys.stderr, flush=True)
            print(f"{name}: {len(faults)} trials, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        rows = [campaign.rows[name] for name in names]
        print_rows(rows)
        if options.markdown:
            with options.markdown.open("w") as out:
                print_rows(rows, out)
        if options.json:
            facts = {row.name: {"points": dict(row.points), "struck": dict(row.struck), "kills": row.kills,
                                "errors": row.errors, "losses": row.losses} for row in rows}  # fmt: skip
            options.json.write_text(json.dumps(facts))
    return int(any(row.losses for row in rows))


def _start_servers(stack: ExitStack, folder: Path) -> dict[str, str]:
    from mlflow_server import MlflowServer
    from servers import MongoServer

    preload = os.environ.pop("LD_PRELOAD")
    addresses = {}
    try:
        if MongoServer.program() is not None:
            mongo = MongoServer(folder / "mongo")
            mongo.start()
            stack.callback(mongo.stop)
            addresses["mongo"] = mongo.uri
        server = MlflowServer(folder / "mlflow")
        server.start()
        stack.callback(server.stop)
        addresses["mlflow"] = server.uri
    finally:
        os.environ["LD_PRELOAD"] = preload
    return addresses


if __name__ == "__main__":
    sys.exit(main())
