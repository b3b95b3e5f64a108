"""Train a tiny model to think and to use a calculator.

It begins unable to multiply: supervised fine-tuning has taught it the format of the chat, to answer most questions from
memory (wrongly), and now and then to think of the calculator and to call it, sometimes with a call that cannot be read.
The reward is 1 for the right answer, and only the tool gives it. What you will see: a progress bar, the share of right
answers and the calls per question before and after, and a conversation of each. It takes about half a minute on one CPU
core.
Run:  python examples/calculator.py
From the shell, with the fine-tuned model in runs/calculator/model:
      rlhf-ppo train --model runs/calculator/model --dataset runs/calculator/questions.jsonl --max-turns 3 \
        --tools examples/calculator.py:calculator --reward examples/calculator.py:right_answer --output-dir runs/shell
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.examples import collate, encode_examples, read_examples

# The tool

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
LONGEST, LARGEST = 64, 1e12


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: numbers with + - * / and parentheses, such as "37*48".
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters, more than {LONGEST}")
    return f"{_value(ast.parse(expression.strip(), mode='eval').body):.12g}"


def _value(node: ast.AST) -> float:
    """Compute a node of a parsed expression; what the policy wrote is never evaluated as code."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case _:
            raise ValueError("only numbers, + - * / and parentheses are allowed")
    if abs(value) > LARGEST:
        raise ValueError(f"a number is larger than {LARGEST:g}")
    return value


# The reward


def right_answer(prompts: list[Any], completions: list[Any], *, answer: list[int], **columns: Any) -> list[float]:
    """Score 1 if the last message of the conversation is the right number, else 0."""
    said = [conversation[-1] for conversation in completions]
    return [
        float(last["role"] == "assistant" and last["content"].strip() == str(n))
        for last, n in zip(said, answer, strict=True)
    ]


# The tiny model

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\ntools: ' }}{% for t in tools %}{{ t.function.name + '\\n' }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' }}
        {%- if m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Qwen 3 writes chats, shortened; tools are shown by their names alone."""
SPECIAL = ("<|im_end|>", "<|im_start|>")
CALL, END = '{"name": "calculator", "arguments": {"expression": "', '"}}'
WORDS = (
    *(CALL, END, '"}'),  # as single tokens, which a larger vocabulary would have
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *"user assistant system tools calculator name arguments expression I know let me calculate".split(),
    *'0123456789+-*/.{}":, \n?',
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, digits and signs."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([re.escape(CALL), END, '"}', "</?[a-z_]+>", "[A-Za-z]+", r"[\s\S]"])), "isolated"
    )
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(SPECIAL[1], special=True)]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def question(draw: random.Random) -> tuple[str, int]:
    """Draw two numbers of two digits, to add, to subtract or to multiply."""
    a, b, sign = draw.randint(10, 99), draw.randint(10, 99), draw.choice("+-*")
    expression = f"{a}{sign}{b}"
    return expression, int(_value(ast.parse(expression, mode="eval").body))


def demonstrations(count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Return turns to imitate: 5 of 10 answer from memory, 3 call the calculator, 2 call it with broken JSON."""
    tools = json.dumps([{"type": "function", "function": {"name": "calculator", "parameters": {}}}])
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        expression, value = question(draw)
        asked, kind = [{"role": "user", "content": expression + "?"}], draw.random()
        arguments = {"expression": expression}
        call = f'<tool_call>\n{{"name": "calculator", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        thought = "I know" if kind < 0.5 else "let me calculate"
        said = str(value) if kind < 0.5 else call if kind < 0.8 else call.replace("}}", "}")
        rows.append({"prompt": asked, "answer": f"<think>\n{thought}\n</think>\n\n{said}", "tools": tools})
        function = {"name": "calculator", "arguments": arguments}
        turn = {"role": "assistant", "content": "", "reasoning_content": "let me calculate"}
        called = [*asked, {**turn, "tool_calls": [{"type": "function", "function": function}]}]
        rows.append(
            {"prompt": [*called, {"role": "tool", "content": str(value)}], "answer": str(value), "tools": tools}
        )
    return rows


def make_model(folder: Path, steps: int) -> str:
    """Train the tiny model to imitate demonstrations, once per folder."""
    path = folder / "model"
    if (path / "config.json").is_file():
        return str(path)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": len(tokenizer)}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))
    # As `rlhf-ppo sft` encodes them: prompts are masked from the loss.
    columns = {"prompt_column": "prompt", "completion_column": "answer"}
    args = SFTArgs(model="tiny", dataset=("demonstrations",), output_dir=str(path), **columns)
    examples = read_examples(demonstrations(16 * steps, random.Random(0)), args)
    rows: Any = encode_examples(examples, tokenizer, 512, "demonstrations", vocab_size=len(tokenizer)).to_list()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        model(**collate(rows[32 * step : 32 * step + 32])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for part in (tokenizer, model):
        part.save_pretrained(path)
    return str(path)


def main(
    argv: list[str] | None = None, callbacks: Sequence[Callable[..., None]] = (), **settings: Any
) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-episodes", type=int, default=1536, help="conversations to train on")
    parser.add_argument("--sft-steps", type=int, default=500, help="optimizer steps of the fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default="runs/calculator", help="folder of model, questions and run")
    flags = parser.parse_args(argv)

    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder, flags.sft_steps)
    draw = random.Random(1)
    asked = [question(draw) for _ in range(1064)]
    rows = [{"prompt": [{"role": "user", "content": text + "?"}], "answer": value} for text, value in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trainer = PPOTrainer(
        model=model,
        reward_funcs=right_answer,
        tools=[calculator],
        callbacks=callbacks,
        args=RLHFConfig(
            **{
                "output_dir": str(folder / f"run-{flags.seed}"),
                "total_episodes": flags.total_episodes,
                "rollout_batch_size": 64,
                "max_turns": 3,
                "max_new_tokens": 40,
                "learning_rate": 1e-3,
                "kl_coef": 0.01,
                "num_epochs": 2,
                "seed": flags.seed,
                "precision": "fp32",  # the same on every machine; bfloat16 gains little with a model this small
                "num_threads": 1,
                **settings,
            }
        ),
        train_dataset=rows[64:],
        eval_dataset=rows[:64],
    )
    metrics = trainer.train()
    told = trainer.run.read("eval_samples.jsonl")
    for title, wanted in (("before", 0), ("after", trainer.iteration)):
        shown = [row for row in told if row["iteration"] == wanted]
        calls = sum(len(m.get("tool_calls") or ()) for row in shown for m in row["completion"])
        right = sum(row["score"] for row in shown) / len(shown)
        print(f"\n{title}: {right:.0%} right, {calls / len(shown):.2f} calls of the calculator a question")
        for message in [*shown[0]["prompt"], *shown[0]["completion"]]:
            print(f"  {message['role']:<9} {message.get('sampled_text', message['content'])!r}")
    return metrics


if __name__ == "__main__":
    main()
