"""Collecting: generate responses, read them with reference and critic, and have them scored."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.data.detokenization import Before, TextPieces, before_each
from rlhf_ppo.data.tokenization import encode_prompts
from rlhf_ppo.generation.multi_turn import Respond, RespondError, sample_conversations
from rlhf_ppo.generation.rollout import Rollout, SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import StopStringDetector, response_texts
from rlhf_ppo.rewards.scoring import Responses, score_responses, total_score
from rlhf_ppo.rewards.validation import RewardError, Score
from rlhf_ppo.runtime.device import autocast
from rlhf_ppo.runtime.progress import Stopwatch
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.runtime.signals import stop_if_asked
from rlhf_ppo.training.setup import RunParts


@dataclass(frozen=True)
class Collector:
    """Makes scored rollouts with the parts of a run."""

    parts: RunParts
    args: RLHFConfig
    run: RunDirectory
    stopwatch: Stopwatch

    def collect(
        self,
        prompts: Sequence[Prompt],
        columns: dict[str, list[Any]],
        generator: torch.Generator,
        *,
        needs_scores: bool = True,
    ) -> Rollout:
        """Generate one response to each prompt, read it, and have it scored.

        Args:
            prompts: [B] text or chat messages.
            columns: other columns for the reward functions, [B] each.
            generator: source of the draws, on the run's device.
            needs_scores: refuse a rollout without any score.
        Raises:
            ValueError: a prompt is bad; names its number.
            RewardError, RespondError: a reward function, or ``respond``, failed; what it failed on is written to
                failed_rollout.jsonl first.
        """
        try:
            with self.stopwatch.phase("generate"):
                rollout = self._generate(list(prompts), columns, generator)
            with self.stopwatch.phase("reference"):
                rollout = self._read(rollout)
            with self.stopwatch.phase("score"):
                return self._score(rollout, needs_scores=needs_scores)
        finally:
            # Rewards have read them; what is open now, after a failure above all, nobody else would close.
            if (close := getattr(self.parts.respond, "close_episodes", None)) is not None:
                close()

    def _generate(self, prompts: list[Prompt], columns: dict[str, list[Any]], generator: torch.Generator) -> Rollout:
        prompt_ids, prompt_mask = encode_prompts(
            prompts,
            self.parts.tokenizer,
            room=self.parts.room,
            truncate=self.args.overlong_prompts == "truncate",
            device=self.parts.device,
        )
        with autocast(self.parts.bf16, self.parts.device):
            if self.parts.respond is not None:
                try:
                    return self._converse(self.parts.respond, prompts, columns, prompt_ids, prompt_mask, generator)
                except RespondError as error:
                    file = self._dump({"conversation": messages} for messages in error.conversations)
                    message = f"{error}. All conversations are in {file}"
                    raise RespondError(message, error.conversations) from error.__cause__
            pieces = TextPieces(self.parts.tokenizer)
            before = before_each(pieces, prompts, prompt_ids, prompt_mask)
            sampled = self._sample(prompt_ids, prompt_mask, before, generator)
        completions: list[Completion] = [*response_texts(sampled, pieces, before, self.args.stop_strings)]
        return Rollout(
            prompts,
            columns,
            prompt_ids,
            prompt_mask,
            **sampled._asdict(),
            completions=completions,
        )

    @property
    def _sampling(self) -> SamplingParams:
        args = self.args
        return SamplingParams(
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.min_new_tokens,
            temperature=args.temperature,
            stop_token_ids=self.parts.stop_token_ids,
            stop_strings=args.stop_strings,
        )

    def _sample(self, ids: Tensor, mask: Tensor, before: list[Before], generator: torch.Generator) -> SampledResponses:
        params, detector = self._sampling, None
        if params.stop_strings:
            detector = StopStringDetector(TextPieces(self.parts.tokenizer), params.stop_strings, before)
        return self.parts.sample(self.parts.model, ids, mask, params, generator=generator, stop_detector=detector)

    def _converse(
        self,
        respond: Respond,
        prompts: list[Prompt],
        columns: dict[str, list[Any]],
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        generator: torch.Generator,
    ) -> Rollout:
        said = sample_conversations(
            lambda ids, mask, before: self._sample(ids, mask, before, generator),
            prompts,
            prompt_ids,
            prompt_mask,
            self._sampling,
            respond=respond,
            timeout_s=self.args.respond_timeout_s,
            max_turns=self.args.max_turns,
            room=self.parts.room,
            tokenizer=self.parts.tokenizer,
        )
        return Rollout(
            prompts,
            columns,
            prompt_ids,
            prompt_mask,
            **said.sampled._asdict(),
            completions=said.completions,
            environment=said.environment,
            turns=said.turns,
            context_full=said.context_full,
            conversations=said.messages,
        )

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> Rollout:
        """Add what decoding did not give: the reference's log-probs, a separate critic's values, or a second look."""
        model, temperature = self.parts.model, self.args.temperature
        read: dict[str, Tensor] = {}

        def note(name: str, values: Tensor | None, rows: list[int]) -> None:
            if values is not None:
                whole = read.setdefault(name, torch.zeros_like(rollout.logprobs))
                whole[rows, : values.shape[1]] = values.to(whole.dtype)

        for rows in self.parts.batches(rollout, range(len(rollout.prompts))):
            stop_if_asked()
            part = rollout.sequences(rows)
            with autocast(self.parts.bf16, self.parts.device):
                note("ref_logprobs", self.parts.reference.logprobs(part, temperature=temperature), rows)
                if self.args.recompute_logprobs:
                    again = model(*part, temperature=temperature, entropy=False)
                    note("logprobs", again.logprobs, rows)
                    note("values", again.values, rows)
                elif rollout.values is None:
                    note("values", model.separate_values(part), rows)
        if "logprobs" not in read:
            return dataclasses.replace(rollout, **read)
        gap = float((read["logprobs"] - rollout.logprobs).abs().max())
        return dataclasses.replace(rollout, **read, sampled_logprobs=rollout.logprobs, decode_gap=gap)

    def _score(self, rollout: Rollout, *, needs_scores: bool) -> Rollout:
        args = self.args
        ids, turns = (
            None if x is None else [row[keep].tolist() for row, keep in zip(x, rollout.mask, strict=True)]
            for x in (rollout.response_ids, rollout.turns)
        )
        pieces = TextPieces(self.parts.tokenizer)
        before = self._cache_use()
        try:
            parts = score_responses(
                {name: function for name, (function, _) in self.parts.rewards.items()},
                Responses(rollout.prompts, rollout.completions, rollout.columns, ids, rollout.conversations, turns),
                decode_of=lambda i, turn: partial(pieces.decode, before_turn(pieces, rollout, i, turn)),
                timeout_s=args.reward_timeout_s,
                drop_nonfinite=args.drop_nonfinite_scores,
                needs_scores=needs_scores,
                caches=self.parts.score_caches,
            )
            if needs_scores and all(None in row for row in zip(*parts.values(), strict=True)):
                raise RewardError("no completion was scored by every reward function")
        except RewardError as error:
            texts = zip(rollout.prompts, rollout.completions, strict=True)
            file = self._dump({"prompt": prompt, "completion": completion} for prompt, completion in texts)
            raise RewardError(f"{error}. The responses are in {file}") from error.__cause__
        rollout = with_scores(rollout, parts, [weight for _, weight in self.parts.rewards.values()])
        if self.parts.score_caches:
            hits, lookups = (now - then for now, then in zip(self._cache_use(), before, strict=True))
            rollout = dataclasses.replace(rollout, cache_hit_fraction=hits / lookups)
        assert rollout.scores is not None and rollout.scored is not None
        scores = rollout.scores[rollout.scored]
        if needs_scores and len(scores) > 1 and rollout.token_scores is None and torch.unique(scores).numel() == 1:
            warnings.warn(
                f"every response scored {float(scores[0])}: a constant reward gives no signal to learn from",
                stacklevel=4,
            )
        return rollout

    def _dump(self, rows: Iterable[dict[str, Any]]) -> Path:
        """Keep what a reward function or ``respond`` failed on."""
        file = self.run.path / "failed_rollout.jsonl"
        file.unlink(missing_ok=True)
        for row in rows:
            self.run.append(file.name, row)
        return file

    def _cache_use(self) -> tuple[int, int]:
        caches = self.parts.score_caches.values()
        return sum(cache.hits for cache in caches), sum(cache.lookups for cache in caches)


def before_turn(pieces: TextPieces, rollout: Rollout, i: int, turn: int) -> Before:
    """What the policy's turn ``turn`` in response ``i`` lies behind."""
    ids, text = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), rollout.prompts[i]
    if turn and rollout.turns is not None and rollout.conversations is not None:
        ids += rollout.response_ids[i][rollout.real[i] & (rollout.turns[i] < turn)].tolist()
        text = rollout.conversations[i][2 * turn]["content"] if isinstance(text, str) else None
    return pieces.before(ids, text)


def with_scores(rollout: Rollout, parts: dict[str, list[Score]], weights: Sequence[float]) -> Rollout:
    """The rollout with the weighted sum of its scores, per response and, where a function scored tokens, per token.

    Args:
        rollout: B responses.
        parts: name -> [B] scores of one reward function.
        weights: one per function.
    """
    device = rollout.mask.device
    score_parts = {name: [total_score(value) for value in part] for name, part in parts.items()}
    rows = list(zip(*score_parts.values(), strict=True))
    scored = torch.tensor([None not in row for row in rows], device=device)
    totals = [
        0.0 if None in row else sum(w * float(s or 0.0) for w, s in zip(weights, row, strict=True)) for row in rows
    ]
    token_parts: dict[str, Tensor] = {}
    for name, part in parts.items():
        if any(isinstance(value, list) for value in part):
            token_parts[name] = torch.zeros(rollout.mask.shape, device=device)
            for i, value in enumerate(part):
                if isinstance(value, list) and scored[i]:
                    token_parts[name][i, rollout.mask[i]] = torch.tensor(value, device=device)
    token_scores = [w * token_parts[name] for w, name in zip(weights, parts, strict=True) if name in token_parts]
    return dataclasses.replace(
        rollout,
        scores=torch.tensor(totals, dtype=torch.float32, device=device),
        scored=scored,
        score_parts=score_parts,
        token_score_parts=token_parts,
        token_scores=torch.stack(token_scores).sum(dim=0) if token_scores else None,
    )
