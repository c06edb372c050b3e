"""Owns where the short names of a configuration are looked up. Pure: imports none of those places."""

from __future__ import annotations

from collections.abc import Mapping

SHORT_NAMES: Mapping[str, tuple[str, ...]] = {
    "activation_fn": ("torch.nn",),
    "optimizer_class": ("torch.optim", "stable_baselines3.common.sb2_compat.rmsprop_tf_like"),
    "features_extractor_class": ("stable_baselines3.common.torch_layers",),
    "replay_buffer_class": ("stable_baselines3", "stable_baselines3.common.buffers"),
    "rollout_buffer_class": ("stable_baselines3.common.buffers",),
}
"""Where a short name such as `Tanh` or `HerReplayBuffer` is looked up, by the argument that it is given for."""
