"""Made-up answers: empty, truncated, repeated, the prompt itself, format without content; which of them pay."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from rlhf_ppo.data.tokenization import encode_bare
from rlhf_ppo.pipeline.doctor.findings import Section
from rlhf_ppo.pipeline.doctor.probe import Numbers, Probe, ask
from rlhf_ppo.rewards.scoring import Responses
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.texts import display_text
from rlhf_ppo.training.run import Run

PROMPTS = 4
"""Prompts whose made-up answers are scored."""

ANSWERS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "empty": ("to answer nothing", lambda prompt, said: ""),
    "truncated": ("to stop half-way", lambda prompt, said: said[: len(said) // 2]),
    "repeated": ("to say the same again and again", lambda prompt, said: _repeated(said)),
    "prompt": ("to repeat the prompt", lambda prompt, said: prompt),
    "punctuation": ("to write punctuation without words", lambda prompt, said: re.sub(r"\w+", "", said) or "..."),
    "think tags": ("to write tags without content", lambda *_: "<think></think><answer></answer>"),
    "empty box": ("to box nothing", lambda *_: "\\boxed{}"),
    "numbered list": ("to number empty lines", lambda *_: "1.\n2.\n3.\n"),
}
"""Name -> (what PPO would learn if it pays, prompt and a sampled response -> the answer)."""


def _repeated(said: str) -> str:
    """Return the first few words again and again, as long as the response."""
    words = said.split()[:4] or ["word"]
    part = " ".join(words) + " "
    return (part * max(4, -(-len(said) // len(part)))).strip()


def try_answers(section: Section, run: Run, probe: Probe) -> list[str]:
    """Score made-up answers and compare them with sampled ones; returns what PPO would learn to exploit.

    A reward function that fails on one of them would end the run when the policy first writes such.
    """
    rows = [i * probe.each for i in range(min(PROMPTS, len(probe.rollout.prompts) // probe.each))]
    scores: dict[str, Numbers] = {}
    for kind, (_, make) in ANSWERS.items():
        made = [make(display_text(probe.rollout.prompts[i]), str(probe.rollout.completions[i])) for i in rows]
        try:
            scores[kind] = _score(run, probe, rows, made)
        except RewardError as error:
            section.warn(
                f"scoring the answer {made[0][:40]!r} ({kind}) fails: {str(error).splitlines()[0]}",
                "let the reward return a low score, or None, for it: the policy will write such an answer some day",
            )
    totals, found = probe.totals, list[str]()
    typical, spread = float(np.nanmean(totals)), float(np.nanstd(totals))
    high = float(np.nanquantile(totals, 0.9))
    lines = [f"{'sampled responses':<20} {typical:8.3g}   (the best tenth from {high:.3g})"]
    for kind, given in scores.items():
        if (mean := _mean(given)) is None:
            lines.append(f"{kind:<20} {'none':>8}")
            continue
        pays = mean >= high and mean > typical + 0.5 * spread + 1e-9
        if pays:
            found.append(ANSWERS[kind][0])
        lines.append(f"{kind:<20} {mean:8.3g}{'   pays' if pays else ''}")
    section.pages.append("score of answers that nobody wants, mean over prompts\n" + "\n".join(lines))
    section.facts["made_up_answers"] = {kind: _mean(given) for kind, given in scores.items()}
    return found


def _mean(given: Numbers) -> float | None:
    return None if np.isnan(given).all() else float(np.nanmean(given))


def _score(run: Run, probe: Probe, rows: list[int], made: list[str]) -> Numbers:
    rollout = probe.rollout
    columns = {name: [values[i] for i in rows] for name, values in rollout.columns.items()}
    ids = [encode_bare(run.tokenizer, text) for text in made]
    responses = Responses([rollout.prompts[i] for i in rows], made, columns, ids)
    parts = [probe.weights[name] * ask(run, name, responses) for name in run.rewards]
    return np.sum(parts, axis=0)
