"""Settle how an evaluation samples and scores: as the run in the model's folder did, unless arguments say otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_ppo.config.arguments.inference import EvaluateArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.loading import BASE_FOLDER, REFERENCE_FOLDER, adapter_base, load_tokenizer
from rlhf_ppo.runtime.command_line.user_code import load_function, load_functions

SAMPLING = (
    *("max_new_tokens", "temperature", "stop_token_ids", "stop_strings", "min_new_tokens"),
    *("max_turns", "respond_timeout_s", "respond_concurrency"),
    *("chat_template_kwargs", "tool_parser", "stripped_thinking"),
)
"""The run's settings that say how it sampled."""

READING = ("reward_chat_template", "reward_max_length")
"""The run's settings that say how its reward models read text."""

RunJson = dict[str, Any]
"""The settings in run.json; {} for a model that is no run."""


def find_reference(model: str, run: RunJson) -> str:
    """Return the model that a run started from.

    Raises:
        ValueError: the folder does not say it.
    """
    found = run.get("reference") or run.get("ref_model") or run.get("model") or adapter_base(model)
    if found in (BASE_FOLDER, REFERENCE_FOLDER):
        found = str(beside) if (beside := Path(model) / found).is_dir() else None
    if not found:
        raise ValueError(
            f"{model} does not say what it was trained from (no run.json with a model in it, or a model object that "
            f"lies neither in {BASE_FOLDER}/ nor in {REFERENCE_FOLDER}/): name the reference for the KL with ref_model"
        )
    return str(found)


def sampler_config(args: EvaluateArgs, run: RunJson) -> RLHFConfig:
    """Return the settings of a run that samples and scores as the evaluation should."""
    known = {field.name for field in dataclasses.fields(RLHFConfig)}
    chosen: dict[str, Any] = {name: run[name] for name in SAMPLING if name in run and name in known}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    for name in ("max_new_tokens", "temperature", "max_turns", "chat_template_kwargs"):
        if (value := getattr(args, name)) is not None:
            chosen[name] = value
    if chosen.get("max_turns", 1) == 1 and find_environment(args, run) is None:
        for name in ("respond_timeout_s", "respond_concurrency", "tool_parser", "stripped_thinking"):
            chosen.pop(name, None)
    template = args.chat_template
    if template is None and run.get("chat_template") is not None:
        template = str(load_tokenizer(args.model).chat_template)  # saved there; the run's file may be gone
    return RLHFConfig(
        **chosen,
        chat_template=template,
        **_scoring(args, run),
        output_dir=args.output_dir,
        drop_nonfinite_scores=args.drop_nonfinite_scores,
        objective="reinforce",  # needs no critic
        recompute_logprobs=True,  # by the reference's kind of forward pass: a model's KL to itself is 0 in bf16, too
        rollout_batch_size=args.batch_size,
        num_minibatches=1,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        process_timeout_s=args.process_timeout_s,
    )


def _scoring(args: EvaluateArgs, run: RunJson) -> dict[str, Any]:
    """Return how the run read and weighted its rewards, where the evaluation asks them again."""
    again = [name for name in args.reward if name in run.get("reward", ()) and ":" not in name]
    chosen = {name: run[name] for name in READING if again and run.get(name) is not None}
    chosen |= {name: value for name in READING if (value := getattr(args, name)) is not None}
    environment = find_environment(args, run)
    same = (environment, list(args.reward)) == (run.get("environment"), list(run.get("reward", ())))
    weights = run.get("reward_weights") if same else None
    if args.judge is not None:
        # The judge is called like a reward, with weight 0 in their sum.
        weights = (*(weights or [1.0] * (len(args.reward) + (environment is not None))), 0.0)
    return {**chosen, "reward_weights": None if weights is None else tuple(weights)}


def find_environment(args: EvaluateArgs, run: RunJson) -> str | None:
    """Return the name of the environment that the model acts in; None: there is none."""
    return args.environment or (run.get("environment") if args.respond is None else None)


def find_respond(args: EvaluateArgs, run: RunJson, max_turns: int) -> dict[str, Any]:
    """Load what answers the model's turns, ``respond`` and ``tools``; neither for a single turn.

    Raises:
        ValueError: several turns, and nothing names it.
    """
    several = max_turns > 1
    name = args.respond or (run.get("respond") if several else None)
    tools = (run.get("tools") or () if several else ()) if args.tools is None else args.tools
    if name is None and not tools and several and find_environment(args, run) is None:
        raise ValueError(
            f"max_turns={max_turns} needs respond, which answers the model's turns, or tools, and {args.model} does "
            "not name them (it was trained from Python, or is no run): name them with respond or tools, or set "
            "max_turns to 1"
        )
    respond = None if name is None else load_function(name, "respond")
    return {"respond": respond, "tools": load_functions(tools, "tools")}


def was_trained_on_judge(args: EvaluateArgs, run: RunJson) -> bool:
    """Return whether one of the run's rewards judges here; assumed of rewards where the folder does not name the run's.

    A judge (``args.judge``) decides alone, else the rewards do.
    """
    if args.judge is None and ("reward" not in run or find_environment(args, run) is not None):
        return True
    judges = args.reward if args.judge is None else (args.judge,)
    return any(_same_reward(judge, trained) for judge in judges for trained in run.get("reward", ()))


def _same_reward(judge: str, trained: str) -> bool:
    """Return whether two names may mean one reward: a function's file or module can be named in several ways."""
    if ":" in judge and ":" in trained and not judge.startswith("http"):
        return judge.rpartition(":")[2] == trained.rpartition(":")[2]
    return judge == trained or (Path(judge).exists() and Path(judge).resolve() == Path(trained).resolve())
