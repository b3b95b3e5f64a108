"""Export: the file acts as the agent does, for every plain policy; others are refused by name."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import classic
from classic.cli import main
from classic.export import export

PLAIN = {
    "choice": ("tests/Match-v0", {"normalize_observations": True}),
    "numbers": ("tests/Aim-v0", {}),
    "squashed": ("Pendulum-v1", {"squash": True, "activation": "relu", "shared_network": True}),
    "state-dependent": ("tests/Aim-v0", {"state_dependent_std": True}),
    "gSDE": ("tests/Aim-v0", {"use_sde": True}),
    "image": ("tests/PixelsObservation-v0", {}),
    "several choices": ("tests/MultiDiscreteAction-v0", {}),
    "matrix": ("tests/MatrixAction-v0", {}),
}


@pytest.mark.parametrize("kind", ["pt", "onnx"])
@pytest.mark.parametrize(("env_id", "settings"), PLAIN.values(), ids=PLAIN)
def test_the_file_acts_as_the_agent(kind, env_id, settings, small, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="pip install 'rlhf-ppo[onnx]'")
        pytest.importorskip("onnxscript", reason="pip install 'rlhf-ppo[onnx]'")
    agent = classic.PPO(env_id, small(**settings, num_envs=2, num_steps=8)).learn(16)
    heads = [x for x in agent.network.policy.modules() if isinstance(x, torch.nn.Linear)]
    heads[-1].weight.data.mul_(300)  # actions reach their bounds
    file = export(agent, tmp_path / f"policy.{kind}")
    space = agent.envs.observation_space
    space.seed(7)
    observations = np.stack([space.sample() for _ in range(5)])
    if kind == "pt":
        actions = torch.jit.load(file)(torch.from_numpy(observations)).numpy()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        actions = session.run(["actions"], {"observations": observations})[0]
    expected = agent.predict(observations)[0]
    assert actions.dtype == expected.dtype and np.allclose(actions, expected, atol=1e-5)


def test_a_policy_that_comes_out_otherwise_is_not_written(small, tmp_path, monkeypatch):
    agent = classic.PPO("tests/Match-v0", small())
    agent.network.policy[-1].weight.data.mul_(100)
    monkeypatch.setattr("classic.export._Policy.forward", lambda self, x: self.low + (x[:, 0] > 99).long())
    agent.network.policy[-1].bias.data.copy_(torch.tensor([-1e3, 1e3]))
    with pytest.raises(ValueError, match=r"acts otherwise than the agent \(up to 1 apart\): .* was not written"):
        export(agent, tmp_path / "policy.pt")
    assert not (tmp_path / "policy.pt").exists()


@pytest.mark.parametrize(
    ("env_id", "settings", "words"),
    [
        ("tests/DictObservation-v0", {}, r"observations that are no Box \(Dict\): export is for plain policies"),
        ("tests/Recall-v0", {"recurrent": "lstm"}, "a recurrent policy"),
        ("tests/Allowed_info-v0", {}, "action masks, for which the file has no input"),
    ],
)
def test_other_policies_are_refused_by_name(env_id, settings, words, small, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(classic.PPO(env_id, small(**settings)), tmp_path / "policy.pt")


def test_the_command_line_and_a_missing_package(small, tmp_path, capsys, monkeypatch):
    classic.PPO("tests/Match-v0", small()).save(tmp_path / "agent")
    assert main(["export", str(tmp_path / "agent"), str(tmp_path / "policy.pt")]) == 0
    assert "policy.pt: checked on 64 random observations" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "agent"), str(tmp_path / "policy.h5")]) == 2
    assert "an exported policy is an .onnx or a .pt (TorchScript)" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(tmp_path / "agent"), str(tmp_path / "policy.onnx")]) == 2
    assert "pip install 'rlhf-ppo[onnx]', or write a .pt" in capsys.readouterr().err


class Memory(gymnasium.Env):
    """Bytes that are no image."""

    observation_space, action_space = Box(0, 255, (8,), np.uint8), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, True, False, {}


def test_bytes_that_are_no_image_become_numbers(small, tmp_path):
    agent = classic.PPO(Memory, small())
    rows = np.arange(16, dtype=np.uint8).reshape(2, 8)
    actions = torch.jit.load(export(agent, tmp_path / "a.pt"))(torch.from_numpy(rows)).numpy()
    assert (actions == agent.predict(rows)[0]).all()
