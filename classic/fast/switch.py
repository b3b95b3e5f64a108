"""Choose between the plain way and its shortcuts: how a network acts, how it is differentiated, and its optimizer.

| | plain way | shortcut | taken by |
|---|---|---|---|
| act | ``ActorCritic.sample`` | numpy (:mod:`classic.fast.numpy_acting`) | small standard networks |
| gradient | ``Autograd`` | analytic (:mod:`classic.fast.analytic_gradients`) | standard networks, clipped objectives |
| optimizer | ``Adam``, torch's | Adam on one vector (:mod:`classic.fast.flat_adam`) | every network |

The shortcuts compute what the plain way computes, up to rounding; tests hold each to it.
"""

from __future__ import annotations

from typing import NamedTuple

from classic.fast.analytic_gradients import AnalyticGradients
from classic.fast.flat_adam import FlatAdam
from classic.fast.numpy_acting import NumpyPolicy
from classic.gradient_step import Adam, Autograd
from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Sample
from rlhf_ppo.core import PPOConfig

ENABLED = True
"""False: everything the plain way, for tests that compare the two."""

Gradients = Autograd | AnalyticGradients
Optimizer = Adam | FlatAdam


class Methods(NamedTuple):
    """How a network acts and learns."""

    sample: Sample
    """Samples one step's actions."""
    gradients: Gradients
    """Forward and backward pass of one minibatch."""
    optimizer: Optimizer
    """Gradient clipping and Adam."""


def choose(
    network: ActorCritic, config: PPOConfig, *, batch: int, learning_rate: float, optimizer: Optimizer | None = None
) -> Methods:
    """Choose for a network as it is now: its parts may have been replaced, frozen, loaded or copied since.

    Args:
        network: acts and learns.
        config: its objective may have no shortcut.
        batch: rows that act at a time.
        learning_rate: of a new optimizer.
        optimizer: the previous one, which is kept if the trained parameters still have its names and shapes.
    """
    kind = FlatAdam if ENABLED else Adam
    if optimizer is None or not optimizer.fits(network):
        optimizer = kind(network, learning_rate)
    else:
        optimizer.attach(network)
    if not isinstance(optimizer, FlatAdam):
        return Methods(network.sample, Autograd(network, optimizer.zero_grad), optimizer)
    sample = NumpyPolicy(network).sample if NumpyPolicy.fits(network, batch) else network.sample
    if AnalyticGradients.fits(network, config):
        return Methods(sample, AnalyticGradients(network, optimizer.weights), optimizer)
    return Methods(sample, Autograd(network, optimizer.zero_grad), optimizer)
