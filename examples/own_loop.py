"""Use the core losses in your own loop, on a policy whose optimum is known in closed form.

A table of logits answers each of 4 prompts with 2 tokens out of 5. With a KL penalty of weight beta
the best policy is pi* ~ pi_ref * exp(score / beta), so the result of training can be checked.
What you will see: the KL-regularised reward climbing to its optimum within a few seconds on one core.
Run:  python examples/own_loop.py
"""

from __future__ import annotations

import argparse

import torch

from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    compute_gae,
    entropy_from_logits,
    kl_estimate,
    kl_penalized_rewards,
    masked_whiten,
    minibatch_indices,
    ppo_loss,
    token_logprobs,
)

PROMPTS, VOCABULARY, BETA = 4, 5, 0.2


class Table(torch.nn.Module):
    """A policy of logits: first token given the prompt, second given prompt and first token; values likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(PROMPTS, VOCABULARY + 1, VOCABULARY))
        self.values = torch.nn.Parameter(torch.zeros(PROMPTS, VOCABULARY + 1))

    def forward(self, prompts: torch.Tensor, tokens: torch.Tensor) -> PolicyOutput:
        """Return [B, 2] each for prompts [B], tokens [B, 2]. State 0: no token yet; state 1 + i: token i sampled."""
        state = torch.stack([torch.zeros_like(prompts), 1 + tokens[:, 0]], dim=1)
        logits = self.logits[prompts[:, None], state]
        return PolicyOutput(
            token_logprobs(logits, tokens), self.values[prompts[:, None], state], entropy_from_logits(logits)
        )


@torch.no_grad()
def sample(policy: Table, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample [B, 2] tokens from the policy."""
    first = policy.logits[prompts, 0].softmax(-1).multinomial(1, generator=generator).squeeze(1)
    second = policy.logits[prompts, 1 + first].softmax(-1).multinomial(1, generator=generator).squeeze(1)
    return torch.stack([first, second], dim=1)


def regularised_reward(policy: Table, reference: Table, scores: torch.Tensor) -> tuple[float, float]:
    """Return E[score] - beta * KL, exact over all 25 responses and averaged over prompts, and its maximum."""
    every = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    now, best = 0.0, 0.0
    with torch.no_grad():
        for prompt in range(PROMPTS):
            row = torch.full((len(every),), prompt)
            log_p = policy(row, every).logprobs.sum(1)
            log_ref = reference(row, every).logprobs.sum(1)
            score = scores[prompt].flatten()
            now += float((log_p.exp() * (score - BETA * (log_p - log_ref))).sum())
            best += float(BETA * torch.logsumexp(log_ref + score / BETA, dim=0))
    return now / PROMPTS, best / PROMPTS


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=150, help="rollouts to train on")
    flags = parser.parse_args(argv)

    torch.set_num_threads(1)  # a second thread only slows a table this small
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(PROMPTS, VOCABULARY, VOCABULARY, generator=generator)  # score of each response
    policy, reference = Table(), Table()
    config = PPOConfig(num_epochs=4, num_minibatches=4, vf_coef=1.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=flags.iterations)

    for iteration in range(flags.iterations):
        # collect
        prompts = torch.randint(PROMPTS, (256,), generator=generator)
        tokens = sample(policy, prompts, generator)
        with torch.no_grad():
            recorded, ref = policy(prompts, tokens), reference(prompts, tokens)
        values = recorded.values
        assert values is not None
        # score and estimate
        mask = torch.ones_like(tokens, dtype=torch.bool)
        kl = kl_estimate(recorded.logprobs, ref.logprobs)
        rewards = kl_penalized_rewards(scores[prompts, tokens[:, 0], tokens[:, 1]], kl, mask, kl_coef=BETA)
        next_values = torch.stack([values[:, 1], torch.zeros_like(values[:, 1])], dim=1)
        terminated = torch.tensor([False, True]).expand_as(mask)
        advantages, returns = compute_gae(
            rewards, values, next_values, terminated, torch.zeros_like(mask), gamma=1.0, gae_lambda=0.95
        )
        old = Experience(recorded.logprobs, values, masked_whiten(advantages, mask), returns, mask)
        # update
        for _ in range(config.num_epochs):
            for rows in minibatch_indices(len(prompts), config.num_minibatches, generator=generator):
                loss = ppo_loss(policy(prompts[rows], tokens[rows]), old[rows], config)
                optimizer.zero_grad()
                loss.total.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                optimizer.step()
        schedule.step()
        if iteration % 25 == 0:
            print(
                f"iteration {iteration:4d}  E[score] - beta KL = {regularised_reward(policy, reference, scores)[0]:.4f}"
            )

    now, best = regularised_reward(policy, reference, scores)
    print(f"learned {now:.4f}, optimum {best:.4f}")
    return now, best


if __name__ == "__main__":
    main()
