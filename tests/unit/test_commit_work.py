"""One more checkpoint takes as much work after thousands as after a few: counted, not timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.commit import capture_checkpoint
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.mirrors.process import JournalReplica
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.runs.document import new_record

EARLIER = 5_000


def record() -> dict[str, Any]:
    return new_record(
        run_id="r", agent_id="a", name=None, algo="PPO", env_id="CartPole-v1", config={}, total_timesteps=1, parent=None,
        root_run_id=None, heartbeat_seconds=1000.0, environment={},
    )  # fmt: skip


def calls(live: LiveRun, model: PPO, episode: int) -> int:
    """Return how many functions a commit calls, Python's and others'."""
    capture = capture_checkpoint(model, agent_id="a", run_id="r", episode=episode)
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        live._commit(capture)
    finally:
        sys.setprofile(before)
    return count


def long_ledger(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    lines = [
        {"event": kind, "episode": episode, **({"timestamp": f"2026-01-01T00:00:00.{episode % 1000:03d}Z"} if kind == "saved" else {})}
        for episode in range(1, EARLIER + 1)
        for kind in ("saved", "pruned")
    ]  # fmt: skip
    folder.events.write_bytes(b"".join(json_lines.atomic.dump_json(line, indent=None) for line in lines))


@pytest.mark.parametrize("retention", [Retention(3), Retention(3, 1, 1000)], ids=["last", "best and milestones"])
def test_a_commit_calls_as_many_functions_after_thousands(tmp_path: Path, retention: Retention) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu", seed=0)
    found = {}
    for name in ("few", "many"):
        folder = RunFolder(tmp_path / name, "a", "r")
        if name == "many":
            long_ledger(folder)
        live = LiveRun(folder, record(), [], RunOptions(retention, heartbeat_seconds=1000.0), fresh=name == "few")
        try:
            counts = [calls(live, model, EARLIER + number) for number in range(1, 12)]
        finally:
            live.finish("completed")
        found[name] = sorted(counts[6:])[2]
    assert found["many"] <= 1.05 * found["few"], found


def test_what_mirrors_are_told_of_one_more_checkpoint_is_that_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a", "r")
    long_ledger(folder)
    journal, sent = RunJournal(folder), []
    try:
        feed, replica = journal.feed(), JournalReplica(folder, sent.append)
        replica.take({"events": feed.take()})
        ledger, line = replica.changed_since(0)
        assert len(ledger.saved) == EARLIER
        journal._add_event({"event": "saved", "episode": EARLIER + 1})
        events = feed.take()
        replica.take({"events": events})
        assert [event["episode"] for event in events] == [EARLIER + 1]
        for told in (journal, replica):
            changed, _ = told.changed_since(line)
            assert [*changed.saved] == [*told.in_mirror().saved] == [EARLIER + 1]
    finally:
        journal.close()
