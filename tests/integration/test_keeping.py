"""What is never removed: pinned checkpoints, those that somebody resumes from, and what a run was told to keep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from filelock import FileLock
from journals import commit, save, start_run
from processes import Leash, environment, python, script, start_trainer, trainer, wait_for
from stable_baselines3 import DQN, PPO

from sb3_mlflow_ckpt import EpisodeCheckpointCallback
from sb3_mlflow_ckpt.checkpoints import (
    latest_checkpoint,
    lease_latest,
    list_checkpoints,
    load_checkpoint,
    pin_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    unpin_checkpoint,
    verify_checkpoint,
)
from sb3_mlflow_ckpt.commit import remove_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError
from sb3_mlflow_ckpt.layout import RunFolder, lease_path, pin_path
from sb3_mlflow_ckpt.leases import lease_checkpoint, leased_episodes
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.runs.folder import FolderRuns

TINY = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu"}

# Holds a checkpoint as a resume does, until it is killed.
_HOLDER = """
import sys, time
from pathlib import Path
from sb3_mlflow_ckpt.leases import lease_checkpoint
lease = lease_checkpoint(Path(sys.argv[1]))
print("held" if lease else "none", flush=True)
while True:
    time.sleep(60)
"""


def saved(folder: Path, *episodes: int) -> list[Path]:
    model = PPO("MlpPolicy", "CartPole-v1", **TINY)
    return [save_checkpoint(model, folder, agent_id="a", run_id="r", episode=episode) for episode in episodes]


def cli(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "sb3_mlflow_ckpt", *words, cwd=cwd)


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_what_another_process_resumes_from_stays_until_it_dies(tmp_path: Path) -> None:
    first, second, third = saved(tmp_path, 1, 2, 3)
    holder = hold(first)
    try:
        assert prune_checkpoints(tmp_path, keep_last_n=1) == [second]
        assert first.exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(300)
    assert prune_checkpoints(tmp_path, keep_last_n=1) == [first]
    assert list_checkpoints(tmp_path) == [third]
    assert not [path for path in third.parent.iterdir() if path.suffix == ".lease"]


def test_a_model_that_was_loaded_to_train_holds_its_checkpoint_and_one_that_predicts_does_not(tmp_path: Path) -> None:
    first, _, _ = saved(tmp_path, 1, 2, 3)
    folder = RunFolder(tmp_path, "a", "r")
    load_checkpoint(first)
    assert leased_episodes(folder) == set()
    model = load_checkpoint(first, gymnasium.make("CartPole-v1")).model
    assert leased_episodes(folder) == {1}
    model.learn(600, callback=EpisodeCheckpointCallback(5, 3, tmp_path, agent_id="a", run_id="child"))
    # The child has a checkpoint of its own: it needs its parent no longer.
    assert leased_episodes(folder) == set()
    del model


def test_a_lease_on_a_file_that_was_removed_meanwhile_is_taken_on_the_new_one(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    stale = lease_checkpoint(first)
    assert stale is not None
    lease_path(first).unlink()
    fresh = lease_checkpoint(first)
    assert fresh is not None
    stale.release()
    assert prune_checkpoints(tmp_path, keep_last_n=1) == []
    fresh.release()
    assert prune_checkpoints(tmp_path, keep_last_n=1) == [first]
    assert second.exists()


def test_a_symbolic_link_in_place_of_a_lease_is_not_followed(tmp_path: Path) -> None:
    first, _ = saved(tmp_path / "c", 1, 2)
    target = tmp_path / "target"
    lease_path(first).symlink_to(target)
    assert lease_checkpoint(first) is None
    assert prune_checkpoints(tmp_path / "c", keep_last_n=1) == [first]
    assert not os.path.lexists(lease_path(first))
    assert not target.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_read_only_folder_is_read_without_a_lease(tmp_path: Path) -> None:
    (first,) = saved(tmp_path, 1)
    first.parent.chmod(0o500)
    try:
        assert lease_checkpoint(first) is None
        assert load_checkpoint(first, gymnasium.make("CartPole-v1")).model.num_timesteps == 0
    finally:
        first.parent.chmod(0o700)


def test_a_folder_that_cannot_be_pruned_is_no_success(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    lock = RunFolder(tmp_path, "a", "r").lock
    lock.unlink(missing_ok=True)
    # Root may write to a read-only folder, but takes no folder for a lock.
    lock.mkdir()
    pruned = cli("checkpoints", "prune", "--checkpoint-dir", tmp_path, "--keep-last-n", 1, cwd=tmp_path)
    assert (pruned.returncode, pruned.stdout) == (1, "")
    assert pruned.stderr.startswith(f"{first.parent}: it cannot be pruned: ") and pruned.stderr.count("\n") == 1
    assert first.exists() and second.exists()


def test_a_run_that_is_training_is_left_to_itself_without_an_error(tmp_path: Path) -> None:
    first, _ = saved(tmp_path, 1, 2)
    with FileLock(RunFolder(tmp_path, "a", "r").lock):
        pruned = cli("checkpoints", "prune", "--checkpoint-dir", tmp_path, "--keep-last-n", 1, cwd=tmp_path)
    assert (pruned.returncode, pruned.stdout) == (0, "")
    assert pruned.stderr == f"{first.parent}: it is training now; its own process prunes it\n"


def test_a_zip_without_metadata_gets_no_lease_beside_it(tmp_path: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", **TINY).save(tmp_path / "mine.zip")
    load_checkpoint(tmp_path / "mine.zip", gymnasium.make("CartPole-v1"), algo="ppo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.zip"]


def test_a_pinned_checkpoint_stays_and_is_shown_as_pinned(tmp_path: Path) -> None:
    first, second, third = saved(tmp_path, 1, 2, 3)
    assert cli("checkpoints", "pin", first, cwd=tmp_path).stdout == f"{first}\n"
    assert pin_checkpoint(first) == first
    listed = json.loads(cli("checkpoints", "list", "--checkpoint-dir", tmp_path, "--json", cwd=tmp_path).stdout)
    assert [item["pinned"] for item in listed] == [True, False, False]
    dry = cli("checkpoints", "prune", "--checkpoint-dir", tmp_path, "--keep-last-n", 1, "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(dry.stdout) == {
        "removed": [str(second)],
        "kept": [{"path": str(first), "why": ["pinned"]}, {"path": str(third), "why": ["newest", "last"]}],
        "dry_run": True,
    }
    assert prune_checkpoints(tmp_path, keep_last_n=1) == [second]
    assert cli("checkpoints", "unpin", first, cwd=tmp_path).returncode == 0
    unpin_checkpoint(first)
    assert prune_checkpoints(tmp_path, keep_last_n=1) == [first]


def test_a_checkpoint_that_is_not_there_cannot_be_pinned(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(CheckpointNotFoundError):
        pin_checkpoint(tmp_path / "a" / "r" / "ep000009.zip")
    done = cli("checkpoints", "pin", "ep000009.zip", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("FileNotFoundError: Checkpoint not found: ep000009.zip")


def test_a_pin_whose_checkpoint_is_gone_is_swept(tmp_path: Path) -> None:
    first, _ = saved(tmp_path, 1, 2)
    pin_path(first.with_name("ep000007.zip")).touch()
    prune_checkpoints(tmp_path, keep_last_n=2)
    assert not pin_path(first.with_name("ep000007.zip")).exists()


def test_a_pin_is_in_the_record_until_its_checkpoint_is_gone(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run")
    for episode in (1, 2):
        save(journal, episode)
    pin_checkpoint(journal.folder.model(1))
    pin_path(journal.folder.model(9)).touch()
    journal.close()
    items = FolderRuns(tmp_path).get("run")["checkpoint_paths"]
    assert [(item["episode"], item["pinned"]) for item in items] == [(1, True), (2, False)]


def test_a_live_run_sees_the_pin_of_another_process_and_keeps_its_best_and_milestones(tmp_path: Path) -> None:
    """The rewards rise with the episodes, so the best is among the last; the milestones and the pin are not."""
    folder = RunFolder(tmp_path, "ppo_agent", "run")
    journal = start_run(tmp_path, "run")
    record = journal.record
    for episode in (10, 20, 30):
        save(journal, episode)
    journal.close()
    live = LiveRun(folder, record, (), RunOptions(Retention(1, 2, 20)), fresh=False)
    try:
        assert cli("checkpoints", "pin", folder.model(10), cwd=tmp_path).returncode == 0
        done = cli("checkpoints", "prune", "--checkpoint-dir", tmp_path, "--keep-last-n", 1, cwd=tmp_path)
        assert "it is training now" in done.stderr
        live._prune()
        assert [p.name for p in list_checkpoints(tmp_path)] == ["ep000010.zip", "ep000020.zip", "ep000030.zip"]
        commit(folder, 45)
        live._journal.add_saved(commit(folder, 50))
        live._prune()
    finally:
        live.finish("completed")
    kept = {path.name for path in list_checkpoints(tmp_path)}
    assert {"ep000010.zip", "ep000020.zip", "ep000030.zip", "ep000050.zip"} <= kept


def test_a_trainer_that_resumes_holds_its_parent_until_its_own_first_checkpoint(tmp_path: Path) -> None:
    """A chunk of the replay buffer is as much in use as the zip is."""
    # Seeded: the episodes must be short enough for more than three checkpoints.
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, buffer_size=500, seed=1, **TINY)
    model.learn(300, callback=EpisodeCheckpointCallback(5, 0, tmp_path / "checkpoints", agent_id="a", run_id="parent"))
    parent = RunFolder(tmp_path / "checkpoints", "a", "parent")
    paths = list_checkpoints(tmp_path / "checkpoints")
    assert len(paths) > 3
    leash = Leash(tmp_path, 0)
    child = start_trainer(
        *("--resume-from-checkpoint", paths[0], "--env-wrappers", leash.wrapper, "--run-id", "child", "--mlflow", "false"),
        *("--total-timesteps", 800, "--checkpoint-interval-episodes", 1, "--env-id", "CartPole-v1"),
        cwd=tmp_path,
    )  # fmt: skip
    own = RunFolder(tmp_path / "checkpoints", "a", "child")
    try:
        wait_for(own.record.exists, "the child has begun", child)
        removed = prune_checkpoints(tmp_path / "checkpoints", run_id="parent", keep_last_n=1)
        assert paths[0] not in removed
        assert len(removed) == len(paths) - 2
        verify_checkpoint(paths[0])
        leash.release()
        wait_for(lambda: own.record.exists() and list_checkpoints(tmp_path / "checkpoints", "child"), "a save", child)
        wait_for(lambda: not leased_episodes(parent), "the lease is given up", child)
        assert child.wait(300) == 0, (tmp_path / "trainer.log").read_text()
    finally:
        child.kill()
        child.wait(300)
    assert prune_checkpoints(tmp_path / "checkpoints", run_id="parent", keep_last_n=1) == [paths[0]]
    for path in list_checkpoints(tmp_path / "checkpoints"):
        verify_checkpoint(path)


def test_latest_takes_the_next_newest_where_a_prune_was_quicker(tmp_path: Path) -> None:
    """The prune comes between the listing and the lease, in another process."""
    saved(tmp_path / "checkpoints", 1, 2, 3)
    done = script(
        """
from pathlib import Path
from sb3_mlflow_ckpt import checkpoints
from sb3_mlflow_ckpt.commit import remove_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder
folder = RunFolder(Path("checkpoints"), "a", "r")
take = checkpoints.lease_checkpoint
def slow(path):
    if folder.metadata(3).exists():
        remove_checkpoint(folder, 3)
    return take(path)
checkpoints.lease_checkpoint = slow
path, lease = checkpoints.lease_latest("checkpoints")
print(path.name, lease is not None)
""",
        cwd=tmp_path,
    )
    assert done.stdout == "ep000002.zip True\n", done.stderr


def test_latest_takes_none_that_is_just_being_removed(tmp_path: Path) -> None:
    """Its metadata is gone and its zip is not: that verifies, and cannot be held."""
    folder = RunFolder(tmp_path / "checkpoints", "a", "r")
    saved(folder.checkpoint_dir, 1, 2)

    def prune(metadata: CheckpointMetadata) -> bool:
        if metadata.episode == 2:
            folder.metadata(2).rename(folder.path / ".tmp-1-ab-ep000002_metadata.json")
        return True

    path, lease = lease_latest(folder.checkpoint_dir, accept=prune)
    assert path == folder.model(1) and lease is not None


def test_latest_looks_again_where_all_went_before_they_were_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "checkpoints", "a", "r")
    saved(folder.checkpoint_dir, 1, 2)

    def prune(metadata: CheckpointMetadata) -> bool:
        if metadata.episode == 1:
            for episode in (1, 2):
                remove_checkpoint(folder, episode)
            saved(folder.checkpoint_dir, 3)
        return metadata.episode > 1

    assert latest_checkpoint(folder.checkpoint_dir, accept=prune) == folder.model(3)


def test_the_trainer_takes_the_settings(tmp_path: Path) -> None:
    done = trainer(
        *("--keep-last-n-checkpoints", 1, "--keep-best-n", 1, "--keep-every-n-episodes", 20, "--mlflow", "false"),
        *("--total-timesteps", 1500, "--checkpoint-interval-episodes", 10, "--hyperparameters", "{n_steps: 64}"),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = FolderRuns(tmp_path / "checkpoints").list()[0]
    items = FolderRuns(tmp_path / "checkpoints").get(run["run_id"])["checkpoint_paths"]
    there = {item["episode"] for item in items if item["on_disk"]}
    first = {}
    for item in items:
        first.setdefault(item["episode"] // 20, item["episode"])
    best = max((item["mean_reward"], n, item["episode"]) for n, item in enumerate(items))[2]
    assert there == {items[-1]["episode"], best} | {e for multiple, e in first.items() if multiple}


# Resumes from the latest again and again: what was verified under a lease must verify again until it is given up.
_RESUMER = """
import sys, time
from pathlib import Path
from sb3_mlflow_ckpt.checkpoints import lease_latest, verify_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError
from sb3_mlflow_ckpt.pins import pin_checkpoint, unpin_checkpoint
print("ready", flush=True)
held = missed = 0
while not Path("done").exists():
    path, lease = lease_latest("checkpoints")
    if path is None:
        missed += 1
        continue
    assert lease is not None
    time.sleep(0.02)
    verify_checkpoint(path)
    lease.release()
    held += 1
    if sys.argv[1] == "0":
        continue  # A pin is everybody's: two that pin and unpin would undo each other's.
    try:
        pin_checkpoint(path)
    except CheckpointNotFoundError:
        continue
    time.sleep(0.01)
    verify_checkpoint(path)
    unpin_checkpoint(path)
print(held, missed)
"""


def test_resumes_and_pins_race_with_prunes_and_neither_loses_a_checkpoint(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", **TINY)
    where = {"agent_id": "a", "run_id": "r"}
    save_checkpoint(model, tmp_path / "checkpoints", episode=1, **where)
    resumers = [
        subprocess.Popen(
            [sys.executable, "-c", _RESUMER, pins], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for pins in "01"
    ]  # fmt: skip
    try:
        for resumer in resumers:
            assert resumer.stdout is not None
            assert resumer.stdout.readline() == "ready\n"
        removed = 0
        for episode in range(2, 120):
            save_checkpoint(model, tmp_path / "checkpoints", episode=episode, **where)
            removed += len(prune_checkpoints(tmp_path / "checkpoints", keep_last_n=1))
        (tmp_path / "done").touch()
        for resumer in resumers:
            out, err = resumer.communicate(timeout=300)
            assert resumer.returncode == 0, err
            held, missed = map(int, out.split())
            assert held > 0
            assert missed == 0
    finally:
        for resumer in resumers:
            resumer.kill()
            resumer.wait(300)
    assert removed > 50
    prune_checkpoints(tmp_path / "checkpoints", keep_last_n=1)
    left = {path.suffix for path in (tmp_path / "checkpoints" / "a" / "r").iterdir()}
    assert left <= {".zip", ".json", ".lock", ""}


_PRUNER = """
import sys
from sb3_mlflow_ckpt.checkpoints import prune_checkpoints
print("begun", flush=True)
while True:
    prune_checkpoints(sys.argv[1], keep_last_n=0)
"""


def test_a_save_without_a_run_is_not_swept_as_a_dead_writers_by_a_prune_beside_it(tmp_path: Path) -> None:
    """The prune holds the folder's lock: the save's temporaries looked like those of somebody who died."""
    saved(tmp_path, 1)
    pruner = subprocess.Popen(
        [sys.executable, "-c", _PRUNER, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert pruner.stdout is not None
        assert pruner.stdout.readline() == "begun\n"
        for _ in range(4):
            for path in saved(tmp_path, *range(1, 21)):
                verify_checkpoint(path)
    finally:
        pruner.kill()
        pruner.wait()
        pruner.stdout.close()
