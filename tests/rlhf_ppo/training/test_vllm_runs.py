"""Runs whose responses a vLLM server samples (a stand-in): they learn as in process, stop in time, and resume."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import in_processes
from vllm_stand_in import error, standing_in

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.generation.vllm.engine import VLLMEngine
from rlhf_ppo.generation.vllm.server import VLLMError, VLLMServer
from rlhf_ppo.training.outside.ahead import RolloutsAhead
from rlhf_ppo.training.rollouts.collect import collect, make_batch


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options})


@pytest.fixture
def serve(served_model, make_trainer):
    """``serve(stand_in, **settings)``: a trainer whose responses the stand-in samples."""

    def make(stand_in: Any, **settings: Any) -> PPOTrainer:
        url = None if stand_in is None else stand_in.url
        given = {"model": str(served_model), "generation": "vllm", "vllm_url": url, "vllm_retries": 0}
        return make_trainer(**{**given, "total_episodes": 24, "learning_rate": 1e-2, **settings})

    return make


def metrics_of(trainer: PPOTrainer) -> list[dict[str, float]]:
    rows = trainer.run.read()
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows if "policy/loss" in row]


@pytest.mark.parametrize("adapter", [True, False])
def test_each_rollout_is_sampled_by_the_policy_that_learns_from_it(serve, served_model, adapter):
    """The server's log-probs stay ours up to rounding while the policy moves, and nothing stays behind."""
    with standing_in(served_model) as stand_in:
        trainer = serve(stand_in, peft_config=lora() if adapter else None, temperature=0.8, num_generations=2)
        trainer.train()
        rows = metrics_of(trainer)
        assert len(rows) == 3 and rows[-1]["policy/max_abs_log_ratio"] > 1e-2  # it did move
        for row in rows:
            assert row["policy/decode_gap_max_nats"] < 1e-4 and row["policy/staleness_updates"] == 0
            assert row["policy/importance_weight_mean"] == pytest.approx(1, abs=1e-4)
            assert row["policy/entropy"] > 0.5  # computed here: a server does not say it
        loaded = [request["lora_name"] for request in stand_in.asked("/v1/load_lora_adapter")]
        unloaded = [request["lora_name"] for request in stand_in.asked("/v1/unload_lora_adapter")]
        assert loaded == unloaded and len(loaded) == len(set(loaded)) == (3 if adapter else 0)
        assert len(stand_in.asked("/collective_rpc")) == (0 if adapter else 3)
        salts = [request["cache_salt"] for request in stand_in.asked("/v1/completions")]
        assert len(dict.fromkeys(salts)) == 3  # what is cached of one policy never serves another
    assert not stand_in.adapters and not (trainer.run.path / "vllm-policy").exists()


def test_the_same_run_again_gives_the_same_metrics_and_weights(serve, served_model):
    runs = []
    for _ in range(2):
        with standing_in(served_model) as stand_in:
            trainer = serve(stand_in)
            trainer.train()
        runs.append((metrics_of(trainer), trainer.model.policy.state_dict()))
    (first, weights), (second, others) = runs
    assert first == second and all(torch.equal(x, others[name]) for name, x in weights.items())


def test_conversations_and_evaluations_go_through_the_server(serve, served_model):
    with standing_in(served_model) as stand_in:
        trainer = serve(
            stand_in, respond=lambda messages: "ok", max_turns=2, max_new_tokens=3, eval_dataset=[{"prompt": "a"}] * 3
        )
        trainer.train()
        assert trainer.evaluate()["eval/length_tokens"] > 3
    rows = metrics_of(trainer)
    assert rows[0]["response/turns"] == 2 and all(row["policy/decode_gap_max_nats"] < 1e-4 for row in rows)


def test_a_conversation_ends_where_the_servers_context_is_full(serve, served_model):
    """Of 24 tokens, where the model's own context has 64; a first turn that does not fit is refused at the start."""

    def strict(path: str, request: Any, answer: Any) -> Any:
        if path == "/v1/completions" and len(request["prompt"]) + request["max_tokens"] > 24:
            return error(400, "This model's maximum context length is 24 tokens")
        return answer

    settings = {"respond": lambda messages: "ok then", "max_turns": 4, "max_new_tokens": 6, "total_episodes": 8}
    with standing_in(served_model, max_model_len=24, change=strict) as stand_in:
        trainer = serve(stand_in, **settings)
        trainer.train()
        assert trainer.fixed.room == 18 and 1 <= metrics_of(trainer)[0]["response/turns"] < 4
    with standing_in(served_model, max_model_len=14) as stand_in, pytest.raises(ValueError, match="reads at most 14"):
        serve(stand_in, **settings)


def test_an_engine_that_is_wrapped_is_still_known(serve, served_model):
    """As `verify` wraps it: the policy is published, and the rollout is another program's."""
    with standing_in(served_model) as stand_in:
        trainer = serve(stand_in, peft_config=lora())
        with torch.no_grad():
            next(p for n, p in trainer.model.policy.named_parameters() if "lora_B" in n).add_(0.1)
        wrapped = dataclasses.replace(trainer.fixed, sample=lambda *a, **options: trainer.fixed.sample(*a, **options))
        rollout = collect(wrapped, trainer.model, make_batch(["a"], {}, copies=1), torch.Generator().manual_seed(0))
        assert len(stand_in.asked("/v1/load_lora_adapter")) == 2 and rollout.foreign


def train_with_a_slow_second_process(url: str, model: str, folder: str) -> int:
    """Train and evaluate; the second process samples ahead only once it is about to have a new policy published."""
    if os.environ["RANK"] == "1":
        going_on, complete, start = threading.Event(), VLLMServer.complete, RolloutsAhead.start
        going_on.set()

        def late(self: VLLMServer, *args: Any, **options: Any) -> Any:
            going_on.wait(60)
            return complete(self, *args, **options)

        def start_late(self: RolloutsAhead, *args: Any) -> None:
            going_on.clear()
            start(self, *args)

        def noted(method: Any) -> Any:
            @functools.wraps(method)
            def call(*args: Any, **options: Any) -> Any:
                going_on.set()
                return method(*args, **options)

            return call

        VLLMServer.complete, RolloutsAhead.start = late, start_late
        VLLMEngine.wait, VLLMEngine.use = noted(VLLMEngine.wait), noted(VLLMEngine.use)
    rows = [{"prompt": text} for text in ("a", "b", "c", "d")]
    settings = {
        "vllm_url": url,
        "vllm_retries": 0,
        "total_episodes": 12,
        "rollout_batch_size": 4,
        "num_minibatches": 1,
        "num_epochs": 1,
        "max_new_tokens": 3,
        "rollouts_ahead": 1,
        "eval_every": 1,
        "learning_rate": 1e-2,
        "decode_batch_size": 1,
        "max_sampler_gap": 50.0,
    }
    fixed = {"generation": "vllm", "quiet": True, "device": "cpu", "report": False}
    args = RLHFConfig(output_dir=folder, **settings, **fixed)
    trainer = PPOTrainer(model, lengths, args, rows, eval_dataset=rows[:2], peft_config=lora())
    trainer.train()
    return trainer.iteration


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def test_an_evaluation_waits_for_what_other_processes_sample_ahead(served_model, tmp_path):
    """It gives the server a new policy, and takes the one away with which the second process still samples."""
    with standing_in(served_model) as stand_in:
        done = in_processes(2, train_with_a_slow_second_process, stand_in.url, str(served_model), str(tmp_path / "run"))
        assert done == [3, 3] and not stand_in.adapters
        salts = [salt for salt, _ in itertools.groupby(x["cache_salt"] for x in stand_in.asked("/v1/completions"))]
        assert len(salts) == len(set(salts))  # each policy has ended before the next one begins


# What stops a run


def failing_later(path: str, after: int, answer: Any) -> Any:
    """Replace answers to ``path`` from the one with number ``after`` on."""
    seen = itertools.count()
    return lambda where, request, usual: answer if where == path and next(seen) >= after else usual


STOPS = {
    "gone": ("/v1/completions", 20, None, "start the server again, or correct vllm_url"),
    "out of memory": ("/v1/completions", 20, error(500, "CUDA out of memory"), "ran out of memory"),
    "refuses the adapter": ("/v1/load_lora_adapter", 1, error(500, "no room"), "no room"),
    "forgets the adapter": ("/v1/completions", 20, error(404, "does not exist"), "does not have the model or adapter"),
    "loads nothing": ("/v1/load_lora_adapter", 1, None, "start the server again"),
}


@pytest.mark.parametrize("fault", STOPS)
def test_a_fault_ends_the_run_with_a_checkpoint_from_which_it_goes_on_as_if_nothing_had_been(
    serve, served_model, fault
):
    path, after, answer, message = STOPS[fault]
    with standing_in(served_model, change=failing_later(path, after, answer)) as stand_in:
        trainer = serve(stand_in, peft_config=lora())
        with pytest.raises(VLLMError, match=message) as raised:
            trainer.train()
    assert "Resume with resume_from_checkpoint=" in str(raised.value)
    assert not (trainer.run.path / "vllm-policy").exists()
    if fault == "out of memory":
        assert not stand_in.adapters  # it still answers other requests
    (checkpoint,) = trainer.run.path.glob("checkpoint-*")
    if fault != "gone":
        return
    with standing_in(served_model) as stand_in:
        resumed = serve(stand_in, peft_config=lora(), output_dir=str(trainer.run.path))
        resumed.train(resume_from_checkpoint=checkpoint)
    with standing_in(served_model) as stand_in:
        whole = serve(stand_in, peft_config=lora())
        whole.train()
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_server_that_keeps_older_weights_is_noticed(serve, served_model, monkeypatch):
    """It says that it loaded the adapter, and samples with the one before."""
    from vllm_stand_in import StandIn

    honest = StandIn.load

    def stale(self: StandIn, name: str, path: str) -> Any:
        answer, before = honest(self, name, path), list(self.adapters.values())
        if len(before) > 1:
            self.adapters[name] = before[0]
        return answer

    monkeypatch.setattr(StandIn, "load", stale)
    with standing_in(served_model) as stand_in:
        trainer = serve(stand_in, peft_config=lora(), learning_rate=0.1)
        with pytest.raises(VLLMError, match=r"nats per token from ours, above max_sampler_gap=0\.1.*Resume with"):
            trainer.train()
    assert trainer.iteration == 1 and list(trainer.run.path.glob("checkpoint-1"))
    with standing_in(served_model) as stand_in:  # a bound says how far is too far
        serve(stand_in, peft_config=lora(), learning_rate=0.1, max_sampler_gap=50.0).train()


# What is refused at the start


def test_without_a_server_the_line_that_starts_one_is_printed(serve, served_model):
    with pytest.raises(ValueError, match="needs vllm_url") as raised:
        serve(None, peft_config=lora(r=12))
    line = str(raised.value).splitlines()[-1]
    assert f"vllm serve {served_model} " in line and "--max-lora-rank 16" in line and "--dtype float32" in line
    with pytest.raises(ValueError, match="vllm serve FOLDER"):
        serve(None, model=None)
    with pytest.raises(ValueError, match=r"Connection refused.*Nothing was generated\. This line starts a server:"):
        serve(None, vllm_url="http://127.0.0.1:9")


def test_another_model_tokenizer_or_context_is_refused_before_the_first_rollout(
    serve, served_model, make_model, tokenizer, tmp_path
):
    other = tmp_path / "other"
    make_model("llama", seed=7).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with standing_in(other) as stand_in:
        with pytest.raises(ValueError, match=r"does not sample from .*another model"):
            serve(stand_in, peft_config=lora())  # without an adapter its weights would be replaced
        assert not stand_in.adapters and not list(tmp_path.rglob("vllm-policy"))
    with standing_in(served_model, logprobs_mode="raw_logprobs") as stand_in:
        serve(stand_in)  # at temperature 1 they are the same
        with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
            serve(stand_in, temperature=0.3)
    short = r"reads at most 9 tokens, .* make 17: .*--max-model-len 17"
    with standing_in(served_model, max_model_len=9) as stand_in, pytest.raises(ValueError, match=short):
        serve(stand_in)
    shutil.copytree(served_model, tmp_path / "shifted")
    text = json.loads((tmp_path / "shifted" / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "shifted" / "tokenizer.json").write_text(json.dumps(text))
    with standing_in(tmp_path / "shifted") as stand_in, pytest.raises(ValueError, match="with another tokenizer"):
        serve(stand_in)


def test_what_no_server_can_sample_is_refused(serve, served_model):
    from peft import IA3Config

    with standing_in(served_model) as stand_in:
        with pytest.raises(ValueError, match=r"min_new_tokens=2 bans the stop tokens \(5,\), but .* ends \(0,\)"):
            serve(stand_in, min_new_tokens=2, stop_token_ids=(5,))
        with pytest.raises(ValueError, match="takes LoRA adapters, and peft_config is IA3Config"):
            serve(
                stand_in,
                peft_config=IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
            )
        with pytest.raises(ValueError, match="rollouts_ahead=1 would call respond or environments"):
            serve(stand_in, rollouts_ahead=1, max_turns=2, respond=lambda messages: "ok")
        with pytest.raises(ValueError, match="save it in a folder first"):
            serve(stand_in, peft_config=lora(init_lora_weights="pissa"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation": "auto", "vllm_url": "http://x:1"}, "vllm_url='http://x:1'.*generation='auto' asks no server"),
        ({"generation": "auto", "vllm_url": None, "rollouts_ahead": 1}, "rollouts_ahead=1.*asks no server"),
        ({"rollouts_ahead": 2}, "rollouts_ahead=2 is more than the one rollout"),
        ({"replay": "runs/x"}, "generation='vllm' samples, and replay='runs/x'"),
        ({"importance_weights": "none", "importance_weight_cap": 2.0}, "importance_weights='none' makes no weights"),
        ({"generation": "auto", "vllm_url": None, "importance_weights": "token"}, "recompute_logprobs=False"),
        ({"objective": "dis", "importance_weights": "sequence"}, "objective='dis'"),
        ({"max_sampler_gap": 0.0}, "max_sampler_gap must be positive"),
    ],
)
def test_settings_that_contradict_each_other(serve, settings, message):
    settings = {"vllm_retries": 3, **settings}
    with pytest.raises(ValueError, match=message):
        serve(None, **settings)


# One rollout ahead


def test_one_ahead_learns_from_responses_of_the_policy_before_with_weights(serve, served_model):
    with standing_in(served_model) as stand_in:
        trainer = serve(
            stand_in,
            rollouts_ahead=1,
            learning_rate=2e-3,
            total_episodes=32,
            importance_weight_cap=5.0,
            eval_every=2,
            eval_dataset=[{"prompt": "a"}],
        )
        trainer.train()
    rows = metrics_of(trainer)
    assert [row["policy/staleness_updates"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["policy/sampler_gap_mean_nats"] < 1e-5 < 1e-2 < rows[1]["policy/sampler_gap_mean_nats"]
    # Their mean over the old policy's tokens is 1 in expectation, and each is far from it.
    assert 0.5 < rows[1]["policy/importance_weight_mean"] < 2 and rows[1]["policy/decode_gap_max_nats"] > 0.1


def test_one_ahead_samples_the_same_prompts_in_the_same_order_and_resumes(serve, served_model):
    """The rollout in flight when a run stops is sampled again, with the policy of then: from there on, staleness 0."""
    seen: dict[int, list[Any]] = {}
    for ahead in (0, 1):
        with standing_in(served_model) as stand_in:
            trainer = serve(stand_in, rollouts_ahead=ahead, learning_rate=1e-3, save_every=1)
            trainer.train()
        asked = stand_in.asked("/v1/completions")[4:]  # after the check of log-probs
        seen[ahead] = [sorted(request["prompt"] for request in asked[i : i + 8]) for i in (0, 8, 16)]
    assert seen[0] == seen[1]
    with standing_in(served_model) as stand_in:
        resumed = serve(stand_in, rollouts_ahead=1, learning_rate=1e-3, output_dir=str(trainer.run.path), save_every=1)
        resumed.train(resume_from_checkpoint=trainer.run.path / "checkpoint-1")
    assert [row["policy/staleness_updates"] for row in metrics_of(resumed)] == [0, 0, 1]


def test_one_ahead_sampling_and_update_run_side_by_side(serve, served_model):
    """Each update waits until the next rollout's first request has come: in turn, it would wait for ever."""

    def waits(trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        end = time.monotonic() + 60
        while len(stand_in.asked("/v1/completions")) < 4 + min(24, 8 * trainer.iteration + 1):
            assert time.monotonic() < end
            time.sleep(0.01)

    with standing_in(served_model) as stand_in:
        serve(stand_in, rollouts_ahead=1, learning_rate=1e-3, callbacks=[waits]).train()
    assert len(stand_in.asked("/v1/completions")) == 4 + 24


def test_an_error_of_the_rollout_ahead_stops_the_run_where_it_is_needed(serve, served_model):
    change = failing_later("/v1/completions", 4 + 8, error(500, "EngineCore encountered an issue"))
    with standing_in(served_model, change=change) as stand_in:
        trainer = serve(stand_in, rollouts_ahead=1)
        with pytest.raises(VLLMError, match=r"has lost its engine.*Resume with"):
            trainer.train()
    assert trainer.iteration == 1 and list(trainer.run.path.glob("checkpoint-1"))


# The real thing


@pytest.fixture
def learning(monkeypatch) -> Any:
    """benchmarks/vllm_learning.py, or a skip where no interpreter has vLLM."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    module = importlib.import_module("vllm_learning")
    if not os.environ.get("RLHF_PPO_VLLM_PYTHON"):
        pytest.skip(
            f"no vLLM here: in an environment of its own, {module.INSTALL}; RLHF_PPO_VLLM_PYTHON names its python"
        )
    return module


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["adapter", "all weights"])
def test_a_policy_learns_through_a_real_server_as_in_process(learning, tmp_path, weights):
    folder, served = tmp_path / "model", {"generation": "vllm"}
    learning.save_model(folder)
    rank = learning.RANK if weights == "adapter" else None
    with learning.serving(os.environ["RLHF_PPO_VLLM_PYTHON"], folder, lora_rank=rank) as url:
        served |= {"vllm_url": url}
        trainer = learning.train(folder, tmp_path / "vllm", weights, 0, episodes=384, **served)
        # Our stops, a minimum length and another temperature: the log-probs are still ours.
        limits = {"temperature": 0.7, "min_new_tokens": 2, "stop_strings": ("a", "th"), "num_generations": 2}
        limited = learning.train(folder, tmp_path / "limited", weights, 0, episodes=64, **served, **limits)
    own = learning.train(folder, tmp_path / "own", weights, 0, episodes=384)
    ours, theirs = (learning.measure(x)["score"] for x in (own, trainer))
    assert theirs[0] < 0.6 and min(sum(ours[-3:]), sum(theirs[-3:])) / 3 > 0.75
    for row in metrics_of(trainer) + metrics_of(limited):
        assert row["policy/decode_gap_max_nats"] < 1e-3
    assert metrics_of(limited)[0]["response/eos_fraction"] > 0.1


# Responses from elsewhere


def given(rollout: Any) -> dict[str, Any]:
    rows = [row.tolist() for row in rollout.mask.sum(dim=1)]
    logprobs = rollout.logprobs if rollout.sampled_logprobs is None else rollout.sampled_logprobs
    return {
        "prompts": rollout.prompts,
        "completion_ids": [ids[:n].tolist() for ids, n in zip(rollout.response_ids, rows, strict=True)],
        "logprobs": [x[:n].tolist() for x, n in zip(logprobs, rows, strict=True)],
    }


def test_responses_of_our_own_engine_given_back_make_the_same_update(make_trainer, prompts):
    one, other = (make_trainer(recompute_logprobs=True, importance_weight_cap=2.0) for _ in range(2))
    rollout = one.rollout(prompts)
    again = other.rollout_from(**given(rollout))
    for name in ("prompt_ids", "prompt_mask", "response_ids", "mask", "finished", "logprobs", "values"):
        assert torch.equal(getattr(again, name), getattr(rollout, name)), name
    assert again.completions == rollout.completions and again.scores.tolist() == rollout.scores.tolist()
    # Decoding rounds otherwise than a full pass.
    torch.testing.assert_close(again.entropy, rollout.entropy)
    torch.testing.assert_close(again.sampled_logprobs, rollout.sampled_logprobs)
    ours, theirs = one.step(rollout), other.step(again)
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, msg=name)
    assert theirs["policy/importance_weight_mean"] == pytest.approx(ours["policy/importance_weight_mean"])


def test_responses_of_another_policy_are_weighted_by_the_ratio(make_trainer, make_model, prompts):
    other, trainer = make_trainer(model=make_model(seed=1)), make_trainer()
    rollout = trainer.rollout_from(**given(other.rollout(prompts)), scores=[float(i) for i in range(8)])
    weights = (rollout.logprobs - rollout.sampled_logprobs).exp().clamp(max=2.0)[rollout.mask]
    metrics = trainer.step(rollout)
    assert metrics["policy/importance_weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert metrics["policy/importance_capped_fraction"] == pytest.approx(float((weights >= 2).float().mean()))
    assert metrics["score/mean"] == 3.5 and metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-4
    trainer.run.log(metrics)  # all of them are in the metric dictionary


def test_tokens_of_tools_are_read_and_never_trained(make_trainer, prompts):
    """Only the log-probs of the policy's own tokens are asked for; what tools said changes nothing but the context."""
    trainer = make_trainer(max_new_tokens=16)
    masks = [[True, True, False, False, True]] * 4
    ids = [[5, 6, 7, 8, 9], [5, 6, 8, 7, 0], [9, 9, 2, 2, 9], [1, 2, 3, 4, 5]]
    rollout = trainer.rollout_from(prompts[:4], ids, [[-1.0, -2.0, None, float("nan"), -3.0]] * 4, masks=masks)
    assert rollout.mask.tolist() == masks and rollout.environment.tolist() == [[not x for x in masks[0]]] * 4
    assert rollout.turns.tolist() == [[0, 0, 0, 0, 1]] * 4 and rollout.finished.tolist() == [False, True, False, False]
    assert rollout.sampled_logprobs.tolist() == [[-1.0, -2.0, 0.0, 0.0, -3.0]] * 4
    assert not rollout.logprobs[~rollout.mask].any() and rollout.logprobs[rollout.mask].all()
    swapped = trainer.rollout_from(
        prompts[:4], [[*row[:2], 3, 3, row[4]] for row in ids], [[-1.0] * 5] * 4, masks=masks
    )
    assert torch.equal(swapped.logprobs[:, :2], rollout.logprobs[:, :2])
    assert not torch.equal(swapped.logprobs[:, 4], rollout.logprobs[:, 4])
    assert trainer.step(rollout)["response/turns"] == 2


def test_given_prompt_ids_and_columns_are_used(make_trainer):
    seen: dict[str, Any] = {}

    def reward(prompts, completions, *, answer, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer, ids=completion_ids)
        return [1.0, 0.0]

    trainer = make_trainer(reward_funcs=reward, rollout_batch_size=2, train_dataset=[{"prompt": "a", "answer": "b"}])
    rollout = trainer.rollout_from(
        ["a", "b"], [[5, 6], [7]], [[-1.0, -1.0], [-2.0]], prompt_ids=[[9, 9, 9], [4]], answer=["x", "y"]
    )
    assert rollout.prompt_ids.tolist() == [[9, 9, 9], [0, 0, 4]]
    assert seen == {"prompts": ["a", "b"], "completions": ["cd", "e"], "answer": ["x", "y"], "ids": [[5, 6], [7]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": [[5, 6]]}, "completion_ids has 1 rows for 2 prompts"),
        ({"answer": [1]}, "answer has 1 rows for 2 prompts"),
        ({"logprobs": [[-1.0], [-1.0]]}, "response 0: 2 completion_ids and 1 logprobs"),
        ({"completion_ids": [[5, 30], [7]]}, "response 0: token id 30 is not in the model's vocabulary of 30"),
        ({"prompt_ids": [[1], [-2]]}, "response 1: token id -2"),
        ({"logprobs": [[-1.0, 0.1], [-1.0]]}, r"response 0: token 1 has the log-prob 0\.1: it must be finite"),
        ({"logprobs": [[-1.0, -1.0], [float("nan")]]}, "response 1: token 0 has the log-prob nan"),
        ({"logprobs": [[-1.0, None], [-1.0]]}, "response 0: token 1 has the log-prob None"),
        (
            {"masks": [[True, True], [False]]},
            "response 1: it has no token of the prompt, or none that",
        ),
        ({"masks": [[True], [True]]}, "response 0: 2 completion_ids and 1 masks"),
        ({"completion_ids": [[5] * 64, [7]], "logprobs": [[-1.0] * 64, [-1.0]]}, r"9 \+ 64 tokens, but .* holds 64"),
        ({"completion_ids": [[5, 6.0], [7]]}, r"response 0: token ids must be whole numbers, got 6\.0"),
        ({"completion_ids": ["ab", [7]]}, "response 0: its completion_ids must be a list, got 'ab'"),
        ({"prompt_ids": [[1], 2]}, "response 1: its prompt_ids must be a list, got 2"),
        ({"logprobs": [["a", -1.0], [-1.0]]}, "response 0: token 0 has the log-prob 'a'"),
        ({"logprobs": None}, "logprobs must be a list with one entry for each response, got None"),
        ({"masks": [[True, 2], [True]]}, "response 0: masks must be True or False, got 2"),
        ({"scores": [1.0, "b"]}, "scores must be finite, .* got 'b'"),
        ({"scores": [1.0, float("inf")]}, "scores must be finite, or None where a response has none, got inf"),
        ({"prompts": [], "completion_ids": [], "logprobs": []}, "got 0 for groups of num_generations=1"),
    ],
)
def test_bad_responses_are_named(make_trainer, changes, message):
    good = {"prompts": ["once upon", "a"], "completion_ids": [[5, 6], [7]], "logprobs": [[-1.0, -1.0], [-2.0]]}
    with pytest.raises(ValueError, match=message):
        make_trainer().rollout_from(**{**good, **changes})
    assert dataclasses.fields(make_trainer().rollout_from(**good, scores=[1.0, None]))


def test_tensors_and_arrays_are_taken_as_lists(make_trainer):
    trainer, ids, logprobs = make_trainer(), [[5, 6], [7, 8]], [[-1.0, -1.5], [-2.0, -0.5]]
    plain = trainer.rollout_from(["a", "b"], ids, logprobs, masks=[[True, False], [True, True]], scores=[1.0, 2.0])
    array = np.array(ids)
    given = trainer.rollout_from(
        ["a", "b"],
        [array[0], array[1]],
        torch.tensor(logprobs),
        masks=np.array([[True, False], [True, True]]),
        scores=np.array([1, 2], dtype=np.float32),
        prompt_ids=[list(np.array([4])), [5]],
    )
    for name in ("response_ids", "mask", "sampled_logprobs", "scores"):
        assert torch.equal(getattr(given, name), getattr(plain, name)), name


def test_prompts_are_rendered_with_the_runs_and_the_rows_template_variables(make_trainer, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ mode }}"
    chat = [{"role": "user", "content": "ab"}]
    settings = {"train_dataset": [{"prompt": chat}] * 8, "chat_template_kwargs": {"mode": "zz"}}
    trainer = make_trainer(processing_class=tokenizer, **settings)
    ours = trainer.rollout([chat] * 2, chat_template_kwargs=[None, {"mode": "x"}])
    columns = {"chat_template_kwargs": [None, {"mode": "x"}]}
    theirs = trainer.rollout_from(**given(ours), **columns)
    assert torch.equal(theirs.prompt_ids, ours.prompt_ids) and torch.equal(theirs.prompt_mask, ours.prompt_mask)
    short = make_trainer(processing_class=tokenizer, overlong_prompts="truncate", **settings)
    long = short.rollout(["ab" * 60] * 2)
    assert torch.equal(short.rollout_from(**given(long)).prompt_ids, long.prompt_ids)


def test_a_stop_string_ends_the_last_turn_alone(make_trainer, tokenizer):
    """The turn "ab" and the tool's "cbd" hold the stop string, too, and end nothing."""
    trainer = make_trainer(stop_strings=("b",), max_new_tokens=16)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cbd", "eb", "ef")]
    first, tool, stopped, going = ids
    lengths = [[True] * 2 + [False] * 3 + [True] * 2] * 2
    rollout = trainer.rollout_from(
        ["a"] * 2,
        [[*first, *tool, *stopped], [*first, *tool, *going]],
        [[-1.0] * 7] * 2,
        masks=lengths,
        scores=[1.0, 1.0],
    )
    assert rollout.completions == ["abcbde", "abcbdef"] and rollout.finished.tolist() == [True, False]
    stop = trainer.fixed.sampling.stop_token_ids[0]
    said = trainer.rollout_from(["a"], [[5, stop]], [[-1.0, -1.0]], masks=[[True, False]], scores=[1.0])
    assert not said.finished.any()  # the tool's, not the policy's


def test_given_scores_and_groups_must_fit_the_settings(make_trainer):
    good = {"prompts": ["a"] * 3, "completion_ids": [[5]] * 3, "logprobs": [[-1.0]] * 3}
    with pytest.raises(ValueError, match="got 3 for groups of num_generations=2"):
        make_trainer(num_generations=2).rollout_from(**good)
    with pytest.raises(ValueError, match="scores are given, and normalize_scores is about the reward functions'"):
        make_trainer(normalize_scores=True).rollout_from(**good, scores=[1.0, 2.0, 3.0])
