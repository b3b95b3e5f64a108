"""Fitted critics: critic.json says what a critic was fitted on, and a run that starts from it must be of that kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.hub import find_file
from rlhf_ppo.models.actor_critic import ActorCritic, CriticKind
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.sharded.sharding import is_sharded
from rlhf_ppo.rewards.functions import RewardFunction, rewards_in_words
from rlhf_ppo.runtime.files import read_json
from rlhf_ppo.training.checkpoints.fingerprints import copy_fingerprint, tokenizer_fingerprint

FILE, FORMAT = "critic.json", 2

SHAPING = ("normalize_scores", "score_clip", "missing_eos_penalty", "missing_eos_mode")
"""Settings that change what a response's score counts for."""

_LORA = ("r", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class CriticFacts:
    """What a critic is, and what it was fitted on."""

    kind: CriticKind
    model: str
    """The policy whose trunk or base it stands on; under "separate", the model that it started from."""
    tokenizer: str
    """Digest of the vocabulary."""
    rewards: dict[str, float]
    """Name of each reward function -> its weight."""
    gamma: float
    kl_coef: float
    shaping: dict[str, Any]
    """The settings in ``SHAPING``."""
    recordings: list[str]
    """Folders of the recorded rollouts."""
    held_out: dict[str, float]
    """Its numbers on the rollouts that it was not fitted on."""
    probe: list[float]
    """Its values of eight tokens, in standard deviations of the returns, by which a run sees that it holds this one."""
    weights: str | None
    """Digest of the weights that its head reads (:func:`read_weights`); None: of a model with a merged adapter, which
    another machine merges into slightly other weights."""
    adapter: dict[str, Any] | None = None
    """Rank, alpha and layers of its adapter, under "adapter"."""


def facts_json(facts: CriticFacts) -> dict[str, Any]:
    """Return what critic.json holds."""
    return {"format": FORMAT, **dataclasses.asdict(facts)}


def read_facts(source: Any) -> CriticFacts | None:
    """Read what a folder's or hub id's critic was fitted on; None: it holds no fitted critic.

    Raises:
        ValueError: critic.json is damaged or of another version.
    """
    file = find_file(source, FILE) if isinstance(source, str) else None
    if file is None:
        return None
    content = read_json(file, "fit the critic again")
    if (version := content.pop("format", None)) != FORMAT:
        raise ValueError(f"{file} has format {version}, but this version reads format {FORMAT}: fit the critic again")
    try:
        return CriticFacts(**content)
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}): fit the critic again") from None


def find_fitted(args: RLHFConfig, kind: CriticKind, value_model: Any, peft_config: Any) -> CriticFacts | None:
    """Return the facts of the fitted critic that a run starts from; None: it starts from none.

    Raises:
        ValueError: the run has another kind of critic, or takes half of the fitted one; names both.
    """
    trunk, head = read_facts(value_model), read_facts(args.value_head_from)
    if trunk is not None and args.value_head_from != value_model:
        raise ValueError(
            f"value_model={value_model!r} is the trunk of a fitted critic, whose head is beside it, but "
            f"value_head_from={args.value_head_from!r}: set value_head_from to the same folder"
        )
    if head is None:
        return None
    where = f"value_head_from={args.value_head_from!r}"
    if head.kind != kind or (head.kind == "separate" and trunk is None):
        remedy = {
            "shared": "leave out value_model, and critic or set it to 'shared'",
            "separate": "name that folder as value_model too",
            "adapter": f"set critic='adapter' with {_adapter_words(head.adapter)}",
        }[head.kind]
        raise ValueError(f"{where} is a critic of the kind {head.kind!r}, but the run's is {kind!r}: {remedy}")
    own = {} if head.kind != "adapter" or peft_config is None else adapter_facts(peft_config)
    # Layers that PEFT has yet to choose (None, "all-linear") are compared once it has: when the weights are loaded.
    given = {name: x for name, x in own.items() if x is not None and not isinstance(x, str)}
    if any((head.adapter or {}).get(name) != x for name, x in given.items()):
        raise ValueError(
            f"{where} is an adapter with {_adapter_words(head.adapter)}, but the run's has {_adapter_words(own)}: give "
            "the run the same"
        )
    return head


def adapter_facts(config: Any) -> dict[str, Any]:
    """Return rank, alpha and layers of a LoRA configuration."""
    found = {name: getattr(config, name, None) for name in _LORA}
    return {name: sorted(x) if isinstance(x, (set, list, tuple)) else x for name, x in found.items()}


def _adapter_words(adapter: Mapping[str, Any] | None) -> str:
    given = adapter or {}
    return f"lora_rank={given.get('r')}, lora_alpha={given.get('lora_alpha')}, layers {given.get('target_modules')}"


def require_same_task(
    facts: CriticFacts | None,
    args: RLHFConfig,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Mapping[str, tuple[RewardFunction, float]],
) -> None:
    """Raise a ValueError unless a run has the tokenizer, rewards and discount that its fitted critic knows (or none).

    kl_coef may differ: a run starts at its reference, where the KL costs nothing yet.
    """
    if facts is None:
        return
    where = f"the critic in value_head_from={args.value_head_from!r}"
    weights = {name: weight for name, (_, weight) in rewards.items()}
    if (own := tokenizer_fingerprint(tokenizer)) != facts.tokenizer:
        raise ValueError(
            f"{where} was fitted on tokens of another tokenizer ({facts.tokenizer}) than the run's ({own}): take a "
            f"model with the tokenizer of {facts.model}, or fit a critic on the run's own rollouts"
        )
    if weights != facts.rewards:
        raise ValueError(
            f"{where} was fitted on the rewards {rewards_in_words(facts.rewards)}, but the run has "
            f"{rewards_in_words(weights)}: take the same rewards and reward_weights, or fit a critic on rollouts with "
            "the run's"
        )
    for name, fitted in {"gamma": facts.gamma, **facts.shaping}.items():
        if (own := getattr(args, name)) != fitted:
            raise ValueError(
                f"{where} was fitted on returns with {name}={fitted!r}, but the run has {name}={own!r}: set it to "
                f"{fitted!r}, or fit a critic with the run's"
            )


@torch.no_grad()
def probe_values(model: ActorCritic) -> Tensor:
    """Compute the values of eight tokens in the head's own units, in float32."""
    ids = (model.value_runner or model.runner).probe_ids(9)
    real = torch.ones_like(ids, dtype=torch.bool)
    # Shares of layers are gathered in bfloat16 alone.
    with nullcontext() if is_sharded(model) else torch.autocast(ids.device.type, enabled=False):
        return model.head_values(Sequences(ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])).squeeze(0)


def read_weights(model: ActorCritic) -> str:
    """Compute a digest of the weights under the head: of the policy, or of the critic's own trunk."""
    return copy_fingerprint(model.policy if model.value_trunk is None else model.value_trunk)


def require_same_trunk(
    facts: CriticFacts | None, model: ActorCritic, *, source: str, exact: bool, base_changed: bool
) -> None:
    """Raise a ValueError unless a run's critic stands on the model that the fitted one was fitted on.

    Values of a few tokens tell one model from another and find an adapter that is trained already; the weights tell a
    model from itself after some training.

    Args:
        facts: of the fitted critic; None: the run starts from none.
        model: the run's, before any training.
        source: where its policy came from.
        exact: it is not quantised.
        base_changed: its adapter changed the weights that it was added to, and makes up for that (PiSSA and the like).
    """
    if facts is None:
        return
    gap = (probe_values(model).cpu() - torch.tensor(facts.probe)).abs().max()
    if not gap <= (1e-2 if exact else 0.3):
        differ = f"its values of eight tokens differ by up to {gap:.2g} standard deviations of the returns"
    elif exact and not base_changed and facts.weights not in (None, own := read_weights(model)):
        differ = f"its weights have the digest {own}, those of the critic's model had {facts.weights}"
    else:
        return
    raise ValueError(
        f"the critic was fitted on hidden states of {facts.model!r}, but the run's model ({source!r}) has others: "
        f"{differ}; start the run from {facts.model!r} as it was, or fit a critic on the run's model (critic fit "
        "--model)"
    )
