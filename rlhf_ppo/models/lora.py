"""Adapters: several small sets of weights on one base model, one of them in force at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Names that no layer of a model has: PEFT finds an adapter's weights by its name between dots.
VALUE_ADAPTER = "ppo_critic"
REWARD_ADAPTER = "ppo_reward"
_ONCE = {VALUE_ADAPTER: "value", REWARD_ADAPTER: "reward"}
"""What the adapters were called in checkpoints and black boxes of earlier versions."""

VALUE_FOLDER = "value"
"""Where the critic's adapter lies in a run's folder."""

_IN_USE: ContextVar[str | None] = ContextVar("adapter_in_use", default=None)


def lora_config(rank: int, *, alpha: int | None = None, target_modules: tuple[str, ...] | None = None) -> Any:
    """A LoRA adapter's configuration, without dropout.

    Args:
        rank: of the two factors of each weight's change.
        alpha: the change is scaled by alpha / rank; None: twice the rank.
        target_modules: names of the layers that get it; ("all-linear",): all but the output layer; None: those that
            PEFT chooses for the architecture.
    """
    from peft import LoraConfig

    targets = None if target_modules is None else list(target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def earlier_name(name: str) -> str:
    """What an adapter, or a parameter in it, was called in earlier versions; any other name itself."""
    return ".".join(_ONCE.get(part, part) for part in name.split("."))


def by_present_names(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Saved weights by the names that the model's parameters have now, where an earlier version saved them."""
    now = {earlier_name(name): name for name in names if name not in weights}
    return {now.get(name, name): weight for name, weight in weights.items()}


def refuse_prompt_learning(config: Any, where: str) -> None:
    """Raise a ValueError if an adapter is virtual tokens or prompts beside the base, and no change of its weights."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{where} is prompt learning ({config.peft_type.value}), whose virtual tokens stand before every sequence: "
            "PPO here reads responses place by place and cannot train it; take LoRA or another adapter of the weights"
        )


def add_value_adapter(policy: Any, *, as_policy: bool) -> None:
    """Give a PEFT model a second adapter, for the critic, of the same configuration as its first.

    Args:
        policy: PEFT model.
        as_policy: start it with the first one's weights, not with new ones: the base alone is no model to start from.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    # What is not beside the base's weights, or would change them, is the policy's alone.
    own = {"modules_to_save": None, "layer_replication": None, "bias": "none"}
    own |= {"init_lora_weights": True} if as_policy else {}
    for field, value in own.items():
        if hasattr(config, field):
            setattr(config, field, value)
    add_adapter(policy, VALUE_ADAPTER, config)
    if as_policy:
        names = get_peft_model_state_dict(policy, adapter_name=VALUE_ADAPTER, save_embedding_layers=False).keys()
        weights = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
        set_peft_model_state_dict(policy, {n: weights[n] for n in names}, adapter_name=VALUE_ADAPTER)
    for parameter in adapter_parameters(policy, VALUE_ADAPTER):
        parameter.requires_grad_(True)


def add_adapter(policy: Any, name: str, config: Any) -> None:
    """Add an adapter to a PEFT model; which one is in force, and what requires gradients, stays as it is.

    Raises:
        ValueError: the model has an adapter of that name.
    """
    if name in policy.peft_config:
        raise ValueError(f"the model already has an adapter named {name!r}: remove it with delete_adapter({name!r})")
    device, active = next(policy.parameters()).device, policy.active_adapter
    with keep_gradient_flags(policy):
        policy.add_adapter(name, config)
        policy.set_adapter(active)
    for parameter in adapter_parameters(policy, name):
        parameter.data = parameter.data.to(device)


def load_adapter(policy: Any, name: str, file: Path) -> None:
    """Load an adapter's weights from a file that PEFT wrote, layers beside the adapter (a head) left out.

    Raises:
        ValueError: they are not those of the adapter ``name``; names some that differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    needed = {key: x.shape for key, x in state.items()}
    weights = {key: x for key, x in load_file(file).items() if "lora_" in key or key in needed}
    if needed != (found := {key: x.shape for key, x in weights.items()}):
        differ = sorted(key for key in needed.keys() | found.keys() if needed.get(key) != found.get(key))
        raise ValueError(
            f"{file} is no adapter for this model and configuration: {len(differ)} of its weights differ, such as "
            f"{differ[0]} ({_shape(found.get(differ[0]))} in the file, {_shape(needed.get(differ[0]))} needed)"
        )
    set_peft_model_state_dict(policy, weights, adapter_name=name)


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter: those that PEFT would train if it were the active one."""
    with keep_gradient_flags(model):
        model.requires_grad_(False)
        with use_adapter(model, name, keep_flags=False):
            return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def use_adapter(module: nn.Module, name: str, *, keep_flags: bool = True) -> Iterator[None]:
    """While this lasts, a PEFT model, or a part of one, computes with the adapter ``name`` and no other.

    PEFT lets only the active adapter require gradients; here ``requires_grad`` stays as it is (``keep_flags``), so that
    policy and critic can learn from one backward pass.
    """
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = next((m.active_adapters for m in module.modules() if isinstance(m, BaseTunerLayer)), [])

    def switch(to: Any) -> None:
        with keep_gradient_flags(module) if keep_flags else nullcontext():
            set_adapter(module, to)

    switch(name)
    token = _IN_USE.set(name)
    try:
        yield
    finally:
        _IN_USE.reset(token)
        switch(before)


def same_adapter(module: nn.Module) -> AbstractContextManager[None]:
    """Whatever :func:`use_adapter` has set now, for computing ``module`` again at another time."""
    name = _IN_USE.get()
    return nullcontext() if name is None else use_adapter(module, name)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While this lasts, a PEFT model is its base. PEFT by itself would leave only the active adapter trainable."""
    with keep_gradient_flags(model), cast(Any, model).disable_adapter():
        yield


@contextmanager
def keep_gradient_flags(module: nn.Module) -> Iterator[None]:
    """Put every ``requires_grad`` back to what it was before."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
