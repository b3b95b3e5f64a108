"""Token records: what PPO computed about each token of a few responses, and all responses in a line each, in parquet.

A recorded rollout is a file of its own in ``tokens/`` and ``responses/``, named after its iteration: a run that resumes
or rolls back writes it again instead of twice.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import kl_estimate
from rlhf_ppo.generation.repetition import repeated_fraction
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.logs.tables import TOKENS, write_table
from rlhf_ppo.training.experience import Estimates
from rlhf_ppo.training.reports.explain import explain_estimates, logprobs_now, token_pieces
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState

RECORDS_PER_RUN = 20
"""About how many rollouts of a run are recorded, unless a setting says otherwise."""


def is_recorded(args: RLHFConfig, iteration: int) -> bool:
    """Whether this iteration's rollout is recorded: the first, every ``record_tokens_every``-th and the last."""
    every = args.record_tokens_every
    if every is None:
        every = -(-args.num_rollouts // RECORDS_PER_RUN)
    return every > 0 and (iteration % every == 0 or iteration in (1, args.num_rollouts))


def record_tokens(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates, config: RLHFConfig) -> None:
    """Record the rollout of the update that was just made, if it is due; a failure ends no run.

    Args:
        state: after the update.
        run: with several processes, the first one writes.
        rollout: scored, with reference log-probs.
        estimates: what the update learned from.
        config: the objective that it used.
    """
    if not is_recorded(run.args, state.iteration):
        return
    rows = range(min(run.args.samples_per_rollout, len(rollout.prompts)))
    together = run.plan.sharding is not None  # processes that share the weights: the others wait for this one
    try:
        now = _logprobs_now(state, run, rollout, rows) if (run.folder.writes or together) and rows else None
        together = False
        if not run.folder.writes:
            return
        write_table(run.folder.path, "responses", state.iteration, _responses(rollout))
        if now is not None:
            tokens = _tokens(run, rollout, estimates, config, rows, now)
            write_table(run.folder.path, "tokens", state.iteration, tokens)
    except Exception as error:  # whatever it is, the update is made
        if together:
            raise
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        warnings.warn(f"the tokens of rollout {state.iteration} are not recorded: {said}", stacklevel=2)


def _responses(rollout: Rollout) -> dict[str, list[Any]]:
    assert rollout.scores is not None and rollout.scored is not None and rollout.ref_logprobs is not None
    scores = zip(rollout.scores.tolist(), rollout.scored.tolist(), strict=True)
    return {
        "response": list(range(len(rollout.prompts))),
        "score": [score if scored else None for score, scored in scores],
        "tokens": rollout.lengths.tolist(),
        "finished": rollout.finished.tolist(),
        "kl": kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).tolist(),
        "repeated": repeated_fraction(rollout.response_ids, rollout.mask).tolist(),
    }


def _logprobs_now(state: TrainState, run: Run, rollout: Rollout, rows: range) -> Tensor:
    passes = run.microbatches(state.model, rollout, rows)
    return logprobs_now(state.model, rollout, passes, temperature=run.args.temperature, bf16=run.bf16)


def _tokens(
    run: Run, rollout: Rollout, estimates: Estimates, config: RLHFConfig, rows: range, now: Tensor
) -> dict[str, list[Any]]:
    assert rollout.ref_logprobs is not None
    args, index = run.args, list(rows)
    pieces = token_pieces(run.tokenizer, rollout, index)
    given = {"objective": config, "new_logprobs": now, "rows": index}
    explained = explain_estimates(rollout, estimates, args, pieces, **given).rows
    facts = {
        "token": rollout.response_ids,
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "entropy": rollout.entropy,
    }
    lists = {name: x[index].tolist() for name, x in facts.items()}
    lists["text"] = pieces
    named = {"response": "sequence", "position": "step"}
    columns = {
        name: [row[named.get(name, name)] for row in explained] for name in TOKENS.keys() - lists.keys() - {"iteration"}
    }
    return columns | {name: [x[row["sequence"]][row["step"]] for row in explained] for name, x in lists.items()}
