"""The metric dictionary: the meaning and unit of every metric; and averages of metrics over an update."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_ppo.runtime.machine.device import exact_dtype
from rlhf_ppo.runtime.machine.transfers import Reading

# Averages are over all real actions (or responses) of the whole update, without padding.
METRICS: dict[str, str] = {
    "progress/iteration": "Number of rollouts trained on so far.",
    "progress/episodes": "Number of training responses generated so far.",
    "progress/env_steps": "Number of environment steps so far, without autoreset steps.",
    "progress/optimizer_steps": "Number of optimizer steps so far.",
    "progress/curriculum_fraction": "With curriculum_column: share of the prompts, from the easiest, that the rollout was drawn from.",
    "score/mean": "Mean score of the rollout's responses (weighted sum of the reward functions), before any penalty.",
    "score/std": "Standard deviation of the scores over the rollout.",
    "score/token_std": "Where rewards score single tokens: standard deviation of these scores over the rollout's tokens.",
    "score/unscored_fraction": "Share of responses whose score was None, or non-finite and dropped.",
    "score/zero_signal_fraction": "With num_generations above 1: share of the prompts whose responses all score alike "
    "(under zero_signal_prompts=resample of all that were drawn).",
    "score/dropped_prompts": "With zero_signal_prompts=drop or resample: prompts that are left out of the update because their responses all score alike.",
    "score/resampled_prompts": "With zero_signal_prompts=resample: prompts drawn in place of others.",
    "score/first_draw_mean": "With zero_signal_prompts=resample: mean score before prompts were replaced; score/mean is of the responses that were kept.",
    "score/part/*": "Mean score of one reward function, before its weight; * is the function's name.",
    "score/positive_fraction": "With positive_loss_coef: share of responses with a score above positive_score_above.",
    "score/length_correlation": "Correlation of scores and lengths over the rollout: close to 1, longer responses score "
    "higher; not there where one of them is the same for all.",
    "score/shaped_mean": "Mean score after normalisation, clipping and penalties, as the policy learns from it.",
    "score/shaped_std": "Standard deviation of those scores.",
    "score/clipped_fraction": "Share of responses whose score was clipped by score_clip.",
    "score/cache_hit_fraction": "With cache_rewards: share of the rollout's scores taken from the cache.",
    "score/running_mean/*": "With normalize_scores: running mean of one reward function's scores; * is the function's name.",
    "score/running_std/*": "With normalize_scores: running standard deviation of one reward function's scores.",
    "judge/score_mean": "With judges: mean score of the responses that they score (judge_responses of each rollout); never trained on.",
    "judge/part/*": "With several judges: mean score of one of them; * is the function's name.",
    "reward/mean_per_response": "Sum of a response's per-token rewards (score and penalties minus the KL penalty), mean over responses.",
    "reward/logged/*": "A number that a reward function logged by log_metric, mean over the responses it was called for; * is the name it gave.",
    "kl/reference_nats_per_response": "KL to the frozen reference in nats: k1 summed over each response, mean over responses.",
    "kl/coef": "KL penalty coefficient (kl_coef) for this rollout.",
    "kl/loss": "KL loss to the reference (with kl_loss_coef), before its coefficient.",
    "response/length_tokens": "Mean response length in tokens, stop token included; in conversations, only the policy's tokens count.",
    "response/eos_fraction": "Share of responses whose (last) turn ended with a stop token or stop string, not at the length limit.",
    "response/repeated_fraction": "Share of a response's runs of four tokens that occurred in it before, mean over responses: "
    "0 never repeats itself, 1 says one thing again and again.",
    "response/distinct_1": "Share of distinct tokens among all tokens of the rollout; falls as responses become alike.",
    "response/distinct_2": "Share of distinct pairs of consecutive tokens among all of the rollout (distinct-2).",
    "response/turns": "Mean number of the policy's turns in a conversation (with max_turns above 1).",
    "tools/calls_per_response": "With tools: mean number of tool calls in a conversation, malformed ones included.",
    "tools/malformed_fraction": "Share of the tool calls that could not be read.",
    "tools/error_fraction": "Share of the tool calls that were read but answered with an error: an unknown tool, wrong "
    "arguments, or a tool that raised.",
    "response/context_full_fraction": "Share of conversations that ended because the model's context was full.",
    "episode/return_mean": "Mean undiscounted return of the last 100 finished training episodes.",
    "episode/length_mean": "Mean length in steps of the last 100 finished training episodes.",
    "episode/count": "Number of training episodes finished so far.",
    "policy/loss": "Policy loss, mean over the update.",
    "policy/positive_loss": "Negative log-likelihood of the positive examples (with positive_loss_coef), in nats per token, "
    "before its coefficient.",
    "policy/approx_kl": "KL(old || new) in nats per action, estimated by k3: (r - 1) - log r.",
    "policy/clip_fraction": "Share of actions whose gradient the clip removed: A > 0 with r > 1 + eps_high, or A < 0 with r < 1 - eps "
    "(cispo: whose weight r was capped; dis: with r, to the sampler's log-probs, outside the range). "
    "Typically 0.01 to 0.3; lower: small steps or a small learning rate; higher: updates too large for their rollout.",
    "policy/out_of_range_fraction": "Share of actions with a ratio outside the clip range, whatever the sign of A.",
    "policy/ratio_mean": "Mean probability ratio new/old; should stay close to 1.",
    "policy/max_abs_log_ratio": "Largest |log(new/old)| of any action, in nats.",
    "policy/overflow_fraction": "Share of actions whose |log-ratio| exceeded 20 and was clamped; anything above 0 is a warning sign.",
    "policy/entropy": "Mean entropy of the action distribution, in nats per action (language models: of the distributions "
    "that the rollout's tokens were drawn from).",
    "policy/clip_range": "Current clip range (adapted under objective=adaptive_clip).",
    "policy/penalty_beta": "Current coefficient of KL(old || new) (adapted under objective=penalty).",
    "policy/first_minibatch_max_abs_log_ratio": "Largest |log-ratio| before the rollout's first optimizer step, in nats: "
    "0 up to rounding if sampling and training agree. The ratio tripwire checks it.",
    "policy/decode_gap_max_nats": "Largest |log-prob while decoding - log-prob of a full forward pass| (with recompute_logprobs).",
    "policy/sampler_gap_mean_nats": "Mean |log-prob of the sampler - ours| of the actions, where another program sampled "
    "(generation=vllm, rollout_from); max_sampler_gap bounds it.",
    "policy/staleness_updates": "With generation=vllm: updates between the policy that sampled a response and the one that learns from it, "
    "mean over responses: 0, or 1 under rollouts_ahead.",
    "policy/importance_weight_mean": "Mean importance weight pi_trainer / pi_sampler of the actions, after importance_weight_cap; "
    "close to 1 unless sampler and trainer disagree.",
    "policy/importance_capped_fraction": "Share of actions whose importance weight was above its cap (truncated, or masked).",
    "replay/kl_nats_per_response": "With replay: KL(recording policy || policy) before the update in nats, k1 summed over each recorded "
    "response, mean over responses: how far off-policy the update is.",
    "replay/effective_fraction": "With replay: effective share of the recorded responses, (sum w)^2 / (n sum w^2) with w = policy / recording "
    "policy of a whole response: 1 on-policy, 1/n where a single response counts.",
    "value/loss": "Value loss: half the squared error of the critic, in the reward's units (squared).",
    "value/explained_variance": "Share of the returns' variance that the critic's values explain: 1 is perfect, 0 no better than a constant. "
    "A language model's returns are whole (Monte Carlo) under any lambda; in classic they are the critic's targets.",
    "value/mean": "Mean value that the critic predicted at rollout.",
    "value/return_mean": "Mean return: of whole returns for a language model, of the critic's targets in classic.",
    "value/return_std": "Unit in which the critic learns: the running standard deviation of the returns (1 without normalize_values).",
    "value/clip_range": "Clip range of the values (clip_range_vf) in the reward's units.",
    "advantage/std": "Standard deviation of the advantages before whitening.",
    "sft/loss": "sft: loss of a step's rows, the negative log-likelihood of the learned tokens in nats per token.",
    "preference/loss": "reward: Bradley-Terry loss of a step's pairs, centering included.",
    "preference/accuracy": "reward: share of a step's pairs whose chosen answer scores higher.",
    "optim/learning_rate": "Learning rate at the end of the update.",
    "optim/value_learning_rate": "The critic's learning rate at the end of the update; there if it has a loss.",
    "optim/grad_norm": "Mean global gradient norm before clipping.",
    "optim/skipped_steps": "Optimizer steps skipped because of a non-finite loss or gradient.",
    "optim/epochs": "Epochs run on this rollout (target_kl may stop them early).",
    "eval/score_mean": "Mean raw score of sampled responses to the evaluation prompts.",
    "eval/score_std": "Standard deviation of those scores.",
    "eval/kl_nats_per_response": "KL to the reference on the evaluation prompts in nats: k1 summed over each response.",
    "eval/reference_nats_per_token": "Cross-entropy of the responses under the reference, in nats per token: "
    "lower means more fluent, as the reference judges it.",
    "eval/length_tokens": "Mean response length on the evaluation prompts, in tokens.",
    "eval/eos_fraction": "Share of evaluation responses that ended with a stop token or stop string.",
    "eval/logged/*": "A number that a reward function logged by log_metric about the evaluation's responses, mean over them.",
    "eval/loss_nats_per_token": "sft: negative log-likelihood of the learned tokens of the held-out rows.",
    "eval/perplexity": "sft: exp of it.",
    "eval/accuracy": "reward: share of the held-out pairs whose chosen answer scores higher; ties count half.",
    "eval/loss": "reward: Bradley-Terry loss of the held-out pairs, without centering.",
    "eval/calibration_error": "reward: mean distance between how sure the model was and how often it was right, on held-out pairs.",
    "eval/chosen_score": "reward: mean score of the held-out chosen answers.",
    "eval/rejected_score": "reward: mean score of the held-out rejected answers.",
    "eval/mean_return": "Mean undiscounted return of the evaluation episodes.",
    "eval/std_return": "Standard deviation of the evaluation episodes' returns.",
    "eval/mean_length": "Mean length in steps of the evaluation episodes.",
}


FAMILIES = {key.partition("/")[0] for key in METRICS}


def require_known_metrics(metrics: Mapping[str, float]) -> None:
    """Raise a KeyError for an undescribed key of a built-in family, or one that looks like a misspelling.

    Any other key is the user's own, such as ``custom/success_rate``.
    """
    open_ended = tuple(key[:-1] for key in METRICS if key.endswith("*"))
    for key in metrics:
        if key in METRICS or key.startswith(open_ended):
            continue
        family, _, rest = key.partition("/")
        close = difflib.get_close_matches(key, METRICS, n=1, cutoff=0.9)
        if close or family in FAMILIES:
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise KeyError(
                f"metric {key!r} is not in the metric dictionary, docs/metrics.md{hint}; a metric of your own needs a "
                f"family of its own, such as 'custom/{rest or family}'"
            )


def metrics_page() -> str:
    """Return the page docs/metrics.md, generated from the dictionary."""
    rows = "\n".join(f"| `{key}` | {meaning} |" for key, meaning in METRICS.items())
    return (
        "# Metrics\n\nEvery metric that a run writes to `metrics.jsonl`. Averages are over all real actions of the whole"
        " update, without padding.\nMetrics of your own go there, too, under any family that is not listed here"
        ' (`agent.log({"custom/success_rate": 0.5})`,\n`trainer.run.log(...)`).\nThis page is generated: `python -m rlhf_ppo.runtime.logs.metrics > docs/metrics.md`.\n\n'
        f"| metric | meaning |\n|---|---|\n{rows}\n"
    )


class MetricAverage:
    """Weighted means over a whole update, kept as tensors so that the device is synchronised only at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Add means over ``weight`` actions; keys that begin with ``max_`` keep their largest value instead."""
        for key, value in values.items():
            value = value.detach()
            if key.startswith("max_"):
                self._maxima[key] = value if key not in self._maxima else torch.maximum(self._maxima[key], value)
            else:
                w = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value * w
                self._weights[key] = self._weights.get(key, torch.zeros_like(value)) + w

    def merge(self, other: MetricAverage, only_if: Tensor | None = None) -> None:
        """Add all that ``other`` holds, or nothing if ``only_if`` [] is False."""

        def kept(value: Tensor) -> Tensor:
            return value if only_if is None else torch.where(only_if, value, torch.zeros_like(value))

        for key, value in other._sums.items():
            self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + kept(value)
            self._weights[key] = self._weights.get(key, torch.zeros_like(value)) + kept(other._weights[key])
        self.add({key: kept(value) for key, value in other._maxima.items()}, weight=1)

    def packed(self) -> Tensor:
        """Return sums, weights and maxima as one tensor [k], in float64."""
        parts = [x for named in (self._sums, self._weights, self._maxima) for x in named.values()]
        return torch.stack([x.to(torch.float64) for x in parts]) if parts else torch.zeros(0, dtype=torch.float64)

    def combined(self, table: Tensor) -> MetricAverage:
        """Return the average over several processes, of which each packed one [processes, k] of the same keys."""
        average, rows = MetricAverage(), iter(table.T)
        average._sums = {key: next(rows).sum() for key in self._sums}
        average._weights = {key: next(rows).sum() for key in self._weights}
        average._maxima = {key: next(rows).amax() for key in self._maxima}
        return average

    def compute(self, prefix: str = "") -> dict[str, float]:
        """Return the averages and maxima so far as floats; NaN for a key of total weight 0."""
        named = {key: total / self._weights[key] for key, total in self._sums.items()} | self._maxima
        if not named:
            return {}
        # One transfer for all of them.
        numbers = torch.stack([x.to(exact_dtype(x.device)) for x in named.values()])
        return {prefix + key: value for key, value in zip(named, Reading(numbers).wait().tolist(), strict=True)}


if __name__ == "__main__":
    print(metrics_page(), end="")
