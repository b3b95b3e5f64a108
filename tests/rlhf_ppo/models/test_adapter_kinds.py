"""What is saved is what was trained, and the reference is where training starts, whatever an adapter does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_ppo.models.adapters.lora import VALUE_ADAPTER
from rlhf_ppo.models.compare import SavedModelError
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.loading import adapter_base, load_classifier, load_policy
from rlhf_ppo.models.saving import write_adapter
from rlhf_ppo.pipeline.evaluation.evaluate import EvaluateArgs, evaluate
from rlhf_ppo.pipeline.generate import GenerateArgs, generate
from rlhf_ppo.pipeline.labelled.reward_training import RewardTrainingArgs, train_reward_model
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, sft
from rlhf_ppo.runtime.checkpoints.checkpoint import read_checkpoint
from rlhf_ppo.runtime.checkpoints.stored_tensors import StoredTensors

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
IDS = torch.arange(3, 15)[None]


def lora(*layers: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 32, "target_modules": list(layers) or None, **TASK, **settings})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def same(one: Any, other: Any) -> bool:
    return torch.allclose(logits(one), logits(other), atol=1e-4, rtol=1e-4)


def read(reference: Any, rollout: Any) -> torch.Tensor:
    inputs = rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask
    return reference.logprobs(Sequences(*inputs), temperature=1.0)


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    """``base(kind, name, **config)``: the folder of a tiny model."""

    def make(kind: str = "gpt2", name: str = "start", **config: Any) -> str:
        model = make_model(kind)
        if config:
            for key, value in config.items():
                setattr(model.config, key, value)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(model.config)
        model.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


TIED = {"tie_word_embeddings": True}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "lora": ("gpt2", {}, lambda: lora(), {}),
    "a new random start": ("gpt2", {}, lambda: lora(init_lora_weights=False), {}),
    "dora, rslora": ("llama", {}, lambda: lora(use_dora=True, use_rslora=True), {}),
    "bias all": ("gpt2", {}, lambda: lora(bias="all"), {}),
    "bias lora_only": ("gpt2", {}, lambda: lora(bias="lora_only"), {}),
    "bias of LoRA's own": ("gpt2", {}, lambda: lora(lora_bias=True), {}),
    "pissa": ("llama", {}, lambda: lora(init_lora_weights="pissa"), {}),
    "pissa, drawn": ("llama", {}, lambda: lora(init_lora_weights="pissa_niter_4"), {}),
    "olora": ("llama", {}, lambda: lora(init_lora_weights="olora"), {}),
    "eva": ("llama", {}, lambda: lora(init_lora_weights="eva"), {}),
    "trained head": ("llama", {}, lambda: lora(modules_to_save=["lm_head"]), {}),
    "trained head, tied": ("gpt2", {}, lambda: lora(modules_to_save=["lm_head"]), {}),
    "trained embedding, tied": ("llama", TIED, lambda: lora(modules_to_save=["embed_tokens"]), {}),
    "trained tokens": ("llama", {}, lambda: lora(trainable_token_indices=[3, 4]), {}),
    "trained tokens, tied": ("llama", TIED, lambda: lora(trainable_token_indices=[3, 4]), {}),
    "head": ("llama", {}, lambda: lora("q_proj", "lm_head"), {}),
    "head, tied": ("gpt2", {}, lambda: lora("c_attn", "lm_head"), {}),
    "embedding, tied": ("llama", TIED, lambda: lora("q_proj", "embed_tokens"), {}),
    "both, tied": ("llama", TIED, lambda: lora("lm_head", "embed_tokens"), {}),
    "layers used twice": ("llama", {}, lambda: lora(layer_replication=[[0, 2], [0, 2]]), {}),
    "ia3": ("llama", {}, lambda: IA3Config(**TASK), {}),
    "adalora": ("llama", {}, lambda: AdaLoraConfig(total_step=9, target_modules=["q_proj"], **TASK), {}),
    "layer norms": ("gpt2", {}, lambda: LNTuningConfig(target_modules=["ln_1"], **TASK), {}),
    "oft": ("llama", {}, lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj"], **TASK), {}),
    "vera": ("llama", {}, lambda: VeraConfig(r=4, target_modules=["q_proj"], **TASK), {}),
    "critic, trained head": ("gpt2", {}, lambda: lora(modules_to_save=["lm_head"]), {"critic": "adapter"}),
    "critic, trained tokens": ("llama", TIED, lambda: lora(trainable_token_indices=[3]), {"critic": "adapter"}),
    "critic, bias": ("gpt2", {}, lambda: lora(bias="all"), {"critic": "adapter"}),
    "critic, pissa": ("llama", {}, lambda: lora(init_lora_weights="pissa"), {"critic": "adapter"}),
    "critic, head, tied": ("gpt2", {}, lambda: lora("c_attn", "lm_head"), {"critic": "adapter"}),
}


def representatives(cases: Any, names: set[str]) -> list[Any]:
    """One case of each kind; the others are slow tests."""
    assert names <= set(cases)
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in cases]


EACH_KIND = {
    *("lora", "a new random start", "dora, rslora", "bias all", "pissa", "trained head, tied", "trained tokens, tied"),
    *("head, tied", "layers used twice", "ia3", "layer norms", "critic, trained tokens", "critic, pissa"),
}


@pytest.mark.parametrize("name", representatives(CONFIGURATIONS, EACH_KIND))
def test_an_adapter_of_any_kind_starts_at_its_reference_and_loads_as_it_was_trained(
    make_trainer, base, prompts, tmp_path, name
):
    kind, shape, config, settings = CONFIGURATIONS[name]
    folder = base(kind, **shape)
    trainer = make_trainer(
        model=folder, peft_config=config(), learning_rate=0.05, lr_scheduler_type="constant", **settings
    )
    first = trainer.rollout(prompts)
    torch.testing.assert_close(first.ref_logprobs, first.logprobs, atol=1e-4, rtol=0)
    start = logits(trainer.model.policy)
    if name not in ("a new random start", "layers used twice"):
        torch.testing.assert_close(start, logits(load_policy(folder)), atol=1e-4, rtol=1e-4)
    for _ in range(2):
        trainer.step(trainer.rollout(prompts))
    torch.testing.assert_close(read(trainer.reference, first), first.ref_logprobs, atol=1e-5, rtol=0)
    trained = trainer.model.policy
    assert not torch.allclose(logits(trained), start, atol=1e-3)
    saved = trainer.save_model()
    assert same(load_policy(str(saved)), trained)
    assert same(AutoPeftModelForCausalLM.from_pretrained(saved), trained)  # whoever has PEFT alone
    # A folder holds the base only where no other does.
    changed = any(word in name for word in ("pissa", "olora"))
    assert Path(adapter_base(str(saved))) == (saved / "base" if changed else Path(folder))
    merged = trainer.save_model(tmp_path / "merged", merge_adapter=True)
    assert same(whole := AutoModelForCausalLM.from_pretrained(merged), trained)
    assert not (whole.config.tie_word_embeddings and "tied" in name)
    if settings:
        again = make_trainer(model=folder, peft_config=config(), value_head_from=str(saved), **settings)
        pairs = zip(trainer.model.critic_parameters(), again.model.critic_parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# What a model is, is not what it is called


def tripled(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model


def resized(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.resize_token_embeddings(33)
    return model


def adapted(folder: str, name: str = "default", **settings: Any) -> Any:
    """A model with an adapter that is trained already."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora(**settings), adapter_name=name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    return model


def sft_folder(folder: str) -> str:
    adapted(folder).save_pretrained(place := f"{folder}-sft")
    return place


STARTS: dict[str, tuple[Any, bool, str | None]] = {
    # name: what is given, with a new adapter, and where base or reference lie in the end: None: under its own name
    "a changed object": (tripled, False, "reference"),
    "a changed object, adapter": (tripled, True, "base"),
    "a resized object, adapter": (resized, True, "base"),
    "an object as it was": (AutoModelForCausalLM.from_pretrained, False, None),
    "an object as it was, adapter": (AutoModelForCausalLM.from_pretrained, True, None),
    "an adapter merged into an object, adapter": (lambda folder: adapted(folder).merge_and_unload(), True, "base"),
    "an adapter's folder": (sft_folder, False, None),
    "an adapter's folder, adapter": (sft_folder, True, "base"),
    "an object's adapter": (adapted, False, "reference"),
    "an object's adapter of another name": (lambda folder: adapted(folder, "policy"), False, "reference"),
    "an object's adapter that changed its base": (lambda f: adapted(f, init_lora_weights="pissa"), False, "reference"),
}


EACH_START = {
    *("a changed object", "a resized object, adapter", "an object as it was, adapter", "an adapter's folder, adapter"),
    "an object's adapter of another name",
}


@pytest.mark.parametrize("name", representatives(STARTS, EACH_START))
def test_a_run_from_anything_is_loaded_generated_from_and_evaluated_as_what_it_is(
    make_trainer, base, tokenizer, tmp_path, name
):
    """At learning rate 0 the evaluation finds no KL to the start, and no difference to it."""
    make, adapter, beside = STARTS[name]
    start = make(base("llama"))
    options = {"peft_config": lora()} if adapter else {}
    trained = make_trainer(model=start, learning_rate=0.05, **options)
    trained.train()
    run = trained.run.path
    assert same(load_policy(str(run)), trained.model.policy)
    assert beside is None or (run / beside / "model.safetensors").is_file()
    assert beside == "reference" or not (run / "reference").exists()
    assert generate(GenerateArgs(model=str(run), prompt=("the",), device="cpu"))
    assert json.loads((run / "run.json").read_text())["model"] == (start if isinstance(start, str) else "object")
    still = make_trainer(model=make(base("llama")), learning_rate=0.0, **({"peft_config": lora()} if adapter else {}))
    still.train()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "she"}\n')
    (tmp_path / "judge.py").write_text(
        "def length(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    asked = {"dataset": str(tmp_path / "rows.jsonl"), "reward": (f"{tmp_path}/judge.py:length",), "quiet": True}
    asked |= {"output_dir": str(tmp_path / "evaluation"), "device": "cpu"}
    found = evaluate(EvaluateArgs(model=str(still.run.path), **asked))
    assert found["model"]["KL to the reference, nats per response"]["mean"] == pytest.approx(0, abs=1e-4)
    if beside is not None and not isinstance(start, str):
        shutil.rmtree(still.run.path / beside)
        with pytest.raises(ValueError, match=r"is not there|neither in base/ nor in reference/.*ref_model"):
            evaluate(EvaluateArgs(model=str(still.run.path), **asked))


def test_a_base_saved_beside_its_adapter_moves_with_it(make_trainer, base, tmp_path):
    trainer = make_trainer(model=tripled(base()), peft_config=lora(), learning_rate=0.05)
    trainer.train()
    trainer.run.path.rename(tmp_path / "moved")
    assert same(load_policy(str(tmp_path / "moved")), trainer.model.policy)


def test_a_folder_that_loads_as_another_model_is_an_error_and_the_weights_stay(make_trainer, base, monkeypatch, capsys):
    trainer = make_trainer(model=base(), peft_config=lora(), learning_rate=0.05)
    trainer.step(trainer.rollout(["the cat", "a"] * 4))
    # The run's base is written over by another model while it trains.
    tripled(trainer.sources["model"]).save_pretrained(trainer.sources["model"])
    with pytest.raises(SavedModelError, match=r"is not the one that was trained: .* off by [\d.]+ of their size"):
        trainer.save_model()
    assert (trainer.run.path / "adapter_model.safetensors").is_file()
    shutil.rmtree(trainer.sources["model"])
    with pytest.raises(SavedModelError, match=r"cannot be loaded again: .*is not there"):
        trainer.save_model()


def test_a_quantised_base_is_not_compared_but_its_adapter_is(make_trainer, base, tmp_path, monkeypatch):
    """What stands for bitsandbytes here: a base that is rounded in memory, and says that it is."""
    trainer = make_trainer(model=base(), peft_config=lora(), learning_rate=0.05)
    trainer.step(trainer.rollout(["the cat", "a"] * 4))
    inner = trainer.model.policy.get_base_model()
    with torch.no_grad():
        inner.lm_head.weight.copy_(inner.lm_head.weight.bfloat16())
    inner.is_quantized = True
    saved = trainer.save_model()
    merged = trainer.save_model(tmp_path / "merged", merge_adapter=True)
    assert same(load_policy(str(saved)), AutoModelForCausalLM.from_pretrained(merged))
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_ppo.models.saving.load_file", lambda file: {})
        with pytest.raises(SavedModelError, match=r"the adapter saved in .* is not the one that was trained"):
            trainer.save_model()


def test_an_adapters_weights_that_do_not_fit_are_not_left_out(base, tmp_path):
    folder = sft_folder(base("llama"))
    weights = load_file(f"{folder}/adapter_model.safetensors")
    save_file({key: x for key, x in weights.items() if "layers.1" not in key}, f"{folder}/adapter_model.safetensors")
    with pytest.raises(ValueError, match="the adapter's weights are not those of its own config"):
        load_policy(folder)


# Names


def named_value(make_model: Any) -> Any:
    """A model with layers called "value" and "reward"."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.value, layer.self_attn.reward = layer.self_attn.v_proj, layer.self_attn.q_proj
        del layer.self_attn.v_proj, layer.self_attn.q_proj
        forward = layer.self_attn.forward

        def renamed(*inputs: Any, attention: Any = layer.self_attn, forward: Any = forward, **options: Any) -> Any:
            object.__setattr__(attention, "v_proj", attention.value)
            object.__setattr__(attention, "q_proj", attention.reward)
            return forward(*inputs, **options)

        layer.self_attn.forward = renamed
    return model


def test_the_critics_adapter_is_not_mistaken_for_a_layer(make_trainer, make_model, prompts, tmp_path):
    config = lora("value", "reward")
    trainer = make_trainer(
        model=named_value(make_model), peft_config=config, critic="adapter", learning_rate=0.05, total_episodes=16
    )
    for _ in range(2):
        trainer.step(trainer.rollout(prompts))
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, place in (("default", folder), (VALUE_ADAPTER, folder / "value")):
        write_adapter(trainer.model.policy, name, place, folder, None)
        written = load_file(place / "adapter_model.safetensors")
        assert len(written) == 2 * 2 * 2 and sum(".value.lora_" in key for key in written) == 4
    policy = PeftModel.from_pretrained(named_value(make_model), folder)
    assert same(policy, trainer.model.policy)
    with pytest.raises(ValueError, match=r"adapter 'value' has the name of a layer.*adapter_name="):
        make_trainer(model=get_peft_model(named_value(make_model), lora("value"), adapter_name="value"))


def test_several_active_adapters_are_refused(make_trainer, base):
    model = adapted(base(), "one")
    model.add_adapter("two", lora())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"2 active adapters \(one, two\).*add_weighted_adapter"):
        make_trainer(model=model)


def test_an_adapter_that_cannot_be_merged_is_refused_at_the_start(make_trainer, base):
    with pytest.raises(ValueError, match=r"of the kind LORA cannot be merged into this base .*LoraConfig"):
        make_trainer(model=base("llama"), peft_config=lora(lora_bias=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["lm_head", "c_attn"]}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_an_earlier_version_resumes(make_trainer, base, settings, tmp_path):
    """There the critic's adapter was called "value"."""
    common = {"critic": "adapter", "total_episodes": 24, "save_every": 1, "model": base()}
    cut = make_trainer(**common, peft_config=lora(**settings), callbacks=[lambda t, metrics: t.iteration == 2])
    cut.train()
    checkpoint = read_checkpoint(cut.run.path / "checkpoint-2")
    earlier = {}
    for kind, tensors in checkpoint.tensors.items():
        named = {key.replace(f".{VALUE_ADAPTER}.", ".value."): x.clone() for key, x in tensors.items()}
        save_file(named, tmp_path / f"{kind}.safetensors")
        earlier[kind] = StoredTensors([tmp_path / f"{kind}.safetensors"])
    assert earlier["trainable"].keys() != checkpoint.tensors["trainable"].keys()
    old = replace(checkpoint, tensors=earlier)
    assert set(old.fingerprints["adapters"]) == {"default", "value"}
    found = []
    for one in (checkpoint, old):
        resumed = make_trainer(**common, peft_config=lora(**settings))
        resumed.load_checkpoint(one)
        resumed.step(resumed.rollout(["once upon", "the cat"] * 4))
        found.append({name: p.detach().clone() for name, p in resumed.model.named_parameters()})
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


# The other commands, and the reference


@pytest.mark.parametrize(
    ("command", "save_dtype"),
    [
        *(("sft", "bfloat16"), ("reward", "float32"), ("reward, adapter", "bfloat16")),
        pytest.param("sft", "float32", marks=pytest.mark.slow),
        pytest.param("reward", "bfloat16", marks=pytest.mark.slow),
        pytest.param("reward, adapter", "float32", marks=pytest.mark.slow),
    ],
)
def test_sft_and_reward_compare_what_they_saved(base, tmp_path, monkeypatch, command, save_dtype):
    answer = {"text": "the cat", "chosen": " cat", "rejected": " dog"}
    rows = [{**answer, "prompt": prompt} for prompt in ("the", "a", "blue", "she")] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"model": base("llama"), "output_dir": str(tmp_path / "out"), "save_dtype": save_dtype, "quiet": True}
    usual |= {"dataset": (str(tmp_path / "rows.jsonl"),), "batch_size": 4, "warmup_steps": 0}

    def run() -> None:
        if command == "sft":
            sft(SFTArgs(**usual))
            return
        rank = 2 if "adapter" in command else None
        train_reward_model(RewardTrainingArgs(**usual, lora_rank=rank, device="cpu", precision="fp32"))

    run()
    # Another model is found there than the one that was saved.
    monkeypatch.setattr("rlhf_ppo.pipeline.labelled.sft.load_policy", lambda name: tripled(usual["model"]))
    monkeypatch.setattr(
        "rlhf_ppo.pipeline.labelled.reward_training.load_classifier",
        lambda name, real=load_classifier, **new: real(usual["model"], new_head=True),
    )
    with pytest.raises(SavedModelError, match="is not the one that was trained"):
        run()


def test_a_reference_that_is_not_the_start_is_an_error_that_names_the_adapter(make_trainer, base, monkeypatch):
    monkeypatch.setattr(
        "rlhf_ppo.models.adapters.policy_adapter.relative_difference", lambda one, other: 0.0
    )  # unnoticed
    with pytest.raises(ValueError, match=r"not the model that training starts from: .*init_lora_weights=False"):
        make_trainer(model=base(), peft_config=lora(init_lora_weights=False))
