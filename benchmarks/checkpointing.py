"""What a checkpoint costs a training, beside SB3's `save`, MLflow and others' asynchronous savers, in one run.

    python benchmarks/checkpointing.py --rounds 5
    python benchmarks/checkpointing.py --throughput --start-up --replay --json figures.json
    python benchmarks/checkpointing.py --from figures.json --write-docs

Without a part's flag the first part alone is measured: stall, lost time, time until durable, bytes and memory of one
checkpoint. docs/performance.md says how to read it. Lightning, torch.distributed and Orbax are measured where they are
installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from costs.campaign import Stores, checkpoint_costs, tell  # noqa: E402
from costs.document import document, machine_table  # noqa: E402
from costs.goals import checks, goals_tables  # noqa: E402
from costs.machine import describe_machine  # noqa: E402
from costs.methods import METHODS  # noqa: E402
from costs.policies import POLICIES  # noqa: E402
from costs.start_up import start_up  # noqa: E402
from costs.tables import costs_tables, middle, start_up_table, throughput_table  # noqa: E402
from costs.throughput import throughput  # noqa: E402

_PARTS = {"costs": checkpoint_costs, "throughput": throughput, "start_up": start_up}
_QUICK = {"rounds": 1, "policies": ["mlp"], "seconds": 0.2, "transitions": 2000, "steps": 1000, "checkpoints": 40}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts that are asked for; return their figures as plain JSON."""
    named = {name for name in _PARTS if getattr(options, name)}
    parts = [name for name in _PARTS if name in named] or ([] if options.replay else ["costs"])
    server = any("server" in name for name in options.methods)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures: dict[str, Any] = {"machine": describe_machine(Path(folder))}
        figures["options"] = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
        with Stores(Path(folder), server=server) as stores:
            for part in parts:
                figures[part] = list(_PARTS[part](stores, options))
    if options.replay:
        figures["replay"] = _replay(options)
    return figures


def _replay(options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "replay_checkpoint.py"), "--json", "--fills", "0.1"]
    tell("replay buffers: benchmarks/replay_checkpoint.py")
    done = subprocess.run([*command, "--repeats", str(options.rounds)], capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def plot(figures: dict[str, Any], file: Path) -> None:
    """Draw stall and lost time of each method and policy."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: python -m pip install matplotlib") from None
    rows = [row for row in figures.get("costs", ()) if row["pairs"]]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    if not policies:
        raise SystemExit("--plot draws what a checkpoint costs: measure it with --costs")
    figure = Figure(figsize=(8, 1 + 3 * len(policies)), layout="constrained")
    for axes, policy in zip(figure.subplots(len(policies), squeeze=False)[:, 0], policies, strict=True):
        own = [row for row in reversed(rows) if row["policy"] == policy]
        for shift, name in ((0.2, "stall"), (-0.2, "lost")):
            places = [index + shift for index in range(len(own))]
            axes.barh(places, [max(1e-3, 1e3 * middle(row, name)) for row in own], 0.4, label=name)
        axes.set_yticks(range(len(own)), [row["method"] for row in own])
        axes.set(xscale="log", xlabel="ms", title=policy)
        axes.legend()
    figure.savefig(file)


def show(figures: dict[str, Any]) -> None:
    """Print the tables of what was measured."""
    blocks = [machine_table(figures)]
    for part, shown in (("costs", costs_tables), ("throughput", throughput_table), ("start_up", start_up_table)):
        if figures.get(part):
            blocks.append(shown(figures[part]))
    print("\n\n".join([*blocks, goals_tables(checks(figures))]))


def parsed() -> argparse.Namespace:
    """Return the options; `--quick` and `--write-docs` change what others are without being given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for part, what in (
        ("costs", "what one checkpoint costs"),
        ("throughput", "whole trainings at several intervals"),
        ("start-up", "the command line, and the way to the first step of a resume"),
        ("replay", "replay buffers alone (benchmarks/replay_checkpoint.py)"),
    ):
        parser.add_argument(f"--{part}", action="store_true", help=f"measure {what}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="without one to a server none is started")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seconds", type=float, default=1.5, help="of measuring a method in each round")
    parser.add_argument("--transitions", type=int, default=100_000, help="in a replay buffer")
    parser.add_argument("--steps", type=int, default=10_000, help="of a whole training")
    parser.add_argument("--checkpoints", type=int, default=10_000, help="of a long run")
    parser.add_argument("--quick", action="store_true", help="seconds in all: one round, small sizes, no server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--from", type=Path, nargs="+", metavar="FILE", dest="files", help="show what --json wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw stall and lost time")
    parser.add_argument("--write-docs", action="store_true", help="measure all, and write docs/performance.md")
    before = parser.parse_args()
    if before.quick:
        parser.set_defaults(**_QUICK, methods=[name for name in METHODS if "server" not in name])
    if before.write_docs:
        parser.set_defaults(costs=True, throughput=True, start_up=True, replay=True)
    options = parser.parse_args()
    options.methods = options.methods or list(METHODS)
    return options


def main() -> None:
    """Measure, or read what was measured, and print the tables."""
    options = parsed()
    if options.files:
        figures: dict[str, Any] = {}
        for file in options.files:
            figures |= json.loads(file.read_text())
    else:
        figures = measure(options)
    if options.json:
        options.json.write_text(json.dumps(figures))
    show(figures)
    if options.plot:
        plot(figures, options.plot)
    if options.write_docs:
        (ROOT / "docs" / "performance.md").write_text(document(figures))


if __name__ == "__main__":
    main()
