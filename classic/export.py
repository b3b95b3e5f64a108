"""Export a policy as one file that runs without this package: ONNX, or TorchScript; checked against the agent."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from classic.envs.images import image_layout
from classic.envs.normalization import LIMIT
from classic.ppo import PPO

INSTALL = "pip install 'rlhf-ppo[onnx]'"
CHECKED = 64
"""Random observations on which the file must act as the agent does."""


def export(agent: PPO, file: str | Path) -> Path:
    """Write the policy, with its normalisation and its actions' bounds, to ``*.onnx`` or ``*.pt`` (TorchScript).

    Input ``observations``: [N, *shape] of a Box, float32 (bytes for an image of bytes). Output ``actions``: the most
    likely ones as the environment takes them. The written file is run on random observations before this returns.

    Raises:
        ValueError: another file type; observations that are no Box, a recurrent policy or masks; or the file acts
            otherwise than the agent.
        ModuleNotFoundError: a package for ONNX is missing.
    """
    file = Path(file)
    if file.suffix not in (".onnx", ".pt"):
        raise ValueError(f"an exported policy is an .onnx or a .pt (TorchScript), got {file}")
    _require_plain(agent)
    policy, example = _Policy(agent).eval().requires_grad_(False), _observations(agent, 2)
    file.parent.mkdir(parents=True, exist_ok=True)
    write = _write_onnx if file.suffix == ".onnx" else _write_torchscript
    with torch.no_grad():
        run = write(policy, torch.from_numpy(example), file)
    observations = _observations(agent, CHECKED)
    expected, got = agent.predict(observations)[0], run(observations)
    if got.shape != expected.shape or not np.allclose(got, expected, atol=1e-4, rtol=1e-4):
        file.unlink()
        raise ValueError(
            f"the exported policy acts otherwise than the agent (up to {np.abs(got - expected).max():.3g} apart): "
            f"{file} was not written; use the other format"
        )
    return file


def _require_plain(agent: PPO) -> None:
    space = agent.envs.observation_space
    with agent._evaluation.lend(agent.run, agent.state, 1) as envs:
        envs.reset(0, "evaluation")
        masked = envs.action_masks is not None
    reasons = {
        f"observations that are no Box ({type(space).__name__})": not isinstance(space, Box),
        f"a recurrent policy (recurrent={agent.args.recurrent!r})": agent.network.recurrent,
        "action masks, for which the file has no input": masked,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"the agent of {agent.env_id!r} has {reason}: export is for plain policies")


class _Policy(nn.Module):
    """From observations to the most likely actions, both as the environment has them."""

    mean: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, agent: PPO) -> None:
        super().__init__()
        envs, statistics = agent.envs, agent.normalizer.observations
        self.network = copy.deepcopy(agent.network).cpu()
        self.layout, self.shape = image_layout(envs.observation_space), envs.observation_shape
        self.squash, self.normalizes = envs.squash, statistics is not None
        if statistics is not None:
            self.register_buffer("mean", torch.from_numpy(statistics.mean.copy()))
            self.register_buffer("spread", torch.from_numpy(np.sqrt(statistics.variance + 1e-8)))
        space: Any = envs.action_space
        self.action_shape, self.continuous = tuple(space.shape), isinstance(space, Box)
        kind = np.float32 if self.continuous else np.int64
        bounds = (space.low, space.high) if self.continuous else (getattr(space, "start", 0),) * 2
        for name, values in zip(("low", "high"), bounds, strict=True):  # of choices both are the first option
            self.register_buffer(name, torch.from_numpy(np.array(values, dtype=kind)))

    def forward(self, observations: Tensor) -> Tensor:
        output, _ = self.network.step(self._encoded(observations))
        actions = self.network.choose(output, None)
        actions = actions.reshape(-1, *self.action_shape)
        if not self.continuous:
            return actions + self.low
        if self.squash:
            actions = self.low + (torch.tanh(actions) + 1) * (self.high - self.low) / 2
        return torch.minimum(torch.maximum(actions, self.low), self.high)

    def _encoded(self, x: Tensor) -> Tensor:
        if self.layout is not None:
            x = x.reshape(-1, *self.layout.sides)
            x = x.permute(0, 3, 1, 2) if self.layout.channels_last else x
            x = x.reshape(-1, *self.shape)
            return x if self.layout.white is None else x / self.layout.white
        x = x.flatten(1)
        if not self.normalizes:
            return x.float()
        return ((x.double() - self.mean) / self.spread).clamp(-LIMIT, LIMIT).float()


def _observations(agent: PPO, count: int) -> np.ndarray:
    """Draw observations: uniform between bounds, normal where there are none."""
    space: Any = agent.envs.observation_space
    random = np.random.default_rng(0)
    if space.dtype == np.uint8:
        return random.integers(space.low, space.high, (count, *space.shape), dtype=np.uint8, endpoint=True)
    bounded = (np.abs(space.low) < 1e3) & (np.abs(space.high) < 1e3)
    low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
    return random.uniform(low, high, (count, *space.shape)).astype(np.float32)


def _write_torchscript(policy: _Policy, example: Tensor, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls tracing old, and comments on shapes that never change
        torch.jit.trace(policy, example, check_trace=False).save(str(file))  # pyright: ignore
        loaded = torch.jit.load(str(file))
    return lambda observations: loaded(torch.from_numpy(observations)).numpy()


def _write_onnx(policy: _Policy, example: Tensor, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports] (an extra)
        import onnxscript  # noqa: F401 # pyright: ignore[reportMissingImports] (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"writing {file.name} needs ONNX ({error}): {INSTALL}, or write a .pt") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            policy,
            (example,),
            str(file),
            input_names=["observations"],
            output_names=["actions"],
            dynamic_shapes={"observations": {0: torch.export.Dim("count")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda observations: session.run(None, {"observations": observations})[0]
