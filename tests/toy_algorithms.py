"""An algorithm of a user's own."""

from stable_baselines3 import PPO


class MyPPO(PPO):
    """PPO by another name."""
