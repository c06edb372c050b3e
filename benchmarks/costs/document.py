"""Owns docs/performance.md: it is written whole, from figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from costs.goals import checks, goals_tables
from costs.tables import costs_tables, start_up_table, table, throughput_table

_TEXT = """# Performance

What a checkpoint costs a training, beside what other ways to save cost, measured side by side in one run. This page is
written by `python benchmarks/checkpointing.py --write-docs`, all of it: text, figures and verdicts. Milliseconds are a
machine's; ratios travel better.

{machine}

## The goals

A share of a limit up to 1 is met; 2 is twice what it should be.

{goals}

## What is measured, and how to read it

Each method saves the same model from a process of its own in the middle of a real `learn`, and the processes take turns
in a random order of each round. A figure comes from a pair of windows, in random order: the same number of steps and
updates, once with a checkpoint at the beginning and once without. Figures are medians, in brackets the middle half of
the values; after the comma stands the ratio to SB3's `save`.

| column | what it is |
|---|---|
| stall | how long the training thread waits for the save |
| lost | the time of the window with the checkpoint minus that without: the stall, and how much slower training is until the background work has ended |
| durable after | from the trigger until the background work has ended: on disk, and where MLflow takes part, there as well |
| written | bytes of new files, artifacts included |
| memory | the highest resident memory of the process and its children in the window, beyond what training alone takes |
| stall / memory copy | the stall as a multiple of copying parameters, optimizers and replay buffer into arrays that are there already |

- The stall alone misleads: what goes on in the background takes the interpreter and cores from the training.
- Only ours syncs files to the disk, hashes them, and saves what makes a resume exact: random states, the rollout, the
  environment. SB3's `save` is durable when the system happens to write it out, the others' as they please.
- SB3's `save` and the others write the replay buffer whole; ours writes the transitions that are new, 1,000 or a little
  more here. The buffers hold {transitions:,} transitions.
- The MLflow server and the training share the cores. MLflow's client works in a process of its own, as it does in a run
  that lasts, unless it says "in a thread"; that process is counted as memory.
- "A prototype of it" has a process write the files that a thread of the training writes in the product: with torch on
  one thread it loses as much where the state is small, and less where it is large. It hashes before it writes, so it
  takes longer until a checkpoint is durable.
- The lost time is a difference of two times: where it is a small part of the window, its spread says how far to trust it.

## What one checkpoint costs

{costs}

## Throughput

PPO on CartPole-v1, {steps:,} steps from the same seed, so {episodes} episodes each, the first of them a few dozen steps
short: ratios of the speed to that of a training without any callback right before or after it. The wait at the end is not
part of it.

{throughput}

## Start-up

Each is a process of its own, in turns with the one that it is compared with. The trainings end with their first step.
One more checkpoint is written at the end and at the beginning of a run of a tiny policy that keeps all of them.

{start_up}
"""  # noqa: E501 # a table
_NOT_MEASURED = "Not measured."


def document(figures: Mapping[str, Any]) -> str:
    """Return docs/performance.md."""
    throughput = figures.get("throughput") or ()
    options = figures["options"]
    return _TEXT.format(
        machine=machine_table(figures),
        goals=goals_tables(checks(figures)),
        costs=costs_tables(figures.get("costs") or ()) or _NOT_MEASURED,
        throughput=throughput_table(throughput) if throughput else _NOT_MEASURED,
        start_up=start_up_table(figures["start_up"]) if figures.get("start_up") else _NOT_MEASURED,
        steps=options["steps"],
        transitions=options["transitions"],
        episodes=throughput[0]["episodes"] if throughput else "the same",
    )


def machine_table(figures: Mapping[str, Any]) -> str:
    """Return the machine and the versions."""
    machine, options = figures["machine"], figures["options"]
    lines = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores, torch on {options['threads']}"],
        ["memory", f"{machine['memory'] / 2**30:.0f} GiB"],
        ["file system", machine["file_system"]],
        *(
            [what, f"{machine[key] / 1e9:.2f} GB/s"]
            for what, key in (("memory copy", "copy"), ("write and fsync", "write"), ("SHA-256", "sha256"))
        ),
        ["load before it began", f"{machine['load']:.1f}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())],
        ["rounds", str(options["rounds"])],
    ]
    return table(["machine", ""], lines)
