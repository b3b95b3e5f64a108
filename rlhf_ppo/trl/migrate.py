"""`rlhf-ppo migrate`: the YAML and flags of a TRL 1.12 PPO run become a YAML for `rlhf-ppo train`."""

from __future__ import annotations

import difflib
import math
import re
import shlex
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rlhf_ppo.runtime.settings import load_yaml, read_yaml
from rlhf_ppo.runtime.trackers import TRACKERS
from rlhf_ppo.trl.fields import ROWS, known_fields

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list[str], "dict": dict, "null": None}
_SCHEDULES = {name: name for name in ("constant", "linear", "cosine")} | {"constant_with_warmup": "constant"}
_NO_CLIPPING = 1e9


@dataclass(frozen=True, kw_only=True)
class MigrateArgs:
    """Rewrite a TRL 1.12 PPO run's arguments: migrate --config trl.yaml --output ours.yaml -- --learning_rate 3e-6"""

    config: str | None = None
    """TRL's YAML file."""
    command_line: str | None = None
    """TRL's flags, or the whole command, as one text; easier: write them at the end, after `--`."""
    num_processes: int | None = None
    """Processes of the TRL run, whose batch sizes were per process; None: what the command's launcher says, else 1."""
    output: str | None = None
    """File to write, which must not exist; None: print."""

    def __post_init__(self) -> None:
        if self.config is None and self.command_line is None:
            raise ValueError("nothing to migrate: give --config FILE, or TRL's flags after --, or both")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be 1 or more, got {self.num_processes}")


def join_command_line(argv: list[str]) -> list[str]:
    """``[..., "--", word, ...]`` as ``[..., "--command-line=word ..."]``: what follows is TRL's, not ours."""
    if "--" not in argv:
        return argv
    at = argv.index("--")
    return [*argv[:at], f"--command-line={shlex.join(argv[at + 1 :])}"]


# Reading TRL's arguments


def read_trl_yaml(path: str | Path) -> dict[str, Any]:
    """The fields in a YAML file for TRL's parser, checked against the real classes; ``env`` is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown field (with the closest known one), or a value of the wrong kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    content = load_yaml(Path(path))
    return {name: _checked(name, value, f"{path}: ") for name, value in content.items() if name != "env"}


def read_trl_flags(text: str) -> dict[str, Any]:
    """The fields in a command line for TRL's scripts; launcher and script name (``... ppo.py``) may stand before them.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_trl_yaml`; a ``--config`` among the flags is read too.
    """
    _, words = _launcher_and_flags(text)
    if words and not words[0].startswith("--"):
        raise ValueError(f"TRL's flags begin with --, got {words[0]!r}")
    flags: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        else:
            flags[name].append(word)
    from_file = read_trl_yaml(_one("config", flags.pop("config"))) if "config" in flags else {}
    return from_file | dict(_flag(name, values) for name, values in flags.items())


def _launcher_and_flags(text: str) -> tuple[list[str], list[str]]:
    """The words of a command line up to its script, and those after it."""
    words = shlex.split(text.replace("\\\n", " "))
    after = 1 + max((i for i, word in enumerate(words) if word.endswith(".py")), default=-1)
    return words[:after], words[after:]


def launched_processes(text: str) -> int:
    """How many processes the launcher before the script starts; 1 where it does not say (a file of its own may)."""
    launcher = " ".join(_launcher_and_flags(text)[0])
    said = re.findall(r"--(?:num[-_]processes|nproc[-_]per[-_]node)[= ](\d+)", launcher)
    return int(said[-1]) if said else 1


def _flag(name: str, values: list[str]) -> tuple[str, Any]:
    name = name.replace("-", "_")
    known = known_fields()
    if name.startswith("no_") and name not in known and known.get(name[3:], {}).get("default") is True and not values:
        return name[3:], False
    if name in known and not values and "bool" in known[name]["kinds"]:
        return name, True
    listed = name in known and "list" in known[name]["kinds"] and len(values) > 1
    return name, _checked(name, values if listed or name not in known else _one(name, values), "--")


def _one(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"--{name} takes one value, got {values}")
    return values[0]


def _checked(name: Any, value: Any, where: str) -> Any:
    known = known_fields()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; docs/migrating-from-trl.md lists the known ones"
        raise ValueError(f"{where}{name}: not a field of TRL 1.12's PPO arguments{hint}")
    kinds, choices = known[name]["kinds"], known[name].get("choices")
    if isinstance(value, str) and "list" in kinds and "str" not in kinds:
        value = [value]
    try:
        value = TypeAdapter(reduce(or_, (_TYPES[kind] for kind in kinds))).validate_python(value)
    except ValidationError:
        raise ValueError(f"{where}{name}: takes {' or '.join(kinds)}, got {value!r}") from None
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where}{name}: {value!r} is none of {', '.join(choices)}")
    return value


# From TRL's values to ours


def convert(given: Mapping[str, Any], num_processes: int = 1) -> dict[str, Any]:
    """Settings of ``rlhf-ppo train`` for the run that TRL would make of ``given`` and its own defaults.

    Raises:
        ValueError: what TRL refuses too, or no data set.
    """
    trl = {name: facts["default"] for name, facts in known_fields().items()} | dict(given)
    if trl["dataset_name"] is None:
        raise ValueError("no dataset_name: the data set is not among the arguments, so name it: -- --dataset_name NAME")
    if trl["stop_token"] is not None and trl["stop_token_id"] is not None:
        raise ValueError("stop_token and stop_token_id are both set; TRL takes one of them")
    if trl["load_in_8bit"] and trl["load_in_4bit"]:
        raise ValueError("load_in_8bit and load_in_4bit are both set; TRL takes one of them")
    ours = {row.ours[0]: trl[name] for name, row in ROWS.items() if row.fate == "same" and trl[name] is not None}
    ours.setdefault("output_dir", "trainer_output")

    # Models
    ours["reward"] = [trl["reward_model_path"]]
    ours["value_model"] = ours["value_head_from"] = trl["reward_model_path"]
    if not trl["use_peft"]:
        ours = {name: value for name, value in ours.items() if not name.startswith("lora_")}
    if trl["load_in_8bit"] or trl["load_in_4bit"]:
        ours["quantization"] = "8bit" if trl["load_in_8bit"] else "4bit"

    # Batches and steps
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
    ours["rollout_batch_size"] = local_batch * num_processes
    microbatches = parts * math.ceil(local_batch // parts / rows)
    ours["num_minibatches"] = _divisor_near(microbatches / accumulated, ours["rollout_batch_size"])
    episodes = trl["total_episodes"]
    rollouts = None if episodes is None else math.ceil(episodes / ours["rollout_batch_size"])
    if trl["lr_scheduler_type"] in _SCHEDULES:
        ours["lr_scheduler_type"] = _SCHEDULES[trl["lr_scheduler_type"]]
    # TRL's "constant" knows no warm-up.
    warmup = 0 if trl["lr_scheduler_type"] == "constant" else _rollouts("warmup_steps", trl, rollouts)
    ours["warmup_steps"] = warmup * ours["num_epochs"] * ours["num_minibatches"]
    ours["weight_decay"] = trl["weight_decay"]
    ours["max_grad_norm"] = trl["max_grad_norm"] or _NO_CLIPPING

    # Responses
    if trl["stop_token_id"] is not None:
        ours["stop_token_ids"] = [trl["stop_token_id"]]

    # The run
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
    if here := [name for name in trackers if name in TRACKERS]:
        ours["report_to"] = here
    ours["save_every"] = _rollouts("save_steps", trl, rollouts) if trl["save_strategy"] == "steps" else 0
    return ours


def _divisor_near(steps: float, batch: int) -> int:
    """The largest number of equal parts of a batch that is not above ``steps`` (and 1 at least)."""
    return max(parts for parts in range(1, max(1, int(steps)) + 1) if batch % parts == 0)


def _rollouts(field: str, trl: Mapping[str, Any], rollouts: int | None) -> int:
    """TRL's count of rollouts, or its share of the run's ``rollouts``."""
    value = trl[field]
    if 0 < value < 1 and rollouts is None:
        raise ValueError(f"{field}={value} is a share of the run, whose length is not given: add total_episodes")
    return int(value) if value >= 1 else math.ceil(value * (rollouts or 0))


# Writing the YAML

_WHY = {"inert": "TRL's PPO ignores it too", "missing": "not here", "automatic": "needs no setting"}


def as_yaml(given: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> str:
    """The settings that differ from ``defaults``, with what changed on the way, then the fields without a line."""
    text = [
        f"# For `rlhf-ppo train --config THIS_FILE`, from TRL 1.12's {source}.",
        "# Settings that equal the defaults here are left out. docs/migrating-from-trl.md has every field, and what is",
        "# different whatever the settings.",
    ]
    told: set[str] = set()
    for name, value in ours.items():
        if name in defaults and value == defaults[name]:
            continue
        sources = [field for field, row in ROWS.items() if name in row.ours and row.fate in ("same", "changed")]
        changed = [field for field in sources if field in given and ROWS[field].fate == "changed" and field not in told]
        told.update(changed)
        text += [line for field in changed for line in ["", *_comment(field, given[field])]]
        text.append(f"{name}: {_plain(value)}" + ("" if set(sources) & set(given) else "  # TRL's default"))
    if ours.get("total_episodes") is None:
        text += [
            "",
            "# total_episodes: N   (TRL would train num_train_epochs x rows of the data set: fill in the number)",
        ]
    unsaid = [f for f in given if f not in told and ROWS[f].fate != "same" and given[f] != known_fields()[f]["default"]]
    # The end-of-text token: TRL's default is to write on behind it, ours to stop there.
    unsaid = [field for field in unsaid if field != "stop_token"]
    if given.get("stop_token") is None and given.get("stop_token_id") is None:
        unsaid.append("stop_token")
    if unsaid:
        text += ["", "# Fields that no line came from:"]
        text += [line for field in unsaid for line in _comment(field, given.get(field))]
    return "\n".join(text) + "\n"


def _plain(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]


def _comment(field: str, value: Any) -> list[str]:
    row = ROWS[field]
    why = f" ({_WHY[row.fate]})" if row.fate in _WHY else ""
    text = f"{field}: {_plain(value)}{why}. {row.note}"
    return textwrap.wrap(text, width=112, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def migrate(args: MigrateArgs, settings: type) -> str:
    """The YAML for ``rlhf-ppo train``, checked by its own loader; written to ``args.output`` if that is set.

    Args:
        args: what to read.
        settings: the dataclass of the `train` command.
    Raises:
        FileNotFoundError, ValueError: see :func:`read_trl_yaml` and :func:`convert`; or ``output`` exists.
    """
    given = read_trl_yaml(args.config) if args.config is not None else {}
    given |= read_trl_flags(args.command_line) if args.command_line is not None else {}
    source = " and ".join(filter(None, (args.config, "command line" if args.command_line is not None else None)))
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    processes = args.num_processes or launched_processes(args.command_line or "")
    text = as_yaml(given, convert(given, processes), defaults, source)
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "settings.yaml"
        checked.write_text(text, encoding="utf-8")
        settings(**read_yaml(checked, settings))
    if args.output is not None:
        if Path(args.output).exists():
            raise ValueError(f"output {args.output} exists: name another file, or remove it")
        Path(args.output).write_text(text, encoding="utf-8")
    return text
