"""Writes docs/training.md from `TrainingConfig`; with `--check` only says whether it is up to date.

Run it after a change of a setting: python docs/write_training_reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from sb3_mlflow_ckpt.cli.settings import Setting, settings

REFERENCE = Path(__file__).with_name("training.md")

_INTRODUCTION = """\
# Training configuration

<!-- Written by docs/write_training_reference.py from sb3_mlflow_ckpt/config.py. Change it there. -->

`python -m sb3_mlflow_ckpt.trainer` and `sb3-mlflow-ckpt train` are one command. Every setting below is a flag of it,
a key of a YAML file, an environment variable, and a field of `TrainingConfig` in Python.

## Where a setting comes from

The first place that names a setting wins:

1. its flag (`--n-envs 4`; `--n_envs 4` is the same);
2. the file of `--config`;
3. its environment variable (`SB3_MLFLOW_CKPT_N_ENVS=4`); an empty one is not set;
4. on a resume, the checkpoint's configuration, for the settings marked "inherited";
5. its default.

`hyperparameters`, `env_kwargs` and `normalize` merge key by key over these places; other settings replace.
A key that is not known, a value of the wrong type and an impossible value are one line that names the key, the
value, where it came from and the nearest valid name; the exit code is 2.

`--dry-run` prints the configuration that results, with what differs from the checkpoint, and trains nothing.
The value `inherit` of a flag or variable stands for "not given": MLproject has to pass every parameter.

## Settings

"Inherited" settings come back from the checkpoint on a resume. "Per launch" settings belong to a machine or to one
start of the trainer, and are taken anew each time.

| Flag | Type | Default | On a resume | What it is |
|---|---|---|---|---|
"""

_EXAMPLES = """\

Numbers may be written as `1000000`, `1e6` or `3e-4`. A MAPPING is a YAML or JSON mapping, or a pair that is
repeated; a LIST is a YAML or JSON list, or one item that is repeated. A switch alone means `true`:

```bash
python -m sb3_mlflow_ckpt.trainer --hyperparameters '{n_steps: 256, clip_range: lin_0.2}' --normalize
python -m sb3_mlflow_ckpt.trainer --hyperparameters n_steps=256 --hyperparameters clip_range=lin_0.2 --normalize true
python -m sb3_mlflow_ckpt.trainer --normalize norm_reward=false --mlflow false
```

## Configuration file

```yaml
# train.yaml
algo: ppo
env_id: CartPole-v1
total_timesteps: 2e5
learning_rate: lin_3e-4
n_envs: 4
normalize:
  norm_reward: false
hyperparameters:
  n_steps: 256
  policy_kwargs:
    net_arch: [64, 64]
checkpoint_interval_episodes: 50
keep_last_n_checkpoints: 5
```

```bash
python -m sb3_mlflow_ckpt.trainer --config train.yaml
```

A key that stands twice in the file is an error, not a silent choice.

## Environment variables

The variable of a setting is its name in capitals behind `SB3_MLFLOW_CKPT_`. They suit what a machine knows and a
file should not hold:

```bash
export SB3_MLFLOW_CKPT_MONGO_URI=mongodb://user:password@db.example/
export SB3_MLFLOW_CKPT_CHECKPOINT_DIR=/data/checkpoints
```

Credentials in URIs are left out of records, logs and error messages.

## MLflow Projects

`mlflow run . -P n_envs=4` passes the same settings; the names of its parameters are those of the keys of the file,
and `-P config=train.yaml` names the file. MLflow records parameters as they are typed, so a URI that holds a password
belongs in an environment variable. MLproject leaves out what `mlflow run` decides by itself: {left_out}.
"""
LEFT_OUT_OF_MLPROJECT = ("run_id", "mlflow", "tracking_uri", "experiment_name")


def reference() -> str:
    """Return the text of docs/training.md."""
    left_out = ", ".join(f"`{name}`" for name in LEFT_OUT_OF_MLPROJECT)
    return _INTRODUCTION + "".join(map(_row, settings())) + _EXAMPLES.replace("{left_out}", left_out)


def _row(setting: Setting) -> str:
    default = "unset" if setting.default is None else f"`{setting.default}`"
    resumed = "inherited" if setting.inherited else "per launch"
    # A bar would end the cell.
    metavar = setting.metavar.replace("|", "\\|")
    return f"| `{setting.flag}` | {metavar} | {default} | {resumed} | {setting.description} |\n"


def main(arguments: list[str]) -> int:
    """Write the reference, or check it."""
    text = reference()
    if arguments == ["--check"]:
        current = REFERENCE.read_text(encoding="utf-8") if REFERENCE.exists() else ""
        if current != text:
            print(f"{REFERENCE} is stale: run python {Path(__file__).name} in docs/", file=sys.stderr)
            return 1
        return 0
    REFERENCE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
