"""Model facts: configurations and names, in a checkpoint or black box, from which its models can be built again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from rlhf_ppo.models.actor_critic import ActorCritic, critic_kind
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.training.run import Run


def model_facts(model: ActorCritic, run: Run) -> dict[str, Any]:
    """Return what says, beside the trained weights, which models a run has."""
    policy = cast(Any, model.policy)
    base, adapter = without_adapter_wrapper(policy), None
    if base is not policy:
        with tempfile.TemporaryDirectory() as folder:
            policy.peft_config[policy.active_adapter].save_pretrained(folder)
            adapter = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return {
        **run.sources,
        "base": run.base,
        "own_reference": run.reference.model is not None,
        "policy_config": _config(base),
        "attention": base.config._attn_implementation,
        "adapter": adapter,
        "critic": critic_kind(model),
        "critic_config": None if model.value_trunk is None else _config(model.value_trunk),
    }


def _config(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))
