"""Convert a PPO run of LLaMA-Factory, whose trainer is a subclass of TRL 0.x's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf_ppo.migration.arguments import with_defaults
from rlhf_ppo.migration.converted import Converted, in_rollouts, report_to, warm_up
from rlhf_ppo.migration.prompts import described_prompts, find_dataset_info, read_rows
from rlhf_ppo.migration.reading import Given
from rlhf_ppo.migration.trl_0x import trainer_settings

_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
"""Its flash_attn -> our attn_implementation."""


def convert(given: Given, rows: int | None) -> Converted:
    """Return settings of ``rlhf-ppo train`` for the run that LLaMA-Factory would make of its arguments and defaults.

    Args:
        given: its arguments.
        rows: number of rows of the data set; None: those of the files that ``dataset_info.json`` names, if they are
            here.
    Raises:
        ValueError: not a PPO run, something is missing, or LLaMA-Factory refuses these arguments too.
    """
    theirs = with_defaults("llama-factory", given.values)
    _refuse(theirs)
    converted = Converted({}, told=["top_k", "top_p"], silent={"stage", "do_train"})
    ours = converted.settings
    ours |= _models(theirs)
    ours["output_dir"] = theirs["output_dir"] or "saves"
    _data(theirs, given.folder, converted)
    if converted.prompts is not None:
        rows = len(converted.prompts)
    ours |= _trainer(theirs, given.processes, converted)
    rollouts = _length(theirs, rows, converted)
    _schedule(theirs, rollouts, converted)
    longest = theirs["max_new_tokens"] if theirs["max_new_tokens"] > 0 else theirs["max_length"]
    ours |= {"max_new_tokens": longest, "temperature": theirs["temperature"], "seed": theirs["seed"]}
    if theirs["bf16"] or theirs["pure_bf16"]:
        ours["precision"] = "bf16"
    if theirs["use_cpu"] or theirs["no_cuda"]:
        ours["device"] = "cpu"
    if theirs["flash_attn"] in _ATTENTION:
        ours["attn_implementation"] = _ATTENTION[theirs["flash_attn"]]
    if "enable_thinking" in given.values:
        ours["chat_template_kwargs"] = {"enable_thinking": theirs["enable_thinking"]}
    report_to(theirs["report_to"], converted)
    return converted


def _refuse(theirs: dict[str, Any]) -> None:
    """Raise a ValueError with the remedy for what is no PPO run, or one that has no counterpart."""
    stage, kind = theirs["stage"], theirs["finetuning_type"]
    if stage != "ppo":
        raise ValueError(
            f"stage is {stage!r}, but only PPO runs are migrated (stage: ppo): `rlhf-ppo sft` and `rlhf-ppo reward` "
            "train the other stages' models"
        )
    for name in ("model_name_or_path", "reward_model", "dataset"):
        if theirs[name] is None:
            raise ValueError(f"no {name}, which a PPO run of LLaMA-Factory needs: add it, or -- --{name} NAME")
    if kind not in ("lora", "full"):
        raise ValueError(
            f"finetuning_type is {kind!r}, but adapters (lora) and all weights (full) are trained here: choose one"
        )
    if theirs["reward_model_type"] == "lora" and kind == "full":
        raise ValueError(
            "reward_model_type is 'lora' (its default), which LLaMA-Factory takes with finetuning_type: lora alone: "
            "set reward_model_type: full or api"
        )
    if theirs["reward_model_type"] == "api" and not theirs["reward_model"].startswith("http"):
        raise ValueError(
            f"reward_model_type is 'api', but reward_model={theirs['reward_model']!r} is no http(s) address: correct "
            "one of them"
        )
    for name in ("reward_model_adapters", "ref_model_adapters"):
        if theirs[name] is not None:
            raise ValueError(
                f"{name}={theirs[name]!r} has no counterpart: merge it first (llamafactory-cli export), and name the "
                "merged folder"
            )
    if "," in (theirs["adapter_name_or_path"] or ""):
        raise ValueError(
            f"adapter_name_or_path names several adapters ({theirs['adapter_name_or_path']}), and one is loaded here: "
            "merge them first (llamafactory-cli export), and name the merged folder"
        )


def _models(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the models: the policy, its reference and adapter, and the reward."""
    base, adapter = theirs["model_name_or_path"], theirs["adapter_name_or_path"]
    ours: dict[str, Any] = {"model": adapter or base, "reward": [theirs["reward_model"]]}
    if theirs["ref_model"] is not None:
        ours["ref_model"] = theirs["ref_model"]
    elif adapter is not None and not theirs["create_new_adapter"]:
        ours["ref_model"] = base  # its reference is the policy with the adapter switched off
    if (Path(ours["model"]) / "value_head.safetensors").is_file():
        ours["value_head_from"] = ours["model"]
    if theirs["finetuning_type"] == "lora":
        target = [name.strip() for name in theirs["lora_target"].split(",")]
        ours["lora_rank"] = theirs["lora_rank"]
        ours["lora_alpha"] = theirs["lora_alpha"] or 2 * theirs["lora_rank"]
        ours["lora_target_modules"] = ["all-linear"] if target == ["all"] else target
    if theirs["quantization_bit"] is not None:
        ours["quantization"] = f"{theirs['quantization_bit']}bit"
    return ours


def _data(theirs: dict[str, Any], folder: Path, converted: Converted) -> None:
    """Set the data set: chat prompts made of the files that dataset_info.json names, or what to fill in."""
    converted.settings["eval_size"] = 0  # its PPO never evaluates
    converted.settings["overlong_prompts"] = "truncate"
    names = [name.strip() for name in theirs["dataset"].split(",")]
    found = find_dataset_info([Path(theirs["dataset_dir"]), folder / theirs["dataset_dir"], folder])
    if found is None:
        converted.missing["dataset"] = (
            f"FILE   (fill it in: chat prompts of {', '.join(names)}, whose files dataset_info.json names; migrate "
            "makes them if it finds that file in dataset_dir)"
        )
        return
    infos, place = found
    prompts: list[dict[str, Any]] = []
    for name in names:
        if name not in infos:
            raise ValueError(f"dataset {name!r} is not in {place / 'dataset_info.json'}: add it, or correct the name")
        file = place / str(infos[name].get("file_name"))
        if not file.is_file():
            converted.missing["dataset"] = (
                f"FILE   (fill it in: chat prompts of {', '.join(names)}; {name} is no file here: {infos[name]})"
            )
            return
        prompts += described_prompts(read_rows(file)[: theirs["max_samples"]], infos[name], f"data set {name}")
    converted.prompts = prompts
    converted.arithmetic["dataset"] = f"{len(prompts)} chat prompts from {', '.join(names)}"


def _trainer(theirs: dict[str, Any], num_processes: int, converted: Converted) -> dict[str, Any]:
    """Return what LLaMA-Factory's PPOConfig says: the rest has TRL's defaults."""
    rows, accumulated, buffer = (
        theirs[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size")
    )
    old = with_defaults(
        "trl-0x",
        {
            "batch_size": rows * accumulated * buffer,
            "mini_batch_size": rows,
            "gradient_accumulation_steps": accumulated,
            "ppo_epochs": theirs["ppo_epochs"],
            "learning_rate": theirs["learning_rate"],
            "max_grad_norm": theirs["max_grad_norm"],
            "target": theirs["ppo_target"],
            "use_score_scaling": theirs["ppo_score_norm"],
        },
    )
    ours = trainer_settings(old, num_processes, converted)
    ours["weight_decay"] = theirs["weight_decay"]
    converted.arithmetic["rollout_batch_size"] = (
        f"{rows} per device x {accumulated} accumulated x {buffer} buffered x {num_processes} "
        f"process{'es' * (num_processes > 1)}"
    )
    converted.arithmetic["num_minibatches"] = "ppo_buffer_size"
    return ours


def _length(theirs: dict[str, Any], rows: int | None, converted: Converted) -> int | None:
    """Set the number of episodes; returns the number of rollouts, or None where the number of rows is not known."""
    batch, epochs = converted.settings["rollout_batch_size"], theirs["num_train_epochs"]
    if theirs["max_steps"] > 0:
        rollouts = theirs["max_steps"]
        converted.arithmetic["total_episodes"] = f"max_steps {rollouts} x {batch}"
    elif rows is None:
        converted.missing["total_episodes"] = (
            f"N   (fill it in: {epochs:g} epochs x the rows of the data set; or give --rows)"
        )
        return None
    else:
        # The last, incomplete batch of an epoch is dropped.
        rollouts = max(1, math.ceil(epochs * (rows // batch)))
        converted.arithmetic["total_episodes"] = f"{epochs:g} epochs x {rows} rows in whole rollouts of {batch}"
    converted.settings["total_episodes"] = rollouts * batch
    return rollouts


def _schedule(theirs: dict[str, Any], rollouts: int | None, converted: Converted) -> None:
    """Convert what LLaMA-Factory counts in rollouts: warm-up and checkpoints."""
    ours = converted.settings
    name = "warmup_steps" if theirs["warmup_steps"] or not theirs["warmup_ratio"] else "warmup_ratio"
    warm_up(theirs, name, rollouts, converted)
    ours["save_every"] = in_rollouts("save_steps", theirs["save_steps"], rollouts)
    if theirs["save_total_limit"] is not None:
        ours["save_total_limit"] = theirs["save_total_limit"]
