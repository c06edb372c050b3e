"""What a trial of a sweep begins with: its own checkpoint, a donor's, or what Tune hands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import trainer
from sweeps import same_weights

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, prune_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.layout import metadata_path
from sb3_mlflow_ckpt.resume import newest_of_run, resolve_checkpoint
from sb3_mlflow_ckpt.scale.search_space import Distribution
from sb3_mlflow_ckpt.scale.sweep_config import build_sweep
from sb3_mlflow_ckpt.scale.trial_row import _forward
from sb3_mlflow_ckpt.scale.trial_start import EXPLOIT, TrialStart, handed_checkpoint, trial_start

pytest.importorskip("ray.tune", reason="the extra [ray] is not installed")


def _trained(folder: Path, run_id: str, rate: float, seed: int) -> Path:
    flags = ["--total-timesteps", 128, "--learning-rate", rate, "--hyperparameters", "{n_steps: 64, batch_size: 64}"]
    done = trainer(*flags, "--run-id", run_id, "--seed", seed, "--mlflow", "false", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = latest_checkpoint(folder / "checkpoints", run_id)
    assert found is not None
    return found


def test_a_clone_learns_with_its_own_rate_from_the_first_update(tmp_path: Path) -> None:
    donor = _trained(tmp_path, "donor", 0.001, seed=1)
    _trained(tmp_path, "clone", 0.5, seed=2)
    space = {"learning_rate": Distribution("loguniform", (1e-5, 1.0))}
    config: dict[str, Any] = {"learning_rate": 0.0, EXPLOIT: "one"}
    def go_on(config: dict[str, Any], *handed: Path) -> TrialStart:
        given = [resolve_checkpoint(str(path), checkpoint_dir=str(path.parent), agent_id="") for path in handed]
        own = newest_of_run("clone", checkpoint_dir=str(tmp_path / "checkpoints"), tracked=False)
        return trial_start("clone", config, own, *given or [None], space)

    start = go_on(config, donor)
    assert start.source is not None and start.source.path == donor and start.generation == 1
    assert start.donor is not None and start.donor["run_id"] == "donor"
    sweep = build_sweep({"training": {"total_timesteps": 192, "mlflow": False}}, "sweep.yaml")
    training = sweep.trial_config(
        start.hyperparameters,
        run_id="clone",
        checkpoint_dir=str(tmp_path / "checkpoints"),
    )
    from sb3_mlflow_ckpt.trainer import SweepPlace, train

    facts = {"id": "s", "trial": "0", **start.facts()}
    result = train(training, sweep=SweepPlace(facts, source=start.source))
    assert result.num_timesteps == 192 and result.checkpoint is not None
    # With the donor's rate, an update would have changed them.
    same_weights(result.checkpoint, donor)
    # The same clone is not taken up twice; what it has saved since is the newest.
    again = go_on(config, donor)
    assert again.source is not None and again.source.path == result.checkpoint and again.generation == 1
    # Nor does a snapshot from before the exploit bring the trial back behind it.
    assert go_on({"learning_rate": 0.5}).hyperparameters == {"learning_rate": 0.0}


def test_what_was_reported_is_whole_after_retention_has_removed_it_from_the_run(tmp_path: Path) -> None:
    from sb3_mlflow_ckpt.scale.tune_reports import staged

    reported = _trained(tmp_path, "donor", 0.001, seed=1)
    with staged(reported) as (folder, metadata):
        # The next checkpoint of a run that keeps one takes its place.
        newer = trainer(
            *("--resume-from-checkpoint", reported, "--run-id", "donor", "--total-timesteps", 640),
            *("--keep-last-n-checkpoints", 1, "--mlflow", "false"), cwd=tmp_path,
        )  # fmt: skip
        assert newer.returncode == 0, newer.stderr
        prune_checkpoints(tmp_path / "checkpoints", "donor", keep_last_n=1)
        assert not reported.exists()
        assert verify_checkpoint(folder / reported.name) == metadata
    assert not folder.exists()


def test_what_tune_dropped_is_not_what_it_hands(tmp_path: Path) -> None:
    dropped = _trained(tmp_path, "member", 0.001, seed=1)
    folder = tmp_path / "checkpoint_000001"
    folder.mkdir()
    later = trainer(
        *("--resume-from-checkpoint", dropped, "--run-id", "member", "--total-timesteps", 192, "--mlflow", "false"),
        cwd=tmp_path,
    )
    assert later.returncode == 0, later.stderr
    newest = latest_checkpoint(tmp_path / "checkpoints", "member")
    assert newest is not None
    for path in (dropped, newest):
        for file in (path, metadata_path(path)):
            (folder / file.name).hardlink_to(file)
    assert handed_checkpoint(folder) == folder / newest.name
    # The highest episode is not the newest, once a trial has gone on from another.
    for file in (newest, metadata_path(newest)):
        (folder / file.name).unlink()
    assert handed_checkpoint(folder) == folder / dropped.name


def test_a_curve_is_drawn_without_what_a_clone_left_behind() -> None:
    assert _forward([(2000, 10), (5000, 12), (3500, 40), (4500, 60)]) == [(2000, 10), (3500, 40), (4500, 60)]
