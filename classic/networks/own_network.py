"""What turns observations into features: a network of the user's own, checked when it is made, or one for images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from classic.config import PPOArgs
from classic.envs.environments import Environments
from classic.envs.parts import as_in_space, image_columns, parts
from classic.networks.layers import MixedNetwork
from rlhf_ppo.runtime.command_line.user_code import FAILURES, load_function

NetworkFactory = Callable[[gymnasium.Space], tuple[nn.Module, int]]
"""From the observation space to a module and the width of its features."""

Encoder = Callable[[torch.Generator], tuple[nn.Module, int]]
"""Makes what turns observations into features, with initial weights drawn from a generator, and tells their width."""


def factory_name(factory: NetworkFactory) -> str:
    """Return a function's name as the setting ``network`` would give it."""
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def make_encoder(args: PPOArgs, envs: Environments, network: NetworkFactory | None) -> Encoder | None:
    """Return what makes the user's own network, or one for observations with images among numbers; else None."""
    space, shape = envs.observation_space, envs.observation_shape
    if args.network is not None:
        dtype = torch.uint8 if len(shape) == 3 and space.dtype == np.uint8 else torch.float32
        return own_encoder(args.network, network, space, shape, dtype)
    if image_columns(space) is None:
        return None

    def mixed(generator: torch.Generator) -> tuple[nn.Module, int]:
        made = MixedNetwork(parts(space), generator)
        return made, made.width

    return mixed


def own_encoder(
    name: str, factory: NetworkFactory | None, space: gymnasium.Space, shape: tuple[int, ...], dtype: torch.dtype
) -> Encoder:
    """Return what makes a network of the user's own.

    Args:
        name: ``file.py:function`` or ``module:function``.
        factory: the function itself; None: it is loaded by its name.
        space: the observations.
        shape, dtype: of one encoded observation.
    Raises:
        ValueError: the function does not exist; from the result: it failed, or made something else.
    """
    make = load_function(name, "network") if factory is None else factory
    made_before: WeakSet[nn.Module] = WeakSet()

    def encoder(generator: torch.Generator) -> tuple[nn.Module, int]:
        # Layers draw from torch's global generator, which a run neither disturbs nor depends on.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            try:
                made: Any = make(space)
            except FAILURES as error:
                raise ValueError(f"network {name!r} failed: {type(error).__name__}: {error}") from error
            if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
                raise ValueError(
                    f"network {name!r} must return (module, width), a torch.nn.Module and the number of its features, "
                    f"got {type(made).__name__}"
                )
            own, width = OwnNetwork(made[0], space), made[1]
            _check(name, own, width, torch.zeros(2, *shape, dtype=dtype))  # lazy layers draw their weights now
        trained = {part for part in own.modules() if any(p.requires_grad for p in part.parameters(recurse=False))}
        if not trained.isdisjoint(made_before):
            raise ValueError(
                f"network {name!r} returned layers that it had made before, so actor and critic would share weights: "
                "make new ones at each call, or set shared_network"
            )
        made_before.update(trained)
        return own, width

    return encoder


class OwnNetwork(nn.Module):
    """The user's module, called with observations as their space has them (:func:`as_in_space`)."""

    def __init__(self, network: nn.Module, space: gymnasium.Space) -> None:
        super().__init__()
        self.network, self.space = network, space

    def forward(self, rows: Tensor) -> Tensor:
        return self.network(as_in_space(self.space, rows))


@torch.no_grad()
def _check(name: str, network: OwnNetwork, width: Any, rows: Tensor) -> None:
    """Raise a ValueError unless a module turns rows into as many features as its function says."""
    formats = {f"{p.dtype} on {p.device}" for p in network.parameters()} - {"torch.float32 on cpu"}
    if formats:
        raise ValueError(
            f"network {name!r} has parameters in {' and '.join(sorted(formats))}: make them in float32 on the CPU (the "
            "setting device moves them)"
        )
    training = network.training
    try:
        features: Any = network.eval()(rows)  # a batch normalisation counts nothing in
    except FAILURES as error:
        raise ValueError(
            f"network {name!r} failed on a batch of 2 observations of {network.space}: {type(error).__name__}: {error}"
        ) from error
    network.train(training)
    got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if type(width) is not int or got != (2, width):
        raise ValueError(f"network {name!r} says that it makes {width!r} features, but of 2 observations it made {got}")
