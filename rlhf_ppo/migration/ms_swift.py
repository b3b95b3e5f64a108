"""Convert a PPO run of ms-swift, whose trainer is TRL's with other names and data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf_ppo.migration import trl
from rlhf_ppo.migration.arguments import known_fields, with_defaults
from rlhf_ppo.migration.converted import Converted
from rlhf_ppo.migration.prompts import ENDINGS, read_rows, usual_prompts
from rlhf_ppo.migration.reading import Given

_ATTENTION = {"flash_attn": "flash_attention_2"}
"""Its attn_impl -> ours, where they differ."""

_OVERLONG = {"delete": "drop", "left": "truncate"}
"""Its truncation_strategy -> our overlong_prompts."""

_PRECISIONS = {"bfloat16": True, "float32": False}
"""Its torch_dtype -> TRL's bf16."""


def convert(given: Given, rows: int | None) -> Converted:
    """Return settings of ``rlhf-ppo train`` for the run that ms-swift would make of its arguments and defaults.

    Args:
        given: its arguments.
        rows: number of rows of the data set; None: what the files here and ``NAME#ROWS`` say.
    Raises:
        ValueError: not a PPO run, something is missing, or ms-swift or TRL refuses these arguments too.
    """
    theirs = with_defaults("ms-swift", given.values)
    for old in ("train_type", "sft_type"):  # names of tuner_type in releases 3 and 2
        if theirs[old] is not None:
            theirs["tuner_type"] = theirs[old]
    _refuse(theirs, "rlhf_type" in given.values)
    prompts, files, counted = _data(theirs)
    rows = len(prompts) if prompts is not None else rows or counted
    held_out = round((rows or 0) * theirs["split_dataset_ratio"])
    values = _as_trl(theirs, given.processes) | {"dataset_name": files[0]}
    converted = trl.convert(given._replace(values=values), None if rows is None else rows - held_out)
    ours = converted.settings
    ours |= _models(theirs)
    ours["dataset"] = files
    if prompts is not None:
        converted.prompts = prompts
        converted.arithmetic["dataset"] = f"{len(prompts)} chat prompts from {', '.join(files)}"
    if held_out:
        ours["eval_size"] = held_out
        converted.arithmetic["eval_size"] = f"{theirs['split_dataset_ratio']:g} of {rows} rows"
    if theirs["val_dataset"]:
        ours.pop("eval_size", None)
        ours["eval_dataset"] = theirs["val_dataset"][0]
    if theirs["truncation_strategy"] in (None, *_OVERLONG):
        ours["overlong_prompts"] = _OVERLONG[theirs["truncation_strategy"] or "delete"]
    converted.silent |= {"rlhf_type"}
    converted.told = [name for name in converted.told if name in known_fields("ms-swift")]
    return converted


def _refuse(theirs: dict[str, Any], given: bool) -> None:
    """Raise a ValueError with the remedy for what is no PPO run, or one that has no counterpart."""
    if theirs["rlhf_type"] != "ppo":
        kind = f"rlhf_type is {theirs['rlhf_type']!r}" + ("" if given else " (ms-swift's default)")
        raise ValueError(
            f"{kind}, but only PPO runs are migrated (--rlhf_type ppo); for GRPO or RLOO set advantage_estimator and "
            "num_generations in a file of your own"
        )
    for name in ("model", "reward_model", "dataset"):
        if not theirs[name]:
            raise ValueError(f"no {name}, which a PPO run of ms-swift needs: add it, or -- --{name} NAME")
    if len(theirs["reward_model"]) > 1:
        raise ValueError(
            f"reward_model names several models ({', '.join(theirs['reward_model'])}), and ms-swift's PPO takes one: "
            "name one, and add others to `reward` in the new file"
        )
    if theirs["tuner_type"] not in ("lora", "full"):
        raise ValueError(
            f"tuner_type is {theirs['tuner_type']!r}, but adapters (lora) and all weights (full) are trained here: "
            "choose one"
        )
    for name in ("adapters", "reward_adapters"):
        if len(theirs[name]) > 1:
            raise ValueError(f"{name} names several adapters, and one is loaded here: merge them first (swift export)")
    if theirs["ref_adapters"]:
        raise ValueError("ref_adapters has no counterpart: merge them first (swift export), and set ref_model")


def _models(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the models, as far as they are not what TRL's names say."""
    ours: dict[str, Any] = {}
    if theirs["adapters"]:
        ours["model"] = theirs["adapters"][0]
        ours["ref_model"] = theirs["model"]  # its reference is the policy with the adapter switched off
    if theirs["ref_model"] is not None and theirs["ref_model"] != theirs["model"]:
        ours["ref_model"] = theirs["ref_model"]
    if theirs["reward_adapters"]:
        ours["reward"] = theirs["reward_adapters"]
        ours["value_model"] = ours["value_head_from"] = theirs["reward_adapters"][0]
    if theirs["attn_impl"] is not None:
        ours["attn_implementation"] = _ATTENTION.get(theirs["attn_impl"], theirs["attn_impl"])
    return ours


def _as_trl(theirs: dict[str, Any], num_processes: int) -> dict[str, Any]:
    """Return TRL's arguments for ms-swift's: most have the same names."""
    shared = {name: value for name, value in theirs.items() if name in known_fields("trl") and value is not None}
    lora = theirs["tuner_type"] == "lora"
    accumulated = theirs["gradient_accumulation_steps"]
    if accumulated is None:
        # Its default makes batches of 16.
        accumulated = max(1, math.ceil(16 / theirs["per_device_train_batch_size"] / num_processes))
    bits = theirs["quant_bits"] if theirs["quant_method"] == "bnb" else None
    warmup = theirs["warmup_steps"] or theirs["warmup_ratio"] or 0.0
    evaluates = bool(theirs["val_dataset"] or theirs["split_dataset_ratio"]) and theirs["eval_strategy"] != "no"
    return shared | {
        "sft_model_path": theirs["model"],
        "reward_model_path": theirs["reward_model"][0],
        "output_dir": theirs["output_dir"] or f"output/{Path(theirs['model']).name}",
        "learning_rate": theirs["learning_rate"] or (1e-4 if lora else 1e-5),
        "gradient_accumulation_steps": accumulated,
        "response_length": theirs["response_length"] or theirs["max_new_tokens"] or theirs["max_completion_length"],
        "stop_token": "eos",  # as its template says
        "temperature": theirs["temperature"],
        "warmup_steps": float(warmup),
        "use_peft": lora,
        "lora_r": theirs["lora_rank"],
        "lora_alpha": int(theirs["lora_alpha"]),
        "lora_target_modules": theirs["target_modules"],
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "bf16": _PRECISIONS.get(str(theirs["torch_dtype"]), theirs["bf16"]),
        "eval_strategy": "steps" if evaluates else "no",
    }


def _data(theirs: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, list[str], int | None]:
    """Return chat prompts of the data sets, or None where one is no file here; their names, and the rows they name."""
    named = [(name, count) for name, _, count in (entry.partition("#") for entry in theirs["dataset"])]
    names = [name for name, _ in named]
    if not all(Path(name).is_file() and name.endswith(ENDINGS) for name in names):
        counts = [int(count) for _, count in named if count.isdecimal()]
        return None, names, sum(counts) if len(counts) == len(named) else None
    prompts: list[dict[str, Any]] = []
    for name, count in named:
        rows = read_rows(Path(name))
        prompts += usual_prompts(rows[: int(count)] if count.isdecimal() else rows, name)
    return prompts, names, None
