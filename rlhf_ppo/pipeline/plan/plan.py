"""Plan: read shapes from configs, choose what settings leave open, and cost the run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.models.actor_critic import choose_critic
from rlhf_ppo.models.costs.cards import CARDS, Card, find_card
from rlhf_ppo.models.costs.choice import choose_sharding
from rlhf_ppo.models.costs.memory import fits, held, memory, usable
from rlhf_ppo.models.costs.setup import Setup, lora_adapter
from rlhf_ppo.models.costs.shapes import shape_of
from rlhf_ppo.models.costs.terms import Term, total
from rlhf_ppo.models.costs.times import times
from rlhf_ppo.runtime.machine.device import compute_in_bf16


@dataclass(frozen=True)
class Plan:
    """What a run costs."""

    args: PlanArgs
    setup: Setup

    @cached_property
    def memory(self) -> dict[str, list[Term]]:
        """Phase -> terms of its peak in bytes, of the process that needs most."""
        return memory(self.setup)

    @cached_property
    def times(self) -> dict[str, list[Term]]:
        """Phase -> terms of its seconds in an iteration."""
        return times(self.setup)

    @property
    def held(self) -> float:
        """Bytes that are held throughout."""
        return total(held(self.setup))

    @property
    def first_to_break(self) -> str:
        """The phase that needs most memory."""
        return max(self.memory, key=lambda phase: total(self.memory[phase]))

    @property
    def peak(self) -> float:
        """Bytes that a process needs."""
        return total(self.memory[self.first_to_break])

    @property
    def seconds(self) -> float:
        """Seconds of an iteration."""
        return sum(total(terms) for terms in self.times.values())

    @property
    def usable(self) -> float:
        """Bytes that a process may count on."""
        return usable(self.setup)

    @property
    def fits(self) -> bool:
        """Whether a process has the memory."""
        return fits(self.setup)


def plan(args: PlanArgs) -> Plan:
    """Return what a run costs; no weights are read, and no model is built with storage.

    Raises:
        ValueError: no such card or config, an architecture that plans do not know, or settings that contradict.
    """
    critic = choose_critic(args, value_model=args.value_model, has_adapter=args.lora_rank is not None)
    policy, card = shape_of(args.model), _card(args)
    adapter = None if args.lora_rank is None else lora_adapter(policy, args.lora_rank, args.lora_target_modules)
    own_reference = None if adapter is not None else shape_of(args.ref_model or args.model)
    bf16 = args.precision != "fp32" if card.name != "cpu" else compute_in_bf16(args.precision, torch.device("cpu"))
    setup = Setup(
        args=args,
        policy=policy,
        critic=critic,
        card=card,
        bf16=bf16,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens or args.max_new_tokens,
        value=None if args.value_model is None else shape_of(args.value_model, "critic"),
        rewards=tuple(shape_of(name, "reward") for name in args.reward if ":" not in name),
        adapter=adapter,
        reference=own_reference,
        processes=args.processes,
        nodes=args.nodes,
        links=args.links * 1e9 / 8,
    )
    return Plan(args, choose_sharding(setup))


def _card(args: PlanArgs) -> Card:
    """Return the card that is named, or this machine's.

    Raises:
        ValueError: it is not in the table.
    """
    if args.card is not None:
        return find_card(args.card)
    if not torch.cuda.is_available():
        return find_card("cpu" if args.gpus is None else "A100-80")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    plain = name.replace(" ", "").upper()
    likely = [card for card in CARDS.values() if card.name.partition("-")[0].upper() in plain]
    if not likely:
        raise ValueError(
            f"this machine's {name} is in no table of cards: name the closest one as card ({', '.join(CARDS)})"
        )
    return min(likely, key=lambda card: abs(card.memory - memory))
