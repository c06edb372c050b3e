"""`python -m sb3_mlflow_ckpt` is the command `sb3-mlflow-ckpt`."""

from sb3_mlflow_ckpt import launch

if __name__ == "__main__":
    launch.conceal()
    from sb3_mlflow_ckpt.cli import main

    main()
