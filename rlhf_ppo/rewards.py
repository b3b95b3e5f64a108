"""Rewards: callables and reward models behind one signature, and what becomes of whatever they return."""

from __future__ import annotations

import math
import numbers
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.data import Completion, Prompt
from rlhf_ppo.models import find_config, freeze, fuse_activations, load_classifier
from rlhf_ppo.user_code import load_function

RewardFunction = Callable[..., Any]
"""``fn(prompts, completions, **columns)``: one float, or None for "cannot be scored", per completion."""


class RewardError(RuntimeError):
    """A reward function failed, hung, or returned what is no list of scores."""


class RewardModel:
    """A sequence-classification model with one label as a reward function; it reads text with its own tokenizer.

    Text prompts are scored as prompt + completion; chats through the reward tokenizer's chat template.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        """Load a hub id or folder, or wrap a model; it is frozen and put into evaluation mode.

        Raises:
            ValueError: the model has more than one label, or a bare model comes without a tokenizer.
        """
        source = model if isinstance(model, str) else model.config._name_or_path
        config = find_config(model)
        self.__name__ = Path(source).name or type(model).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has num_labels={config.num_labels}, but a reward is one number; "
                "use a model with num_labels=1, or wrap this one in a function that picks a label"
            )
        if tokenizer is None and not source:
            raise ValueError(
                "a reward model that was not loaded from a folder or hub id needs its tokenizer: "
                "pass RewardModel(model, tokenizer) as the reward function"
            )
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if isinstance(model, str):
            model = load_classifier(model)
        self.model: Any = freeze(cast(PreTrainedModel, model)).to(device)
        fuse_activations(self.model)
        self.batch_size = batch_size

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        return scored_text(self.tokenizer, prompt, completion)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> list[float]:
        """The model's one logit for each prompt with its completion."""
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            rows = self.tokenizer(texts[start : start + self.batch_size], truncation=True)["input_ids"]
            scores += self._logits(rows).tolist()
        return scores

    def _logits(self, rows: list[list[int]]) -> Tensor:
        return text_scores(self.model, self.tokenizer, rows)


def scored_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion) -> str:
    """What a reward model reads: prompt + completion, or a chat through its chat template (written out without one)."""
    if isinstance(prompt, str):
        return f"{prompt}{completion}"
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages = [*prompt, *said]
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def text_scores(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> Tensor:
    """A one-label classifier's logit [B] for each row of token ids, padded by length, with gradients."""
    # Decoder classifiers pool at the last token whose id is not the pad id. With pad == eos that is one token early, so
    # padding takes an id that occurs in no row.
    used = {token for row in rows for token in row}
    pad = tokenizer.pad_token_id
    if pad is None or pad in used:
        pad = next(i for i in range(model.config.get_text_config().vocab_size) if i not in used)
    model.config.get_text_config().pad_token_id = pad
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)


def load_reward(source: RewardFunction | str | PreTrainedModel, *, device: torch.device | str) -> RewardFunction:
    """A reward function from a callable, a model, ``file.py:function``, ``module:function``, a folder or a hub id.

    Raises:
        ValueError: the file, module or function is not there, or the model does not fit (see :class:`RewardModel`).
    """
    if isinstance(source, PreTrainedModel):
        return RewardModel(source, device=device)
    if callable(source):
        return source
    if not isinstance(source, str):
        raise ValueError(f"a reward must be a function, a model, a folder or a hub id, got {type(source).__name__}")
    if source.endswith(".py"):
        raise ValueError(f"reward {source!r} names a file but no function: write {source}:function")
    if ":" not in source:
        return RewardModel(source, device=device)
    return load_function(source, "reward")


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function is logged."""
    return getattr(function, "__name__", type(function).__name__)


def score(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: dict[str, list[Any]],
    *,
    timeout_s: float | None = None,
    drop_nonfinite: bool = False,
    needs_scores: bool = True,
) -> list[float | None]:
    """Call a reward function and check what it says.

    Args:
        function: see :data:`RewardFunction`.
        prompts, completions: [B] each.
        columns: the prompts' other columns, [B] each.
        timeout_s: longest time for the call in seconds.
        drop_nonfinite: turn NaN and infinite scores into None.
        needs_scores: refuse None for all.
    Returns:
        [B] scores; None where the function could not score.
    Raises:
        RewardError: it raised (the cause is chained), ran out of time, or returned no list of [B] finite numbers;
            never a silent zero.
    """
    name = reward_name(function)

    def call() -> Any:
        return function(prompts, completions, **columns)

    try:
        result = call() if timeout_s is None else _call_with_timeout(call, timeout_s)
    except _TimeoutReachedError:
        raise RewardError(f"reward function {name!r} did not return within reward_timeout_s={timeout_s}") from None
    except Exception as error:
        raise RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
    scores = coerce_scores(result, len(completions), name)
    for i, value in enumerate(scores):
        if value is None or math.isfinite(value):
            continue
        if not drop_nonfinite:
            raise RewardError(
                f"reward function {name!r} scored {value} for prompt {prompts[i]!r} "
                f"with completion {completions[i]!r}; "
                "return None for what cannot be scored, or set drop_nonfinite_scores"
            )
        scores[i] = None
    if needs_scores and all(value is None for value in scores):
        raise RewardError(f"reward function {name!r} scored none of the {len(scores)} completions (None for all)")
    return scores


class _TimeoutReachedError(Exception):
    """Kept apart from a TimeoutError that the reward function itself may raise."""


def _call_with_timeout(call: Callable[[], Any], timeout_s: float) -> Any:
    """Run in a daemon thread: a call that hangs is left behind and cannot keep the process from ending."""
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        ok, answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise _TimeoutReachedError from None
    if not ok:
        raise answer
    return answer


def coerce_scores(result: Any, count: int, name: str) -> list[float | None]:
    """Read ``count`` scores from a list, tuple, array or tensor; bools and NumPy numbers count as numbers.

    Raises:
        RewardError: another length, nesting or type; says what was expected and what came.
    """
    expected = f"expected {count} numbers (or None), one per completion"
    if isinstance(result, (Tensor, np.ndarray)):
        shape = tuple(result.shape)
        if shape not in ((count,), (count, 1)):
            raise RewardError(f"reward function {name!r} returned an array of shape {shape}; {expected}")
        result = result.reshape(count).tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(f"reward function {name!r} returned {type(result).__name__}: {result!r:.80}; {expected}")
    if len(result) != count:
        raise RewardError(f"reward function {name!r} returned {len(result)} scores; {expected}")
    return [_number(value, i, name, expected) for i, value in enumerate(result)]


def _number(value: Any, i: int, name: str, expected: str) -> float | None:
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if value is None:
        return None
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    raise RewardError(
        f"reward function {name!r} returned {type(value).__name__} {value!r:.80} at index {i}; {expected}"
    )
