"""The Bradley-Terry loss of scores of chosen and rejected answers, and what it is measured by."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ppo.pipeline.evaluation.intervals import calibration


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Compute -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2 for scores [B] each: [B].

    Sources: Bradley and Terry (1952); the margin: Touvron et al., "Llama 2" (2023); the centering, which fixes the
    constant that the first term leaves open: Eisenstein et al., "Helping or Herding?" (2023).
    """
    return -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()


def preference_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Compute accuracy (ties count half), loss, expected calibration error and mean scores, from scores [N] each."""
    gap = chosen - rejected
    return {
        "accuracy": float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean()),
        "loss": float(bradley_terry_loss(chosen, rejected).mean()),
        "calibration_error": sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in calibration(gap))
        / len(gap),
        "chosen_score": float(chosen.mean()),
        "rejected_score": float(rejected.mean()),
    }
