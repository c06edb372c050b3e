"""`python -m sb3_mlflow_ckpt` is the command `sb3-mlflow-ckpt`."""

from sb3_mlflow_ckpt import launch
from sb3_mlflow_ckpt.interruption import CommandGuard


def main() -> None:
    """Run the command line; secret words are hidden, and a signal is heard, before anything slow is imported."""
    launch.conceal()
    CommandGuard().install()
    launch.listening()
    from sb3_mlflow_ckpt.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
