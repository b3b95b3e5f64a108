"""Gradients of standard networks with the derivatives written out.

These networks are so small that autograd's bookkeeping costs more than the arithmetic. Tests hold every gradient to
:class:`classic.gradient_step.Autograd`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from classic.fast.flat_adam import FlatParameters
from classic.fast.standard_networks import is_standard, trains_every_parameter
from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Decisions
from classic.networks.distributions import gaussian_entropy, gaussian_logprobs
from classic.networks.layers import Tanh, tanh_
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig
from rlhf_ppo.core.kernels.analytic_gradients import clipped_policy_slope, clipped_value_slope

SLOPES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    Tanh: torch.ops.aten.tanh_backward.default,
    nn.ReLU: lambda gradient, output: torch.ops.aten.threshold_backward.default(gradient, output, 0),
}
"""Activation -> (gradient of its output, its output) -> gradient of its input."""


class AnalyticGradients:
    """Gradients of layers with tanh or relu between them, then a softmax or a Gaussian, under a clipped objective.

    Everything is [features, N], features first, so that the layers of actor and critic stack without a copy.
    """

    @staticmethod
    def fits(network: ActorCritic, config: PPOConfig) -> bool:
        """Whether this computes the gradient that autograd would."""
        head = len(network.actions.choices) == 1 or (network.log_std is not None and not network.squash)
        clipped = config.objective in ("clip", "adaptive_clip", "dual_clip") and config.kl_loss_coef == 0
        return is_standard(network) and trains_every_parameter(network) and head and clipped

    def __init__(self, network: ActorCritic, weights: FlatParameters) -> None:
        self.network, self.weights = network, weights
        shared = len(network.bodies) == 1
        trunk: nn.Sequential = network.bodies[0].layers if shared else network.policy[:-1]  # pyright: ignore
        prefixes = ("bodies.0.layers.",) if shared else ("policy.", "critic.")
        self.slope = SLOPES[type(trunk[-1])]
        self.activate = tanh_ if isinstance(trunk[-1], Tanh) else torch.relu_
        vector, gradient = weights.vector.detach(), weights.gradient

        def stacked(whole: Tensor, layer: int, kind: str) -> Tensor:
            part = weights.of(whole, *(f"{prefix}{layer}.{kind}" for prefix in prefixes))
            return part if len(prefixes) == 2 else part.unsqueeze(0)

        # Each [networks, out, in] or [networks, out], the same memory as the network's own.
        depths = range(0, len(trunk), 2)
        self.hidden = [(stacked(vector, i, "weight"), stacked(vector, i, "bias")) for i in depths]
        self.hidden_gradients = [(stacked(gradient, i, "weight"), stacked(gradient, i, "bias")) for i in depths]
        last = len(network.policy) - 1
        names = [(f"{head}.{last}.weight", f"{head}.{last}.bias") for head in ("policy", "critic")]
        self.heads = [tuple(weights.of(vector, name) for name in pair) for pair in names]
        self.head_gradients = [tuple(weights.of(gradient, name) for name in pair) for pair in names]
        self.log_std = None if network.log_std is None else weights.of(vector, "log_std")
        self.log_std_gradient = None if network.log_std is None else weights.of(gradient, "log_std")

    def evaluate(self, decisions: Decisions) -> PolicyOutput:
        """Compute log-probs, values and entropies of a minibatch, and keep what :meth:`backward` needs."""
        self.decisions = decisions
        (weight, bias), *deeper = self.hidden
        networks, count = weight.shape[0], len(decisions)
        x = torch.addmm(bias.view(-1, 1), weight.view(-1, weight.shape[-1]), decisions.observations.T)
        self.layers = [self.activate(x).view(networks, -1, count)]
        for weight, bias in deeper:
            self.layers.append(self.activate(torch.baddbmm(bias.unsqueeze(-1), weight, self.layers[-1])))
        top = self.layers[-1]
        output, values = (
            torch.addmm(bias.unsqueeze(-1), weight, x)
            for (weight, bias), x in zip(self.heads, (top[0], top[-1]), strict=True)
        )
        if self.log_std is None:
            if decisions.action_masks is not None:
                output = output.masked_fill_(~decisions.action_masks.T, -math.inf)
            self.log_p = output.log_softmax(dim=0)
            self.p = self.log_p.exp()
            logprobs = self.log_p.gather(0, decisions.actions.unsqueeze(0))[0]
            if decisions.action_masks is not None:
                self.log_p = self.log_p.masked_fill(self.p == 0, 0.0)  # 0 * -inf is NaN
            self.entropy = (self.p * self.log_p).sum(dim=0).neg_()
        else:
            mean = output.T
            self.scaled = (decisions.actions - mean) * (-self.log_std).exp()
            logprobs = gaussian_logprobs(mean, self.log_std, decisions.actions)
            self.entropy = gaussian_entropy(self.log_std).expand(count)
        return PolicyOutput(logprobs=logprobs, values=values[0], entropy=self.entropy)

    def backward(self, new: PolicyOutput, old: Experience, config: PPOConfig) -> float:
        """Replace the gradient, as :meth:`Autograd.backward` does."""
        assert new.values is not None and old.returns is not None
        count = new.logprobs.shape[0]
        slope = clipped_policy_slope(
            new.logprobs,
            old.logprobs,
            old.advantages,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip if config.objective == "dual_clip" else None,
        ).mul_(1 / count)
        error = clipped_value_slope(new.values, old.values, old.returns, clip_range=config.clip_range_vf)
        upper = self._head_slope(slope, config.ent_coef)
        lower = error.mul(config.vf_coef / count).unsqueeze(0)
        self._backward(upper, lower)
        return torch.dot(error, error).item()

    def _head_slope(self, slope: Tensor, ent_coef: float) -> Tensor:
        """Turn d loss / d log pi [N] into d loss / d output of the policy's last layer, [outputs, N]."""
        if self.log_std is None:
            # d log p_a / d logit_j = [j = a] - p_j, and d entropy / d logit_j = -p_j * (log p_j + entropy).
            result = self.p * -slope
            result.scatter_add_(0, self.decisions.actions.unsqueeze(0), slope.unsqueeze(0))
            if ent_coef:
                result.add_(self.p * (self.log_p + self.entropy), alpha=ent_coef / slope.shape[0])
            return result
        assert self.log_std_gradient is not None
        # d log p / d mean = scaled / std, d log p / d log std = scaled^2 - 1, and d entropy / d log std = 1.
        weighted = self.scaled * slope.unsqueeze(-1)
        torch.sum(weighted * self.scaled - slope.unsqueeze(-1), dim=0, out=self.log_std_gradient).sub_(ent_coef)
        return (weighted * (-self.log_std).exp()).T

    def _backward(self, policy: Tensor, values: Tensor) -> None:
        """Write the gradient, given the loss's derivatives by both last layers' outputs, [outputs, N] and [1, N]."""
        top = self.layers[-1]
        (policy_weight, _), (value_weight, _) = self.heads
        for slope, x, (weight, bias) in zip((policy, values), (top[0], top[-1]), self.head_gradients, strict=True):
            torch.mm(slope, x.T, out=weight)
            torch.sum(slope, dim=1, out=bias)
        below = torch.empty_like(top)
        if top.shape[0] == 2:
            torch.mm(policy_weight.T, policy, out=below[0])
            torch.mm(value_weight.T, values, out=below[1])
        else:
            torch.mm(policy_weight.T, policy, out=below[0]).addmm_(value_weight.T, values)
        for depth in reversed(range(len(self.layers))):
            slope = self.slope(below, self.layers[depth])
            weight, bias = self.hidden_gradients[depth]
            torch.sum(slope, dim=-1, out=bias)
            if depth == 0:
                # The other way round, slope @ observations, takes five times as long.
                weight.flatten(0, 1).copy_(torch.mm(self.decisions.observations.T, slope.flatten(0, 1).T).T)
            else:
                torch.bmm(slope, self.layers[depth - 1].transpose(1, 2), out=weight)
                below = torch.bmm(self.hidden[depth][0].transpose(1, 2), slope)
