"""Decoding samples from exactly softmax(logits / temperature), records it, and ends where it should."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.models.actor_critic import ActorCritic


def chi_square_bound(freedom: int) -> float:
    """The value that chi-square passes with probability 1e-4 (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_match_the_models_softmax_whatever_its_generation_config_says(make_model, temperature):
    """Pairs of tokens over a vocabulary of 6: 36 cells, so a repetition penalty would show too."""
    model = make_model(vocab_size=6)
    model.generation_config.update(top_k=2, top_p=0.3, repetition_penalty=5.0, temperature=0.1, do_sample=True)
    model.eval()
    n, prompt = 20_000, torch.tensor([[1, 2]])
    ids, mask, *_ = sample_responses(
        ActorCritic(model),
        prompt.expand(n, 2),
        torch.ones(n, 2, dtype=torch.bool),
        SamplingParams(max_new_tokens=2, temperature=temperature),
        generator=torch.Generator().manual_seed(0),
    )
    assert mask.all()
    with torch.no_grad():
        first = model(prompt).logits[0, -1].div(temperature).softmax(-1)
        after = torch.cat([prompt.expand(6, 2), torch.arange(6)[:, None]], dim=1)
        second = model(after).logits[:, -1].div(temperature).softmax(-1)
    expected = (first[:, None] * second).flatten() * n
    counts = torch.bincount(ids[:, 0] * 6 + ids[:, 1], minlength=36)
    common = expected >= 5  # the chi-square approximation needs 5 expected counts a cell; the rest share one cell
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None] + 1e-9])
    assert chi_square(counts, expected) < chi_square_bound(len(expected) - 1)


def test_frequencies_match_the_distribution_without_the_stop_tokens(make_model):
    """Chi-square over the pairs of a vocabulary of 6, of which ids 1 and 4 are banned at the first token only."""
    model = make_model(vocab_size=6).eval()
    n, prompt = 20_000, torch.tensor([[1, 2]])
    sampled = sample_responses(
        ActorCritic(model),
        prompt.expand(n, 2),
        torch.ones(n, 2, dtype=torch.bool),
        SamplingParams(max_new_tokens=2, min_new_tokens=1, temperature=0.8, stop_token_ids=(1, 4)),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits = model(prompt).logits[0, -1] / 0.8
        after = torch.cat([prompt.expand(6, 2), torch.arange(6)[:, None]], dim=1)
        second = model(after).logits[:, -1].div(0.8).softmax(-1)
    first = logits.softmax(-1)
    first[[1, 4]] = 0
    first = first / first.sum()
    expected = (first[:, None] * second).flatten() * n
    counts = torch.bincount(sampled.response_ids[:, 0] * 6 + sampled.response_ids[:, 1], minlength=36)
    assert counts.view(6, 6)[[1, 4]].sum() == 0
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None] + 1e-9])
    assert chi_square(counts, expected) < chi_square_bound(len(expected) - 1)


def test_eos_first_eos_at_the_limit_and_eos_never(make_trainer, script, prompts):
    """Faults 4 and 5, golden: responses of 4 tokens at most, end of text is id 0."""
    trainer = make_trainer(max_new_tokens=4, rollout_batch_size=4, reward_funcs=lambda p, c, **_: [1.0, 2.0, 3.0, 4.0])
    script([[0, 9, 9, 9], [5, 6, 7, 0], [5, 6, 7, 8], [5, 0, 0, 9]])
    rollout = trainer.rollout(prompts[:4])
    assert rollout.mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert rollout.finished.tolist() == [True, True, False, True]
    assert rollout.lengths.tolist() == [1, 4, 4, 2]
    # What finished rows still drew while others went on is not recorded.
    assert rollout.response_ids.tolist() == [[0, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8], [5, 0, 0, 0]]
    assert rollout.completions == ["", "cde", "cdef", "c"]
    metrics = trainer.step(rollout)
    assert metrics["response/eos_fraction"] == pytest.approx(3 / 4)
    assert metrics["response/length_tokens"] == pytest.approx(11 / 4)
    assert all(math.isfinite(value) for value in metrics.values())


def test_fault_5_every_response_is_one_token(make_trainer, script, prompts):
    """The loop ends as soon as no row goes on, and the loss of length-1 responses is finite."""
    trainer = make_trainer(max_new_tokens=4)
    script([[0] * 4] * 8)
    rollout = trainer.rollout(prompts)
    assert rollout.mask.shape == (8, 1)
    metrics = trainer.step(rollout)
    assert metrics["response/length_tokens"] == 1
    assert all(math.isfinite(value) for value in metrics.values())


def test_custom_stop_tokens_end_a_response(make_trainer, script, prompts):
    trainer = make_trainer(max_new_tokens=3, rollout_batch_size=2, stop_token_ids=(7, 8))
    script([[5, 0, 7], [8, 5, 5]])
    rollout = trainer.rollout(prompts[:2])
    assert rollout.mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rollout.finished.tolist() == [True, True]


def test_sampled_ids_are_trained_whatever_their_text_would_tokenise_to(make_trainer, make_model):
    """A byte-pair tokenizer reads most random token sequences back as other tokens."""
    from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer

    pairs = train_tokenizer(["the cat sat on the mat with the hat"] * 50, 280, 64)
    trainer = make_trainer(
        model=make_model(vocab_size=len(pairs)),
        processing_class=pairs,
        reward_funcs=lambda prompts, completions, **_: [float(len(text)) for text in completions],
        train_dataset=[{"prompt": "the cat"}],
    )
    rollout = trainer.rollout(["the cat"] * 8)
    again = [pairs(text)["input_ids"] for text in rollout.completions]
    assert again != [ids[keep].tolist() for ids, keep in zip(rollout.response_ids, rollout.mask, strict=True)]
    trained: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: trained.extend(ids[keep] for ids, keep in zip(inputs[2], inputs[3], strict=True))
    )
    trainer.step(rollout)
    sampled = {tuple(ids[keep].tolist()) for ids, keep in zip(rollout.response_ids, rollout.mask, strict=True)}
    assert {tuple(ids.tolist()) for ids in trained} == sampled
    assert len(trained) == 8 * trainer.args.num_epochs
