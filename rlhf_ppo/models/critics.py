"""Critics: which kind a run has, and how it is built beside the policy."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.lora import VALUE_ADAPTER, VALUE_FOLDER, add_value_adapter, load_adapter
from rlhf_ppo.models.value_head import VALUE_HEAD_FILE, find_file

CriticKind = Literal["none", "shared", "separate", "adapter"]


def choose_critic(args: RLHFConfig, *, value_model: Any, has_adapter: bool) -> CriticKind:
    """The kind of critic that settings and models ask for.

    Raises:
        ValueError: they contradict each other; names both.
    """
    if not args.has_critic:
        if value_model is not None:
            raise ValueError(f"{args.critic_free} has no critic, but a value_model is given: drop one of them")
        return "none"
    if value_model is not None and args.vf_coef == 0 and args.value_head_from is None:
        raise ValueError("a value_model is given, but under vf_coef=0 its values stay 0: drop one of them")
    kind = args.critic
    if kind == "auto":
        kind = "shared" if value_model is None else "separate"
    if kind == "separate" and value_model is None:
        raise ValueError(
            "critic='separate' needs a value_model: name its folder or hub id (that of model will do), or set "
            "critic='shared'"
        )
    if kind != "separate" and value_model is not None:
        raise ValueError(f"critic={kind!r} uses the policy's own model, but a value_model is given: drop one of them")
    if kind == "adapter" and not has_adapter:
        raise ValueError(
            "critic='adapter' is a second adapter on the policy's base, so it needs peft_config (lora_rank on the "
            "command line)"
        )
    return kind


def critic_kind(model: ActorCritic) -> CriticKind:
    """The kind of critic that a model has."""
    if model.value_head is None:
        return "none"
    if model.value_adapter is not None:
        return "adapter"
    return "shared" if model.value_trunk is None else "separate"


def build_actor_critic(
    policy: Any,
    kind: CriticKind,
    *,
    trunk: PreTrainedModel | None,
    head: dict[str, Tensor] | None,
    head_from: str | None,
    bare_base: bool = True,
) -> ActorCritic:
    """The policy with its critic.

    Args:
        policy: causal language model, its adapter in place.
        kind: see :func:`choose_critic`.
        trunk: a separate critic's.
        head: weights that the value head starts from; None: 0.
        head_from: where the head came from; an adapter critic takes the adapter that lies beside it.
        bare_base: without its adapter the policy is a model that a critic can start from.
    """
    if kind == "adapter":
        add_value_adapter(policy, as_policy=not bare_base)
        if head_from is not None:
            # A run keeps the critic's adapter in a folder of its own: the one beside the head is the policy's.
            inside = f"{VALUE_FOLDER}/" if find_file(head_from, VALUE_HEAD_FILE) else ""
            if (file := find_file(head_from, f"{inside}adapter_model.safetensors")) is not None:
                load_adapter(policy, VALUE_ADAPTER, file)
    model = ActorCritic(
        policy,
        critic=kind != "none",
        value_trunk=trunk,
        value_adapter=VALUE_ADAPTER if kind == "adapter" else None,
    )
    if head is not None and model.value_head is not None:
        if head["weight"].shape != model.value_head.weight.shape:
            raise ValueError(
                f"value_head_from={head_from!r} reads hidden states of width {head['weight'].shape[1]}, but the model "
                f"under it is {model.value_head.in_features} wide: take a head that was trained on this model"
            )
        model.value_head.load_state_dict(head)
    return model
