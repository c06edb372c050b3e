"""Makes the README's pictures of the Training History from trainings that it runs.

Run it with: python docs/screenshot.py. It needs the extra [test] and a chromium, and takes about three minutes.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import FloatRect, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1440, 900
DEADLINE = 600.0
_COLOURS = 128

# A working folder's name is seen in the pictures' commands.
_FOLDER = "cartpole"
_TRAINER = (sys.executable, "-m", "sb3_mlflow_ckpt.trainer", "--device", "cpu", "--mlflow", "false", "--seed", "7")
_ALL = ("--keep-last-n-checkpoints", 0)
# What RL Baselines3 Zoo found for CartPole.
_PPO = ("--n-envs", 8, "--learning-rate", "lin_0.001", "--hyperparameters",
        "{n_steps: 32, batch_size: 256, n_epochs: 20, gae_lambda: 0.8, gamma: 0.98}")  # fmt: skip
_DQN = ("--algo", "dqn", "--learning-rate", 2.3e-3, "--hyperparameters",
        "{learning_starts: 1000, target_update_interval: 10, train_freq: 256, gradient_steps: 128,"
        " exploration_fraction: 0.16, exploration_final_eps: 0.04}")  # fmt: skip


def main() -> None:
    """Train, serve, look, write."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / _FOLDER
        folder.mkdir()
        resumed, live = train(folder)
        try:
            with serving(folder) as address, window() as page:
                page.goto(f"{address}/training")
                page.get_by_text("Live", exact=True).wait_for()
                save(page, "training-history.png")
                page.goto(f"{address}/training/{resumed}")
                page.locator(".resume").get_by_text("verified").wait_for()
                save(page, "training-run.png")
        finally:
            live.terminate()
            live.wait(DEADLINE)


def train(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Train a chain of two, three other runs, and one that goes on; return the id of the resumed one, and the last."""
    typo = ("--run-name", "PPO, a typo", "--agent-id", "ppo_typo", *_PPO, "--learning-rate", 1e20)
    start(folder, *typo, "--total-timesteps", 60_000).wait(DEADLINE)
    others = [
        start(folder, "--run-name", "A2C", "--algo", "a2c", "--n-envs", 8, "--total-timesteps", 100_000),
        start(folder, "--run-name", "DQN", *_DQN, "--total-timesteps", 50_000),
    ]
    first = start(folder, "--run-name", "PPO", *_PPO, *_ALL, "--total-timesteps", 120_000)
    wait_for(lambda: len(saved(folder, "ppo_agent")) >= 5, first)
    first.terminate()
    first.wait(DEADLINE)
    again = ("--run-name", "PPO, finer", "--learning-rate", "lin_3e-4", "--resume-from-checkpoint", "latest")
    start(folder, *again, "--agent-id", "ppo_agent", "--total-timesteps", 120_000).wait(DEADLINE)
    resumed = max(saved(folder, "ppo_agent"), key=lambda path: path.stat().st_mtime).parent.name
    for process in others:
        process.wait(DEADLINE)
    live = start(folder, "--run-name", "PPO, larger network", "--agent-id", "ppo_large", "--total-timesteps", 2_000_000,
                 *_PPO[:-1], "{n_steps: 32, batch_size: 256, policy_kwargs: {net_arch: [256, 256]}}")  # fmt: skip
    wait_for(lambda: len(saved(folder, "ppo_large")) > 2, live)
    return resumed, live


def start(folder: Path, *flags: object) -> subprocess.Popen[bytes]:
    """Start a training; what it prints goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "trainer.log").open("ab") as log:
        return subprocess.Popen([*_TRAINER, *map(str, flags)], cwd=folder, env=environment, stdout=log, stderr=log)


def saved(folder: Path, agent_id: str) -> list[Path]:
    """Return the committed checkpoints of an agent."""
    return list(folder.glob(f"checkpoints/{agent_id}/*/ep*_metadata.json"))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Return when a condition holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"a process did not do what it was waited for: {process.args!r}")
        time.sleep(0.1)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder's runs for as long as a block."""
    ports = [str(port) for port in free_ports()]
    words = [sys.executable, "-m", "sb3_mlflow_ckpt", "serve", "--port", ports[0], "--ui-port", ports[1]]
    address = f"http://127.0.0.1:{ports[1]}"
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(f"{address}/training"), server)
        yield address
    finally:
        server.terminate()
        server.wait(DEADLINE)


def answers(address: str) -> bool:
    """Return whether a page is there."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_ports() -> list[int]:
    """Return two ports that nobody listens at."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def window() -> Iterator[Page]:
    """Open a browser window for as long as a block."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        browser.close()


def save(page: Page, name: str) -> None:
    """Write a picture of what a window shows, in few colours."""
    end = page.evaluate("() => Math.ceil(document.querySelector('main').getBoundingClientRect().bottom)")
    clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": min(HEIGHT, end)}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip)))
    picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
