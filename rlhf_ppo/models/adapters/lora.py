"""LoRA and other adapters: configure, add, load, switch between and merge them; one at a time is active."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import nn

# A name that no layer of a model has: PEFT finds an adapter's weights by its name between dots.
VALUE_ADAPTER = "ppo_critic"
_EARLIER_NAMES = {VALUE_ADAPTER: "value"}
"""The adapter's name in checkpoints and black boxes of earlier versions."""

VALUE_FOLDER = "value"
"""Folder of the critic's adapter inside a run's folder."""

Value = TypeVar("Value")

_ACTIVE: ContextVar[str | None] = ContextVar("active_adapter", default=None)


def lora_config(rank: int, *, alpha: int | None = None, target_modules: tuple[str, ...] | None = None) -> Any:
    """Return a LoRA adapter's configuration, without dropout.

    Args:
        rank: of the two factors of each weight's change.
        alpha: the change is scaled by alpha / rank; None: twice the rank.
        target_modules: names of the layers that get it; ("all-linear",): all but the output layer; None: PEFT's choice
            for the architecture.
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
    """Return the name that an adapter, or a parameter in it, had in earlier versions; any other name itself."""
    return ".".join(_EARLIER_NAMES.get(part, part) for part in name.split("."))


def with_current_names(weights: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """Rename weights (or what is known of each) that an earlier version saved to the current ``names``."""
    now = {earlier_name(name): name for name in names if name not in weights}
    return {now.get(name, name): weight for name, weight in weights.items()}


def refuse_prompt_learning(config: Any, where: str) -> None:
    """Raise a ValueError if an adapter adds virtual tokens or prompts instead of changing the base's weights."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{where} is prompt learning ({config.peft_type.value}), whose virtual tokens stand before every sequence: "
            "PPO here needs one position per token and cannot train it; take LoRA or another adapter of the weights"
        )


def add_value_adapter(policy: Any, *, as_policy: bool) -> None:
    """Add a second adapter to a PEFT model, for the critic, with the configuration of the first.

    Args:
        policy: PEFT model.
        as_policy: start it with the first one's weights, where the base alone is not a model to start from.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    # Whatever changes the base's own weights belongs to the policy alone.
    own = {"modules_to_save": None, "layer_replication": None, "bias": "none"}
    own |= {"init_lora_weights": True} if as_policy else {}
    for field, value in own.items():
        if hasattr(config, field):
            setattr(config, field, value)
    _add_adapter(policy, VALUE_ADAPTER, config)
    if as_policy:
        names = get_peft_model_state_dict(policy, adapter_name=VALUE_ADAPTER, save_embedding_layers=False).keys()
        weights = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
        set_peft_model_state_dict(policy, {n: weights[n] for n in names}, adapter_name=VALUE_ADAPTER)
    for parameter in adapter_parameters(policy, VALUE_ADAPTER):
        parameter.requires_grad_(True)


def _add_adapter(policy: Any, name: str, config: Any) -> None:
    """Add an adapter to a PEFT model; the active adapter and ``requires_grad`` stay as they are.

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
    """Load an adapter's weights from a file written by PEFT, except layers beside the adapter (a head).

    Raises:
        ValueError: they do not match the adapter ``name``; names one that differs.
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
    """Return the weights of one adapter: those that PEFT would train if it were active."""
    with keep_gradient_flags(model):
        model.requires_grad_(False)
        with use_adapter(model, name, keep_flags=False):
            return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def use_adapter(module: nn.Module, name: str, *, keep_flags: bool = True) -> Iterator[None]:
    """Activate the adapter ``name`` alone, in a PEFT model or a part of one.

    PEFT lets only the active adapter require gradients; here ``requires_grad`` stays as it is (``keep_flags``), so that
    policy and critic can be trained by one backward pass.
    """
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = next((m.active_adapters for m in module.modules() if isinstance(m, BaseTunerLayer)), [])

    def switch(to: Any) -> None:
        with keep_gradient_flags(module) if keep_flags else nullcontext():
            set_adapter(module, to)

    switch(name)
    token = _ACTIVE.set(name)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        switch(before)


def current_adapter(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context manager that activates the current adapter again later, to recompute ``module``."""
    name = _ACTIVE.get()
    return nullcontext() if name is None else use_adapter(module, name)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch a PEFT model's adapters off; ``requires_grad`` stays, where PEFT would change it."""
    with keep_gradient_flags(model), cast(Any, model).disable_adapter():
        yield


@contextmanager
def keep_gradient_flags(module: nn.Module) -> Iterator[None]:
    """Restore every ``requires_grad`` afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def merge_adapter(policy: Any) -> Any:
    """Merge a PEFT model's active adapter into its base, in place, and return the base.

    A weight that an adapted layer shares with another (tied embeddings, repeated layers) is copied first: the adapter
    changes one of the layers only. The config then says that embeddings are not tied.
    """
    shared = Counter(id(p) for module in policy.modules() for p in module.parameters(recurse=False))
    repeats = getattr(policy.peft_config[policy.active_adapter], "layer_replication", None)
    for base in policy.modules() if repeats else [layer.get_base_layer() for layer in _layers(policy)]:
        for name, p in list(base.named_parameters(recurse=False)):
            if shared[id(p)] > 1:
                setattr(base, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    model = policy.merge_and_unload()
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(model.get_input_embeddings(), "weight", None):
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


def require_mergeable(policy: Any) -> None:
    """Refuse an adapter that cannot be merged: generate, evaluate and later runs load an adapter by merging it.

    Merges a copy of one layer of each kind.

    Raises:
        ValueError: the adapter cannot be merged; names its kind.
    """
    config = policy.peft_config[policy.active_adapter]
    tried = {
        (type(x), type(base := x.get_base_layer()), getattr(base, "bias", None) is None): x for x in _layers(policy)
    }
    try:
        if not hasattr(policy, "merge_and_unload"):
            raise NotImplementedError("it is not made of layers")
        for layer in tried.values():
            copy.deepcopy(layer).merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"an adapter of the kind {config.peft_type.value} cannot be merged into this base ({error}), which is how "
            "generate, evaluate and later runs load it: change peft_config, for instance to LoraConfig(r=8)"
        ) from error


def _layers(policy: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in policy.modules() if isinstance(module, BaseTunerLayer))
