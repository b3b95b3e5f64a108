"""`rlhf-ppo migrate`: convert a TRL 1.12 PPO config to YAML for `rlhf-ppo train`."""

from __future__ import annotations

import math
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.config.trl_names import ROWS
from rlhf_ppo.runtime.command_line.settings import read_yaml
from rlhf_ppo.runtime.logs.trackers import TRACKERS
from rlhf_ppo.trl.arguments import known_fields, launched_processes, read_trl_flags, read_trl_yaml

_SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"}
_NO_CLIPPING = 1e9


def migrate(args: MigrateArgs) -> str:
    """Convert a config to YAML, check it with `rlhf-ppo train`'s own loader, and write it to ``args.output`` if set.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_trl_yaml` and :func:`convert`; or ``output`` exists.
    """
    given = read_trl_yaml(args.config) if args.config is not None else {}
    given |= read_trl_flags(args.command_line) if args.command_line is not None else {}
    source = " and ".join(filter(None, (args.config, "command line" if args.command_line is not None else None)))
    defaults = {field.name: field.default for field in fields(TrainArgs) if field.default is not MISSING}
    processes = args.num_processes or launched_processes(args.command_line or "")
    text = as_yaml(given, convert(given, processes), defaults, source)
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "settings.yaml"
        checked.write_text(text, encoding="utf-8")
        TrainArgs(**read_yaml(checked, TrainArgs))
    if args.output is not None:
        if Path(args.output).exists():
            raise ValueError(f"output {args.output} exists: name another file, or remove it")
        Path(args.output).write_text(text, encoding="utf-8")
    return text


# Convert values


def convert(given: Mapping[str, Any], num_processes: int = 1) -> dict[str, Any]:
    """Return settings of ``rlhf-ppo train`` for the run that TRL would make of ``given`` and its own defaults.

    Raises:
        ValueError: TRL refuses these arguments too, or no data set is given.
    """
    trl = {name: facts["default"] for name, facts in known_fields().items()} | dict(given)
    if trl["dataset_name"] is None:
        raise ValueError("no dataset_name: the data set is not among the arguments, so name it: -- --dataset_name NAME")
    for one, other in (("stop_token", "stop_token_id"), ("load_in_8bit", "load_in_4bit")):
        if not any(trl[name] is None or trl[name] is False for name in (one, other)):
            raise ValueError(f"{one} and {other} are both set; TRL takes one of them")
    ours = {row.ours[0]: trl[name] for name, row in ROWS.items() if row.fate == "same" and trl[name] is not None}
    ours.setdefault("output_dir", "trainer_output")
    ours["reward"] = [trl["reward_model_path"]]
    ours["value_model"] = ours["value_head_from"] = trl["reward_model_path"]
    ours["value_learning_rate"] = trl["learning_rate"]
    ours["normalize_values"] = False  # TRL's cliprange_value is in the reward's units
    if not trl["use_peft"]:
        ours = {name: value for name, value in ours.items() if not name.startswith("lora_")}
    if trl["load_in_8bit"] or trl["load_in_4bit"]:
        ours["quantization"] = "8bit" if trl["load_in_8bit"] else "4bit"
    ours |= _batches(trl, num_processes)
    episodes = trl["total_episodes"]
    rollouts = None if episodes is None else math.ceil(episodes / ours["rollout_batch_size"])
    if trl["lr_scheduler_type"] in _SCHEDULES:
        ours["lr_scheduler_type"] = _SCHEDULES[trl["lr_scheduler_type"]]
    # TRL's "constant" has no warm-up.
    warmup = 0 if trl["lr_scheduler_type"] == "constant" else _rollouts("warmup_steps", trl, rollouts)
    ours["warmup_steps"] = warmup * ours["num_epochs"] * ours["num_minibatches"]
    ours["weight_decay"] = trl["weight_decay"]
    ours["max_grad_norm"] = trl["max_grad_norm"] or _NO_CLIPPING
    if trl["stop_token_id"] is not None:
        ours["stop_token_ids"] = [trl["stop_token_id"]]
    if trl["bf16"] is not None:
        ours["precision"] = "bf16" if trl["bf16"] else "fp32"
    if trl["dtype"] == "bfloat16":
        ours["precision"] = "bf16"
    if trl["use_cpu"]:
        ours["device"] = "cpu"
    if trl["eval_strategy"] == "no":
        ours["eval_size"] = 0
    elif trl["eval_steps"]:
        ours["eval_every"] = _rollouts("eval_steps", trl, rollouts)
    elif trl["num_sample_generations"] and rollouts:
        ours["eval_every"] = max(1, rollouts // trl["num_sample_generations"])
    trackers = trl["report_to"] if isinstance(trl["report_to"], list) else [trl["report_to"]]
    if supported := [name for name in trackers if name in TRACKERS]:
        ours["report_to"] = supported
    ours["save_every"] = _rollouts("save_steps", trl, rollouts) if trl["save_strategy"] == "steps" else 0
    return ours


def _batches(trl: Mapping[str, Any], num_processes: int) -> dict[str, int]:
    """Convert the rollout's size and count the optimizer steps that TRL takes in it."""
    rows, parts, accumulated = (
        trl[name] for name in ("per_device_train_batch_size", "num_mini_batches", "gradient_accumulation_steps")
    )
    if min(rows, parts, accumulated) < 1:
        raise ValueError(
            f"per_device_train_batch_size={rows}, num_mini_batches={parts} and gradient_accumulation_steps="
            f"{accumulated} must be 1 or more"
        )
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
    return {"rollout_batch_size": batch, "num_minibatches": minibatches}


def _rollouts(field: str, trl: Mapping[str, Any], rollouts: int | None) -> int:
    """Read a number of rollouts, which may be a share of the run's."""
    value = trl[field]
    if 0 < value < 1 and rollouts is None:
        raise ValueError(f"{field}={value} is a share of the run, whose length is not given: add total_episodes")
    return int(value) if value >= 1 else math.ceil(value * (rollouts or 0))


# Write YAML

_WHY = {"ignored": "TRL's PPO ignores it too", "unsupported": "not supported", "automatic": "needs no setting"}


def as_yaml(given: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> str:
    """Write the settings that differ from ``defaults``, with a comment at each changed or unused field."""
    text = [
        f"# For `rlhf-ppo train --config THIS_FILE`, from TRL 1.12's {source}.",
        "# Settings at their defaults are left out. docs/migrating-from-trl.md lists every field and every difference.",
    ]
    explained: set[str] = set()
    for name, value in ours.items():
        if name in defaults and value == defaults[name]:
            continue
        sources = [field for field, row in ROWS.items() if name in row.ours and row.fate in ("same", "converted")]
        new = [f for f in sources if f in given and ROWS[f].fate == "converted" and f not in explained]
        explained.update(new)
        text += [line for field in new for line in ["", *_comment(field, given[field])]]
        text.append(f"{name}: {_plain(value)}" + ("" if set(sources) & set(given) else "  # TRL's default"))
    if ours.get("total_episodes") is None:
        text += ["", "# total_episodes: N   (fill it in: TRL would train on num_train_epochs x rows of the data set)"]
    facts = known_fields()
    rest = [f for f in given if f not in explained and ROWS[f].fate != "same" and given[f] != facts[f]["default"]]
    # TRL's default is to generate past the end-of-text token; here a response ends there.
    rest = [field for field in rest if field != "stop_token"]
    if given.get("stop_token") is None and given.get("stop_token_id") is None:
        rest.append("stop_token")
    if rest:
        text += ["", "# Fields without a line above:"]
        text += [line for field in rest for line in _comment(field, given.get(field))]
    return "\n".join(text) + "\n"


def _plain(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]


def _comment(field: str, value: Any) -> list[str]:
    row = ROWS[field]
    why = f" ({_WHY[row.fate]})" if row.fate in _WHY else ""
    text = f"{field}: {_plain(value)}{why}. {row.note}"
    return textwrap.wrap(text, width=112, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def migrate_command(args: MigrateArgs) -> None:
    """Run the `migrate` command."""
    text = migrate(args)
    print(text if args.output is None else f"settings  {args.output}", end="" if args.output is None else "\n")
