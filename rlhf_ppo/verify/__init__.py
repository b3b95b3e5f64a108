"""Verify: evidence, on your own model, data and settings, or your own loss, that training is computed right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_ppo.core.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_ppo.verify.loss_checks import check_loss
    from rlhf_ppo.verify.report import Report
    from rlhf_ppo.verify.verify import verify_training

__all__ = ["Report", "check_loss", "verify_training"]

# check_loss loads torch alone.
__getattr__ = lazy_names(
    __name__,
    {
        "Report": "rlhf_ppo.verify.report",
        "check_loss": "rlhf_ppo.verify.loss_checks",
        "verify_training": "rlhf_ppo.verify.verify",
    },
)


def __dir__() -> list[str]:
    return __all__
