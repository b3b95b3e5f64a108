"""The metric dictionary: every number a run writes, what it means and in which unit; nothing else is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

# Averages run over all real actions (or responses) of the whole update; padding never counts.
METRICS: dict[str, str] = {
    "progress/iteration": "Rollouts trained on so far.",
    "progress/episodes": "Responses generated for training so far.",
    "progress/env_steps": "Environment steps taken so far, autoreset steps left out.",
    "progress/optimizer_steps": "Optimizer steps so far.",
    "score/mean": "Mean score of the rollout's responses, as the reward functions gave it (weighted sum), before any penalty.",
    "score/std": "Standard deviation of the scores over the rollout.",
    "score/unscored_fraction": "Share of responses whose score was None (or was dropped as not finite).",
    "score/part/*": "Mean score of one reward function, before its weight; * is the function's name.",
    "score/shaped_mean": "Mean score as it is learned from: normalised, scaled, clipped and penalised as the settings say.",
    "score/shaped_std": "Standard deviation of those scores.",
    "score/clipped_fraction": "Share of responses whose score met score_clip.",
    "score/cache_hit_fraction": "cache_rewards: share of the rollout's scores that were known already.",
    "score/running_mean/*": "normalize_scores: mean of one reward function's scores so far; * is the function's name.",
    "score/running_std/*": "normalize_scores: their standard deviation.",
    "reward/mean_per_response": "Mean over responses of the summed per-token rewards: score and penalties minus the KL cost.",
    "kl/reference_nats_per_response": "KL to the frozen reference: k1 summed over each response, mean over responses, in nats.",
    "kl/coef": "Weight of the KL penalty during this rollout.",
    "kl/loss": "The KL to the reference as a loss term (with kl_loss_coef), before its weight.",
    "response/length_tokens": "Mean response length in tokens, the stop token included; of conversations, the policy's tokens alone.",
    "response/eos_fraction": "Share of responses whose (last) turn ended with a stop token or string instead of the length limit.",
    "response/turns": "Mean number of the policy's turns in a conversation (with max_turns above 1).",
    "response/context_full_fraction": "Share of conversations that ended because the model's context had no room for another turn.",
    "episode/return_mean": "Mean undiscounted return of the last 100 finished training episodes.",
    "episode/length_mean": "Mean length in steps of the last 100 finished training episodes.",
    "episode/count": "Training episodes finished so far.",
    "policy/loss": "Policy loss.",
    "policy/approx_kl": "KL(old || new) per action in nats, estimated by k3: (r - 1) - log r.",
    "policy/clip_fraction": "Share of actions whose gradient the clip killed: A > 0 with r > 1 + eps_high, or A < 0 with r < 1 - eps "
    "(cispo: whose weight r was capped). "
    "Often 0.01 to 0.3; near 0 the steps are small (or the learning rate is), far above it the update outruns its data.",
    "policy/out_of_range_fraction": "Share of actions with the ratio outside the clip range, whatever the sign of A.",
    "policy/ratio_mean": "Mean probability ratio new/old; stays close to 1.",
    "policy/max_abs_log_ratio": "Largest |log(new/old)| of any action, in nats.",
    "policy/overflow_fraction": "Share of actions whose |log-ratio| passed 20 and was clamped; anything above 0 is a warning.",
    "policy/entropy": "Mean entropy of the action distribution, in nats per action (language models: of the distributions "
    "that the rollout's tokens were drawn from).",
    "policy/clip_range": "Clip range in force (it moves under objective=adaptive_clip).",
    "policy/penalty_beta": "Weight of KL(old || new) in force (it moves under objective=penalty).",
    "policy/first_minibatch_max_abs_log_ratio": "Largest |log-ratio| before the rollout's first optimizer step, in nats: "
    "0 up to rounding if sampling and training agree. The tripwire watches it.",
    "policy/decode_gap_max_nats": "Largest |log-prob while decoding - log-prob of a full forward pass| (with recompute_logprobs).",
    "policy/importance_weight_mean": "Mean weight pi_trainer / pi_sampler of the actions, after the cap (importance_weight_cap); "
    "near 1 unless sampler and trainer disagree.",
    "policy/importance_capped_fraction": "Share of actions whose importance weight reached the cap.",
    "value/loss": "Value loss: half the squared error of the critic.",
    "value/explained_variance": "Share of the returns' variance that the critic's values explain; 1 is perfect, 0 a constant.",
    "value/mean": "Mean value predicted at rollout.",
    "value/return_mean": "Mean of the returns that the critic learns.",
    "advantage/std": "Standard deviation of the advantages before whitening.",
    "optim/learning_rate": "Learning rate at the end of the update.",
    "optim/value_learning_rate": "The critic's learning rate at the end of the update, where it has one of its own.",
    "optim/grad_norm": "Mean global gradient norm before clipping.",
    "optim/skipped_steps": "Optimizer steps skipped because a loss or a gradient was not finite.",
    "optim/epochs": "Epochs run on this rollout (target_kl may stop early).",
    "eval/score_mean": "Mean raw score of sampled responses to the evaluation prompts.",
    "eval/score_std": "Standard deviation of those scores.",
    "eval/kl_nats_per_response": "KL to the reference on the evaluation prompts: k1 summed over a response, in nats.",
    "eval/reference_nats_per_token": "How surprised the reference is by the responses (its cross-entropy), in nats per token: "
    "fluency as the reference judges it; lower is more fluent.",
    "eval/length_tokens": "Mean response length on the evaluation prompts, in tokens.",
    "eval/eos_fraction": "Share of evaluation responses that ended with a stop token.",
    "eval/mean_return": "Mean undiscounted return of the evaluation episodes.",
    "eval/std_return": "Standard deviation of those returns.",
    "eval/mean_length": "Mean length in steps of the evaluation episodes.",
}


FAMILIES = {key.partition("/")[0] for key in METRICS}


def require_known_metrics(metrics: Mapping[str, float]) -> None:
    """Raise a KeyError for a key that is, or nearly is, of a family of the dictionary and not described there.

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
                f"metric {key!r} is not in the metric dictionary, docs/metrics.md{hint}; a number of your own needs a "
                f"family of its own, such as 'custom/{rest or family}'"
            )


def metrics_page() -> str:
    """The documentation page `docs/metrics.md`, made from the dictionary."""
    rows = "\n".join(f"| `{key}` | {meaning} |" for key, meaning in METRICS.items())
    return (
        "# Metrics\n\nEvery number that a run writes to `metrics.jsonl`. Averages run over all real actions of the whole"
        " update, padding left out.\nNumbers of your own go there, too, under any family that is not listed here"
        ' (`agent.log({"custom/success_rate": 0.5})`,\n`trainer.run.log(...)`).\nThis page is generated: `python -m rlhf_ppo.runtime.metrics > docs/metrics.md`.\n\n'
        f"| metric | meaning |\n|---|---|\n{rows}\n"
    )


class MetricAverage:
    """Weighted means over a whole update, kept as tensors so that nothing waits for the device until the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Add means over ``weight`` actions; a key that begins with ``max_`` keeps its largest value instead."""
        for key, value in values.items():
            value = value.detach()
            if key.startswith("max_"):
                self._maxima[key] = value if key not in self._maxima else torch.maximum(self._maxima[key], value)
            else:
                w = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value * w
                self._weights[key] = self._weights.get(key, torch.zeros_like(value)) + w

    def merge(self, other: MetricAverage, only_if: Tensor | None = None) -> None:
        """Add everything that ``other`` has seen, or nothing of it where ``only_if`` [] is False."""

        def kept(value: Tensor) -> Tensor:
            return value if only_if is None else torch.where(only_if, value, torch.zeros_like(value))

        for key, value in other._sums.items():
            self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + kept(value)
            self._weights[key] = self._weights.get(key, torch.zeros_like(value)) + kept(other._weights[key])
        self.add({key: kept(value) for key, value in other._maxima.items()}, weight=1)

    def compute(self, prefix: str = "") -> dict[str, float]:
        """The averages and maxima so far, as floats; NaN for a key that only ever had weight 0."""
        averages = {key: float(total / self._weights[key]) for key, total in self._sums.items()}
        return {prefix + key: value for key, value in {**averages, **_floats(self._maxima)}.items()}


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in tensors.items()}


if __name__ == "__main__":
    print(metrics_page(), end="")
