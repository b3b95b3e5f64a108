"""Each shortcut of the model runner gives what the plain way gives, and is taken where it is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GPT2LMHeadModel

import rlhf_ppo.models.forward.runner
import rlhf_ppo.training.setup
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, ppo_loss
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import ModelRunner, Sequences, position_ids
from rlhf_ppo.models.reference import Reference

CPU = torch.device("cpu")
PATHS = {  # architecture -> (the output layer is applied chunk-wise, sequences are packed on CPU)
    "gpt2": (True, True),
    "llama": (True, True),
    "qwen2": (True, True),
    "gpt_neox": (True, True),
    "opt": (True, True),
    "gemma": (True, True),
    "bloom": (True, False),  # ALiBi biases instead of position ids
    "mistral": (True, False),  # a sliding window
    "gemma2": (False, False),  # caps on logits and scores, and a sliding window
}


def paths(runner: ModelRunner) -> tuple[bool, bool]:
    return runner.head is not None, runner.packs


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    """Sequences of 4, 4, 5, 6 and 8 inputs in another order; id 0, which also pads, lies inside prompts too."""
    prompts = [[9, 8, 7, 6, 5, 4], [7], [3, 0, 5], [0, 0, 4], [0, 12]]
    responses = [[11, 2, 0], [3, 4, 5, 0], [0], [6, 21, 8], [29, 5, 17, 10, 1]]
    ids, mask = left_pad(prompts, CPU)
    right, right_mask = left_pad([response[::-1] for response in responses], CPU)
    return ids, mask, right.flip(1), right_mask.flip(1)


def differing(x: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def experience(new: PolicyOutput, mask: torch.Tensor) -> Experience:
    """Facts near what the policy says, so that some ratios and values are clipped and some are not."""
    logprobs, values = new.logprobs.detach(), None if new.values is None else new.values.detach()
    near = None if values is None else differing(values, 1, 0.2)
    returns = None if values is None else differing(values, 2, 1.0)
    return Experience(differing(logprobs, 3, 0.2), near, differing(torch.zeros_like(logprobs), 4, 1.0), returns, mask)


CONFIG = PPOConfig(clip_range=0.2, clip_range_vf=0.2, vf_coef=0.1, ent_coef=0.05)


def assert_agree(fast: ActorCritic, plain: ActorCritic, batch: tuple[torch.Tensor, ...], temperature: float) -> None:
    """Log-probs, values, entropies, losses and the gradient of every parameter."""
    outputs = [model(*batch, temperature=temperature) for model in (fast, plain)]
    old = experience(outputs[1], batch[3])
    losses = [ppo_loss(output, old, CONFIG) for output in outputs]
    for name in ("logprobs", "values", "entropy"):
        a, b = (getattr(output, name) for output in outputs)
        assert (a is None) == (b is None), name
        if b is not None:
            # Products in another order: float32 rounding of about 1e-6 on log-probs of down to -20.
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert a.dtype == b.dtype and (a[~batch[3]] == 0).all()
    for a, b in zip(
        *((loss.total, loss.policy, loss.value, loss.entropy) for loss in losses),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    for loss in losses:
        loss.total.backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (fast, plain)]
    assert grads[0].keys() == grads[1].keys()
    largest = max(float(g.abs().max()) for g in grads[1].values() if g is not None)
    for name, expected in grads[1].items():
        got = grads[0][name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            # Sums over all tokens: their rounding is relative to the largest gradient, not to the sum itself.
            torch.testing.assert_close(
                got, expected, atol=2e-5 * max(largest, 1), rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture
def make_pair(make_model, wake_critic):
    """``make_pair(kind, separate=None, wrap=...)``: the same actor-critic with and without shortcuts."""

    def make(kind: str = "gpt2", separate: str | None = None, wrap: Any = lambda model: model) -> tuple[Any, Any]:
        pair = []
        for plain in (False, True):
            trunk = None if separate is None else make_model(separate, seed=7).base_model
            model = ActorCritic(wrap(make_model(kind)), value_trunk=trunk, plain=plain)
            wake_critic(model)
            pair.append(model)
        return pair[0], pair[1]

    return make


# Response tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", PATHS)
def test_a_shared_trunk_gives_the_plain_ways_numbers_and_gradients(make_pair, batch, kind, temperature):
    fast, plain = make_pair(kind)
    assert paths(fast.runner) == PATHS[kind]
    assert paths(plain.runner) == (False, False)
    assert_agree(fast, plain, batch, temperature)


@pytest.mark.parametrize("kind", PATHS)
def test_a_separate_critic_gives_the_plain_ways_numbers_and_gradients(make_pair, batch, kind):
    fast, plain = make_pair("gpt2", separate=kind)
    assert fast.value_runner.head is None and fast.value_runner.packs == PATHS[kind][1]
    assert_agree(fast, plain, batch, 0.7)
    assert any(p.grad is not None and p.grad.any() for p in fast.value_trunk.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_chunk_wise_head_on_padded_sequences(make_pair, batch, kind, monkeypatch):
    """As on a GPU in float32, where nothing is packed."""
    fast, plain = make_pair(kind)
    monkeypatch.setattr(ModelRunner, "packs_on", lambda self, device: False)
    assert_agree(fast, plain, batch, 0.7)


def test_weights_are_wide_enough_for_context_to_matter(make_model, batch):
    """A leak of one sequence into another, or a position off by one, moves log-probs by far more than the tolerance."""
    for kind in PATHS:
        model = make_model(kind).eval()
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            after = [model(ids).logits[0, -1], model(ids[:, 1:]).logits[0, -1]]
        assert (after[0].log_softmax(-1) - after[1].log_softmax(-1)).abs().max() > 1e-2, kind


class Sharpened(GPT2LMHeadModel):
    """A user's model that changes its logits, if not at once; written with named arguments."""

    factor = 1.0

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * self.factor
        return output


class Wrapped(GPT2LMHeadModel):
    """The same, passing on whatever it is given."""

    factor = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


class Placeless(GPT2LMHeadModel):
    """A user's model that counts places in the row, whatever positions it is given."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


def recast(cls: type) -> Any:
    def change(model: Any) -> Any:
        model.__class__ = cls
        return model

    return change


class Counted(TorchDispatchMode):
    """Counts the results with a column per token of the vocabulary that some operators return."""

    def __init__(self, vocabulary: int, *operators: Any) -> None:
        super().__init__()
        self.vocabulary, self.operators, self.count = vocabulary, operators, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in self.operators and result.shape[-1] == self.vocabulary
        return result


COPIED_INTO_ZEROS = (torch.ops.aten.select_backward, torch.ops.aten.slice_backward)


@pytest.mark.parametrize("packs", [True, False])
def test_the_gradient_of_a_users_own_logits_is_not_copied_into_zeros(make_model, batch, packs):
    model = recast(Wrapped)(make_model("gpt2"))
    runner = ModelRunner(model)
    runner.packs = packs
    with Counted(model.config.vocab_size, *COPIED_INTO_ZEROS) as scattered:
        outputs = runner.outputs(Sequences(*batch))
        assert outputs.logits is not None
        outputs.logits.sum().backward()
    assert scattered.count == 0
    with Counted(model.config.vocab_size, *COPIED_INTO_ZEROS) as scattered:  # it would be seen
        torch.zeros(1, 2, model.config.vocab_size, requires_grad=True)[0].sum().backward()
    assert scattered.count == 1


@pytest.mark.parametrize("bf16", [True, False])
def test_a_frozen_output_layer_is_not_copied_for_each_row(make_model, batch, bf16):
    model = recast(Wrapped)(make_model("gpt2")).requires_grad_(False)
    runner, vocabulary = ModelRunner(model), model.config.vocab_size
    runner.packs = False
    prompts, mask = batch[:2]  # a product of batches copies the weight for each of these
    with Counted(vocabulary, torch.ops.aten.bmm) as batched, computing(model, bf16=bf16):
        runner.decode_step(prompts, position_ids(mask), mask, runner.new_cache(16), hidden=False)
        runner.outputs(Sequences(*batch))
    assert batched.count == 0
    with Counted(vocabulary, torch.ops.aten.bmm) as batched:  # it would be seen
        torch.nn.functional.linear(torch.zeros(2, 3, 8)[:, 1:], torch.zeros(vocabulary, 8))
    assert batched.count == 1


@pytest.mark.parametrize("cls", [Sharpened, Wrapped])
def test_a_users_own_forward_is_always_run(make_pair, make_model, batch, cls, monkeypatch):
    """Its logits are used as they come, also packed; a trial run cannot tell what it will do to them."""
    fast, plain = make_pair(wrap=recast(cls))
    assert paths(fast.runner) == (False, True)
    monkeypatch.setattr(cls, "factor", 1.5)
    assert_agree(fast, plain, batch, 0.7)
    # logits * 1.5 at temperature 1.5 are the parent's logits at temperature 1.
    parent = ActorCritic(make_model())
    with torch.no_grad():
        torch.testing.assert_close(
            fast(*batch, temperature=1.5).logprobs, parent(*batch).logprobs, atol=2e-5, rtol=1e-5
        )


def test_a_model_that_does_not_heed_positions_is_not_packed(make_pair, batch):
    fast, plain = make_pair(wrap=recast(Placeless))
    assert paths(fast.runner) == (False, False)
    assert_agree(fast, plain, batch, 1.0)


def test_a_bias_on_the_output_layer(make_pair, batch):
    def biased(model: Any) -> Any:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 30))
        return model

    fast, plain = make_pair(wrap=biased)
    assert paths(fast.runner) == (True, True)
    assert_agree(fast, plain, batch, 0.7)
    prompt_ids, prompt_mask, sampled = decode(fast)
    with torch.no_grad():
        full = plain(prompt_ids, prompt_mask, sampled.response_ids, sampled.mask, temperature=0.8)
    torch.testing.assert_close(sampled.logprobs, full.logprobs, atol=5e-5, rtol=1e-5)


def test_a_hook_on_the_output_layer_is_seen(make_pair, batch):
    def hooked(model: Any) -> Any:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
        return model

    fast, plain = make_pair(wrap=hooked)
    assert fast.runner.head is None
    assert_agree(fast, plain, batch, 1.0)


def test_layers_that_see_a_part_of_the_context_are_not_packed(make_model):
    """Ten tokens show nothing of a chunk or window of thousands, but the config names the kinds of layers."""
    model = make_model("llama")
    assert ModelRunner(model).packs
    model.config.layer_types = ["full_attention", "full_attention"]
    assert ModelRunner(model).packs
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not ModelRunner(model).packs
    model.config.layer_types = None
    model.config.sliding_window = 4096
    assert not ModelRunner(model).packs


def lora(*targets: str, **settings: Any) -> Any:
    """A wrapper with adapters whose weights are not 0."""

    def wrap(model: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = LoraConfig(
                r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM", **settings
            )
            return get_peft_model(model, config)

    return wrap


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("kind", "wrap", "head"),
    [
        ("gpt2", lora("c_attn", "c_proj", fan_in_fan_out=True), True),
        ("llama", lora("q_proj", "v_proj", "down_proj"), True),
        ("llama", lora("q_proj", "lm_head"), False),
        ("qwen2", lora("q_proj", modules_to_save=["lm_head"]), False),
    ],
    ids=["gpt2", "llama", "an adapter on the head", "a trained copy of the head"],
)
def test_adapters(make_pair, batch, kind, wrap, head, temperature):
    fast, plain = make_pair(kind, wrap=wrap)
    assert paths(fast.runner) == (head, True)
    assert_agree(fast, plain, batch, temperature)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_reference_is_the_model_without_its_adapter(make_model, batch, kind):
    wrap = lora("c_attn", fan_in_fan_out=True) if kind == "gpt2" else lora("q_proj", "lm_head")
    policy = wrap(make_model(kind))
    reference = Reference(policy, None, adapter_off=True)
    copied = Reference(make_model(kind), None, adapter_off=False)
    base, adapted = ActorCritic(make_model(kind), plain=True), ActorCritic(policy)
    with torch.no_grad():
        expected, moved = (model(*batch, temperature=0.7).logprobs for model in (base, adapted))
    for one in (reference, copied):
        torch.testing.assert_close(one.logprobs(Sequences(*batch), temperature=0.7), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-2)


# Decoding


def decode(model: ActorCritic, temperature: float = 0.8, rows: int = 6) -> Any:
    """Mixed prompts over a vocabulary of 30, of which a fifth ends a response."""
    prompt_ids, prompt_mask = left_pad([[1], [0, 3, 4], [5, 0], [7, 1, 2, 3, 4, 6]] * rows, CPU)
    sampled = sample_responses(
        model,
        prompt_ids,
        prompt_mask,
        SamplingParams(max_new_tokens=12, temperature=temperature, stop_token_ids=(0, 4, 8, 12, 16, 20)),
        generator=torch.Generator().manual_seed(5),
    )
    return prompt_ids, prompt_mask, sampled


@pytest.mark.parametrize("kind", PATHS)
def test_rows_removed_from_the_cache_change_nothing_for_the_others(make_pair, kind, monkeypatch):
    """The same tokens without it, with transformers' own cache, and log-probs, values, entropies of a plain pass."""
    fast, plain = make_pair(kind)
    left: list[int] = []
    leave = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, rows: left.append(1) or leave(cache, rows))
    prompt_ids, prompt_mask, sampled = decode(fast)
    assert len(left) >= 3 and sampled.mask.sum(dim=1).unique().numel() > 3
    others = []
    with monkeypatch.context() as patch:
        patch.setattr(
            rlhf_ppo.models.forward.runner, "preallocated_cache", lambda config, room: DynamicCache(config=config)
        )
        others.append(decode(fast)[2])
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "cache_shrinks", False)
        others += [decode(fast)[2], decode(plain)[2]]
    for other in others:
        assert torch.equal(other.response_ids, sampled.response_ids)
        assert torch.equal(other.mask, sampled.mask) and torch.equal(other.finished, sampled.finished)
    with torch.no_grad():
        full = plain(prompt_ids, prompt_mask, sampled.response_ids, sampled.mask, temperature=0.8)
    for x in (sampled, *others):
        torch.testing.assert_close(x.logprobs, full.logprobs, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(x.values, full.values, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(x.entropy, full.entropy, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [Sharpened, Wrapped])
def test_a_users_own_forward_decodes_as_it_evaluates(make_pair, cls, monkeypatch):
    fast, plain = make_pair(wrap=recast(cls))
    monkeypatch.setattr(cls, "factor", 1.5)
    prompt_ids, prompt_mask, sampled = decode(fast)
    with torch.no_grad():
        full = plain(prompt_ids, prompt_mask, sampled.response_ids, sampled.mask, temperature=0.8)
    torch.testing.assert_close(sampled.logprobs, full.logprobs, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(sampled.values, full.values, atol=5e-5, rtol=1e-5)


def test_weights_that_are_no_longer_finite_sample_tokens_of_the_vocabulary(make_trainer, prompts):
    """So that a run ends at the ratio tripwire, which knows the reason, and not at an index out of range."""
    trainer = make_trainer()
    with torch.no_grad():
        for p in trainer.model.policy.parameters():
            p.fill_(math.nan)
    rollout = trainer.rollout(prompts)
    assert rollout.response_ids.max() < 30


# Whole runs


def plain_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers made from now on take no shortcut, and no row leaves the batch."""
    init, actor_critic = ModelRunner.__init__, ActorCritic.__init__
    monkeypatch.setattr(ModelRunner, "__init__", lambda self, model, *, plain=False: init(self, model, plain=True))
    monkeypatch.setattr(ActorCritic, "__init__", lambda self, *a, **k: actor_critic(self, *a, **{**k, "plain": True}))
    monkeypatch.setattr(ModelRunner, "cache_shrinks", False)
    monkeypatch.setattr(
        rlhf_ppo.models.forward.runner, "preallocated_cache", lambda config, room: DynamicCache(config=config)
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("separate", [False, True])
def test_two_updates_move_all_weights_alike(make_trainer, make_model, kind, separate, monkeypatch):
    runs = []
    for plain in (False, True):
        if plain:
            plain_everywhere(monkeypatch)
        trainer = make_trainer(
            model=make_model(kind),
            value_model=make_model(kind, seed=7) if separate else None,
            microbatch_tokens=10_000 if plain else 40,
            ent_coef=0.01,
            temperature=0.9,
        )
        metrics = trainer.train()
        assert paths(trainer.model.runner) == (not plain, not plain)
        runs.append((trainer, metrics))
    (fast, fast_metrics), (plain_run, plain_metrics) = runs
    samples = [(trainer.run.path / "samples.jsonl").read_text().splitlines() for trainer, _ in runs]
    assert len(samples[0]) == len(samples[1])
    for name, value in plain_metrics.items():
        assert fast_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for (name, a), b in zip(fast.model.named_parameters(), plain_run.model.parameters(), strict=True):
        apart = (a - b).abs()
        if name.endswith("c_attn.bias"):
            # A bias on the keys moves all scores of a query alike: its gradient is rounding, of which Adam makes steps.
            apart = torch.cat([apart[:16], apart[32:]])
        # Eight steps of up to 1e-3 each. Adam divides by the gradient's size, so where that is near 0 rounding shows;
        # such weights are few.
        assert apart.max() <= 1e-3 and (apart > 1e-5).float().mean() < 0.02, (name, apart.max())


@pytest.mark.slow
def test_learning_curves_agree_within_seed_noise(make_trainer, make_model, monkeypatch):
    """Five seeds each on the toy task: the means part by less than three standard errors of their difference."""
    curves = {}
    for plain in (False, True):
        if plain:
            plain_everywhere(monkeypatch)
        curves[plain] = []
        for seed in range(5):
            trainer = make_trainer(
                total_episodes=960,
                rollout_batch_size=32,
                learning_rate=5e-3,
                num_epochs=4,
                num_minibatches=4,
                kl_coef=0.01,
                # Seeds of their own: with the same draws the curves would only show rounding.
                seed=seed + 100 * plain,
            )
            trainer.train()
            curves[plain].append([row["score/mean"] for row in trainer.run.read()])
    fast, plain_curves = (torch.tensor(curves[plain]).unflatten(1, (3, -1)).mean(dim=-1) for plain in (False, True))
    error = ((fast.var(dim=0) + plain_curves.var(dim=0)) / 5).sqrt()
    assert ((fast.mean(dim=0) - plain_curves.mean(dim=0)).abs() < 3 * error + 0.01).all(), (fast, plain_curves)
    assert fast[:, -1].min() > 0.75 and plain_curves[:, -1].min() > 0.75
