"""Publish: give the vLLM server the policy as it is before it samples; and compare its log-probs with ours."""

from __future__ import annotations

from contextlib import suppress

from rlhf_ppo.core import masked_mean
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.generation.vllm.server import VLLMError
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.models.sharded.skeleton import whole_copy
from rlhf_ppo.training.checkpoints.fingerprints import parameters_fingerprint
from rlhf_ppo.training.run import Run


def publish(run: Run, model: ActorCritic) -> None:
    """Give the server the policy as it is, unless it has that one already; nothing under another engine.

    Raises:
        VLLMError: it does not take it.
    """
    engine = run.engine
    if engine is None:
        return
    digest = parameters_fingerprint((n, p) for n, p in model.policy.named_parameters() if p.requires_grad)
    if digest == engine.digest:
        return
    run.processes.facts(engine.wait)  # each process samples in a thread of its own
    with whole_copy(model, keep=run.processes.first) as whole, without_library_bars():
        run.processes.on_first(lambda: engine.publish(whole.policy, digest, run.base))
    engine.use(digest, adapter=hasattr(model.policy, "peft_config"))


def withdraw(run: Run) -> None:
    """Leave the server as it was found, however a run ends: without the policy's adapter."""
    engine = run.engine
    if engine is not None:
        with suppress(VLLMError):  # the run has what it wanted, or an error that says more
            engine.withdraw(first=run.processes.first)


def require_small_gap(run: Run, rollout: Rollout) -> None:
    """Raise a VLLMError if the server's log-probs of a rollout are too far from ours (``max_sampler_gap``)."""
    if run.engine is None or rollout.sampled_logprobs is None:
        return
    gap = float(masked_mean((rollout.logprobs - rollout.sampled_logprobs).abs(), rollout.mask))
    bound = run.args.sampler_gap_bound
    if not gap <= bound:
        raise VLLMError(
            f"vLLM server {run.engine.server.name}: its log-probs of this rollout are {gap:.3g} nats per token from "
            f"ours, above max_sampler_gap={bound}. Usual causes: it has another adapter or other weights than the "
            "policy's, or a coarser --dtype (raise the bound)"
        )
