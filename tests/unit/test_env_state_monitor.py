"""SB3's Monitor around a restored environment: its counts, and its file."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import pytest
import toy_environments  # noqa: F401
from stable_baselines3.common.monitor import Monitor, load_results

from sb3_mlflow_ckpt import CheckpointableEnv


def make(folder: Path | None = None, **settings) -> CheckpointableEnv:
    filename = str(folder / "0") if folder else None
    return CheckpointableEnv(Monitor(gym.make("FixedLength-v0"), filename, **settings))


def play(env: CheckpointableEnv, steps: int) -> list[dict]:
    """Play on from a reset; return what Monitor says of each finished episode."""
    episodes = []
    for _ in range(steps):
        *_, terminated, truncated, info = env.step(0)
        if terminated or truncated:
            episodes.append({key: info["episode"][key] for key in "rl"})
            env.reset()
    return episodes


def rows(folder: Path) -> list[str]:
    return (folder / "0.monitor.csv").read_text().splitlines()[2:]


def surplus(folder: Path) -> str:
    return (folder / "0.monitor.csv.after-checkpoint").read_text()


def test_the_episode_under_way_is_counted_whole() -> None:
    env, other = make(), make()
    env.reset(seed=1)
    play(env, 13)
    assert other.restore_env_state(env.capture_env_state()) is None
    assert other.env.total_steps == 13
    assert other.env.rewards == env.env.rewards and len(env.env.rewards) == 3
    assert play(env, 20) == play(other, 20)


def test_the_lists_of_all_episodes_are_not_captured() -> None:
    env = make()
    env.reset(seed=1)
    play(env, 5)
    few = len(repr(env.capture_env_state()))
    play(env, 500)
    assert len(repr(env.capture_env_state())) < few + 200


@pytest.mark.parametrize("override", [True, False], ids=["w", "a"])
def test_rows_after_the_checkpoint_are_set_aside_in_the_same_process(tmp_path: Path, override: bool) -> None:
    if not override:
        make(tmp_path).close()
    env = make(tmp_path, override_existing=override)
    env.reset(seed=1)
    play(env, 12)
    state, then = env.capture_env_state(), rows(tmp_path)
    play(env, 10)
    late = rows(tmp_path)[len(then) :]
    assert len(late) == 2
    assert env.restore_env_state(state) is None
    assert rows(tmp_path) == then
    assert surplus(tmp_path).splitlines() == late
    play(env, 10)
    assert rows(tmp_path)[: len(then)] == then and len(rows(tmp_path)) == len(then) + 2
    assert len(load_results(str(tmp_path))) == len(then) + 2


def test_rows_of_a_file_that_was_empty_at_the_checkpoint_are_set_aside_and_another_files_are_not(tmp_path: Path) -> None:
    def written() -> str:
        return (tmp_path / "0.monitor.csv").read_text()

    env = make(tmp_path, override_existing=False)
    env.reset(seed=1)
    play(env, 2)
    state = env.capture_env_state()
    assert written() == ""
    play(env, 10)
    late = written()
    assert late.count("\n") == 2
    other = make(tmp_path, override_existing=False)
    assert other.restore_env_state(state) is None
    assert (written(), surplus(tmp_path)) == ("", late)
    play(other, 10)
    assert written().count("\n") == 2

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0.monitor.csv").write_text(late)
    assert make(elsewhere, override_existing=False).restore_env_state(state) is None
    assert (elsewhere / "0.monitor.csv").read_text() == late


def test_rows_are_neither_doubled_nor_lost_in_a_new_process(tmp_path: Path) -> None:
    env = make(tmp_path)
    env.reset(seed=1)
    play(env, 12)
    state = env.capture_env_state()
    play(env, 10)
    env.close()
    with (tmp_path / "0.monitor.csv").open("a") as file:
        file.write("5.0,")  # Killed while it wrote.
    resumed = make(tmp_path, override_existing=False)
    assert resumed.restore_env_state(state) is None
    play(resumed, 10)
    assert len(rows(tmp_path)) == 4
    assert len(surplus(tmp_path).splitlines()) == 3 and surplus(tmp_path).endswith("5.0,")


def test_a_second_surplus_is_added_to_the_first(tmp_path: Path) -> None:
    env = make(tmp_path)
    env.reset(seed=1)
    state = env.capture_env_state()
    for _ in range(2):
        play(env, 5)
        assert env.restore_env_state(state) is None
    assert len(surplus(tmp_path).splitlines()) == 2


def test_a_file_that_sb3_began_anew_is_left_alone(tmp_path: Path) -> None:
    env = make(tmp_path)
    env.reset(seed=1)
    state = env.capture_env_state()
    env.close()
    other = make(tmp_path)
    other.reset(seed=2)
    play(other, 10)
    written = rows(tmp_path)
    assert other.restore_env_state(state) is None
    assert rows(tmp_path) == written
    assert not (tmp_path / "0.monitor.csv.after-checkpoint").exists()


def test_a_shorter_file_with_a_torn_row_goes_on_with_a_line_of_its_own(tmp_path: Path) -> None:
    env = make(tmp_path)
    env.reset(seed=1)
    play(env, 12)
    state = env.capture_env_state()
    env.close()
    path = tmp_path / "0.monitor.csv"
    path.write_bytes(path.read_bytes()[:-4])
    resumed = make(tmp_path, override_existing=False)
    assert resumed.restore_env_state(state) is None
    play(resumed, 3)
    assert len(rows(tmp_path)) == 2
    assert all(row.count(",") == 2 for row in rows(tmp_path))


def test_a_path_is_never_taken_from_the_state(tmp_path: Path) -> None:
    env = make(tmp_path)
    env.reset(seed=1)
    state = env.capture_env_state()
    assert "monitor.csv" not in repr(state) and str(tmp_path) not in repr(state)
