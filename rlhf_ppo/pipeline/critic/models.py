"""Critics outside a run: build one to fit, read recorded rollouts with it, save it, and load it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs, RecordedArgs
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import VALUE_FOLDER, lora_config
from rlhf_ppo.models.forward.forward_checks import check_forward
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.loading import (
    context_length,
    load_config,
    load_policy,
    load_tokenizer,
    load_trunk,
    resolve_model,
    saved_bytes,
    vocabulary_size,
)
from rlhf_ppo.models.saving import write_adapter
from rlhf_ppo.models.value_head import VALUE_HEAD_FILE, load_value_head, save_value_head
from rlhf_ppo.pipeline.critic.data import CriticData, ScoredRollout
from rlhf_ppo.runtime.files import replacing_files
from rlhf_ppo.runtime.machine.device import compute_in_bf16, resolve_device
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.runtime.processes.join import join_processes
from rlhf_ppo.runtime.processes.launch import own_gpu
from rlhf_ppo.training.checkpoints.fingerprints import tokenizer_fingerprint
from rlhf_ppo.training.models.fitted_critic import FILE, CriticFacts, read_facts

_ADAPTER = "default"


class Reader(NamedTuple):
    """A critic with how it reads recorded rollouts."""

    model: ActorCritic
    device: torch.device
    bf16: bool
    microbatch_tokens: int
    processes: ProcessGroup = ALONE
    """Those that share the rows."""

    def share(self, part: ScoredRollout, rows: Sequence[int]) -> list[list[int]]:
        """Divide rows of a rollout among the processes by their tokens."""
        shares = self.processes.shares([sum(part.rollout.token_counts[row]) for row in rows])
        return [[rows[i] for i in own] for own in shares]

    def passes(self, part: ScoredRollout, rows: Sequence[int]) -> Iterator[tuple[list[int], Sequences]]:
        """Group rows of a rollout into forward passes: yield (rows, their sequences on the device)."""
        runner = self.model.value_runner or self.model.runner
        for some in part.rollout.batches(list(rows), self.microbatch_tokens, padded=not runner.packs_on(self.device)):
            ids = part.rollout.sequences(some)
            moved = (None if x is None else x.to(self.device) for x in ids[:5])
            # What was banned at sampling is no matter of values.
            yield some, Sequences(*moved, layout=ids.layout and replace(ids.layout, device=self.device))  # type: ignore[arg-type]

    @torch.no_grad()
    def values(self, parts: Sequence[ScoredRollout], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute values [B, T] of some rows of each rollout in the reward's units, float64 on the CPU; 0 elsewhere."""
        shares = [self.share(part, some) for part, some in zip(parts, rows, strict=True)]

        def read_own() -> tuple[dict[str, Tensor], None]:
            read = {}
            for i, part in enumerate(parts):
                whole, own = torch.zeros_like(part.returns), shares[i][self.processes.rank]
                for batch, sequences in self.passes(part, own):
                    with computing(self.model, bf16=self.bf16):
                        values = self.model.head_values(sequences)
                    values = self.model.in_reward_units(values, sequences.mask)
                    assert values is not None
                    whole[batch, : values.shape[1]] = values.double().cpu()
                read |= {str(i): whole[own]} if own else {}
            return read, None

        found = [torch.zeros_like(part.returns) for part in parts]
        for rank, sent in enumerate(self.processes.exchange(read_own)):
            for i, values in sent.tensors.items():
                found[int(i)][shares[int(i)][rank]] = values
        return found


def policy_name(data: CriticData, given: str | None) -> str:
    """Return the folder or hub id of the policy: the given one, or the recording's.

    Raises:
        ValueError: the recording's was a model object.
    """
    if given is None and data.facts.model == "object":
        raise ValueError(
            f"the policy of {data.folders[0]} was a model object, which no folder holds: save it, and name the folder "
            "with --model"
        )
    return given or data.facts.model


def check_tokenizer(data: CriticData, name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ValueError: the recorded responses are tokens of another one.
    """
    tokenizer = load_tokenizer(resolve_model(name))
    if (own := tokenizer_fingerprint(tokenizer)) != data.facts.tokenizer:
        raise ValueError(
            f"the rollouts in {data.folders[0]} are tokens of another tokenizer ({data.facts.tokenizer}, of "
            f"{data.facts.model}) than {name}'s ({own}): take a model of the recording's tokenizer, or record with "
            f"{name}"
        )
    return tokenizer


def build_critic(args: CriticFitArgs, data: CriticData, policy: str) -> Reader:
    """Load the model that a critic is fitted on, with a new head or a given one, and freeze what is not trained."""
    source = resolve_model(args.value_model if args.kind == "separate" else policy)
    _require_readable(source, data, policy)
    head = None if args.value_head_from is None else load_value_head(args.value_head_from, load_config(source))
    if args.kind == "separate":
        model = _with_trunk(source)
    elif args.kind == "adapter":
        assert args.lora_rank is not None  # CriticFitArgs asks for it
        config = lora_config(args.lora_rank, alpha=args.lora_alpha, target_modules=args.lora_target_modules)
        model = _with_adapter(load_policy(source), config)
    else:
        model = ActorCritic(load_policy(source).requires_grad_(False))
    if head is not None:
        model.load_head(head)
    return _reader(model, args, data)


def load_fitted(folder: str, args: RecordedArgs, data: CriticData) -> tuple[Reader, CriticFacts]:
    """Load a fitted critic to read recorded rollouts with it.

    Raises:
        ValueError: the folder holds none, or one of another tokenizer or discount, or of other rewards.
    """
    facts = read_facts(folder)
    if facts is None:
        raise ValueError(f"critic={folder!r} holds no fitted critic ({FILE}): make one by rlhf-ppo critic fit")
    require_same_returns(facts, folder, data)
    trunk = folder if facts.kind == "separate" else resolve_model(facts.model)
    head = load_value_head(folder, load_config(trunk))
    if facts.kind == "separate":
        model = _with_trunk(trunk)
    elif facts.kind == "adapter":
        from peft import PeftModel

        policy: Any = PeftModel.from_pretrained(load_policy(trunk), f"{folder}/{VALUE_FOLDER}")
        model = ActorCritic(policy, value_adapter=_ADAPTER)
    else:
        model = ActorCritic(load_policy(trunk))
    model.load_head(head)
    return _reader(model, args, data), facts


def require_same_returns(facts: CriticFacts, folder: str, data: CriticData) -> None:
    """Raise a ValueError unless a critic was fitted on returns of the recording's kind."""
    shaping = {name: getattr(data.settings, name) for name in facts.shaping}
    for name, (one, two) in {
        "tokenizer": (facts.tokenizer, data.facts.tokenizer),
        "rewards": (facts.rewards, data.facts.rewards),
        "gamma": (facts.gamma, data.gamma),
        **{name: (facts.shaping[name], shaping[name]) for name in shaping},
    }.items():
        if one != two:
            raise ValueError(
                f"the critic in {folder} was fitted with {name}={one!r}, but the returns of {data.folders[0]} have "
                f"{name}={two!r}: they cannot be compared; take rollouts of the critic's kind, or fit a critic on these"
            )


def save_critic(
    model: ActorCritic, facts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, base: str
) -> None:
    """Save a fitted critic as runs load one: the head, and a trunk beside it or an adapter in ``value/``.

    Raises:
        OSError: the disk is full, or the folder cannot be written; its files stay as they were.
    """
    head, policy = model.value_head, model.policy
    assert head is not None
    with replacing_files(folder, needed=saved_bytes(model, adapted=model.value_trunk is None)) as new:
        save_value_head(head, model.value_scale, new / VALUE_HEAD_FILE)
        (new / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if model.value_trunk is not None:
            model.value_trunk.save_pretrained(new)
            tokenizer.save_pretrained(new)
        if model.value_adapter is not None:
            write_adapter(policy, model.value_adapter, new / VALUE_FOLDER, folder, base)


def _with_trunk(source: str) -> ActorCritic:
    trunk = load_trunk(source).requires_grad_(True)
    return ActorCritic(trunk, value_trunk=trunk)  # no policy samples here


def _with_adapter(policy: Any, config: Any) -> ActorCritic:
    from peft import get_peft_model

    return ActorCritic(get_peft_model(policy, config), value_adapter=_ADAPTER)


def _require_readable(source: str, data: CriticData, policy: str) -> None:
    """Raise a ValueError unless a model has the policy's vocabulary, and room for the longest recorded sequence."""
    config = load_config(source)
    own, theirs = vocabulary_size(config), vocabulary_size(load_config(resolve_model(policy)))
    if own != theirs:
        raise ValueError(
            f"value_model {source} has a vocabulary of {own} tokens and the policy {policy} one of {theirs}; they must "
            "read the same token ids, so use models of one tokenizer"
        )
    longest, room = longest_sequence(data), context_length(config)
    if room is not None and longest > room:
        raise ValueError(
            f"the longest recorded prompt with its response has {longest} tokens, but {source} reads at most {room}: "
            "take a model with a longer context"
        )


def longest_sequence(data: CriticData) -> int:
    """Return the most tokens of a prompt with its response."""
    return max(sum(counts) for part in data.rollouts for counts in part.rollout.token_counts)


def _reader(model: ActorCritic, args: RecordedArgs, data: CriticData) -> Reader:
    device = own_gpu(resolve_device(args.device))
    bf16 = compute_in_bf16(args.precision, device)
    model.to(device)
    check_forward(model, longest=longest_sequence(data), bf16=bf16, decodes=False)
    tokens = args.microbatch_tokens or (1024 if device.type == "cpu" else 16384)
    return Reader(model, device, bf16, tokens, join_processes())
