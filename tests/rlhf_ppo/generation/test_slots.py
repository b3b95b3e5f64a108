"""Slots and shared prompts: however many responses are decoded at once, each is the one that the plain loop samples."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import seeded
from torch import Tensor

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.data.detokenization import TextPieces, before_each
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.engines import StaticEngine, choose_engine, sample_with_refill
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.sampling import RowsOf
from rlhf_ppo.generation.slots import Pace
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.actor_critic import ActorCritic

STOPS = (0, 12, 16, 20)
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.7, stop_token_ids=STOPS)
ONE, TWO, LONG = [7], [3, 5], [9, 8, 7, 6, 5]
PROMPTS = [ONE, ONE, LONG, LONG, TWO, TWO, ONE, [4, 4, 4], LONG, TWO, [1, 2], LONG, ONE]
ENGINES = {
    "dynamic": partial(sample_with_refill, slots=4),
    "static": StaticEngine(compile_step=False, slots=4),
    "static, all at once": StaticEngine(compile_step=False),
    "static, looked at as on a GPU": StaticEngine(compile_step=False, slots=4, pace=Pace(3, waits=False)),
    "static, more slots than prompts": StaticEngine(compile_step=False, slots=16),
    "chunks": partial(sample_responses, at_once=4),
}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return left_pad(PROMPTS, torch.device("cpu"))


def assert_same(found: SampledResponses, expected: SampledResponses) -> None:
    for name in ("response_ids", "mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert (found.banned is None) == (expected.banned is None)
    assert expected.banned is None or torch.equal(found.banned.where, expected.banned.where)


def lanes(model: ActorCritic, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note (rows, tokens each) of every forward pass of the policy from now on."""
    seen: list[tuple[int, int]] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda ids, *rest: seen.append(tuple(ids.shape)) or decode(ids, *rest))
    return seen


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_the_same_draws_give_the_same_responses(make, batch, kind, name):
    model = make(kind)
    for seed, limits in ((3, {}), (4, {"min_new_tokens": 4}), (5, {"max_new_tokens": 1})):
        params = SamplingParams(**{**vars(PARAMS), **limits})
        plain = sample_responses(model, *batch, params, generator=seeded(seed))
        assert_same(ENGINES[name](model, *batch, params, generator=seeded(seed)), plain)
        assert limits.get("max_new_tokens") == 1 or len(plain.mask.sum(dim=1).unique()) > 3


@pytest.mark.parametrize("name", ENGINES)
def test_some_rows_of_a_rollout_get_its_draws(make, batch, name):
    model, rows = make(), [2, 3, 7, 8, 11]
    whole = sample_responses(model, *batch, PARAMS, generator=seeded())
    some = ENGINES[name](
        model, batch[0][rows], batch[1][rows], PARAMS, generator=seeded(), whole=RowsOf(rows, len(PROMPTS))
    )
    width = some.mask.shape[1]
    assert torch.equal(some.response_ids, whole.response_ids[rows, :width]) and not whole.mask[rows, width:].any()


@pytest.mark.parametrize("name", ["dynamic", "chunks"])
def test_stop_strings_are_found_in_slots(make, batch, tokenizer, name):
    model, pieces = make(), TextPieces(tokenizer)
    params = SamplingParams(max_new_tokens=12, stop_strings=("a", "e", "u"))

    def detector() -> StopStringDetector:
        return StopStringDetector(pieces, params.stop_strings, before_each(pieces, ["x"] * len(PROMPTS), *batch))

    plain = sample_responses(model, *batch, params, generator=seeded(), stop_detector=detector())
    assert plain.finished.any() and plain.mask.sum(dim=1).min() < 6
    assert_same(ENGINES[name](model, *batch, params, generator=seeded(), stop_detector=detector()), plain)


def test_no_token_is_read_beyond_the_context(make):
    """GPT-2 has 64 positions: a response that has ended, but was not looked at yet, must not go on to the 65th."""
    model, engine = make(), StaticEngine(compile_step=False, slots=2, pace=Pace(3, waits=False))
    batch = left_pad([[token] * 57 for token in range(8)], torch.device("cpu"))
    params = SamplingParams(max_new_tokens=8, stop_token_ids=STOPS)  # 57 + 8 - 1 tokens are read
    plain = sample_responses(model, *batch, params, generator=seeded())
    assert_same(engine(model, *batch, params, generator=seeded()), plain)


def test_the_cache_holds_slots_and_a_prompt_takes_the_next_free_one(make, batch, monkeypatch):
    model, engine = make(), StaticEngine(compile_step=False, slots=3)
    seen = lanes(model, monkeypatch)
    sampled = engine(model, *batch, PARAMS, generator=seeded())
    assert engine._fixed is not None and engine._fixed.cache.layers[0].keys.shape[:3] == (3, 2, 64)
    steps = [rows for rows, tokens in seen if tokens == 1 and rows == 3]
    ideal = int(sampled.mask.sum()) - len(PROMPTS)  # the first token of each comes from its prompt's pass
    # Slots idle only at the end, for no longer than a response is.
    assert ideal <= sum(steps) <= ideal + 2 * PARAMS.max_new_tokens


def test_nothing_of_an_earlier_response_is_left_in_its_slot(make, batch):
    """Not even what is non-finite: 0 times infinity is no number."""
    model, engine = make(), StaticEngine(compile_step=False, slots=3)
    first = engine(model, *batch, PARAMS, generator=seeded())
    assert engine._fixed is not None
    for layer in engine._fixed.cache.layers:
        layer.values.fill_(math.inf)
    assert_same(engine(model, *batch, PARAMS, generator=seeded()), first)


@pytest.mark.parametrize("waits", [False, True])
def test_steps_after_the_end_are_bounded(make, waits, monkeypatch):
    """One slot, so that each of its steps belongs to the response in it; every response ends at its first token."""
    model, pace = make(), Pace(4, waits=waits)
    engine = StaticEngine(compile_step=False, slots=1, pace=pace)
    batch = left_pad([ONE] * 5, torch.device("cpu"))
    seen = lanes(model, monkeypatch)
    every = SamplingParams(max_new_tokens=40, stop_token_ids=tuple(range(30)))
    sampled = engine(model, *batch, every, generator=seeded())
    assert sampled.mask.sum(dim=1).tolist() == [1] * 5
    # The end is known to the look that is taken before the first steps.
    assert len(seen) == 5 + 5 * 4 <= 5 + 5 * (2 * 4 - 1)


def test_a_window_cannot_be_refilled_and_is_decoded_in_chunks(make, batch, monkeypatch):
    model = make("mistral")
    engine = choose_engine(RolloutSettings(decode_batch_size=4), model)
    seen = lanes(model, monkeypatch)
    plain = sample_responses(model, *batch, PARAMS, generator=seeded())
    seen.clear()
    assert_same(engine(model, *batch, PARAMS, generator=seeded()), plain)
    assert max(rows for rows, _ in seen) == 4 and sum(tokens > 1 for _, tokens in seen) == 4
    with pytest.raises(ValueError, match=r"'static' does not work with model=MistralForCausalLM: .* use generation="):
        choose_engine(RolloutSettings(generation="static"), model)


def test_a_window_that_no_sequence_fills_is_no_window(make, batch, monkeypatch):
    """As Mistral's of 4,096 tokens is none to most runs; a longer prompt takes the ordinary loop."""
    model = make("mistral")
    model.runner.config.sliding_window = 64
    sizes = RolloutSettings(decode_batch_size=4), RolloutSettings(decode_batch_size=4, generation="static")
    for engine in (choose_engine(size, model) for size in sizes):
        plain = sample_responses(model, *batch, PARAMS, generator=seeded())
        seen = lanes(model, monkeypatch)
        assert_same(engine(model, *batch, PARAMS, generator=seeded()), plain)
        assert sum(tokens > 1 for _, tokens in seen) > 4  # prompts are read whenever a slot is free
        longer = left_pad([[5] * 60, [6] * 52, [7] * 3, [8] * 9, [9] * 5], torch.device("cpu"))
        plain = sample_responses(model, *longer, PARAMS, generator=seeded())
        assert_same(engine(model, *longer, PARAMS, generator=seeded()), plain)


def test_equal_prompts_are_read_once(make, batch, monkeypatch):
    model = make()
    seen = lanes(model, monkeypatch)
    sample_responses(model, *batch, PARAMS, generator=seeded())
    assert seen[0] == (5, 5)  # of 13 prompts five are distinct
    seen.clear()
    monkeypatch.setattr(type(model.runner), "cache_shrinks", False)
    sample_responses(model, *batch, PARAMS, generator=seeded())
    assert seen[0] == (13, 5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2"])
def test_equal_prompts_give_what_each_gives_alone(make, batch, kind, monkeypatch):
    model = make(kind)
    shared = sample_responses(model, *batch, PARAMS, generator=seeded())
    monkeypatch.setattr(type(model.runner), "cache_shrinks", False)
    assert_same(shared, sample_responses(model, *batch, PARAMS, generator=seeded()))


def test_padding_does_not_make_prompts_equal(make):
    """A prompt whose first token is the padding's id 0 is another one."""
    ids, mask = left_pad([[0, 5], [5]], torch.device("cpu"))
    assert ids[0].tolist() == ids[1].tolist()
    sampled = sample_responses(make(), ids, mask, PARAMS, generator=seeded())
    assert not torch.allclose(sampled.entropy[0, 0], sampled.entropy[1, 0])


# Runs


@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 4},
        {"generation": "static"},
        {"stop_strings": ("a",), "min_new_tokens": 2},
        {"max_turns": 2, "respond": lambda messages: "go on"},
        {"critic": "separate"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_run_trains_on_the_same_responses_whatever_the_batch(make_trainer, make_model, settings):
    """With the first ratio at 1: values, log-probs and tokens were recorded in the right rows."""
    separate = {"value_model": make_model(seed=7)} if settings.get("critic") == "separate" else {}
    few, all_of_them = (
        make_trainer(decode_batch_size=size, max_initial_log_ratio=1e-4, **settings, **separate) for size in (3, None)
    )
    prompts = [prompt for prompt in ("once upon", "the cat") for _ in range(4)]
    rollouts = [trainer.rollout(prompts) for trainer in (few, all_of_them)]
    assert torch.equal(rollouts[0].response_ids, rollouts[1].response_ids)
    assert rollouts[0].completions == rollouts[1].completions
    torch.testing.assert_close(rollouts[0].values, rollouts[1].values, atol=1e-5, rtol=1e-5)
    few.step(rollouts[0])


def test_a_batch_of_no_response_is_refused():
    with pytest.raises(ValueError, match=r"decode_batch_size.*1 or more.*0"):
        RolloutSettings(decode_batch_size=0)
