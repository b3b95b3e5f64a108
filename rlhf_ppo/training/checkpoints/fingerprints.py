"""Fingerprints: digests of a run's data and reference, so that no run resumes with others unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import Rows
from rlhf_ppo.models.adapters.lora import earlier_name
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.sharding import whole_tensor
from rlhf_ppo.runtime.processes.agreement import require_same
from rlhf_ppo.runtime.processes.group import ProcessGroup

_VALUES_PER_TENSOR = 2**16


def run_fingerprints(
    *,
    train_prompts: PromptSet | None,
    eval_prompts: PromptSet | None,
    reference: Reference,
    reward_funcs: Sequence[str],
    stop_token_ids: Sequence[int],
    device: torch.device,
    bf16: bool,
    processes: int,
) -> dict[str, Any]:
    """Return digests of data sets and reference, the adapters' configurations, and facts not in the settings."""
    adapters: Any = getattr(reference.policy, "peft_config", {})
    return {
        "train_dataset": None if train_prompts is None else data_fingerprint(train_prompts),
        "eval_dataset": None if eval_prompts is None else data_fingerprint(eval_prompts),
        # Under bf16 some processes hold rounded weights, others round where they gather.
        "reference": (copy_fingerprint if bf16 else weights_fingerprint)(reference.model or reference.policy),
        "reward_funcs": list(reward_funcs),
        "stop_token_ids": list(stop_token_ids),
        "adapters": {earlier_name(name): _adapter(config) for name, config in adapters.items()},
        "device": device.type,
        "bf16": bf16,
        "processes": processes,
    }


def data_fingerprint(prompts: PromptSet) -> str:
    """Compute a digest of all rows and columns, in order; an object unknown to JSON counts by its type alone."""
    digest = hashlib.sha256()
    for start in range(0, len(prompts), 1000):
        batch = prompts.take(range(start, min(start + 1000, len(prompts))))
        _add(digest, {"prompt": batch.prompts, **batch.columns})
    return f"{len(prompts)} rows, {digest.hexdigest()[:16]}"


def require_same_data(processes: ProcessGroup, sets: Mapping[str, Rows | PromptSet]) -> None:
    """Raise a ValueError that names both sides unless all processes have the same data sets, by name."""
    if not processes.alone:
        found = {n: data_fingerprint(x) if isinstance(x, PromptSet) else _rows_fingerprint(x) for n, x in sets.items()}
        require_same(processes, "give all processes the same data, in the same order", found)


def _rows_fingerprint(rows: Rows) -> str:
    digest = hashlib.sha256()
    for row in rows:
        _add(digest, row)
    return f"{len(rows)} rows, {digest.hexdigest()[:16]}"


def _add(digest: Any, value: Any) -> None:
    digest.update(json.dumps(_with_text_keys(value), sort_keys=True, default=_plain).encode())


def _with_text_keys(value: Any) -> Any:
    """Turn keys into text: JSON sorts them, and keys of mixed types do not compare."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def weights_fingerprint(model: nn.Module) -> str:
    """Compute a digest of a model's frozen parameters (:func:`parameters_fingerprint`)."""
    return parameters_fingerprint((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def parameters_fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute a digest of parameters: name, shape, dtype, and up to 65,536 evenly spaced values of each.

    That is every value of a small model, and of a large one enough to tell it from another without reading all of it.
    """
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{earlier_name(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = whole_tensor(parameter.detach()).flatten()
        spread = values[:: max(1, len(values) // _VALUES_PER_TENSOR)].contiguous().cpu()
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def copy_fingerprint(model: nn.Module) -> str:
    """Compute a digest that a model shares with its copies in bfloat16 and with what an adapter was added to.

    Values count as bfloat16 rounds them, in order and without names; adapters do not count. One optimizer step moves
    some value of a model over the edge between two bfloat16 numbers, while another CPU or precision moves none.
    """
    adapters = set(getattr(model, "peft_config", ()))
    own = (p for name, p in model.named_parameters() if not adapters & set(name.split(".")))
    return parameters_fingerprint(("", p.detach().bfloat16()) for p in own)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute a digest of a vocabulary: which text has which id."""
    vocabulary = tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items(), key=lambda pair: pair[1])).encode())
    return f"{len(vocabulary)} tokens, {digest.hexdigest()[:16]}"


def _adapter(config: Any) -> dict[str, Any]:
    # Sets are unordered, and the base's location is no property of the adapter.
    facts = {key: sorted(x) if isinstance(x, set) else x for key, x in config.to_dict().items()}
    return {key: x for key, x in facts.items() if key not in ("base_model_name_or_path", "revision", "inference_mode")}
