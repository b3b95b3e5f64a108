"""What a plan is about: settings, shapes of the models, processes, and the card they run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.costs.cards import Card
from rlhf_ppo.models.costs.shapes import Linear, Shape

Sharding = Literal["none", "full", "hybrid"]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter."""

    rank: int
    targets: tuple[Linear, ...]
    """The linear layers that have one, of one transformer layer."""
    layers: int

    @property
    def parameters(self) -> int:
        """Return the number of its weights: two factors for each layer."""
        return self.layers * self.rank * sum(x.inputs + x.outputs for x in self.targets)


def lora_adapter(shape: Shape, rank: int, targets: tuple[str, ...] | None = None) -> Adapter:
    """Return the adapter that PEFT makes.

    Args:
        shape: the base's.
        rank: of its factors.
        targets: names of the layers that get it; ("all-linear",): all; None: PEFT's choice for the architecture.
    Raises:
        ValueError: PEFT has no choice for this architecture, or there are no such layers.
    """
    names = targets
    if names is None:
        chosen = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(shape.architecture)
        if chosen is None:
            raise ValueError(
                f"PEFT has no choice of layers for {shape.architecture!r}: name them with lora_target_modules, or "
                "all-linear"
            )
        names = tuple(chosen)
    found = tuple(x for x in shape.linears if names == ("all-linear",) or x.name in names)
    if not found:
        known = ", ".join(dict.fromkeys(x.name for x in shape.linears))
        raise ValueError(f"lora_target_modules={names} are no layers of {shape.name!r}, whose are {known}")
    return Adapter(rank, found, shape.layers)


@dataclass(frozen=True)
class Setup:
    """A run as far as its costs depend on it."""

    args: RLHFConfig
    policy: Shape
    critic: Literal["none", "shared", "separate", "adapter"]
    card: Card
    bf16: bool
    prompt_tokens: int
    response_tokens: int
    """Of each response, on average."""
    value: Shape | None = None
    """A separate critic's trunk."""
    rewards: tuple[Shape, ...] = ()
    """Reward models."""
    adapter: Adapter | None = None
    reference: Shape | None = None
    """A reference with weights of its own; None: the policy with its adapter off."""
    processes: int = 1
    nodes: int = 1
    links: float = 0.0
    """Bytes per second of a node's network."""
    sharding: Sharding = "none"
    gathers_whole: bool = True
    """Under sharding: all weights are gathered for a rollout's decoding; False: each layer's at each decode step."""
    trains: bool = True
    """False: an evaluation, which samples, reads and scores alone."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that matrix products read."""
        return 2 if self.bf16 else 4

    @property
    def has_copies(self) -> bool:
        """Whether trained matrices have a bfloat16 copy; sharded ones are rounded where they are gathered."""
        return self.bf16 and self.sharding == "none"

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU, where the output layer works in blocks."""
        return self.card.name == "cpu"

    @property
    def shards(self) -> int:
        """Processes that share one copy of the weights."""
        return {"none": 1, "full": self.processes, "hybrid": self.processes // self.nodes}[self.sharding]

    @property
    def row_tokens(self) -> int:
        """Tokens that a model reads of a prompt with its response; the last one is no input."""
        return self.prompt_tokens + self.response_tokens - 1

    @property
    def rows(self) -> int:
        """Responses that a process samples and scores."""
        return math.ceil(self.args.rollout_batch_size / self.processes)

    @property
    def slots(self) -> int:
        """Responses that a process decodes at once."""
        return min(self.args.decode_batch_size or self.rows, self.rows)

    @property
    def minibatch_rows(self) -> int:
        """Responses of a minibatch that a process trains on."""
        return math.ceil(self.args.rollout_batch_size / self.args.num_minibatches / self.processes)

    @property
    def microbatch_tokens(self) -> int:
        """Most tokens of a pass outside decoding."""
        return self.args.microbatch_tokens or (1024 if self.on_cpu else 16384)

    def pass_rows(self, rows: int) -> int:
        """Return the responses in one pass over ``rows`` of them."""
        return min(max(self.microbatch_tokens // (self.prompt_tokens + self.response_tokens), 1), rows)

    def passes(self, rows: int) -> int:
        """Return the number of passes over ``rows`` responses."""
        return math.ceil(rows / self.pass_rows(rows))

    @cached_property
    def trained_policy(self) -> int:
        """Trained weights of the policy, a shared critic's head among them."""
        own = self.policy.parameters if self.adapter is None else self.adapter.parameters
        own += self.adapter.parameters if self.adapter is not None and self.critic == "adapter" else 0
        return own + (self.policy.width + 1 if self.critic in ("shared", "adapter") else 0)

    @cached_property
    def trained_value(self) -> int:
        """Trained weights of a separate critic."""
        if self.value is None:
            return 0
        kept = {"none": 0, "attention": self.value.attention, "trunk": self.value.parameters}
        return self.value.parameters - kept[self.args.critic_frozen] + self.value.width + 1

    @property
    def trained(self) -> int:
        """All trained weights."""
        return self.trained_policy + self.trained_value if self.trains else 0

    @property
    def copied(self) -> int:
        """Weights of policy and separate critic that have a bfloat16 copy: matrices that are not held in it."""
        if not self.has_copies:
            return 0
        own = self.policy.matrices
        if self.adapter is not None:
            own = self.adapter.parameters * (2 if self.critic == "adapter" else 1)
        return own + (0 if self.value is None else self.value.matrices)
