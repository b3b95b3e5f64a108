"""Convert a script of TRL before 0.12, with ``ppo_trainer.step``; LLaMA-Factory's trainer is a subclass of TRL's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_ppo.migration.arguments import with_defaults
from rlhf_ppo.migration.converted import NO_CLIPPING, Converted, report_to, require_positive
from rlhf_ppo.migration.reading import Given

KL_ESTIMATORS = {"kl": "k1", "mse": "k2", "abs": "k3", "full": "k3"}
"""TRL's kl_penalty -> our kl_estimator; the last two are the nearest that there is."""


def convert(given: Given, rows: int | None) -> Converted:
    """Return settings of ``rlhf-ppo train`` for what a script gives to ``PPOConfig``, ``generate`` and ``LoraConfig``.

    Args:
        given: the script's constants.
        rows: number of rows of the data set, if known.
    Raises:
        ValueError: TRL refuses these arguments too.
    """
    old = with_defaults("trl-0x", given.values)
    converted = Converted({"output_dir": f"runs/{given.origin.rpartition('/')[2].removesuffix('.py')}"})
    ours = converted.settings
    model = old["pretrained_model_name_or_path"] or given.values.get("model_name")
    if model is None:
        converted.missing["model"] = "NAME   (fill it in: the script computes the name of its policy)"
    else:
        ours["model"] = model
    converted.missing["reward"] = (
        "FILE.py:FUNCTION   (fill it in: a function of prompts and completions that returns what the script passes to "
        "step as scores; or the folder of a reward model)"
    )
    converted.missing["dataset"] = (
        "FILE   (fill it in: a csv, jsonl or parquet file or a hub id with a column prompt, or see prompt_column; "
        "text, not token ids)"
    )
    ours |= trainer_settings(old, given.processes, converted)
    ours |= {"seed": old["seed"], "gradient_checkpointing": old["gradient_checkpointing"]}
    ours["lr_scheduler_type"] = "constant"  # TRL's default optimizer is Adam without a schedule
    if given.values.get("steps") is not None:
        ours["total_episodes"] = old["steps"]
    elif rows is not None:
        ours["total_episodes"] = rows
    else:
        converted.missing["total_episodes"] = "N   (fill it in: the responses of the script's whole loop)"
    ours |= _sampling(given.values)
    if old["r"] is not None:
        ours |= {"lora_rank": old["r"], "lora_alpha": old["lora_alpha"]}
        if old["target_modules"] is not None:
            ours["lora_target_modules"] = old["target_modules"]
    report_to(old["log_with"], converted)
    return converted


def trainer_settings(old: Mapping[str, Any], num_processes: int, converted: Converted) -> dict[str, Any]:
    """Return the settings that come from a ``PPOConfig``, and note the arithmetic.

    Raises:
        ValueError: sizes that TRL refuses too.
    """
    names = ("batch_size", "mini_batch_size", "gradient_accumulation_steps")
    require_positive({name: old[name] for name in names})
    batch, rows, accumulated = (old[name] for name in names)
    step = rows * accumulated
    if batch % step:
        raise ValueError(
            f"batch_size={batch} is not a multiple of mini_batch_size x gradient_accumulation_steps = {step}; TRL "
            "refuses that too"
        )
    ours: dict[str, Any] = {
        "rollout_batch_size": batch * num_processes,
        "num_minibatches": batch // step,
        "num_epochs": old["ppo_epochs"],
        "learning_rate": old["learning_rate"],
        "value_learning_rate": old["learning_rate"],
        "max_grad_norm": old["max_grad_norm"] or NO_CLIPPING,
        "gamma": old["gamma"],
        "gae_lambda": old["lam"],
        "clip_range": old["cliprange"],
        "clip_range_vf": old["cliprange_value"],
        "normalize_values": False,  # cliprange_value is in the reward's units
        "vf_coef": old["vf_coef"],
        "kl_coef": old["init_kl_coef"],
        "score_clip": old["score_clip"],
    }
    if num_processes > 1:
        converted.arithmetic["rollout_batch_size"] = f"{batch} per process x {num_processes} processes"
    converted.arithmetic["num_minibatches"] = f"{batch} / ({rows} x {accumulated} accumulated)"
    if ours["kl_coef"]:
        ours["kl_estimator"] = KL_ESTIMATORS[old["kl_penalty"]]
        if old["adap_kl_ctrl"]:
            ours |= {"kl_target": old["target"], "kl_horizon": old["horizon"]}
    if old["use_score_scaling"]:
        ours["normalize_scores"] = True
    if old["early_stopping"]:
        ours["target_kl"] = old["target_kl"]
    return ours


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the arguments of ``generate`` that a script gives."""
    ours: dict[str, Any] = {}
    if values.get("max_new_tokens") is not None:
        ours["max_new_tokens"] = math.ceil(values["max_new_tokens"])
    if values.get("temperature") is not None:
        ours["temperature"] = values["temperature"]
    if (values.get("min_new_tokens") or 0) > 0:
        ours["min_new_tokens"] = values["min_new_tokens"]
    if values.get("eos_token_id") == -1:
        ours["stop_token_ids"] = []
    return ours
