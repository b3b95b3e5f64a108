"""Demonstrations: record episodes of an agent, and clone recorded behaviour before training (a warm start).

The file is numpy's .npz, without pickles. Arrays of N steps, one after another: ``observations`` (of a Dict or Tuple
``observations.<key>`` each) and ``actions``, both as the environment has them. :func:`record` adds ``rewards``,
``terminated`` and ``truncated``, which cloning does not read.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from torch import Tensor
from torch.nn.functional import mse_loss

from classic.config import filled
from classic.envs.environments import Environments
from classic.envs.make_env import make_vector_env
from classic.envs.seeds import derive_seeds
from classic.evaluation import max_episode_steps
from classic.gradient_step import trained_parameters
from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Decisions, on_device
from classic.ppo import PPO
from classic.video import allowed_actions
from rlhf_ppo.core import minibatch_indices
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.runtime.machine.threads import torch_threads

INSIDE = 1 - 1e-6
"""Squashed actions at a bound are taken for this share of it: the bound itself is infinitely far before tanh."""


def record(agent: PPO, file: str | Path, *, episodes: int = 20, seed: int = 0, deterministic: bool = True) -> Path:
    """Play whole episodes with an agent and write its observations, actions, rewards and ends to a file.

    Args:
        agent: made from an id or a function.
        file: ``*.npz``.
        episodes: how many, one after another; each ends after ``eval_max_steps`` at the latest.
        seed: of the episodes.
        deterministic: take the most likely action instead of a sampled one.
    Raises:
        ValueError: another file type, no episodes, or an agent of one environment object.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"demonstrations are an .npz, got {file}")
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, got {episodes}")
    if isinstance(agent.env, gymnasium.Env):
        raise ValueError("record needs copies of the environment: make or load the agent with an id or a function")
    args, wrappers = agent.args, filled(agent.args.wrappers)
    columns: dict[str, list[Any]] = {"actions": [], "rewards": [], "terminated": [], "truncated": []}
    observations: list[Any] = []
    envs = make_vector_env(agent.env, 1, None, vectorization="sync", env_kwargs=args.env_kwargs, wrappers=wrappers)
    env = envs.unwrapped.envs[0]  # pyright: ignore
    try:
        for episode_seed in derive_seeds(seed, "video", episodes):
            observation, info = env.reset(seed=episode_seed)
            memory, over, steps = None, False, 0
            while not over and steps < max_episode_steps(agent.run):
                stop_if_asked()
                masks = None if args.action_masks is False else allowed_actions(env, info)
                action, memory = agent.predict(observation, deterministic, state=memory, action_masks=masks)
                observations.append(observation)
                observation, reward, terminated, truncated, info = env.step(action)
                over, steps = terminated or truncated, steps + 1
                for column, value in zip(columns.values(), (action, reward, terminated, truncated), strict=True):
                    column.append(value)
    finally:
        envs.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: Any = {name: np.array(column) for name, column in columns.items()}
    new = file.with_name(f".{file.name}")
    with new.open("wb") as stream:
        np.savez_compressed(stream, **_named(agent.envs.observation_space, observations), **arrays)
    new.replace(file)
    return file


def clone(
    agent: PPO,
    file: str | Path,
    *,
    epochs: int = 10,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> dict[str, float]:
    """Let the agent's policy imitate recorded actions, by maximum likelihood; its critic and its spread stay
    (with ``shared_network`` or ``state_dependent_std`` nearly: a squared error holds them where they were).

    With ``normalize_observations`` the recorded observations are counted in first. Training's random draws do not
    change.

    Args:
        agent: a fresh one, usually; not recurrent.
        file: demonstrations.
        epochs: passes over them.
        batch_size: steps per optimizer step.
        learning_rate: Adam's, for this alone.
    Returns:
        ``loss_before`` and ``loss_after``, -log pi(a|s) per step in nats, and ``steps``.
    Raises:
        ValueError: the file does not fit the environment, or the agent is recurrent.
        FileNotFoundError: there is no such file.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if agent.network.recurrent:
        raise ValueError(f"recurrent={agent.args.recurrent!r} cannot be cloned step by step: use recurrent='none'")
    state, network = agent.state, agent.network
    observations, actions = read(file, agent.envs)
    everyone = torch.ones(len(observations), dtype=torch.bool)
    with torch_threads(agent.args.num_threads):
        decisions = on_device(Decisions(state.normalizer.observe(observations, everyone), actions), network.device)
        kept_values, kept_spread = _kept(network, decisions)
        generator = torch.Generator().manual_seed(agent.args.seed)
        # A critic that shares layers follows them, so that its values stay.
        kept = "log_std" if kept_values is not None else ("critic.", "log_std")
        trained = [p for name, p in trained_parameters(network).items() if not name.startswith(kept)]
        adam = torch.optim.Adam(trained, lr=learning_rate)
        before = _loss(agent, decisions)
        for _ in range(epochs):
            for rows in minibatch_indices(len(decisions), max(1, len(decisions) // batch_size), generator=generator):
                stop_if_asked()
                adam.zero_grad()
                held = (None if kept is None else kept[rows] for kept in (kept_values, kept_spread))
                _cloning_loss(network, decisions[rows], *held).backward()
                adam.step()
        network.zero_grad()
        return {"loss_before": before, "loss_after": _loss(agent, decisions), "steps": len(decisions)}


@torch.no_grad()
def _kept(network: ActorCritic, decisions: Decisions) -> tuple[Tensor | None, Tensor | None]:
    """Compute what trained layers would move: a critic's values that shares them, a log std that they predict."""
    values = network.evaluate(decisions).values if len(network.bodies) == 1 else None
    predicted = network.actions.dimensions and network.log_std is None
    return values, network.step(decisions.observations)[0].tensor_split(2, dim=-1)[1] if predicted else None


def _cloning_loss(
    network: ActorCritic, decisions: Decisions, kept_values: Tensor | None, kept_spread: Tensor | None
) -> Tensor:
    """Compute -log pi(a|s), under the log std as it was, and squared errors of what is to stay."""
    output = network.evaluate(decisions)
    logprobs, moved = output.logprobs, torch.zeros(())
    if kept_spread is not None:
        mean, spread = network.step(decisions.observations)[0].tensor_split(2, dim=-1)
        logprobs = network.logprobs(torch.cat([mean, kept_spread], dim=-1), decisions.actions)
        moved = mse_loss(spread, kept_spread)
    if kept_values is not None and output.values is not None:
        moved = moved + mse_loss(output.values, kept_values)
    return moved - logprobs.mean()


@torch.no_grad()
def _loss(agent: PPO, decisions: Decisions) -> float:
    return -float(agent.network.evaluate(decisions).logprobs.mean())


def read(file: str | Path, envs: Environments) -> tuple[Tensor, Tensor]:
    """Read demonstrations: encoded observations [N, *O], and actions as the policy has them.

    Raises:
        ValueError: an array is missing, or does not fit the environment's spaces.
        FileNotFoundError: there is no such file.
    """
    file, where = Path(file), f"environment {envs.env_id!r}"
    if not file.is_file():
        raise FileNotFoundError(f"there are no demonstrations {file}: classic-ppo record FOLDER {file} writes some")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        observations = envs.encode(_unnamed(envs.observation_space, arrays))
        actions = _to_policy_actions(arrays["actions"], envs)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file} is damaged or was not written to its end ({error}): record it again") from None
    except KeyError as error:
        raise ValueError(f"{file} has no array {error}: {where} needs observations and actions") from None
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file} does not fit {where}: {error}") from None
    if not len(observations) or len(observations) != len(actions):
        raise ValueError(f"{file} has {len(observations)} observations, {len(actions)} actions: each step needs both")
    if not np.isfinite(observations).all():
        raise ValueError(f"{file} has non-finite observations")
    return torch.from_numpy(observations), torch.from_numpy(actions)


def _to_policy_actions(actions: np.ndarray, envs: Environments) -> np.ndarray:
    """Turn the environment's actions [N, ...] into the policy's: what ``to_env_actions`` turns into them."""
    space: Any = envs.action_space
    if actions.shape[1:] != space.shape:
        raise ValueError(f"one action must be {space.shape}, got {actions.shape[1:]}")
    if isinstance(space, Box):
        numbers = actions.reshape(len(actions), -1).astype(np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError("an action is non-finite")
        if not envs.squash:
            return numbers
        low, high = space.low.reshape(-1), space.high.reshape(-1)
        return np.arctanh((2 * (numbers - low) / (high - low) - 1).clip(-INSIDE, INSIDE)).astype(np.float32)
    indices = (actions - getattr(space, "start", 0)).astype(np.int64)
    indices = indices if isinstance(space, Discrete) else indices.reshape(len(indices), -1)
    if (indices < 0).any() or (indices >= np.array(envs.actions.choices)).any():
        raise ValueError(f"an action is outside {space}")
    return indices


def _named(space: gymnasium.Space, observations: list[Any], name: str = "observations") -> dict[str, np.ndarray]:
    """Return name -> array [N, ...] of each part of the observations."""
    if not isinstance(space, Dict | Tuple):
        return {name: np.array(observations)}
    named: Any = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
    parts = (_named(part, [one[key] for one in observations], f"{name}.{key}") for key, part in named)
    return {name: array for part in parts for name, array in part.items()}


def _unnamed(space: gymnasium.Space, arrays: dict[str, np.ndarray], name: str = "observations") -> Any:
    """Return a batch of observations from the arrays of :func:`_named`."""
    if isinstance(space, Dict):
        return {key: _unnamed(part, arrays, f"{name}.{key}") for key, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_unnamed(part, arrays, f"{name}.{i}") for i, part in enumerate(space.spaces))
    return arrays[name]
