"""Subject: what is verified. Trainers made from one set of arguments, and one rollout with everything about it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.config.engine import in_process
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience, PolicyOutput, ValueScale
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.engines import Sampler
from rlhf_ppo.generation.environments.episodes import TextEnvironment
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.rollout import Rollout, SampledResponses
from rlhf_ppo.generation.tools.schemas import Tool
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.rewards.loading import RewardSource
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.gradients import clear_gradients
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import collect, next_draws, next_prompts
from rlhf_ppo.training.run import Run
from rlhf_ppo.verify.changed_rollouts import with_own_scores

OWN_REWARD = "rlhf_ppo.verify.subject:distinct_tokens"
"""The reward of runs that are about the trainer's state: the user's need not be deterministic."""


def distinct_tokens(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **_: Any) -> list[float]:
    """Score the share of a response's tokens that are the first of their kind."""
    return [len(set(ids)) / max(len(ids), 1) for ids in completion_ids]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Arguments of :class:`rlhf_ppo.PPOTrainer`, from which the trainers of all checks are made."""

    model: str | PreTrainedModel
    reward_funcs: RewardSource | Sequence[RewardSource] | None
    args: RLHFConfig
    train_dataset: RowSource
    processing_class: PreTrainedTokenizerBase | None = None
    ref_model: str | PreTrainedModel | None = None
    value_model: str | PreTrainedModel | None = None
    peft_config: Any = None
    respond: Respond | None = None
    tools: Sequence[Tool] = ()
    environment: Callable[[], TextEnvironment] | None = None
    command: TrainArgs | None = None
    """The same as a command, which other processes can be given; None: it cannot be written as one."""

    def trainer(self, *, reward: str | None = None, **settings: Any) -> PPOTrainer:
        """Make a trainer with some settings changed; model objects are copied, since training changes them."""
        if reward is not None:
            settings["reward_weights"] = None
        names = ("model", "ref_model", "value_model", "peft_config")
        return PPOTrainer(
            reward_funcs=self.reward_funcs if reward is None else reward,
            args=dataclasses.replace(self.args, **settings),
            train_dataset=self.train_dataset,
            processing_class=self.processing_class,
            respond=self.respond,
            tools=self.tools,
            environment=self.environment,
            **{name: copy.deepcopy(getattr(self, name)) for name in names},
        )


def small_run(args: RLHFConfig, num_responses: int, response_tokens: int) -> dict[str, Any]:
    """Return the settings that make a run of two small rollouts of a long one, with all that computes as it was."""
    group = math.lcm(args.num_minibatches, args.num_generations)
    batch = min(args.rollout_batch_size, math.ceil(num_responses / group) * group)
    length = min(args.max_new_tokens, response_tokens)
    critic = None if args.critic_minibatches is None else min(args.critic_minibatches, batch)
    return {
        "rollout_batch_size": batch,
        "total_episodes": 2 * batch,
        "critic_minibatches": critic,
        "max_new_tokens": length,
        "min_new_tokens": min(args.min_new_tokens, length),
        "warmup_steps": 0,
        "critic_warmup_rollouts": 0,
        "max_kl_nats_per_response": None,
        "min_entropy_nats_per_token": None,
        "eval_every": 0,
        "save_every": 1,
        "save_best": False,
        "save_total_limit": None,
        "save_rollouts": False,
        "save_rollouts_gb": 1.0,
        "report_to": (),
        "quiet": True,
        **in_process(vars(args)),
    }


class Turn(NamedTuple):
    """One turn of a response as the sampler saw it."""

    context: list[int]
    said: list[int]


class RecordingSampler:
    """Sample as another sampler does, and record what it read and returned: row -> its turns."""

    def __init__(self, sample: Sampler) -> None:
        self.sample = sample
        self.turns: defaultdict[int, list[Turn]] = defaultdict(list)

    def __call__(
        self, model: ActorCritic, prompt_ids: Tensor, prompt_mask: Tensor, params: Any, /, **options: Any
    ) -> SampledResponses:
        sampled = self.sample(model, prompt_ids, prompt_mask, params, **options)
        for i, row in enumerate(options["whole"].rows):
            context, said = prompt_ids[i][prompt_mask[i]], sampled.response_ids[i][sampled.mask[i]]
            self.turns[row].append(Turn(context.tolist(), said.tolist()))
        return sampled


class Gradient(NamedTuple):
    """The gradient of one minibatch."""

    parts: list[Tensor]
    """Of each trained parameter."""
    losses: dict[str, float]
    """The loop's, by name."""
    max_abs_log_ratio: float
    """In nats, over all actions."""

    def difference(self, other: Gradient) -> float:
        """Return the distance to another one relative to this one's norm; infinite if one is non-finite."""
        pairs = zip(self.parts, other.parts, strict=True)
        distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
        share = distance / max(self.norm, 1e-30)
        return share if math.isfinite(share) else math.inf

    @property
    def norm(self) -> float:
        """The global norm."""
        return math.sqrt(sum(float(part.square().sum()) for part in self.parts))


class Subject:
    """One trainer at learning rate 0, one rollout of it, and a run that trains."""

    def __init__(self, given: Arguments, folder: Path) -> None:
        self.given, self.folder = given, folder
        rates = ("learning_rate", *(() if given.args.value_learning_rate is None else ("value_learning_rate",)))
        settings: dict[str, Any] = {"output_dir": str(folder / "still"), **dict.fromkeys(rates, 0.0)}
        self.trainer = given.trainer(**settings)
        state, model = self.trainer.state, self.trainer.model
        _wake_critic(model)
        self.sampler = RecordingSampler(self.run.sample)
        run = dataclasses.replace(self.run, sample=self.sampler)
        self.rollout = collect(run, model, next_prompts(run, state.iteration), next_draws(run, state))
        self.scored = with_own_scores(self.rollout)
        estimates = estimate(self.scored, shape_rewards(self.scored, self.args, state.kl_coef), self.args)
        self.experience = estimates.experience
        model.change_value_scale(estimates.value_scale)

    @property
    def run(self) -> Run:
        """What is fixed for the trainer at learning rate 0."""
        return self.trainer.fixed

    @property
    def model(self) -> ActorCritic:
        """Its policy and critic."""
        return self.trainer.model

    @property
    def args(self) -> RLHFConfig:
        """The settings of its next update."""
        return self.trainer.state.effective_settings(self.run.args)

    @property
    def rows(self) -> list[int]:
        """All rows of the rollout."""
        return list(range(len(self.rollout.prompts)))

    @property
    def bound(self) -> float:
        """Largest difference of log-probs in nats that rounding explains."""
        return self.run.initial_ratio_bound if self.run.bf16 else 1e-3

    @property
    def gradient_bound(self) -> float:
        """Largest relative difference of gradients that rounding explains."""
        return 0.1 if self.run.bf16 else 1e-3

    @cached_property
    def trained(self) -> PPOTrainer:
        """A run of two rollouts with the user's learning rate and a checkpoint after each."""
        trainer = self.given.trainer(reward=OWN_REWARD, output_dir=str(self.folder / "trained"))
        trainer.train()
        return trainer

    def gradient(
        self,
        rollout: Rollout | None = None,
        experience: Experience | None = None,
        *,
        microbatch_tokens: int | None = None,
    ) -> Gradient:
        """Compute the gradient of the rollout as one minibatch, by the loop's own function."""
        run = dataclasses.replace(self.run, microbatch_tokens=microbatch_tokens or self.run.microbatch_tokens)
        clear_gradients(self.model)
        given = (rollout or self.scored, experience or self.experience)
        actions, losses = run.minibatch_gradient(self.model, *given, self.rows, self.args)
        parts = [p.grad.detach().clone() for p in self.model.trainable_parameters() if p.grad is not None]
        clear_gradients(self.model)
        return Gradient(parts, {name: float(x) for name, x in losses.items()}, actions.compute()["max_abs_log_ratio"])

    @torch.no_grad()
    def forward(self, sequences: Sequences) -> PolicyOutput:
        """Compute log-probs and values as an update does."""
        with computing(self.model, bf16=self.run.bf16):
            return self.model(*sequences, temperature=self.run.args.temperature)

    @torch.no_grad()
    def plain_logits(self, ids: Tensor, policy: Any = None, *, bf16: bool | None = None) -> Tensor:
        """Compute logits [L, V] of one sequence [L] by the model's own forward pass: no cache, padding or packing."""
        policy = self.model.policy if policy is None else policy
        with computing(policy, bf16=self.run.bf16 if bf16 is None else bf16):
            return policy(input_ids=ids[None]).logits[0].float()

    def plain_logprobs(self, row: int, policy: Any = None, *, bf16: bool | None = None) -> Tensor:
        """Compute log-probs [n] of the n tokens that the policy chose in one response, from :meth:`plain_logits`."""
        r = self.rollout
        real = r.real[row]
        prompt, said = r.prompt_ids[row][r.prompt_mask[row]], r.response_ids[row][real]
        logits = self.plain_logits(torch.cat([prompt, said]), policy, bf16=bf16)[len(prompt) - 1 : -1]
        if r.banned is not None:
            where, tokens = r.banned.where[row][real], torch.tensor(r.banned.tokens, device=logits.device)
            logits[:, tokens] = logits[:, tokens].masked_fill(where[:, None], -math.inf)
        logprobs = (logits / self.run.args.temperature).log_softmax(dim=-1)
        return logprobs.gather(1, said[:, None])[:, 0][r.mask[row][real]]


def _wake_critic(model: ActorCritic) -> None:
    """Give a value head that starts at 0 weights, so that its values can differ."""
    head = model.value_head
    if head is not None and model.value_scale is None:
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-0.1, 0.1, head.in_features)[None])
        model.value_scale = ValueScale()


def largest(differences: Iterable[Tensor]) -> float:
    """Return the largest absolute entry of some tensors; NaN counts as infinite, and none as 0."""
    worst = max((float(x.abs().max()) for x in differences if x.numel()), default=0.0)
    return worst if math.isfinite(worst) else math.inf
