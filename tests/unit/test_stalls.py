"""How long checkpoints hold the training: what is counted, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import EpisodeCheckpointCallback
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.json_lines import read_lines
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.stalls import METRIC, Stalls, stall_text


def test_a_point_tells_what_came_since_the_one_before() -> None:
    stalls = Stalls()
    assert stalls.point() == {}
    stalls.note(0.001, 0.0)
    stalls.note(0.003, 0.0)
    assert stalls.point() == {METRIC: 4.0}
    assert stalls.point() == {}
    assert stalls.summary() == {"count": 2, "total_ms": 4.0, "longest_ms": 3.0, "waited_ms": 0.0}


def test_training_that_waits_for_the_disk_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    stalls = Stalls()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            stalls.note(1.6, 1.5)
    assert [record.getMessage()[:40] for record in caplog.records] == ["Training waited 1.5 s for the disk: chec"]
    assert stall_text({"checkpoint_stalls": stalls.summary()}) == (
        "1,600.0 ms each, 1,600.0 ms at most, of it 4,500 ms waiting for the disk"
    )


@pytest.mark.parametrize("value", [None, {}, [], {"count": 0}, {"count": "3"}, {"count": True, "total_ms": 1}], ids=str)
def test_a_record_that_says_nothing_of_it_is_nothing_said(value: object) -> None:
    assert stall_text({"checkpoint_stalls": value}) == ""


def test_a_run_tells_its_stalls_in_its_curve_and_its_record(tmp_path: Path) -> None:
    saving = EpisodeCheckpointCallback(2, 3, tmp_path, agent_id="a", run_id="r")
    PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(256, callback=saving)
    folder = RunFolder(tmp_path, "a", "r")
    points, _ = read_lines(folder.metrics)
    told = read_record(folder)["progress"]["checkpoint_stalls"]
    assert told["count"] == len(read_lines(folder.events)[0]) - sum("pruned" in str(e) for e in read_lines(folder.events)[0])
    assert sum(point.get(METRIC, 0) for point in points) == pytest.approx(told["total_ms"], abs=0.01)
    assert 0 < told["longest_ms"] <= told["total_ms"]
