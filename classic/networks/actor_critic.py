"""Actor and critic: a policy over any supported action space and a value function, separate or with a shared body."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from classic.config import LOG_STD_RANGE
from classic.envs.spaces import ActionLayout
from classic.networks.decisions import Decisions, on_device
from classic.networks.distributions import (
    categorical_logprobs,
    gaussian_entropy,
    gaussian_logprobs,
    gumbel_noise,
    normal_noise,
    sample_categorical,
    sample_gaussian,
    split_choices,
    squashed_entropy,
    squashed_logprobs,
)
from classic.networks.exploration import ExploringHead, exploration_log_std, exploration_noise, explore
from classic.networks.layers import IMAGE_FEATURES, Body, Memory, image_network, mlp
from classic.networks.own_network import Encoder
from rlhf_ppo.core import PolicyOutput, ValueScale, rescaled_head


class ActorCritic(nn.Module):
    """A policy pi(a|s) and a critic V(s), in units of its own (``TrainState.value_scale``).

    ``policy`` and ``critic`` are the heads. What comes before them, if anything, is in ``bodies``: one shared by both,
    or one each.

    Args:
        observation_shape: (O,) features or (channels, height, width) of an image.
        actions: what an action consists of.
        hidden_sizes: widths of the hidden layers.
        value_hidden_sizes: the critic's; None: the same.
        generator: source of the initial weights.
        activation: tanh or relu, between the hidden layers.
        shared: policy and critic share hidden layers, image network and recurrent layer; otherwise no weight.
        recurrent: none, lstm or gru: the recurrent layer before the hidden layers.
        recurrent_size: its width.
        squash: continuous actions pass through tanh; the log-probs account for it.
        log_std_init: initial log standard deviation of continuous actions.
        state_dependent_std: the standard deviation is a second output of the policy instead of one learned number per
            action dimension.
        explores: continuous actions are explored by gSDE (:mod:`classic.networks.exploration`).
        encoder: makes what turns observations into features; None: the image network for images, nothing for numbers.
    """

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        actions: ActionLayout,
        *,
        hidden_sizes: Sequence[int],
        generator: torch.Generator,
        value_hidden_sizes: Sequence[int] | None = None,
        activation: str = "tanh",
        shared: bool = False,
        recurrent: str = "none",
        recurrent_size: int = 64,
        squash: bool = False,
        log_std_init: float = 0.0,
        state_dependent_std: bool = False,
        explores: bool = False,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.actions, self.squash = actions, squash
        self.state_dependent_std = state_dependent_std
        width, bodies = observation_shape[0], []
        for _ in range(1 if shared else 2):
            image, width = None, observation_shape[0]
            if encoder is not None:
                image, width = encoder(generator)
            elif len(observation_shape) == 3:
                image, width = image_network(observation_shape, generator), IMAGE_FEATURES
            memory = None if recurrent == "none" else Memory(recurrent, width, recurrent_size, generator)
            width = width if memory is None else recurrent_size
            layers = mlp((width, *hidden_sizes), None, generator, activation) if shared else None
            if image is not None or memory is not None or layers is not None:
                bodies.append(Body(image, memory, layers))
        self.bodies = nn.ModuleList(bodies)
        width, below = ((width, *hidden_sizes)[-1], ()) if shared else (width, hidden_sizes)
        outputs = actions.num_outputs * (2 if state_dependent_std else 1)
        self.policy: Any = mlp((width, *below, outputs), 0.01, generator, activation)
        below = below if value_hidden_sizes is None else value_hidden_sizes
        self.critic = mlp((width, *below, 1), 1.0, generator, activation)
        self.log_std: nn.Parameter | None = None
        self.explores = explores
        if explores:
            size = (self.policy[-1].in_features, actions.dimensions)
            self.log_std = nn.Parameter(torch.full(size, log_std_init, dtype=torch.float32))
            self.policy = ExploringHead(self.policy)
        elif actions.dimensions and not state_dependent_std:
            self.log_std = nn.Parameter(torch.full((actions.dimensions,), log_std_init, dtype=torch.float32))
        elif actions.dimensions:
            nn.init.constant_(self.policy[-1].bias[actions.dimensions :], log_std_init)  # pyright: ignore

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def recurrent(self) -> bool:
        """Whether there is a recurrent layer."""
        return self.state_size > 0

    @property
    def state_size(self) -> int:
        """K, the length of one copy's recurrent state; 0 without a recurrent layer."""
        return sum(body.memory.state_size for body in self._all_bodies() if body.memory is not None)

    def initial_state(self, batch: int) -> Tensor | None:
        """Return the recurrent state [B, K] of new episodes; None without a recurrent layer."""
        return torch.zeros(batch, self.state_size, dtype=torch.float32) if self.recurrent else None

    @torch.no_grad()
    def act(
        self,
        observations: Tensor,
        generator: torch.Generator | None,
        *,
        action_masks: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose actions.

        Args:
            observations: [B, *O].
            generator: samples from the policy; None: take the most likely action.
            action_masks: [B, options] bool, True for allowed options; others are never chosen.
            starts: [B] bool, True where an episode begins; only with a recurrent layer.
            state: [B, K] recurrent state; only with a recurrent layer.
        Returns:
            (actions, logprobs, state): [B] or [B, choices] int64, or [B, dimensions] float; [B] in nats; the state
            after.
        """
        noise = None if generator is None else self.noise((len(observations),), generator)
        output, actions, state = self.sample(observations, noise, action_masks, starts, state)
        return actions, self.logprobs(output, actions, action_masks), state

    def sample(
        self,
        observations: Tensor,
        noise: Tensor | None,
        action_masks: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose actions with noise drawn before; arguments otherwise as in :meth:`act`.

        Returns:
            (output, actions, state): the policy's outputs [B, outputs], from which :meth:`logprobs` computes log-probs
            later; the actions; the state after. All are on the CPU, where the environments are.
        """
        output, state = self.step(*self._here(observations, starts, state))
        output, state = output.cpu(), None if state is None else state.cpu()
        return output, self.choose(output, noise, action_masks), state

    def step(
        self, observations: Tensor, starts: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the policy's outputs [B, outputs] for one step of every copy, and the recurrent state after it."""
        if self.bodies:
            observations, state = self._step(observations, starts, state)
        return self.policy(observations), state

    def noise(self, shape: tuple[int, ...], generator: torch.Generator, every: int = 1) -> Tensor:
        """Draw the noise with which :meth:`choose` samples actions of this shape; gSDE's for ``every`` steps alike."""
        if self.explores and self.log_std is not None:
            return exploration_noise(shape, self.log_std.shape, every, generator)
        if self.actions.dimensions:
            return normal_noise((*shape, self.actions.dimensions), generator)
        choices = self.actions.choices
        options = choices if len(choices) == 1 else (len(choices), max(choices))
        return gumbel_noise((*shape, *options), generator)

    def choose(self, output: Tensor, noise: Tensor | None, action_masks: Tensor | None = None) -> Tensor:
        """Choose actions [*] from the policy's outputs [*, outputs]: samples, or without noise the most likely ones."""
        if self.explores and noise is not None and self.log_std is not None:
            mean, features = output[..., : self.actions.dimensions], output[..., self.actions.dimensions :]
            return mean + explore(features, self.log_std.to(output.device), noise)
        if self.actions.dimensions:
            return sample_gaussian(*self._gaussian(output), noise)
        return sample_categorical(self._logits(output, action_masks), noise)

    def logprobs(self, output: Tensor, actions: Tensor, action_masks: Tensor | None = None) -> Tensor:
        """Compute log pi(a|s) [*] in nats from the policy's outputs [*, outputs]."""
        if self.actions.dimensions:
            density = squashed_logprobs if self.squash else gaussian_logprobs
            return density(*self._gaussian(output), actions)
        logits = self._logits(output, action_masks)
        logprobs = logits.log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return logprobs if len(self.actions.choices) == 1 else logprobs.sum(dim=-1)

    def evaluate(self, decisions: Decisions) -> PolicyOutput:
        """Compute log-probs, entropies and values of recorded steps, each [*], with gradients, on the device."""
        decisions = on_device(decisions, self.device)
        features = self._features(0, decisions.observations, decisions.starts, decisions.state)
        output = self.policy(features)
        if self.actions.dimensions:
            mean, log_std = self._gaussian(output)
            if self.squash:
                logprobs = squashed_logprobs(mean, log_std, decisions.actions)
                entropy = squashed_entropy(mean, log_std)
            else:
                logprobs = gaussian_logprobs(mean, log_std, decisions.actions)
                entropy = gaussian_entropy(log_std).expand(logprobs.shape)
        else:
            logits = self._logits(output, decisions.action_masks)
            logprobs, entropy = categorical_logprobs(logits, decisions.actions)
            if len(self.actions.choices) > 1:
                logprobs, entropy = logprobs.sum(dim=-1), entropy.sum(dim=-1)
        if len(self.bodies) != 1:
            features = self._features(1, decisions.observations, decisions.starts, decisions.state)
        return PolicyOutput(logprobs=logprobs, values=self.critic(features).squeeze(-1), entropy=entropy)

    def values(self, observations: Tensor, starts: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Compute V(s): [N, *O] -> [N], or with a recurrent layer [B, L, *O] -> [B, L] from its state [B, K] before.

        The result is on the CPU, where rollouts are.
        """
        return self.critic(self._features(1, *self._here(observations, starts, state))).squeeze(-1).cpu()

    @torch.no_grad()
    def rescale_values(self, old: ValueScale, new: ValueScale) -> bool:
        """Let the critic predict in the units ``new`` what it predicts in ``old``, by its last layer, in place.

        Returns:
            Whether it does; not if that layer is frozen or no plain linear one with a bias.
        """
        head = self.critic[-1] if isinstance(self.critic, nn.Sequential) else None
        if type(head) is not nn.Linear:
            return False
        trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
        if trained != {"weight", "bias"}:
            return False
        weight, bias = rescaled_head(head.weight, head.bias, old, new)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        return True

    def _features(self, head: int, observations: Tensor, starts: Tensor | None, state: Tensor | None) -> Tensor:
        """Compute the input of the policy (head 0) or the critic (head 1)."""
        bodies = self._all_bodies()
        if not bodies:
            return observations
        if state is not None and len(bodies) == 2:
            state = state.tensor_split(2, dim=-1)[head]
        return bodies[min(head, len(bodies) - 1)](observations, starts, state)

    def _step(self, observations: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the policy's features of one step, and the state of both recurrent layers after it."""
        bodies = self._all_bodies()
        if state is None or len(bodies) == 1:
            return bodies[0].step(observations, starts, state)
        policy_state, critic_state = state.tensor_split(2, dim=-1)
        features, policy_after = bodies[0].step(observations, starts, policy_state)
        _, critic_after = bodies[1].step(observations, starts, critic_state)
        assert policy_after is not None and critic_after is not None
        return features, torch.cat([policy_after, critic_after], dim=-1)

    def _here(self, *tensors: Tensor | None) -> list[Any]:
        device = self.device
        return [x if x is None or x.device == device else x.to(device) for x in tensors]

    def _all_bodies(self) -> list[Body]:
        return list(self.bodies)  # pyright: ignore

    def _gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*, A] and log standard deviation, which broadcasts to it."""
        if self.explores and self.log_std is not None:
            mean, features = output[..., : self.actions.dimensions], output[..., self.actions.dimensions :]
            return mean, exploration_log_std(features, self.log_std.to(output.device))
        if self.log_std is not None:
            return output, self.log_std.to(output.device)
        mean, log_std = output.tensor_split(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def _logits(self, output: Tensor, action_masks: Tensor | None) -> Tensor:
        """Return logits [*, options] for one choice, [*, choices, options] for several; masked options are -inf."""
        if action_masks is not None:
            output = output.masked_fill(~action_masks, -math.inf)
        return output if len(self.actions.choices) == 1 else split_choices(output, self.actions.choices)
