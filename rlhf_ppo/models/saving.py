"""Saving: policy and critic as folders that generate, evaluate and plain PEFT open; loaded again and compared."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import SavedModelError, answers, require_saved
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.loading import BASE_FOLDER, REFERENCE_FOLDER, load_policy, merge_adapter, saved_bytes
from rlhf_ppo.models.lora import VALUE_FOLDER
from rlhf_ppo.models.merging import merge
from rlhf_ppo.runtime.files import replacing_files


def bytes_to_save(model: ActorCritic, *, base: str | None, merged: bool = False) -> int:
    """Bytes that :func:`save_actor_critic` writes, about."""
    whole = merged or base is None
    return saved_bytes(model, adapted=hasattr(model.policy, "peft_config") and not whole)


def save_actor_critic(
    model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: str | None, merged: bool = False
) -> None:
    """Save policy, tokenizer and critic, then load the policy afresh and compare it with the one in memory.

    Args:
        model: policy and critic.
        tokenizer: the policy's.
        folder: its files of the same names are replaced.
        base: where the model under the policy's adapter lies; None: nowhere, so that it is saved beside the adapter.
        merged: save the whole model with the adapter merged in, instead of the adapter alone.
    Raises:
        OSError: the disk is full, or the folder cannot be written; what lies there stays as it was.
        SavedModelError: what was saved is another model than the one in memory, or cannot be loaded; it stays there.
    """
    policy: Any = model.policy
    quantized = getattr(without_adapter_wrapper(policy), "is_quantized", False)
    expected, half = answers(policy), any(p.dtype in (torch.float16, torch.bfloat16) for p in policy.parameters())
    with replacing_files(folder, needed=bytes_to_save(model, base=base, merged=merged)) as new:
        if merged:
            whole = _merged(policy, base, quantized=quantized)
            # Beside the base at full precision an adapter makes another model than beside the rounded one.
            expected, half = (answers(whole), False) if quantized else (expected, half)
            whole.save_pretrained(new)
            del whole
        elif hasattr(policy, "peft_config"):
            if base is None:
                copy.deepcopy(policy).unload().save_pretrained(new / BASE_FOLDER)
                tokenizer.save_pretrained(new / BASE_FOLDER)
            write_adapter(policy, policy.active_adapter, new, folder, base)
        else:
            policy.save_pretrained(new)
        tokenizer.save_pretrained(new)
        model.save_critic(new)
        if model.value_adapter is not None:
            write_adapter(policy, model.value_adapter, new / VALUE_FOLDER, folder, base)
    if quantized and not merged:
        _require_same_adapter(policy, folder)
    else:
        require_saved(folder, expected, load_policy, half=half)


def save_reference(reference: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a run's reference as a model of its own in ``reference/``, for an evaluation of the run."""
    model: Any = reference
    with replacing_files(folder, needed=saved_bytes(reference, adapted=False)) as new:
        (merge(copy.deepcopy(model)) if hasattr(model, "peft_config") else model).save_pretrained(
            new / REFERENCE_FOLDER
        )
        tokenizer.save_pretrained(new / REFERENCE_FOLDER)


def write_adapter(policy: Any, name: str, place: Path, home: Path, base: str | None) -> None:
    """Write one adapter of a PEFT model into a folder itself, whatever the adapter's name.

    Args:
        policy: PEFT model.
        name: the adapter's.
        place: folder to write into.
        home: where the run's model will lie in the end.
        base: where the model under the adapter lies; None: beside the policy's, as it is after the adapter was made.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Embeddings that were resized are the base's, and lie there.
        policy.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        written = Path(scratch) if name == "default" else Path(scratch) / name
        place.mkdir(exist_ok=True)
        for file in {*written.glob("adapter_*"), Path(scratch) / "README.md"}:
            shutil.move(file, place / file.name)
    file = place / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["base_model_name_or_path"] = base or str(home.resolve() / BASE_FOLDER)
    if base is None and "init_lora_weights" in facts:
        # What changed the base when the adapter was made must not change it again when that is loaded.
        facts |= {"init_lora_weights": True, "layer_replication": None}
    file.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _merged(policy: Any, base: str | None, *, quantized: bool) -> Any:
    if not quantized or base is None:
        return merge(copy.deepcopy(policy))
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(policy, policy.active_adapter, Path(scratch), Path(scratch), base)
        return merge_adapter(load_policy(base), scratch)


def _require_same_adapter(policy: Any, folder: Path) -> None:
    """A quantised base cannot be compared with one loaded at full precision; the adapter can, to the last bit."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
    saved = load_file(folder / "adapter_model.safetensors")
    if held.keys() != saved.keys() or not all(torch.equal(held[key].cpu(), x) for key, x in saved.items()):
        raise SavedModelError(f"the adapter saved in {folder} is not the one that was trained")
