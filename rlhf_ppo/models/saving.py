"""Save policy and critic as folders for generate, evaluate and plain PEFT; then load them and compare."""

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

from rlhf_ppo.models.acceleration.working_copy import held_in_bf16
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import VALUE_FOLDER, merge_adapter
from rlhf_ppo.models.compare import SavedModelError, probe_logits, require_saved
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.loading import BASE_FOLDER, REFERENCE_FOLDER, load_policy, merge_saved_adapter, saved_bytes
from rlhf_ppo.runtime.files import replacing_files


def bytes_to_save(model: ActorCritic, *, base: str | None, merged: bool = False) -> int:
    """Estimate the bytes that :func:`save_actor_critic` writes."""
    whole = merged or base is None
    return saved_bytes(model, adapted=hasattr(model.policy, "peft_config") and not whole)


def save_actor_critic(
    model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: str | None, merged: bool = False
) -> None:
    """Save policy, tokenizer and critic, then load the policy and compare it with the one in memory.

    Args:
        model: policy and critic.
        tokenizer: the policy's.
        folder: files of the same names in it are replaced.
        base: folder or hub id of the model under the policy's adapter; None: save it beside the adapter.
        merged: save the whole model with the adapter merged in, instead of the adapter alone.
    Raises:
        OSError: the disk is full, or the folder cannot be written; its files stay as they were.
        SavedModelError: the saved model differs from the one in memory, or cannot be loaded; the files stay.
    """
    policy: Any = model.policy
    quantized = getattr(without_adapter_wrapper(policy), "is_quantized", False)
    rounded = quantized or held_in_bf16(policy)  # an adapter's base
    expected, half = probe_logits(policy), any(p.dtype in (torch.float16, torch.bfloat16) for p in policy.parameters())
    with replacing_files(folder, needed=bytes_to_save(model, base=base, merged=merged)) as new:
        if merged:
            whole = _merged(policy, base, rounded=rounded)
            # On the base at full precision the adapter gives another model than on the rounded one.
            expected, half = (probe_logits(whole), False) if rounded else (expected, half)
            whole.save_pretrained(new)
            del whole
        elif hasattr(policy, "peft_config"):
            if base is None:
                copy.deepcopy(policy).float().unload().save_pretrained(new / BASE_FOLDER)
                tokenizer.save_pretrained(new / BASE_FOLDER)
            write_adapter(policy, policy.active_adapter, new, folder, base)
        else:
            policy.save_pretrained(new)
        tokenizer.save_pretrained(new)
        model.save_critic(new)
        if model.value_adapter is not None:
            write_adapter(policy, model.value_adapter, new / VALUE_FOLDER, folder, base)
    if rounded and not merged:
        _require_current_adapter(policy, folder)
    if merged or not quantized:
        require_saved(folder, expected, load_policy, half=half)


def save_reference(reference: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a run's reference as a whole model in ``reference/``, for evaluations of the run."""
    model: Any = reference
    with replacing_files(folder, needed=saved_bytes(reference, adapted=False)) as new:
        (merge_adapter(copy.deepcopy(model)) if hasattr(model, "peft_config") else model).save_pretrained(
            new / REFERENCE_FOLDER
        )
        tokenizer.save_pretrained(new / REFERENCE_FOLDER)


def write_adapter(policy: Any, name: str, place: Path, home: Path, base: str | None) -> None:
    """Save one adapter of a PEFT model directly in a folder, not in a subfolder of the adapter's name.

    Args:
        policy: PEFT model.
        name: the adapter's.
        place: folder to write into.
        home: final folder of the run's model.
        base: folder or hub id of the model under the adapter; None: ``base/`` in ``home``, saved after the adapter was
            added.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Resized embeddings are saved with the base.
        policy.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        written = Path(scratch) if name == "default" else Path(scratch) / name
        place.mkdir(exist_ok=True)
        for file in {*written.glob("adapter_*"), Path(scratch) / "README.md"}:
            shutil.move(file, place / file.name)
    file = place / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["base_model_name_or_path"] = base or str(home.resolve() / BASE_FOLDER)
    if base is None and "init_lora_weights" in facts:
        # Whatever changed the base when the adapter was added must not change it again on loading.
        facts |= {"init_lora_weights": True, "layer_replication": None}
    file.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _merged(policy: Any, base: str | None, *, rounded: bool) -> Any:
    if not rounded or base is None:
        return merge_adapter(copy.deepcopy(policy).float())
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(policy, policy.active_adapter, Path(scratch), Path(scratch), base)
        return merge_saved_adapter(load_policy(base), scratch)


def _require_current_adapter(policy: Any, folder: Path) -> None:
    """Compare the adapter alone, bit for bit: a quantised base differs from the base loaded at full precision."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
    saved = load_file(folder / "adapter_model.safetensors")
    if held.keys() != saved.keys() or not all(torch.equal(held[key].cpu(), x) for key, x in saved.items()):
        raise SavedModelError(f"the adapter saved in {folder} is not the one that was trained")
