"""Collecting: generate responses, read them with reference and critic, and have them scored."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ppo.config import RLHFConfig
from rlhf_ppo.data import Prompt, decode_responses, encode_prompts
from rlhf_ppo.rewards import RewardError, score
from rlhf_ppo.rollout import Rollout, sample_responses
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.setup import RunParts


@dataclass(frozen=True)
class Collector:
    """Makes scored rollouts with the parts of a run."""

    parts: RunParts
    args: RLHFConfig
    run: RunDirectory

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
            RewardError: a reward function failed; the responses are written to failed_rollout.jsonl first.
        """
        rollout = self._read(self._generate(list(prompts), columns, generator))
        return self._score(rollout, needs_scores=needs_scores)

    def _generate(self, prompts: list[Prompt], columns: dict[str, list[Any]], generator: torch.Generator) -> Rollout:
        prompt_ids, prompt_mask = encode_prompts(
            prompts,
            self.parts.tokenizer,
            room=self.parts.room,
            truncate=self.args.overlong_prompts == "truncate",
            device=self.parts.device,
        )
        response_ids, mask, finished, logprobs, values = sample_responses(
            self.parts.model,
            prompt_ids,
            prompt_mask,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            stop_token_ids=self.parts.stop_token_ids,
            generator=generator,
        )
        completions = decode_responses(self.parts.tokenizer, response_ids, mask)
        return Rollout(
            prompts, columns, prompt_ids, prompt_mask, response_ids, mask, finished, logprobs, values, completions
        )

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> Rollout:
        """Add what decoding did not give: the reference's log-probs, a separate critic's values, or a second look."""
        sequences = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
        ref_logprobs = self.parts.reference.logprobs(*sequences, temperature=self.args.temperature)
        changes: dict[str, Any] = {"ref_logprobs": torch.where(rollout.mask, ref_logprobs, 0.0)}
        if rollout.values is None and self.parts.model.value_trunk is not None:
            changes["values"] = self.parts.model.separate_values(*sequences)
        if self.args.recompute_logprobs:
            again = self.parts.model(*sequences, temperature=self.args.temperature, entropy=False)
            logprobs = torch.where(rollout.mask, again.logprobs, 0.0)
            changes |= {"logprobs": logprobs, "values": again.values}
            changes["decode_gap"] = float((logprobs - rollout.logprobs).abs().max())
        return dataclasses.replace(rollout, **changes)

    def _score(self, rollout: Rollout, *, needs_scores: bool) -> Rollout:
        args = self.args
        parts: dict[str, list[float | None]] = {}
        try:
            for name, (function, _) in self.parts.rewards.items():
                parts[name] = score(
                    function,
                    rollout.prompts,
                    rollout.completions,
                    rollout.columns,
                    timeout_s=args.reward_timeout_s,
                    drop_nonfinite=args.drop_nonfinite_scores,
                    needs_scores=needs_scores,
                )
            weights = [weight for _, weight in self.parts.rewards.values()]
            rows = list(zip(*parts.values(), strict=True))
            if needs_scores and all(None in row for row in rows):
                raise RewardError("no completion was scored by every reward function")
        except RewardError as error:
            file = self.run.path / "failed_rollout.jsonl"
            file.unlink(missing_ok=True)
            for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
                self.run.append(file.name, {"prompt": prompt, "completion": completion})
            raise RewardError(f"{error}. The responses are in {file}") from (error.__cause__ or error)
        totals = [
            None if None in row else sum(w * float(s or 0.0) for w, s in zip(weights, row, strict=True)) for row in rows
        ]
        scores = torch.tensor([total or 0.0 for total in totals], dtype=torch.float32, device=self.parts.device)
        scored = torch.tensor([total is not None for total in totals], device=self.parts.device)
        if scored.sum() > 1 and torch.unique(scores[scored]).numel() == 1:
            warnings.warn(
                f"every response scored {float(scores[scored][0])}: a constant reward gives no signal to learn from",
                stacklevel=4,
            )
        return dataclasses.replace(rollout, scores=scores, scored=scored, score_parts=parts)
