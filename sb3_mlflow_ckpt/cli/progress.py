"""Owns what a person sees of a training in the terminal: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean

from sb3_mlflow_ckpt.callback import EpisodeCheckpointCallback
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.resume_commands import given_again, resume_command
from sb3_mlflow_ckpt.trainer import ResolvedTraining, TrainingResult

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FRAMES = 0.25


class TerminalReporter:
    """Prints how a training goes.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: _ProgressCallback | None = None

    def starting(self, resolved: ResolvedTraining) -> None:
        """Print what is about to be trained, and what a resume changes."""
        config = resolved.config
        self._print(f"Training {config.algo} on {config.env_id} (agent {config.agent}, seed {config.seed})")
        if resolved.source is None:
            return
        metadata = resolved.source.metadata
        self._print(
            f"Resuming {resolved.source.uri} at episode {metadata.episode}, "
            f"{metadata.num_timesteps} of {config.total_timesteps} timesteps"
        )
        for key, change in resolved.differences.items():
            before, after = ("default" if value is None else value for value in (change["from"], change["to"]))
            self._print(f"  override {key}: {before} -> {after}")

    def callback(self, resolved: ResolvedTraining, checkpoints: EpisodeCheckpointCallback) -> BaseCallback:
        """Return the callback that shows the progress."""
        self._shown = _ProgressCallback(self._console, resolved, checkpoints)
        return self._shown

    def close(self) -> None:
        """Give the terminal back: an error or a signal leaves `learn` without its end."""
        if self._shown is not None:
            self._shown.stop()

    def finished(self, result: TrainingResult) -> None:
        """Print where everything is, and how to go on."""
        config = result.resolved.config
        if result.run_folder is None:
            self._print(
                f"Nothing to do: {result.num_timesteps} of {config.total_timesteps} timesteps are trained. "
                "To go on, give a greater --total-timesteps"
            )
            return
        self._print(f"Trained {result.num_timesteps} timesteps, {result.episode} episodes")
        self._print(f"Checkpoints: {result.run_folder}")
        if result.mlflow_run_id is not None:
            self._print(f"MLflow run:  {result.mlflow_run_id}")
        if result.checkpoint is not None:
            self._print_resume(config, result.checkpoint, result.num_timesteps)

    def interrupted(self, config: TrainingConfig, checkpoint: Path | None) -> None:
        """Print how to go on after a signal."""
        if checkpoint is None:
            self._print("Interrupted; no checkpoint was saved")
        else:
            self._print("Interrupted; the state was saved")
            self._print_resume(config, checkpoint)

    def _print_resume(self, config: TrainingConfig, checkpoint: Path, num_timesteps: int | None = None) -> None:
        record = {"config": config.to_json()}
        item = {"path": str(checkpoint), "on_disk": True, "num_timesteps": num_timesteps}
        self._print(f"Resume with: {resume_command(record, item, program='trainer', source='path')}")
        for line in given_again(record):
            self._print(f"  {line}")

    def _print(self, text: str) -> None:
        # A command must be copyable: no wrapping, no markup, no highlighting.
        self._console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def configure_logging(console: Console) -> None:
    """Send warnings to the console that also shows the bar, so that neither breaks the other."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    if not console.is_terminal:
        handler = logging.StreamHandler()  # type: ignore[assignment]
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # It announces the creation of its tables at level INFO, and sets its loggers up when it is imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # An outage is told once, by the replicator; urllib3 would tell every attempt.
    logging.getLogger("urllib3").setLevel(logging.ERROR)


class _ProgressCallback(BaseCallback):
    """Redraws a bar four times a second, or prints a line every ten seconds and at each checkpoint."""

    def __init__(self, console: Console, resolved: ResolvedTraining, checkpoints: EpisodeCheckpointCallback) -> None:
        super().__init__()
        self._console = console
        self._total = resolved.config.total_timesteps
        self._checkpoints = checkpoints
        self._pause = _SECONDS_BETWEEN_FRAMES if console.is_terminal else _SECONDS_BETWEEN_LINES
        self._last = (0.0, 0)
        self._shown: Path | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._told = False

    def _on_training_start(self) -> None:
        self._last = (time.monotonic(), self.num_timesteps)
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self.num_timesteps)
            self._bar.start()

    def _on_rollout_start(self) -> None:
        report, told, self._told = self._checkpoints.resume_report, self._told, True
        # Where it is not exact, a warning has said why.
        if not told and report is not None and report["exact"]:
            self._console.print("Everything is restored: the training goes on as if it had not stopped")

    def _on_step(self) -> bool:
        now = time.monotonic()
        new_checkpoint = self._bar is None and self._checkpoints.latest_checkpoint != self._shown
        if now - self._last[0] >= self._pause or new_checkpoint:
            self._show(now)
        return True

    def _on_training_end(self) -> None:
        self._show(time.monotonic())
        self.stop()

    def _show(self, now: float) -> None:
        then, steps = self._last
        self._last = (now, self.num_timesteps)
        self._shown = self._checkpoints.latest_checkpoint
        rate = (self.num_timesteps - steps) / (now - then) if now > then else 0.0
        infos: list[Any] = [info for info in (self.model.ep_info_buffer or ()) if "r" in info]
        reward = f"{safe_mean([info['r'] for info in infos]):.1f}" if infos else "-"
        saved = self._shown.name if self._shown is not None else "none yet"
        text = f"episode {self._checkpoints.episode}  reward {reward}  {rate:.0f} steps/s  checkpoint {saved}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(self.num_timesteps, self._total), description=text)
        else:
            self._console.print(f"{self.num_timesteps}/{self._total}  {text}", soft_wrap=True, highlight=False)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
