"""Owns the state of single environments: recorded, captured and put back inside the process that steps them."""

import copy

import gymnasium
import numpy as np


class CheckpointableEnv(gymnasium.Wrapper):
    def reset(self, **kw):
        self.before = copy.deepcopy(self.unwrapped.np_random.bit_generator.state)
        self.kw = kw
        self.actions = []
        return self.env.reset(**kw)

    def step(self, a):
        self.actions.append(np.array(a))
        return self.env.step(a)

    def capture_env_state(self):
        return {
            "how": "replay",
            "reason": None,
            "before": self.before,
            "actions": list(self.actions),
            "after": copy.deepcopy(self.unwrapped.np_random.bit_generator.state),
            "kw": {k: v for k, v in self.kw.items() if v is not None},
        }

    def restore_env_state(self, s):
        self.unwrapped.np_random.bit_generator.state = s["before"]
        self.reset(**s["kw"]) if False else self._r(s)
        return

    def _r(self, s):
        self.before = copy.deepcopy(s["before"])
        self.actions = []
        self.kw = s["kw"]
        self.env.reset(**s["kw"])
        for a in s["actions"]:
            self.step(a)
        self.unwrapped.np_random.bit_generator.state = s["after"]
