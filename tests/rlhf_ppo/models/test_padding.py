"""Padding is known by masks alone: its amount, its content and the pad id change no log-prob and no value."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import position_ids

ARCHITECTURES = ["gpt2", "llama", "qwen2", "gpt_neox", "opt", "bloom"]
CPU = torch.device("cpu")


def pad_more(ids: torch.Tensor, mask: torch.Tensor, by: int, content: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = ids.shape[0]
    more_ids = torch.cat([torch.full((rows, by), content), ids], dim=1)
    return more_ids, torch.cat([torch.zeros(rows, by, dtype=torch.bool), mask], dim=1)


@pytest.fixture
def batch():
    """Prompts of 1, 3 and 5 tokens; responses of 4, 1 and 2."""
    ids, mask = left_pad([[7], [3, 0, 5], [9, 8, 7, 6, 5]], CPU)
    responses = torch.tensor([[3, 4, 5, 6], [0, 0, 0, 0], [11, 0, 0, 0]])
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    return ids, mask, responses, response_mask


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_more_left_padding_changes_nothing(make_model, wake_critic, batch, kind):
    model = ActorCritic(make_model(kind))
    wake_critic(model)
    ids, mask, responses, response_mask = batch
    with torch.no_grad():
        tight = model(ids, mask, responses, response_mask)
        wide = model(*pad_more(ids, mask, 7, content=0), responses, response_mask)
    assert tight.values is not None and wide.values is not None
    torch.testing.assert_close(wide.logprobs[response_mask], tight.logprobs[response_mask])
    torch.testing.assert_close(wide.values[response_mask], tight.values[response_mask])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_row_alone_equals_the_row_in_a_batch(make_model, wake_critic, batch, kind):
    model = ActorCritic(make_model(kind))
    wake_critic(model)
    ids, mask, responses, response_mask = batch
    with torch.no_grad():
        together = model(ids, mask, responses, response_mask)
        for row in range(3):
            keep = response_mask[row]
            real = ids[row][mask[row]][None]
            alone = model(real, torch.ones_like(real).bool(), responses[row][keep][None], keep[keep][None])
            torch.testing.assert_close(together.logprobs[row][keep], alone.logprobs[0])
            torch.testing.assert_close(together.values[row][keep], alone.values[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_fault_4_what_lies_in_the_padding_is_never_read(make_model, batch, kind):
    """Any id may fill it: masks are not derived from ids, so a pad id inside a prompt is an ordinary token."""
    model = ActorCritic(make_model(kind))
    ids, mask, responses, response_mask = batch
    with torch.no_grad():
        before = model(ids, mask, responses, response_mask).logprobs[response_mask]
        filled = torch.where(mask, ids, torch.full_like(ids, 13))
        rest = torch.where(response_mask, responses, torch.full_like(responses, 21))
        after = model(filled, mask, rest, response_mask).logprobs[response_mask]
        # Row 1 holds the pad id 0 in its prompt; another id there is another prompt.
        other = torch.where((ids == 0) & mask, torch.full_like(ids, 13), ids)
        changed = model(other, mask, responses, response_mask).logprobs
    torch.testing.assert_close(after, before)
    assert not torch.allclose(changed[1, 0], before[4])


def test_a_pad_token_on_the_tokenizer_changes_nothing(make_trainer, tokenizer, prompts):
    """Faults 3 and 4: none, one of its own, or end of text; padding on either side; prompts that contain it."""
    rows = [f"{prompt}." for prompt in prompts]
    results = []
    for pad, side in ((None, "left"), (".", "right"), ("<|endoftext|>", "right")):
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        trainer = make_trainer()
        rollout = trainer.rollout(rows)
        metrics = trainer.step(rollout)
        results.append((rollout, metrics, [p.detach().clone() for p in trainer.model.parameters()]))
        assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, side)
    for rollout, metrics, weights in results[1:]:
        assert torch.equal(rollout.prompt_mask, results[0][0].prompt_mask)
        assert torch.equal(rollout.response_ids, results[0][0].response_ids)
        assert metrics == results[0][1]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][2], strict=True))


def test_prompts_are_padded_on_the_left_and_keep_every_id():
    ids, mask = left_pad([[0, 5], [4, 0, 6]], CPU)
    assert ids.tolist() == [[0, 0, 5], [4, 0, 6]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 1, 1]]
    # Positions count real tokens only.
    assert position_ids(mask).tolist() == [[0, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_values_while_decoding_equal_a_full_forward(make_model, wake_critic, kind, temperature):
    """With a cache, left-padded prompts and rows that stop at different times."""
    model = ActorCritic(make_model(kind, vocab_size=8))
    wake_critic(model)
    prompt_ids, prompt_mask = left_pad([[1], [2, 3, 4], [5, 6], [7, 1, 2, 3, 4]] * 4, CPU)
    ids, mask, finished, logprobs, entropy, values, _ = sample_responses(
        model,
        prompt_ids,
        prompt_mask,
        SamplingParams(max_new_tokens=8, temperature=temperature, stop_token_ids=(0,)),
        generator=torch.Generator().manual_seed(2),
    )
    assert int(finished.sum()) > 0 and mask.sum(dim=1).unique().numel() > 2
    with torch.no_grad():
        full = model(prompt_ids, prompt_mask, ids, mask, temperature=temperature)
    assert values is not None and full.values is not None
    # Two paths through the model: float32 rounding of about 1e-6 on sums over 16 features.
    torch.testing.assert_close(logprobs[mask], full.logprobs[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(values[mask], full.values[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[mask], full.entropy[mask], atol=1e-5, rtol=1e-5)
    assert (entropy[~mask] == 0).all() and (logprobs[~mask] == 0).all() and (values[~mask] == 0).all()


def test_a_real_llama_with_grouped_query_attention(real_data, wake_critic):
    from transformers import AutoModelForCausalLM

    folder = real_data / "models/stories260K-hf-fp32"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    model = ActorCritic(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    wake_critic(model)
    prompt_ids, prompt_mask = left_pad([[1, 403, 407], [1, 403], [1]], CPU)
    params = SamplingParams(max_new_tokens=12, temperature=0.8, stop_token_ids=(2,))
    generator = torch.Generator().manual_seed(0)
    ids, mask, _, logprobs, *_ = sample_responses(model, prompt_ids, prompt_mask, params, generator=generator)
    with torch.no_grad():
        wide = model(*pad_more(prompt_ids, prompt_mask, 5, content=2), ids, mask, temperature=0.8)
    # Cached decoding and one forward pass round differently: about 1e-6 a logit, and logits reach 20.
    torch.testing.assert_close(logprobs[mask], wide.logprobs[mask], atol=1e-4, rtol=0)
