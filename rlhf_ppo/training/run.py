"""Run: everything that is fixed for one run, from settings and prompts to the frozen reference and the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.template_options import TemplateDefaults
from rlhf_ppo.generation.engines import Sampler
from rlhf_ppo.generation.environments.episodes import Episodes
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.rollout import Rollout, SamplingParams
from rlhf_ppo.generation.tools.calls import Tools
from rlhf_ppo.generation.vllm.engine import VLLMEngine
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.rewards.cache import ScoreCache
from rlhf_ppo.rewards.functions import RewardFunction
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.runtime.logs.progress import Stopwatch
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.training.checkpoints.fingerprints import run_fingerprints
from rlhf_ppo.training.gradients import MinibatchGradient, critic_gradient, minibatch_gradient, sum_over_processes
from rlhf_ppo.training.models.compilation import computed
from rlhf_ppo.training.models.shard_models import UNSHARDED, Plan
from rlhf_ppo.training.recorded.recorded_rollouts import Recording


@dataclass(frozen=True)
class Run:
    """What every step of training may read and none changes; its counterpart is :class:`TrainState`."""

    args: RLHFConfig
    """The settings, with the learning rates that were chosen."""
    learning_rates: str
    """These rates and where they come from, in words."""
    device: torch.device
    bf16: bool
    """Matrix products run in bfloat16."""
    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    room: int | None
    """Maximum prompt length in tokens, with room left for max_new_tokens; None: the model sets no limit."""
    train_prompts: PromptSet | None
    eval_prompts: PromptSet | None
    rewards: dict[str, tuple[RewardFunction, float]]
    """Name -> reward function and its weight."""
    score_caches: dict[str, ScoreCache]
    """Name -> the reward function's answers so far; empty without cache_rewards."""
    respond: Respond | Episodes | None
    """Answers the policy's turns: a function, or environments; None where there is one turn."""
    reference: Reference
    base: str | None
    """The folder or hub id that holds the model under the policy's adapter; None: none does."""
    start: str | None
    """The folder or hub id that holds the reference; None: none does."""
    sampling: SamplingParams
    """How responses are sampled, and where they end."""
    sample: Sampler
    """The engine that decodes responses."""
    microbatch_tokens: int
    """Maximum tokens in one forward pass outside decoding."""
    folder: RunDirectory
    sources: dict[str, str | None]
    """For run.json: where model, ref_model and reference came from; "object" for a model that was passed as one."""
    reward_sources: list[str]
    """Likewise, the reward functions."""
    stopwatch: Stopwatch
    engine: VLLMEngine | None = None
    """What gives the policy to the vLLM server, if one samples; ``sample`` is this, or wraps it."""
    judges: dict[str, RewardFunction] = field(default_factory=dict)
    """Name -> a reward function that scores some responses and is never trained on."""
    recording: Recording | None = None
    """The rollouts that the run trains on instead of sampling (``replay``)."""
    gradient: MinibatchGradient = minibatch_gradient
    """How a minibatch's gradient is computed."""
    processes: ProcessGroup = ALONE
    """The processes that share the work; each holds the whole rollout."""
    plan: Plan = UNSHARDED
    """How the weights are spread over the processes."""

    @cached_property
    def template(self) -> TemplateDefaults:
        """What chats are rendered with besides messages."""
        tools = self.respond.schemas if isinstance(self.respond, Tools) else []
        return TemplateDefaults(self.args.chat_template_kwargs, tools)

    @property
    def episodes(self) -> Episodes | None:
        """The environments that conversations are held with; None: there are none."""
        return self.respond if isinstance(self.respond, Episodes) else None

    @property
    def planned_episodes(self) -> int:
        """Responses of the whole run."""
        return self.args.num_rollouts * self.args.rollout_batch_size

    @property
    def initial_ratio_bound(self) -> float:
        """Largest |log ratio| in nats that rounding explains before an update (``max_initial_log_ratio``)."""
        rounded = self.bf16 or (self.recording is not None and self.recording.facts.fingerprints["bf16"])
        return self.args.max_initial_log_ratio or (0.5 if rounded else 0.1)

    @property
    def tries_compiling(self) -> bool:
        """Whether the run may choose compiled layers by itself: on a CUDA GPU that holds all weights."""
        return self.args.compile == "auto" and self.device.type == "cuda" and self.plan.sharding is None

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Digests of data, reference and adapter, by which a checkpoint recognises its run."""
        return run_fingerprints(
            train_prompts=self.train_prompts,
            eval_prompts=self.eval_prompts,
            reference=self.reference,
            reward_funcs=list(self.rewards),
            stop_token_ids=self.sampling.stop_token_ids,
            device=self.device,
            bf16=self.bf16,
            processes=self.processes.size,
        )

    def microbatches(self, model: ActorCritic, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """Group rows of a rollout into microbatches of at most ``microbatch_tokens``."""
        return rollout.batches(rows, self.microbatch_tokens, padded=not model.runner.packs_on(self.device))

    def minibatch_gradient(
        self, model: ActorCritic, rollout: Rollout, old: Experience, rows: Sequence[int], args: RLHFConfig
    ) -> tuple[MetricAverage, dict[str, Tensor]]:
        """Add the gradient of the minibatch ``rows`` to ``.grad``; see :func:`minibatch_gradient`."""
        passes = self._own_passes(model, rollout, rows)
        kwargs = {"bf16": self.bf16, "reference": self.reference, "minibatch": rows}
        step, losses = computed(model, lambda: self.gradient(model, rollout, old, passes, args, **kwargs))
        return sum_over_processes(self.processes, model, step, losses)

    def critic_gradient(
        self, model: ActorCritic, rollout: Rollout, old: Experience, rows: Sequence[int], args: RLHFConfig
    ) -> dict[str, Tensor]:
        """Add the gradient of the minibatch's value loss alone to ``.grad``; see :func:`critic_gradient`."""
        passes = self._own_passes(model, rollout, rows)
        given = (model, rollout, old, passes, args)
        losses = computed(model, lambda: critic_gradient(*given, bf16=self.bf16, minibatch=rows))
        return sum_over_processes(self.processes, model, MetricAverage(), losses)[1]

    def own_rows(self, count: int) -> range:
        """Return which rows of a rollout of ``count`` this process samples and scores: consecutive, in whole groups."""
        return self.processes.block(count, self.args.num_generations)

    def shares(self, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """Divide rows of a rollout among the processes by their tokens."""
        shares = self.processes.shares([sum(rollout.token_counts[row]) for row in rows])
        return [[rows[i] for i in share] for share in shares]

    def _own_passes(self, model: ActorCritic, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """Return this process's microbatches of a minibatch; one of no rows if it has none."""
        return self.passes(model, rollout, self.shares(rollout, rows)) or [[]]

    def passes(self, model: ActorCritic, rollout: Rollout, shares: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the microbatches of this process's share.

        Processes that share the weights make the same number of passes: the others' layers need its shares of them.
        Passes that have no rows make up the number.
        """
        own = self.microbatches(model, rollout, shares[self.processes.rank])
        if self.plan.sharding is None:
            return own
        most = max(len(self.microbatches(model, rollout, share)) for share in shares)
        return own + [[] for _ in range(most - len(own))]
