"""Costs on paper: shapes against models that are built, memory against peaks that are measured, time against runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.costs.cards import CARDS, find_card
from rlhf_ppo.models.costs.choice import choose_sharding
from rlhf_ppo.models.costs.exchange import least_in_update, sent_in_update
from rlhf_ppo.models.costs.memory import memory, peak
from rlhf_ppo.models.costs.setup import Setup, lora_adapter
from rlhf_ppo.models.costs.shapes import read_shape, shape_of
from rlhf_ppo.models.costs.terms import TIMES, term, total
from rlhf_ppo.models.costs.times import seconds
from rlhf_ppo.models.costs.weights import gradients, held
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import make_batch, next_draws, read_reference, score
from rlhf_ppo.training.rollouts.generate import generate
from rlhf_ppo.training.update import update

VOCABULARY, PROMPT, ANSWER, ROWS = 2000, 16, 48, 16


def gpt2(**sizes: Any) -> GPT2Config:
    usual = {"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4}
    return GPT2Config(**{**usual, **sizes}, bos_token_id=0, eos_token_id=0)


def llama(**sizes: Any) -> LlamaConfig:
    usual = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    usual |= {"num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": 256}
    return LlamaConfig(**{**usual, **sizes}, bos_token_id=0, eos_token_id=0)


def setup_for(config: PretrainedConfig, *, lora: int | None = None, separate: bool = False, **settings: Any) -> Setup:
    given = {"card": find_card("cpu"), "bf16": False, "prompt_tokens": PROMPT, "response_tokens": ANSWER}
    given |= {name: settings.pop(name) for name in ("card", "bf16", "processes", "nodes", "links") if name in settings}
    args = RLHFConfig(output_dir="x", rollout_batch_size=ROWS, num_epochs=1, max_new_tokens=ANSWER, **settings)
    shape = read_shape(config)
    return Setup(
        args=args,
        policy=shape,
        critic="separate" if separate else "shared",
        value=read_shape(config, "critic") if separate else None,
        adapter=None if lora is None else lora_adapter(shape, lora, ("all-linear",)),
        reference=shape if lora is None else None,
        **given,
    )


# Terms


def test_a_term_is_the_product_that_it_shows():
    shown = term("cache", (8, "rows"), (2.5, "bytes"), (1, TIMES), (0.75, "(3/4)"), over=(5, "bytes/s"))
    assert shown == ("cache", 8 * 2.5 * 0.75 / 5, "8 rows x 2.5 bytes x (3/4) / 5 bytes/s")


# Shapes

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
}
"""Parameters as the models' safetensors files count them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_models_have_their_published_number_of_parameters(name):
    assert shape_of(name).parameters == PUBLISHED[name]


def test_parameters_are_counted_by_kind():
    shape, width, inner = read_shape(llama()), 64, 192
    assert (shape.layers, shape.query_width, shape.key_width, shape.mlp_width) == (4, 64, 32, inner)
    assert shape.gated and shape.rotary and shape.norms == 2 and not shape.fused_norms
    assert shape.attention == 4 * (2 * width * width + 2 * width * 32)
    assert shape.mlp == 4 * 3 * width * inner
    assert shape.embeddings == shape.output == VOCABULARY * width
    assert shape.other == (2 * 4 + 1) * width
    tied = read_shape(gpt2())
    assert (tied.output, tied.embeddings) == (0, (VOCABULARY + 256) * width) and tied.fused_norms and not tied.gated
    assert [x.name for x in tied.readers(attends=True)] == ["c_attn"] and not tied.rotary


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox", "opt", "bloom", "mistral", "gemma", "gemma2"])
def test_each_architecture_is_counted_whole(kind, make_model):
    built = make_model(kind)
    shape = read_shape(built.config)
    assert shape.parameters == sum(p.numel() for p in built.parameters())
    # What has no kind is norms and biases: one-dimensional, but for OPT's projections of its narrow embeddings.
    vectors = sum(p.numel() for p in built.parameters() if p.ndim == 1)
    assert shape.other == vectors or kind == "opt"


@pytest.mark.parametrize("config", [gpt2(), llama()], ids=["gpt2", "llama"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_an_adapter_has_as_many_weights_as_pefts(config, targets):
    shape = read_shape(config)
    adapter = lora_adapter(shape, 3, None if targets is None else (targets,))
    built = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    )
    assert adapter.parameters == sum(p.numel() for p in built.parameters() if p.requires_grad)


def test_what_is_no_plain_transformer_is_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    experts = MixtralConfig(intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, **small)
    with pytest.raises(ValueError, match=r"'model' \(mixtral\) is none: mixtures of experts and convolutions are not"):
        read_shape(experts)
    with pytest.raises(ValueError, match=r"plan counts plain transformers, and 'model' \(mamba\) is none"):
        read_shape(MambaConfig(state_size=8, **small))
    with pytest.raises(ValueError, match=r"lora_target_modules=.*'q_prj'.* are no layers of 'model', whose are q_proj"):
        lora_adapter(read_shape(llama()), 8, ("q_prj",))


# Memory


def allocated_peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """What work returns, and the most bytes of tensors that it had at once, beside those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return result, highest


def measured_peaks(config: PretrainedConfig, folder: str, setup: Setup, lora: int | None) -> dict[str, int]:
    """Bytes that each phase of a second iteration adds at its peak."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(config.vocab_size)}, unk_token="<2>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    prompts = ["".join(f"<{2 + 7 * i + 3 * j}>" for j in range(PROMPT)) for i in range(ROWS)]
    names = ("gradient_checkpointing", "microbatch_tokens", "rollout_batch_size", "num_epochs", "max_new_tokens")
    same = {name: getattr(setup.args, name) for name in names}
    here = {"device": "cpu", "precision": "bf16" if setup.bf16 else "fp32", "stop_token_ids": (), "quiet": True}
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_config(config),
        lambda prompts, completions, **columns: [float(i) for i in range(len(prompts))],
        RLHFConfig(output_dir=folder, learning_rate=1e-6, **same, **here),
        [{"prompt": prompt} for prompt in prompts],
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<1>"),
        peft_config=None if lora is None else LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"),
        value_model=None if setup.value is None else AutoModelForCausalLM.from_config(config),
    )
    assert setup.trained == sum(p.numel() for p in trainer.model.trainable_parameters())
    run, state, found = trainer.fixed, trainer.state, {}

    def train(rollout: Any) -> Any:
        return update(state, run, rollout, estimate(rollout, shape_rewards(rollout, run.args, 0.05, None), run.args))

    for _ in range(2):  # the optimizer's moments are there from the first step on
        draws = next_draws(run, state)
        batch = make_batch(prompts, {}, copies=1)
        rollout, found["generate"] = allocated_peak(lambda: generate(run, state.model, batch, draws))  # noqa: B023
        rollout, found["reference"] = allocated_peak(lambda: read_reference(run, state.model, rollout))  # noqa: B023
        rollout = score(run, rollout)
        _, found["update"] = allocated_peak(lambda: train(rollout))  # noqa: B023
    copies = {id(p): p._rlhf_ppo_low for p in trainer.model.trainable_parameters() if hasattr(p, "_rlhf_ppo_low")}
    # Biases of linear layers have copies, too, which a plan leaves out.
    assert 2 * setup.copied == pytest.approx(sum(low.nbytes for low in copies.values()), rel=0.01)
    return found


CASES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "full": (gpt2(), {}),
    "many words": (gpt2(vocab_size=24_000, n_embd=32, n_layer=2), {}),
    "lora": (llama(), {"lora": 8}),
    "checkpointing": (llama(), {"gradient_checkpointing": True}),
    "two passes": (gpt2(), {"microbatch_tokens": 126}),
    "separate critic": (llama(), {"separate": True}),
    "bf16": (llama(), {"bf16": True}),
    "bf16 without rotation": (gpt2(), {"bf16": True}),
    "bf16 lora": (llama(), {"bf16": True, "lora": 8}),
    "bf16 checkpointing": (llama(), {"bf16": True, "gradient_checkpointing": True}),
}
QUICK = ("many words", "lora", "checkpointing")


@pytest.mark.parametrize("case", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_phases_need_the_memory_that_is_measured(case, tmp_path):
    config, settings = CASES[case]
    setup = setup_for(config, **settings)
    measured = measured_peaks(config, str(tmp_path), setup, settings.get("lora"))
    between = 0 if setup.adapter or not setup.policy.output else 4 * setup.policy.embeddings  # gradients that stay
    always = total(held(setup))
    for phase, terms in memory(setup).items():
        if (name := phase.partition(" (")[0]) in measured:
            # 15 % of what the phase adds, which is less than 15 % of its peak: so much is promised.
            assert total(terms) - always - between == pytest.approx(measured[name], rel=0.15), phase


MEASURED = {
    ("M", True): (gpt2(vocab_size=50257, n_embd=384, n_layer=6), 20.18, 290e6),
    ("M", False): (gpt2(vocab_size=50257, n_embd=384, n_layer=6), 7.58, 245e6),
    ("L", True): (gpt2(vocab_size=50257, n_embd=768, n_layer=12), 97.89, 710e6),
    ("L", False): (gpt2(vocab_size=50257, n_embd=768, n_layer=12), 35.0, 582e6),
}
"""Workload of benchmarks/speed.py on 2026-11-24, and whether like for like -> config, seconds, peak above static."""


@pytest.mark.parametrize(("workload", "like"), MEASURED)
def test_time_and_memory_are_those_of_the_benchmark(workload, like):
    config, measured, above = MEASURED[workload, like]
    shape = read_shape(config)
    args = RLHFConfig(output_dir="x", rollout_batch_size=32, num_epochs=4, num_minibatches=4, max_new_tokens=48)
    value = read_shape(config, "critic") if like else None
    reward = read_shape(config, "reward")
    card = find_card("cpu")
    kinds = {"critic": "separate" if like else "shared", "value": value, "rewards": (reward,), "reference": shape}
    setup = Setup(args, shape, card=card, bf16=not like, prompt_tokens=16, response_tokens=48, **kinds)
    assert seconds(setup) == pytest.approx(measured, rel=0.15)
    # As the benchmark counts: weights, gradients and moments of what is trained; weights of the others.
    static = 16 * setup.trained + 4 * (shape.parameters + reward.parameters)
    # It gives the reward model as an object, which stays in float32 and has a copy; a plan's is loaded by name.
    given = 0 if like else 4 * reward.matrices
    assert peak(setup) + given == pytest.approx(static + above, rel=0.15)


def test_sharding_divides_what_is_held_and_passes_get_smaller():
    gpu = {"card": CARDS["H100"], "bf16": True}
    one = setup_for(llama(), **gpu)
    shared = choose_sharding(setup_for(llama(), processes=4, sharding="full", **gpu))
    always, divided = ({x.what: x.amount for x in held(setup)} for setup in (one, shared))
    assert divided["AdamW's two moments"] == always["AdamW's two moments"] / 4
    assert divided["policy's weights"] + divided["policy's weights: norms and biases"] == pytest.approx(
        always["policy's weights"] / 4, rel=0.01
    )
    assert choose_sharding(setup_for(llama(), processes=4, **gpu)).sharding == "none"  # it fits
    assert peak(setup_for(llama(), microbatch_tokens=64, **gpu)) < peak(one)


def test_replicas_send_the_least_and_shards_more():
    gpu = {"card": CARDS["H100"], "bf16": False, "processes": 4}
    least = least_in_update(setup_for(llama(), **gpu)).amount
    assert total(sent_in_update(setup_for(llama(), **gpu))) == least
    shared = choose_sharding(setup_for(llama(), sharding="full", **gpu))
    # Weights in the forward and in the backward pass, and gradients: three times 3/4, and not twice; norms stay.
    assert total(sent_in_update(shared)) == pytest.approx(1.5 * least, rel=0.01)
    assert not sent_in_update(setup_for(llama()))


@pytest.mark.parametrize(
    ("sharding", "sent", "kept"), [("none", 243.1e6, 303.8e6), ("full", 364.6e6, 152.0e6)], ids=["none", "full"]
)
def test_bytes_sent_and_held_are_those_that_were_counted(sharding, sent, kept):
    """What benchmarks/sharding.py counted with 15 million parameters in fp32 on two processes (docs/scaling.md)."""
    config = llama(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6)
    config = LlamaConfig(**{**config.to_dict(), "num_key_value_heads": 6, "tie_word_embeddings": True})
    two = setup_for(config, processes=2, num_minibatches=4, sharding=sharding)
    assert two.policy.parameters == pytest.approx(15.19e6, rel=0.001)
    two = choose_sharding(two)
    assert total(sent_in_update(two)) == pytest.approx(sent, rel=0.01)
    beside = ("records of the whole rollout", "libraries loaded at first use")
    weights = [x for x in held(two) if x.what not in beside]
    assert total([*weights, gradients(two)]) == pytest.approx(kept, rel=0.01)
