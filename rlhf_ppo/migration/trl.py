"""Convert arguments of TRL 1.12's PPO, which ms-swift runs too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_ppo.config.migration_table import rows_of
from rlhf_ppo.migration.arguments import with_defaults
from rlhf_ppo.migration.converted import NO_CLIPPING, Converted, in_rollouts, report_to, require_positive, warm_up
from rlhf_ppo.migration.reading import Given


def convert(given: Given, rows: int | None) -> Converted:
    """Return settings of ``rlhf-ppo train`` for the run that TRL would make of ``given`` and its own defaults.

    Args:
        given: TRL's arguments.
        rows: number of rows of the data set, if known.
    Raises:
        ValueError: TRL refuses these arguments too, or no data set is given.
    """
    trl = with_defaults("trl", given.values)
    if trl["dataset_name"] is None:
        raise ValueError("no dataset_name: the data set is not among the arguments, so name it: -- --dataset_name NAME")
    for one, other in (("stop_token", "stop_token_id"), ("load_in_8bit", "load_in_4bit")):
        if not any(trl[name] is None or trl[name] is False for name in (one, other)):
            raise ValueError(f"{one} and {other} are both set; TRL takes one of them")
    converted = Converted(_renamed(trl), silent={"stop_token"})
    ours = converted.settings
    ours["reward"] = [trl["reward_model_path"]]
    ours["value_model"] = ours["value_head_from"] = trl["reward_model_path"]
    ours["normalize_values"] = False  # TRL's cliprange_value is in the reward's units
    _batches(trl, given.processes, converted)
    _length(trl, rows, converted)
    _schedule(trl, converted)
    ours["max_grad_norm"] = trl["max_grad_norm"] or NO_CLIPPING
    if trl["stop_token_id"] is not None:
        ours["stop_token_ids"] = [trl["stop_token_id"]]
    if trl["stop_token"] is None and trl["stop_token_id"] is None:
        # TRL's default is to generate past the end-of-text token; here a response ends there.
        converted.told.append("stop_token")
    if trl["bf16"] is not None:
        ours["precision"] = "bf16" if trl["bf16"] else "fp32"
    if trl["dtype"] == "bfloat16":
        ours["precision"] = "bf16"
    if trl["use_cpu"]:
        ours["device"] = "cpu"
    report_to(trl["report_to"], converted)
    return converted


def _renamed(trl: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that take TRL's values as they are."""
    rows = rows_of("trl")
    ours = {row.ours[0]: trl[name] for name, row in rows.items() if row.fate == "same" and trl.get(name) is not None}
    ours.setdefault("output_dir", "trainer_output")
    ours["value_learning_rate"] = trl["learning_rate"]
    ours["weight_decay"] = trl["weight_decay"]
    if not trl["use_peft"]:
        ours = {name: value for name, value in ours.items() if not name.startswith("lora_")}
    if trl["load_in_8bit"] or trl["load_in_4bit"]:
        ours["quantization"] = "8bit" if trl["load_in_8bit"] else "4bit"
    return ours


def _batches(trl: Mapping[str, Any], num_processes: int, converted: Converted) -> None:
    """Convert the rollout's size and count the optimizer steps that TRL takes in it."""
    names = ("per_device_train_batch_size", "num_mini_batches", "gradient_accumulation_steps")
    require_positive({name: trl[name] for name in names})
    rows, parts, accumulated = (trl[name] for name in names)
    local_batch = rows * accumulated
    if local_batch % parts:
        raise ValueError(
            f"num_mini_batches={parts} does not divide per_device_train_batch_size x gradient_accumulation_steps = "
            f"{local_batch}; TRL refuses that too"
        )
    batch = local_batch * num_processes
    steps = parts * math.ceil(local_batch // parts / rows) / accumulated
    # The largest number of equal parts that is not above TRL's steps.
    minibatches = max(number for number in range(1, max(1, int(steps)) + 1) if batch % number == 0)
    converted.settings |= {"rollout_batch_size": batch, "num_minibatches": minibatches}
    converted.arithmetic["rollout_batch_size"] = (
        f"{rows} per device x {accumulated} accumulated x {num_processes} process{'es' * (num_processes > 1)}"
    )


def _length(trl: Mapping[str, Any], rows: int | None, converted: Converted) -> None:
    """Set the number of episodes, if it or the number of rows is known."""
    epochs = trl["num_train_epochs"]
    if trl["total_episodes"] is not None:
        return
    if rows is None:
        converted.missing["total_episodes"] = (
            "N   (fill it in: TRL would train on num_train_epochs x rows of the data set)"
        )
        return
    converted.settings["total_episodes"] = max(1, int(epochs * rows))
    converted.arithmetic["total_episodes"] = f"{epochs:g} epochs x {rows} rows"


def _schedule(trl: Mapping[str, Any], converted: Converted) -> None:
    """Convert what TRL counts in rollouts: warm-up, evaluations and checkpoints."""
    ours = converted.settings
    episodes = ours.get("total_episodes")
    rollouts = None if episodes is None else math.ceil(episodes / ours["rollout_batch_size"])
    warm_up(trl, "warmup_steps", rollouts, converted)
    if trl["eval_strategy"] == "no":
        ours["eval_size"] = 0
    elif trl["eval_steps"]:
        ours["eval_every"] = in_rollouts("eval_steps", trl["eval_steps"], rollouts)
    elif trl["num_sample_generations"] and rollouts:
        ours["eval_every"] = max(1, rollouts // trl["num_sample_generations"])
    save = trl["save_strategy"] == "steps"
    ours["save_every"] = in_rollouts("save_steps", trl["save_steps"], rollouts) if save else 0
