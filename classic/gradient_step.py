"""One gradient step, the plain way: PPO's loss, autograd, gradient clipping and Adam as torch has them.

It fits any network and any objective. Small networks take the shortcuts of :mod:`classic.fast`, which compute the same
numbers faster; :mod:`classic.fast.switch` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Decisions
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, PPOLoss, aggregate_loss, clipped_value_loss, ppo_loss


def update_loss(new: PolicyOutput, old: Experience, config: PPOConfig) -> PPOLoss:
    """Compute the core's loss, plus a value loss under reinforce.

    The core's reinforce has no critic, but here the critic closes cut rollouts and must learn to.
    """
    loss = ppo_loss(new, old, config, denominator=float(old.mask.sum()))
    if config.objective != "reinforce" or new.values is None:
        return loss
    assert old.returns is not None
    errors = clipped_value_loss(new.values, old.values, old.returns, clip_range=config.clip_range_vf)
    value = aggregate_loss(errors, old.mask)
    return replace(loss, total=loss.total + config.vf_coef * value, value=value)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's parameters by name, frozen ones (``requires_grad`` False) left out."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def parameter_shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
    """Return the parameters' shapes by name."""
    return {name: parameter.shape for name, parameter in parameters.items()}


def _adam_setting(name: str, doc: str) -> Any:
    """Make a setting of torch's optimizer an attribute."""
    return property(
        lambda adam: adam._adam.param_groups[0][name],
        lambda adam, value: adam._adam.param_groups[0].update({name: value}),
        doc=doc,
    )


class Autograd:
    """Gradients of one minibatch by autograd.

    Args:
        network: the network.
        zero_grad: clears its gradient; an optimizer's.
    """

    def __init__(self, network: ActorCritic, zero_grad: Callable[[], object]) -> None:
        self.network, self.zero_grad = network, zero_grad

    def evaluate(self, decisions: Decisions) -> PolicyOutput:
        """Compute log-probs, values and entropies of a minibatch's decisions."""
        return self.network.evaluate(decisions)

    def backward(self, new: PolicyOutput, old: Experience, config: PPOConfig) -> float:
        """Replace the gradient by that of the loss of what :meth:`evaluate` returned last.

        Returns:
            A number that is finite if the loss is: a loss may overflow while its gradient does not.
        """
        loss = update_loss(new, old, config).total
        self.zero_grad()
        loss.backward()
        return loss.item()


class Adam:
    """torch's AdamW over the trained parameters, and torch's ``clip_grad_norm_``; without weight decay it is Adam.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015); Loshchilov and Hutter, "Decoupled Weight
    Decay Regularization" (2019).
    """

    lr: float = _adam_setting("lr", "Learning rate.")
    eps: float = _adam_setting("eps", "What is added to the root of the second moment.")
    weight_decay: float = _adam_setting("weight_decay", "See the setting of this name.")

    def __init__(self, network: nn.Module, lr: float, eps: float = 1e-5, weight_decay: float = 0.0) -> None:
        self.parameters = trained_parameters(network)
        self._adam = torch.optim.AdamW(self.parameters.values(), lr=lr, eps=eps, weight_decay=weight_decay)

    def fits(self, network: nn.Module) -> bool:
        """Whether a network trains parameters of the names and shapes that its moments belong to."""
        return parameter_shapes(trained_parameters(network)) == parameter_shapes(self.parameters)

    def attach(self, network: nn.Module) -> None:
        """Train this network, which it fits, from here on: parameters may have been replaced or copied."""
        state = self.state()
        self.__init__(network, self.lr, self.eps, self.weight_decay)
        self.load(state)

    def zero_grad(self) -> None:
        """Clear the gradient."""
        self._adam.zero_grad()

    def clip_gradient(self, limit: float) -> float:
        """Scale the gradient down to a norm of at most ``limit``; return its norm before."""
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit).item()

    def step(self) -> None:
        """Move the parameters by their gradient."""
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """Return ``<parameter>/step``, ``<parameter>/exp_avg`` and ``<parameter>/exp_avg_sq``; {} before a step."""
        moments = self._adam.state
        return {f"{n}/{key}": x.clone() for n, p in self.parameters.items() for key, x in moments.get(p, {}).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        for name, parameter in self.parameters.items() if tensors else ():
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: tensors[f"{name}/{key}"].clone() for key in keys}
            self._adam.state[parameter] = {k: x if k == "step" else x.to(parameter.device) for k, x in state.items()}
