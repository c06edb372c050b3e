"""Owns what a checkpoint's configuration may ask for when nobody has vouched for the file.

A setting given on this launch is its user's word. One that comes from a checkpoint is a stranger's: a name in it may
only lead to what is installed for this purpose or already imported, and must be of the kind that its place asks for;
a number has bounds; a text may not look like a path. Nothing here imports what it refuses.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sb3_mlflow_ckpt.errors import UntrustedCheckpointError
from sb3_mlflow_ckpt.short_names import SHORT_NAMES

KNOWN_PACKAGES = (
    "stable_baselines3",
    "sb3_contrib",
    "torch.nn",
    "torch.optim",
    "gymnasium",
    "ale_py",
    "sb3_mlflow_ckpt",
)
"""Packages that a checkpoint may name without having been imported."""

# What must stand where a name stands; any other place takes no name.
_KINDS: Mapping[str, tuple[str, str]] = {
    "algo": ("stable_baselines3.common.base_class", "BaseAlgorithm"),
    "policy": ("stable_baselines3.common.policies", "BasePolicy"),
    "env_wrappers": ("gymnasium", "Wrapper"),
    "activation_fn": ("torch.nn", "Module"),
    "features_extractor_class": ("stable_baselines3.common.torch_layers", "BaseFeaturesExtractor"),
    "optimizer_class": ("torch.optim", "Optimizer"),
    "replay_buffer_class": ("stable_baselines3.common.buffers", "BaseBuffer"),
    "rollout_buffer_class": ("stable_baselines3.common.buffers", "BaseBuffer"),
}
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""How `module:Name` is written among hyperparameters."""

_PATH_KEY = re.compile(r"(^|_)(path|file|filename|folder|dir|directory|url|uri|log|prefix)s?($|_)", re.IGNORECASE)
_PATH = re.compile(r"[/\\:~\x00]")
_LONGEST_TEXT = 4096
# Far beyond what anybody trains with; what is far below it still fills a machine that is small enough.
_LIMITS: Mapping[str, int] = {
    "n_envs": 1024,
    "frame_stack": 128,
    "total_timesteps": 10**15,
    "buffer_size": 10**8,
    "n_steps": 10**7,
    "batch_size": 10**7,
    "stats_window_size": 10**7,
    "n_delta": 10**5,
    "n_sampled_goal": 10**4,
    "cg_max_steps": 10**6,
    "n_epochs": 10**6,
    "gradient_steps": 10**9,
    "verbose": 2,
}
_LARGEST_NUMBER = 10**12
_SUBPROCESSES = 256
# Belongs to a launch, not to a training: where this process writes.
_NOT_TAKEN_OVER = frozenset({"tensorboard_log"})


@dataclass(frozen=True)
class Refusal:
    """One thing that a checkpoint asks for and does not get.

    Attributes:
        setting: The setting as it is given on a launch.
        value: Its value, as it would be given again.
        cause: What is wrong, as a clause.
    """

    setting: str
    value: Any
    cause: str

    @property
    def flag(self) -> str:
        """The words that give the setting again."""
        return shlex.join(self.words)

    @property
    def words(self) -> tuple[str, str]:
        """The flag and its value."""
        name, _, key = self.setting.partition(".")
        flag = f"--{name.replace('_', '-')}"
        if key:
            return flag, f"{key}={self.value if isinstance(self.value, str) else json.dumps(self.value)}"
        return flag, self.value if isinstance(self.value, str) else json.dumps(self.value)


def stranger_settings(config: Mapping[str, Any], own: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return what of a checkpoint's configuration this launch does not give itself.

    Args:
        config: The checkpoint's configuration.
        own: The settings of this launch. Mappings merge key by key, as `TrainingConfig.inherit` merges them.
        names: The settings that a resume inherits.
    """
    taken: dict[str, Any] = {}
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if name not in own:
            taken[name] = value
        elif isinstance(value, Mapping) and isinstance(own[name], Mapping):
            taken[name] = {key: item for key, item in value.items() if key not in own[name]}
    return taken


def not_taken_over(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's configuration without the hyperparameters that belong to its own launch."""
    hyperparameters = config.get("hyperparameters")
    if not isinstance(hyperparameters, Mapping):
        return dict(config)
    kept = {key: value for key, value in hyperparameters.items() if key not in _NOT_TAKEN_OVER}
    return {**config, "hyperparameters": kept}


def check_settings(settings: Mapping[str, Any], where: object) -> None:
    """Raise for the first of a stranger's settings that is not to be used.

    Args:
        settings: What comes from the checkpoint.
        where: Its path or URI, for the error.

    Raises:
        UntrustedCheckpointError: One could run code, or write, read or fill something.
    """
    imported = frozenset(sys.modules)
    for refusal in refusals(settings, imported):
        raise refused(where, refusal)
    named = [*_names(settings), *_short_names(settings)]
    for setting, key, name in named:
        cause = _wrong_kind(setting, key, name)
        if cause:
            raise refused(where, Refusal(*_again(settings, setting), cause))


def refused(where: object, refusal: Refusal) -> UntrustedCheckpointError:
    """Return the error of a refusal, which names the words that give the setting again."""
    return UntrustedCheckpointError(
        where,
        refusal.cause,
        f"If that is meant, give it on this launch: {refusal.flag}. Or trust the file with all that it may run: "
        "--trust-checkpoint, or load_checkpoint(..., trusted=True)",
    )


def refusals(settings: Mapping[str, Any], imported: Collection[str] = ()) -> Iterator[Refusal]:
    """Yield what a stranger's settings ask for in vain, as far as that is seen without importing anything.

    Args:
        settings: What comes from the checkpoint.
        imported: Names of the modules that this process has; none for a process that is still to start.
    """
    for setting, _, name in _names(settings):
        if not _known(name.partition(":")[0], imported):
            module = name.partition(":")[0]
            cause = (
                f"its config names {name[:200]!r} as {setting}, and {module!r} is neither a known package nor "
                "imported here: importing it could run anything"
            )
            yield Refusal(*_again(settings, setting), cause)
    env_id = settings.get("env_id")
    if isinstance(env_id, str) and ":" in env_id and not _known(env_id.partition(":")[0], imported):
        cause = (
            f"its config names {env_id[:200]!r} as env_id, and {env_id.partition(':')[0]!r} is neither a known package "
            "nor imported here: importing it could run anything"
        )
        yield Refusal("env_id", env_id, cause)
    wrappers = settings.get("env_wrappers")
    arguments = [item for item in wrappers if isinstance(item, Mapping)] if isinstance(wrappers, list) else []
    for setting, key, value in _leaves({**settings, "env_wrappers": [list(item.values()) for item in arguments]}):
        cause = _wrong_value(setting, key, value, settings)
        if cause:
            yield Refusal(*_again(settings, setting), f"its config has {cause}")


def _again(settings: Mapping[str, Any], setting: str) -> tuple[str, Any]:
    """Return the part of a setting that a launch can give, and its value: mappings merge one level deep."""
    name, _, rest = setting.partition(".")
    value = settings.get(name)
    key = rest.partition(".")[0]
    if key and isinstance(value, Mapping) and key in value:
        return f"{name}.{key}", value[key]
    return name, value


def _known(module: str, imported: Collection[str]) -> bool:
    if "__main__" in module.split(".")[1:]:
        return False  # Importing it would run it.
    if any(module == package or module.startswith(f"{package}.") for package in KNOWN_PACKAGES):
        return True
    return module in imported and module.partition(".")[0] not in sys.stdlib_module_names


def _names(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the setting, its last key and the `module:Name` of every name in settings."""
    for key in ("algo", "policy"):
        value = settings.get(key)
        if isinstance(value, str) and ":" in value:
            yield key, key, value
    wrappers = settings.get("env_wrappers")
    for item in wrappers if isinstance(wrappers, list) else ():
        for name in [item] if isinstance(item, str) else item if isinstance(item, Mapping) else ():
            yield "env_wrappers", "env_wrappers", str(name)
    for setting, key, value in _leaves({"hyperparameters": settings.get("hyperparameters")}):
        if isinstance(value, str) and REFERENCE.fullmatch(value):
            yield setting, key, value


def _short_names(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the same for short names such as `Tanh`, written out as where they are looked up."""
    for setting, key, value in _leaves({"hyperparameters": settings.get("hyperparameters")}):
        if key in SHORT_NAMES and isinstance(value, str) and ":" not in value:
            name = value.removeprefix("nn.")
            homes = [home for home in SHORT_NAMES[key] if hasattr(importlib.import_module(home), name)]
            yield from ((setting, key, f"{home}:{name}") for home in homes[:1])


def _wrong_kind(setting: str, key: str, name: str) -> str:
    """Return why what a name leads to is not to be used there, or an empty text."""
    if key not in _KINDS:
        return f"its config names {name[:200]!r} as {setting}, where no name is expected"
    module_name, _, attribute = name.partition(":")
    home, kind_name = _KINDS[key]
    kind = getattr(importlib.import_module(home), kind_name)
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"its config names {name[:200]!r} as {setting}, which cannot be imported ({reason})"
    if inspect.isclass(found) and issubclass(found, kind):
        return ""
    return f"its config names {name[:200]!r} as {setting}, which is no {kind_name}"


def _leaves(value: Any, setting: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the dotted setting, the nearest key and the value of everything that is no mapping and no list."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _leaves(item, f"{setting}.{inner}" if setting else str(inner), str(inner))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, setting, key)
    else:
        yield setting, key, value


def _wrong_value(setting: str, key: str, value: Any, settings: Mapping[str, Any]) -> str:
    if isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)):
        limit = _LIMITS.get(key, _LARGEST_NUMBER)
        if key == "n_envs" and settings.get("vec_env") == "subproc":
            limit = _SUBPROCESSES
        # Infinities are settings; it is counts that are to be feared.
        return f"{setting} {value}, more than {limit}" if isinstance(value, int) and abs(value) > limit else ""
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            return f"a text of {len(value)} characters as {setting}"
        name = setting.partition(".")[0]
        if name in ("env_kwargs", "env_wrappers") and (_PATH_KEY.search(key) or _PATH.search(value)):
            return f"{value[:200]!r} as {setting}, which may be a path, an address or code to import"
        if name == "hyperparameters" and not REFERENCE.fullmatch(value) and _PATH.search(value):
            return f"{value[:200]!r} as {setting}, which may be a path or an address"
    return ""
