"""Seeds: runs, evaluations and videos of neighbouring numbers share no episode."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import classic
from classic.cli import main
from classic.envs.seeds import PURPOSES, derive_seeds
from classic.video import record_video


class Seeded(gymnasium.Env):
    """One step an episode; notes every seed that it is given."""

    observation_space = Box(0, 1, (1,), np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"
    given = []  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            Seeded.given.append(seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), 1.0, True, False, {}

    def render(self):
        return np.zeros((8, 8, 3), dtype=np.uint8)


def test_derived_seeds_are_all_different_and_fit_every_simulator():
    seeds = [s for seed in range(50) for purpose in PURPOSES for s in derive_seeds(seed, purpose, 32)]
    # Of 6,400 among 2**31 about 0.01 agree by chance.
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**31
    assert derive_seeds(3, "training", 8) == derive_seeds(3, "training", 32)[:8]
    assert not set(derive_seeds(3, "training", 8)) & set(derive_seeds(3, "training", 8, begun=4096))


@pytest.mark.parametrize("autoreset_mode", ["next_step", "same_step"])
def test_neighbouring_seeds_share_no_episode(autoreset_mode, small, tmp_path):
    Seeded.given.clear()
    for seed in range(4):
        agent = classic.PPO(Seeded, small(seed=seed, autoreset_mode=autoreset_mode)).learn(64)
        agent.evaluate(episodes=6)
        record_video(agent, tmp_path / "a.png", episodes=3, seed=seed)
    # Of each seed four copies train, at least four others are evaluated, and three episodes are filmed.
    assert len(Seeded.given) >= 4 * (4 + 4 + 3) and len(set(Seeded.given)) == len(Seeded.given)


def test_a_comparison_of_runs_with_shared_episodes_is_not_continued(tmp_path, capsys):
    command = ["compare", "tests/Match-v0", "--vary", "num_epochs=1", "--seeds", "1", "--output-dir", str(tmp_path)]
    command += "--num-envs 4 --num-steps 16 --num-minibatches 2 --hidden-sizes 16 --total-timesteps 64 --quiet".split()
    assert main(command) == 0
    file = tmp_path / "num_epochs=1" / "seed0" / "result.json"
    result = json.loads(file.read_text())
    del result["seeding"]  # as earlier versions wrote it
    file.write_text(json.dumps(result))
    assert main(command) == 2
    assert "neighbouring seeds shared episodes" in capsys.readouterr().err
