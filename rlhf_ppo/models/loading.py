"""Load policies, critics' trunks, classifiers and tokenizers; read context length and the like from their configs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging

from rlhf_ppo.data.hub import explain_load_failure, read_weights, refuse_pickles
from rlhf_ppo.models.adapters.lora import merge_adapter, refuse_prompt_learning
from rlhf_ppo.models.value_head import adapter_labels, holds_reward_head, load_value_head

EMBEDDED_MODEL = str(Path(__file__).parents[1] / "assets" / "stories-gpt2")
"""Folder of the packaged small GPT-2, which the name "embedded" stands for."""

BASE_FOLDER = "base"
"""Subfolder of an adapter with its base, if no other folder or hub id holds that."""

REFERENCE_FOLDER = "reference"
"""Subfolder of a run with its reference, if no other folder or hub id holds that."""


def resolve_model(model: Any) -> Any:
    """Return the packaged model's folder for "embedded"; anything else unchanged."""
    return EMBEDDED_MODEL if isinstance(model, str) and model == "embedded" else model


def find_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """Return the config of a model, folder or hub id.

    Raises:
        ValueError: neither a folder with a config nor on the hub; says which was tried.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return cast(PreTrainedModel, model).config
    if not isinstance(model, str):
        raise ValueError(f"a model must be a hub id, a folder or a transformers model, got {type(model).__name__}")
    refuse_pickles(model)
    base = adapter_base(model)
    if base is not None and not (Path(model) / "config.json").is_file():
        config = find_config(base)
        if (labels := adapter_labels(Path(model) / "adapter_model.safetensors")) is not None:
            config.num_labels = labels  # the base's config does not count the labels of the adapter's head
    else:
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {model!r} cannot be loaded: {explain_load_failure(model, error)}") from error
    if holds_reward_head(model):
        config.num_labels = 1  # the head beside a causal language model predicts one number
    return config


def adapter_base(model: Any) -> str | None:
    """Return the base model that a PEFT adapter's folder names, or None if ``model`` is not such a folder.

    Raises:
        ValueError: the adapter names no base, or that folder is gone.
    """
    file = Path(model) / "adapter_config.json" if isinstance(model, str) else None
    if file is None or not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} does not describe an adapter: {error}") from None
    own = file.with_name(BASE_FOLDER)
    if base and Path(base).name == BASE_FOLDER and (own / "config.json").is_file():
        return str(own)  # even if the folder was moved
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(
            f"{model} holds an adapter alone, and the model it was trained on ({base}) is not there: put it back, or "
            "correct base_model_name_or_path in adapter_config.json"
        )
    return str(base)


def load_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """Return the model's config; refuse models that are not decoder-only.

    Raises:
        ValueError: no such model, or an encoder-decoder; names its type.
    """
    config = find_config(model)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; PPO here treats prompt and response as one sequence "
            "and needs a decoder-only causal language model (GPT-2, Llama, Qwen, ...)"
        )
    return cast(PretrainedConfig, config)


def refuse_encoder_decoder(config: PretrainedConfig, what: str, instead: str) -> None:
    """Raise a ValueError with the remedy ``instead`` if the model is an encoder-decoder (T5, BART)."""
    if config.is_encoder_decoder:
        raise ValueError(f"{what} is an encoder-decoder model ({config.model_type}), which is not supported: {instead}")


def load_tokenizer(model: str | PreTrainedModel, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or, for an adapter without one, of its base; ``options`` go to transformers.

    Raises:
        ValueError: a model object without a name, or no tokenizer there.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError("this model was not loaded from a folder or hub id; pass its tokenizer as processing_class")
    base = adapter_base(name)
    if base is not None and not (Path(name) / "tokenizer_config.json").is_file():
        name = resolve_model(base)
    folder = Path(name)
    if folder.is_dir() and not any(file for kind in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(kind)):
        # For some models transformers would return an empty tokenizer.
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: the folder has none; copy the model's own there")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {explain_load_failure(name, error)}") from error


def load_policy(model: str | PreTrainedModel) -> PreTrainedModel:
    """Load a causal language model in float32 from a hub id or folder, adapters merged; a model object stays as is."""
    base = adapter_base(model)
    if base is not None:
        return merge_saved_adapter(load_policy(base), str(model))
    if isinstance(model, str):
        return read_weights(AutoModelForCausalLM, model)
    return model


def in_float32(model: PreTrainedModel, *, frozen: bool = True) -> PreTrainedModel:
    """Convert half-precision weights to float32 in place, with a warning; a quantised model stays as it is.

    PPO's steps are smaller than the spacing of half-precision numbers and would be lost; and transformers loads a model
    in whatever precision it was saved.

    Args:
        model: whole model.
        frozen: convert for frozen weights too; False: only if a trainable weight is in half precision.
    """
    types = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if frozen or p.requires_grad}
    halves = types & {"float16", "bfloat16"}
    if not halves or getattr(model, "is_quantized", False):
        return model
    warnings.warn(
        f"the given {type(model).__name__} has weights in {' and '.join(sorted(halves))}; they are converted to "
        "float32. Load it with dtype=torch.float32 (what products are computed in is the setting `precision`)",
        stacklevel=4,
    )
    return model.float()


def merge_saved_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Load a PEFT adapter's folder and merge it into the model.

    Raises:
        ValueError: the weights are missing, pickled, damaged, or another adapter's.
    """
    from peft import PeftConfig, PeftModel

    refuse_pickles(folder)
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} holds an adapter's config, but its weights, adapter_model.safetensors, are gone")
    refuse_prompt_learning(PeftConfig.from_pretrained(folder), folder)
    try:
        with warnings.catch_warnings():
            # PEFT silently leaves out weights that match no layer.
            warnings.filterwarnings("error", ".*missing adapter keys")
            return merge_adapter(PeftModel.from_pretrained(model, folder))
    except SafetensorError as error:
        raise ValueError(f"{folder}: adapter_model.safetensors cannot be read ({error}): it is damaged") from error
    except UserWarning as error:
        raise ValueError(
            f"{folder}: the adapter's weights are not those of its own config on {model.name_or_path or 'this base'} "
            f"({str(error)[:200]}): correct adapter_config.json, base_model_name_or_path above all"
        ) from error


def load_classifier(model: str, *, new_head: bool = False) -> PreTrainedModel:
    """Load a one-label sequence classifier in float32 from a hub id or folder, adapters merged.

    Args:
        model: hub id or folder.
        new_head: accept a causal language model too, and give it a random score head without a warning.
    """
    if not new_head and holds_reward_head(model):
        return _classifier_of_parts(model)
    base = adapter_base(model)
    if base is not None:
        return merge_saved_adapter(load_classifier(base, new_head=True), model)
    verbosity = logging.get_verbosity()
    if new_head:
        logging.set_verbosity_error()
    try:
        new = "head" if new_head else "none"
        return read_weights(AutoModelForSequenceClassification, model, new=new, num_labels=1)
    finally:
        logging.set_verbosity(verbosity)


def _classifier_of_parts(folder: str) -> PreTrainedModel:
    """Make a classifier of a causal language model's trunk, its adapter merged, and the value head beside it."""
    config = find_config(folder)
    head = load_value_head(folder, config)
    policy = load_policy(folder)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    score = nn.Linear(head.weight.shape[1], 1)
    score.load_state_dict({"weight": head.weight, "bias": head.bias})
    if not hasattr(classifier, "score"):
        raise ValueError(
            f"{folder} has a value head beside a {config.model_type} model, for whose classifier it is not known where "
            "a head goes: call the model in a reward function of your own"
        )
    setattr(classifier, classifier.base_model_prefix, policy.base_model)
    classifier.score = score
    classifier.name_or_path = folder
    return classifier


def load_trunk(model: str | PreTrainedModel) -> PreTrainedModel:
    """Load a model without its head, for a separate critic; adapters are merged."""
    if adapter_base(model) is not None:
        classifies = adapter_labels(Path(str(model)) / "adapter_model.safetensors") is not None
        model = load_classifier(str(model)) if classifies else load_policy(model)
    if isinstance(model, str):
        return read_weights(AutoModel, model, new="pooler")
    return cast(PreTrainedModel, in_float32(model).base_model)


def vocabulary_size(config: PretrainedConfig) -> int:
    """Return the number of tokens that the model has embeddings for."""
    return int(config.get_text_config().vocab_size)


_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_length", "seq_len", "context_length", "max_target_positions", "model_max_length"),
)
"""Names of the context length in configs; of several, the smallest counts."""


_COUNTS_FROM_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"),
    *("longformer", "mpnet", "luke", "esm", "ibert", "lilt", "markuplm", "layoutlmv3"),
)
"""Architectures whose first position is pad_token_id + 1, which shortens the context by as many tokens."""


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most tokens that fit the model's context, or None where its config sets no limit."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _CONTEXT)
    limit = min((value for value in named if isinstance(value, int) and value > 0), default=None)
    if limit is None or text.model_type not in _COUNTS_FROM_PADDING or text.pad_token_id is None:
        return limit
    return limit - text.pad_token_id - 1


def prompt_room(config: PretrainedConfig, max_new_tokens: int) -> int | None:
    """Return the most tokens of a prompt that leave room for ``max_new_tokens``; None: no limit."""
    limit = context_length(config)
    return None if limit is None else limit - max_new_tokens


def saved_bytes(model: nn.Module, *, adapted: bool) -> int:
    """Estimate the bytes of the saved weights; if ``adapted``, of the trainable ones only."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapted)


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's "gelu_new" by one kernel instead of transformers' eight operations; the function is the same."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh").eval())
