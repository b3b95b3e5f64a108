"""The command `plan`: its page and JSON, what makes a run fit, and bad input as one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.pipeline.plan.fit import changes, find_fit, growth, more_gpus, replan
from rlhf_ppo.pipeline.plan.plan import plan
from rlhf_ppo.pipeline.plan.report import text

LONG = {"max_new_tokens": 1024, "rollout_batch_size": 128}


def plan_for(model: str = "Qwen/Qwen2.5-7B", card: str = "H100", **settings):
    return plan(PlanArgs(**{"model": model, "card": card, **LONG, **settings}))


def refusal(capsys, *flags: str) -> str:
    """What the command says about bad input."""
    try:
        assert main(["plan", *flags]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    return re.sub(r"[\s│]+", " ", capsys.readouterr().err)


def test_the_page_names_phases_and_what_breaks_first(capsys):
    assert main("plan --model Qwen/Qwen2.5-7B --gpus 4 --card h100 --max-new-tokens 1024 --explain".split()) == 0
    said = capsys.readouterr().out
    assert "Qwen/Qwen2.5-7B, 7,615,616,512 parameters, shared critic" in said
    assert "4 x H100 (80 GB; NVIDIA H100 datasheet, SXM5)" in said and "sharding=full" in said
    for phase in ("generate", "reference", "update (", "optimizer step"):
        assert f"\n  {phase}" in said
    assert re.search(r"sent by a process in an update: \d+ GB, at least \d+ GB", said)
    # The arithmetic of a number that a reader can check by head: 7.6e9 x 8 / 4.
    assert "15.23 GB  AdamW's two moments = 7,615,620,097 trained weights x 8 bytes / 4 processes" in said


def test_a_file_of_train_is_a_file_of_plan(capsys, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        "model: gpt2\nreward: reward.py:score\ndataset: prompts.jsonl\noutput_dir: runs/mine\nlora_rank: 8\n"
    )
    assert main(["plan", "--config", str(file), "--card", "L40S"]) == 0
    # PEFT adapts c_attn, [768, 2304], in each of 12 layers; the value head has 769 weights.
    trained = 12 * 8 * (768 + 2304) + 769
    assert f"124,439,808 parameters, {trained / 1e3:.0f} k of them trained" in capsys.readouterr().out
    assert not Path("mine").exists()


def test_every_total_is_the_sum_of_its_terms(capsys):
    assert main("plan --model embedded --card cpu --reward embedded --json".split()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 2_234_496 and facts["fits"] and facts["fits_with"] is None
    assert set(facts["seconds"]) == {"generate", "reference", "score", "update", "optimizer steps"}
    for numbers in (facts["memory_bytes"], facts["seconds"]):
        for phase in numbers.values():
            assert phase["total"] == pytest.approx(sum(term["amount"] for term in phase["terms"]))
    assert any(term["what"] == "reward model embedded" for term in facts["memory_bytes"]["score"]["terms"])


def test_what_does_not_fit_is_made_to_by_the_settings_that_cost_least_time():
    found = plan_for(gpus=4)
    assert not found.fits and found.setup.sharding == "full"
    fitting = find_fit(found)
    assert fitting is not None and fitting.fits and fitting.args.lora_rank is None
    changed = changes(found.args, fitting.args)
    # Smaller passes make the weights travel more often; recomputing would take a third more of the update.
    assert set(changed) == {"microbatch_tokens"}
    slower = replan(found, **changed, gradient_checkpointing=True)
    assert slower.fits and slower.seconds > fitting.seconds
    assert "fits with --microbatch-tokens 4096 --sharding full: " in text(found)


def test_an_adapter_is_the_last_resort_and_then_more_gpus():
    found = plan_for()
    fitting = find_fit(found)
    assert fitting is not None and changes(found.args, fitting.args)["lora_rank"] == 16
    assert "which trains an adapter instead of all weights" in text(found)
    assert changes(found.args, find_fit(plan_for("Qwen/Qwen2.5-32B")).args)["quantization"] == "4bit"
    large = plan_for("Qwen/Qwen2.5-72B")
    assert find_fit(large) is None
    larger = more_gpus(large)
    assert larger is not None and larger.fits and larger.setup.processes > 1
    assert "No setting makes it fit here.\nfits with" in text(large) and f"--gpus {larger.args.gpus}" in text(large)


def test_models_beside_the_policy_count():
    alone = plan_for(gpus=8).held
    rewarded = plan_for(gpus=8, reward=("Qwen/Qwen2.5-0.5B", "file.py:function", "http://localhost:1")).held
    assert rewarded - alone == pytest.approx(2 * 494_032_768 / 8, rel=0.01)
    separate = plan_for(gpus=8, value_model="Qwen/Qwen2.5-0.5B").held
    assert separate - alone == pytest.approx((4 + 8) * 494_032_768 / 8, rel=0.01)
    adapter = plan_for(gpus=8, sharding="none", lora_rank=8).held
    assert adapter == pytest.approx(2 * 7_615_616_512, rel=0.01)
    exact = plan_for(gpus=8, sharding="none", lora_rank=8, precision="fp32").held
    assert exact == pytest.approx(4 * 7_615_616_512, rel=0.01)
    quantized = plan_for(lora_rank=8, quantization="4bit").held
    embedded = 2 * 152_064 * 3584  # and an output layer of that size, in bf16
    assert quantized == pytest.approx(0.56 * (7_615_616_512 - embedded) + 2 * embedded, rel=0.02)


def test_bf16_copies_are_held_by_replicas_and_by_no_shares():
    """All weights trained: 16 bytes each, a copy of 2, and a reference in bf16; norms are a few in ten thousand."""
    size = 494_032_768
    model = "Qwen/Qwen2.5-0.5B"
    assert plan_for(model, sharding="none").held == pytest.approx((4 + 8 + 2 + 2) * size, rel=0.01)
    assert plan_for(model, sharding="none", precision="fp32").held == pytest.approx((4 + 8 + 4) * size, rel=0.01)
    read = plan_for(model, sharding="none", reference_dtype="float32").held  # its products read a copy, too
    assert read == pytest.approx((4 + 8 + 2 + 4 + 2) * size, rel=0.01)
    shares = plan_for(model, gpus=8, sharding="full").held
    assert shares == pytest.approx((4 + 8 + 2) * size / 8, rel=0.02)


@pytest.mark.parametrize(
    ("gpu", "memory", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "H100"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "A100-80"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100-40"),
        ("NVIDIA GeForce RTX 4090", 25e9, "RTX4090"),
        ("Tesla T4", 16e9, None),
    ],
)
def test_this_machines_gpu_is_recognised(gpu, memory, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    if card is None:
        with pytest.raises(ValueError, match="this machine's Tesla T4 is in no table of cards: name the closest one"):
            plan(PlanArgs(model="gpt2"))
    else:
        assert plan(PlanArgs(model="gpt2")).setup.card.name == card


def test_hybrid_keeps_weights_within_a_node():
    full, hybrid = (plan_for(gpus=64, nodes=8, sharding=kind) for kind in ("full", "hybrid"))
    assert hybrid.setup.shards == 8 and full.setup.shards == 64
    assert hybrid.held > 6 * full.held
    assert hybrid.seconds < full.seconds  # over 400 Gbit/s between nodes


def test_bad_input_is_one_sentence(capsys, tmp_path):
    usual = ("--model", "gpt2")
    said = refusal(capsys, *usual, "--card", "H10")
    assert "unknown card 'H10' (did you mean 'H100'?); known: A100-40, A100-80, H100, H200, L40S" in said
    assert "gpus must be 1 or more, or None, got 0" in refusal(capsys, *usual, "--gpus", "0")
    said = refusal(capsys, *usual, "--gpus", "8", "--sharding", "hybrid")
    assert "sharding='hybrid' repeats the shares on every machine, but nodes=1: set sharding='full', or nodes" in said
    said = refusal(capsys, *usual, "--gpus", "6", "--nodes", "4")
    assert "gpus=6 processes do not divide into nodes=4: gpus counts those of all nodes" in said
    said = refusal(capsys, "--model", str(tmp_path))
    assert f"error: model '{tmp_path}' cannot be loaded: the folder has no readable model" in said
    assert "cannot be loaded: no such folder, and the hub" in refusal(capsys, "--model", "Qwen/Qwen2.5-8B")
    said = refusal(capsys, *usual, "--response-tokens", "100")
    assert "response_tokens=100 is above max_new_tokens=48: lower the first or raise the second" in said
    assert "quantization='4bit' freezes the policy's weights" in refusal(capsys, *usual, "--quantization", "4bit")
    assert "critic='separate' needs a value_model" in refusal(capsys, *usual, "--critic", "separate")


def test_how_far_a_run_may_grow_is_where_the_next_double_breaks(capsys):
    found = plan_for("Qwen/Qwen2.5-0.5B")
    limits = growth(found)
    fits, breaks, phase = limits["rollout_batch_size"]
    assert replan(found, rollout_batch_size=fits).fits and breaks == 2 * fits
    too_large = replan(found, rollout_batch_size=breaks)
    assert not too_large.fits and too_large.first_to_break == phase
    assert f"fits with up to {fits:,} responses a rollout; at {breaks:,}, {phase} breaks" in text(found)
    tokens = limits["response_tokens"][0]
    assert replan(found, max_new_tokens=tokens).fits and "tokens a response, if the model reads as many" in text(found)


def test_a_controllers_horizon_grows_along():
    limits = growth(plan_for("Qwen/Qwen2.5-0.5B", kl_target=10.0, kl_horizon=200.0))
    assert limits["rollout_batch_size"] == growth(plan_for("Qwen/Qwen2.5-0.5B"))["rollout_batch_size"]
