"""Tries every architecture of ``AutoModelForCausalLM`` that builds tiny: right to 1e-6, or refused by name at set-up.

``python -P tests/architectures.py`` tries them all, each in a process of its own, prints what it found and exits with
1 if there is a third outcome; ``--write docs/models.md`` puts the table into that page; names try these alone. What is
compared: log-probs, values and reference log-probs of a rollout of prompts of unequal length whose rows end at
different times, with a plain forward pass over each row alone; the first ratio of the update; and for checkpointing
the norm of the update's gradient.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import runpy
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import peft
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.adapters.lora import use_adapter
from rlhf_ppo.models.forward.hidden_states import call, capture_states

# Not an import: beside this file lies a folder rlhf_ppo, of tests, so that its folder is no place to import from.
TINY = runpy.run_path(str(Path(__file__).with_name("architectures_tiny.py")))
NAMES, VOCABULARY, NotBuiltError, tiny_model = (
    TINY[name] for name in ("NAMES", "VOCABULARY", "NotBuiltError", "tiny_model")
)

PROMPTS = ["t5 t6 t7", " ".join(f"t{i}" for i in range(9, 23)), "t30", "t11 t12 t13 t14"] * 2
VARIANTS = ("plain", "lora", "separate", "adapter", "checkpointing", "static")
EXACT = 1e-6
SECONDS = 300


def tokenizer() -> PreTrainedTokenizerFast:
    """Words t0 to t31."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0", unk_token="t3")


def score(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Something that differs between responses."""
    return [len(set(ids)) / len(ids) + 0.01 * ids[0] for ids in completion_ids]


def make_trainer(model: Any, variant: str, folder: str) -> PPOTrainer:
    """A trainer of one variant; raises ValueError where it is refused."""
    settings: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if variant in ("lora", "adapter"):
        known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        layers = None if known else "all-linear"
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM")
    if variant == "separate":
        given["value_model"] = copy.deepcopy(model)
    if variant in ("separate", "adapter"):
        settings["critic"] = variant
    if variant == "checkpointing":
        settings["gradient_checkpointing"] = True
    if variant == "static":
        settings["generation"] = "static"
    args = RLHFConfig(
        output_dir=folder, total_episodes=16, rollout_batch_size=8, num_minibatches=2, num_epochs=1, max_new_tokens=12,
        stop_token_ids=tuple(range(2, VOCABULARY, 6)), learning_rate=1e-3, precision="fp32", device="cpu", quiet=True,
        **settings,
    )  # fmt: skip
    return PPOTrainer(model, score, args, [{"prompt": p} for p in PROMPTS], processing_class=tokenizer(), **given)


@torch.no_grad()
def alone(model: Any, states_module: Any, rollout: Any, row: int) -> tuple[Any, Any, float]:
    """By a plain pass over a row alone: log-probs [T] of its response, the states [T, O] before these tokens, and the
    largest log-prob of any token there.
    """
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    answer = rollout.response_ids[row][rollout.mask[row]]
    with capture_states(states_module) as captured:
        output = call(model, torch.cat([prompt, answer])[None])
    start = len(prompt) - 1
    states = captured[0][0, start:-1]
    if getattr(output, "logits", None) is None:
        return None, states, 0.0
    logprobs = output.logits[0, start:-1].float().log_softmax(-1)
    return logprobs.gather(-1, answer[:, None])[:, 0], states, float(logprobs.abs().max())


def gaps(trainer: PPOTrainer, start: Any, rollout: Any) -> tuple[dict[str, float], float]:
    """How far a rollout is from plain passes of the start and of the critic, and the largest log-prob there."""
    actor = trainer.model
    found = {"log-probs": 0.0, "reference": 0.0, "values": 0.0}
    largest = least_likely = 1.0
    for row in range(len(rollout.mask)):
        keep = rollout.mask[row]
        expected, _, last = alone(start, start, rollout, row)
        least_likely = max(least_likely, last)
        runner = actor.value_runner or actor.runner
        if actor.value_adapter is None:
            states = alone(runner.model, runner.states_module, rollout, row)[1]
        else:
            with use_adapter(actor.policy, actor.value_adapter):
                states = alone(runner.model, runner.states_module, rollout, row)[1]
        values = actor.value_head(states)[:, 0]
        largest = max(largest, float((states.abs() @ actor.value_head.weight.abs().T).max()))
        for name, got, want in (
            ("log-probs", rollout.logprobs, expected),
            ("reference", rollout.ref_logprobs, expected),
            ("values", rollout.values, values),
        ):
            found[name] = max(found[name], float((got[row][keep] - want).abs().max()))
    # Rounding is a share of what is rounded.
    return {name: gap / (largest if name == "values" else least_likely) for name, gap in found.items()}, least_likely


def try_variant(name: str, variant: str, folder: str, norms: dict[str, float]) -> dict[str, Any]:
    """{"outcome": "right" | "refused" | "wrong", "why", "gap", "ways"} of one variant."""
    model = tiny_model(name)
    start = copy.deepcopy(model)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = make_trainer(model, variant, folder)
    except ValueError as error:
        return {"outcome": "refused", "why": str(error).splitlines()[0]}
    head = trainer.model.value_head
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-0.3, 0.3, head.weight.numel())[None])
    rollouts = (trainer.rollout(PROMPTS) for _ in range(9))
    rollout = next((x for x in rollouts if x.mask.sum(dim=1).unique().numel() >= 3), None)
    if rollout is None:
        return {"outcome": "wrong", "why": "the rows end together, so that nothing is tested"}
    found, scale = gaps(trainer, start, rollout)
    metrics = trainer.step(rollout)
    found["first ratio"] = metrics["policy/first_minibatch_max_abs_log_ratio"] / scale
    norms[variant] = metrics["optim/grad_norm"]
    if variant == "checkpointing":
        found["gradient"] = abs(norms[variant] / norms["plain"] - 1) / 10  # a sum of rounded numbers
    worst = max(found, key=lambda key: found[key] if found[key] == found[key] else float("inf"))
    runner = trainer.model.runner
    ways = [
        "packed" if runner.packs else "padded" if runner.pads_left else "right-padded",
        "no cache" if not runner.uses_cache else "cache" if runner.cache_shrinks else "cache, rows stay",
    ]
    right = found[worst] <= EXACT
    return {
        "outcome": "right" if right else "wrong",
        "why": "" if right else f"{worst} {found[worst]:.2g} off",
        "gap": found[worst],
        "ways": ways,
        "warned": [str(w.message) for w in said if w.category is UserWarning],
    }


def try_all(name: str) -> dict[str, Any]:
    """Variant -> what came of it; or {"not built": why}."""
    torch.set_num_threads(1)
    norms: dict[str, float] = {}
    found: dict[str, Any] = {}
    try:
        tiny_model(name)
    except NotBuiltError as error:
        return {"not built": str(error)}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[variant] = try_variant(name, variant, folder, norms)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} ({Path(where.filename).name})"
                found[variant] = {"outcome": "wrong", "why": line}
        if variant == "plain" and found[variant]["outcome"] == "refused":
            # What is refused as it is needs no adapter to be refused.
            return dict.fromkeys(VARIANTS, found["plain"])
    return found


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns in a forked process; a crash of the process, or a hang, is an outcome like another."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(SECONDS)
        os.close(reading)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = json.dumps(work())
        with os.fdopen(writing, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if said:
        return json.loads(said)
    why = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    return {variant: {"outcome": "wrong", "why": why} for variant in VARIANTS}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row an architecture, a column a variant."""
    titles = ("shared critic", "LoRA", "separate critic", "adapter critic", "checkpointing", "static decoding")
    lines = [f"| architecture | sequences | decoding | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    refused: dict[str, list[str]] = {}
    unbuilt: dict[str, list[str]] = {}
    for name, found in sorted(results.items()):
        if "not built" in found:
            unbuilt.setdefault(found["not built"], []).append(name)
        elif found["plain"]["outcome"] == "refused":
            why = re.sub(r"^model is '[^']*' \([^)]*\): |^'[^']*' \([^)]*\) ", "", found["plain"]["why"])
            refused.setdefault(why, []).append(name)
        else:
            cells = [found[variant]["outcome"] for variant in VARIANTS]
            lines.append(f"| {name} | {' | '.join(found['plain'].get('ways', ['', '']))} | {' | '.join(cells)} |")
    lines += ["", "Always refused at set-up:", ""]
    lines += [f"- {', '.join(names)}: {why}" for why, names in refused.items()]
    lines += ["", "Not tried, because no tiny model can be built:", ""]
    lines += [f"- {', '.join(names)}: {why}" for why, names in unbuilt.items()]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the table between the two marks of a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- architectures -->\n")
    _, end, after = rest.partition("<!-- /architectures -->")
    assert mark and end, f"{page} has no marks <!-- architectures --> and <!-- /architectures -->"
    page.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Try; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="architectures; none: all")
    parser.add_argument("--results", type=Path, help="a jsonl file: what it holds is not tried again")
    parser.add_argument("--write", type=Path, help="page that gets the table")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if args.results and args.results.is_file():
        results = dict(json.loads(line) for line in args.results.read_text().splitlines())
    for name in args.names:
        if name not in results:
            results[name] = in_child(lambda name=name: try_all(name))
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps([name, results[name]]) + "\n")
        found = results[name]
        if "not built" in found:
            print(f"{name}: not built: {found['not built']}", flush=True)
            continue
        for variant in VARIANTS:
            cell = found[variant]
            print(name, variant, cell["outcome"], cell["why"], cell.get("gap", ""), *cell.get("ways", ""), flush=True)
            if cell == found["plain"] and cell["outcome"] == "refused":
                break
    tried = {name: results[name] for name in args.names}
    wrong = [
        f"{name} {variant}: {cell['why']}"
        for name, found in tried.items()
        if "not built" not in found
        for variant, cell in found.items()
        if cell["outcome"] == "wrong"
    ]
    built = [found for found in tried.values() if "not built" not in found]
    right = sum(found["plain"]["outcome"] == "right" for found in built)
    print(f"transformers {transformers.__version__}: {len(tried)} names, {len(built)} built, {right} right, ", end="")
    print(f"{len(wrong)} third outcomes")
    for line in wrong:
        print(f"  {line}")
    if args.write:
        write(args.write, table(results))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
