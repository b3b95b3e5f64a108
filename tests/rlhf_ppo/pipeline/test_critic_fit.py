"""Critics fitted on recorded rollouts: what they learn, how runs start from them, and which runs may not."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs, CriticReportArgs
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.pipeline.critic.critic_fit import fit_critic
from rlhf_ppo.pipeline.critic.critic_report import report_critic, say_report
from rlhf_ppo.pipeline.critic.data import all_rows, hold_out, load_critic_data, recorded_values
from rlhf_ppo.pipeline.critic.models import load_fitted
from rlhf_ppo.training.checkpoints.fingerprints import copy_fingerprint

PROMPTS = ["".join(letters) for pair in ("ab", "yz") for letters in itertools.product(pair, repeat=6)]
SMALL = {"microbatch_tokens": 4096, "device": "cpu", "precision": "fp32"}


def by_prompt(prompts, completions, **columns) -> list[float]:
    """What the prompt alone decides: 107 or 103."""
    return [107.0 if prompt[0] in "ab" else 103.0 for prompt in prompts]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """What the first test that needs it makes: the policy, its recording, and a critic fitted on that."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def world(tmp_path, made, make_model, make_trainer, tokenizer):
    """A policy with recorded rollouts: ``start(**settings)`` -> a trainer, ``record(name, **settings)`` -> a run's
    folder, ``fit(*folders, **settings)`` -> a critic; ``run`` and ``critic`` are of the usual settings."""
    policy = made["folder"] / "policy"
    if not policy.is_dir():
        make_model().save_pretrained(policy)
        tokenizer.save_pretrained(policy)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    usual = {"model": str(policy), "reward_funcs": by_prompt, "train_dataset": rows, "processing_class": None}
    usual |= {"rollout_batch_size": 64, "total_episodes": 192, "num_minibatches": 4}

    def start(**settings):
        return make_trainer(**{**usual, **settings})

    def record(folder: str | Path, **settings) -> str:
        start(output_dir=str(tmp_path / folder), save_rollouts=True, **settings).record()
        return str(tmp_path / folder)

    def fit(*folders: str, name: str | Path = "critic", **settings):
        args = {"rollouts": folders, "output_dir": str(tmp_path / name), "quiet": True, **SMALL, **settings}
        return fit_critic(CriticFitArgs(**args))

    if "run" not in made:
        made["run"] = record(made["folder"] / "run")
        made["critic"] = fit(made["run"], name=made["folder"] / "critic")
    return SimpleNamespace(**made, policy=str(policy), record=record, start=start, fit=fit, tmp=tmp_path)


def first_update(trainer) -> dict[str, float]:
    return trainer.step(trainer.rollout(PROMPTS[::2]))


# What is learned, and where a run starts


def test_a_run_that_starts_from_a_fitted_critic_knows_what_prompts_are_worth(world):
    """On prompts that the critic has not seen; a new head knows nothing in its first update."""
    result = world.critic
    assert result.facts.held_out["explained_variance"] > 0.5
    assert result.facts.held_out["error"] < 0.75 * result.facts.held_out["error_of_mean"]
    fresh = first_update(world.start())
    fitted = first_update(world.start(value_head_from=str(result.folder)))
    assert fresh["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert fitted["value/explained_variance"] > 0.5
    assert fitted["value/mean"] == pytest.approx(105, abs=0.5)


def test_the_head_is_solved_and_judged_exactly(world):
    """The explained variance that follows from sums of products is that of the values themselves."""
    result = world.critic
    assert max(result.history) == pytest.approx(result.facts.held_out["explained_variance"], abs=1e-4)
    data = load_critic_data([world.run])
    reader, _ = load_fitted(str(result.folder), CriticReportArgs(rollouts="", **SMALL, critic="x"), data)
    train, _ = hold_out(data, 0.2, by="prompt", seed=0)
    states, returns = [], []
    with torch.no_grad():
        for part, rows in zip(data.rollouts, train, strict=True):
            for batch, sequences in reader.passes(part, rows):
                states.append(reader.model.runner.hidden(sequences).double())
                returns.append(part.returns[batch, : sequences.mask.shape[1]][sequences.mask])
    x, y = torch.cat(states), torch.cat(returns)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    exact = float((x @ torch.linalg.lstsq(x, y[:, None]).solution - y[:, None]).square().mean())
    head, scale = reader.model.value_head, reader.model.value_scale
    own = scale.denormalize(x[:, :-1] @ head.weight.double().T + head.bias.double()).detach()
    # The penalty that held-out rollouts chose may leave a little more than the least squares.
    assert exact <= float((own - y[:, None]).square().mean()) < 1.3 * exact
    assert float(own.mean()) == pytest.approx(float(y.mean()), abs=1e-4)  # the penalty leaves the mean alone
    assert scale.mean == pytest.approx(float(y.mean())) and scale.std == pytest.approx(float(y.std(correction=0)))


def test_scale_and_offset_of_the_reward_change_nothing(world):
    """Scores a * s + b, and kl_coef times a, give the same head in units of another mean and spread."""

    def scaled(prompts, completions, **columns):
        return [0.001 * s - 7 for s in by_prompt(prompts, completions)]

    one, two = world.critic, world.fit(world.record("other", reward_funcs=scaled, kl_coef=0.05 * 0.001))
    assert one.history == pytest.approx(two.history, abs=1e-6)
    assert one.facts.probe == pytest.approx(two.facts.probe, abs=1e-5)


@pytest.mark.parametrize("kind", ["separate", "adapter"])
def test_a_run_holds_the_very_critic_that_was_fitted(world, kind):
    folder, lora = world.run, {"lora_rank": 4, "lora_target_modules": ("c_attn",)}
    own = lora if kind == "adapter" else {"value_model": world.policy}
    result = world.fit(folder, kind=kind, num_epochs=6, batch_size=16, learning_rate=0.02, **own)
    assert result.facts.held_out["explained_variance"] > 0.3
    start = {"value_head_from": str(result.folder)}
    if kind == "adapter":
        start |= {"critic": "adapter", "peft_config": lora_config(4, target_modules=("c_attn",))}
    else:
        start |= {"value_model": str(result.folder)}
    trainer = world.start(**start)
    data = load_critic_data([folder])
    reader, facts = load_fitted(str(result.folder), CriticReportArgs(rollouts=folder, critic="x", **SMALL), data)
    rollout = data.rollouts[0].rollout
    with torch.no_grad():
        values = trainer.model.head_values(rollout.sequences(range(64)))
    expected = reader.values(data.rollouts, all_rows(data))[0]
    torch.testing.assert_close(trainer.model.in_reward_units(values, rollout.mask), expected, atol=1e-4, rtol=0)
    assert facts == result.facts
    metrics = first_update(trainer)
    assert metrics["value/explained_variance"] > 0.3


def test_a_reward_model_as_the_start(world, make_classifier, tokenizer):
    """Its head predicts in the reward's units: a critic that starts as one keeps its values until it learns."""
    reward = world.tmp / "reward"
    model = make_classifier()
    model.save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    own = {"kind": "separate", "value_model": str(reward), "value_head_from": str(reward)}
    result = world.fit(world.run, num_epochs=1, learning_rate=1e-30, **own)
    assert result.history[0] == pytest.approx(result.history[1], abs=1e-3)
    ids = torch.arange(1, 10)[None] * 7 % 30
    model.eval().config.pad_token_id = None
    with torch.no_grad():
        scores = torch.stack([model(ids[:, : n + 1]).logits[0, 0] for n in range(8)])
    scale = world.start(value_head_from=str(result.folder), value_model=str(result.folder)).model.value_scale
    torch.testing.assert_close(torch.tensor(result.facts.probe), scale.normalize(scores), atol=1e-4, rtol=1e-4)


def test_the_best_pass_is_kept_and_patience_ends_the_fit(world):
    result = world.fit(
        world.run, kind="separate", value_model=world.policy, num_epochs=30, patience=2, learning_rate=0.05
    )
    best = result.history.index(max(result.history))
    assert len(result.history) == best + 3 < 31
    assert result.facts.held_out["explained_variance"] == pytest.approx(max(result.history), abs=1e-4)


def test_prompts_or_rollouts_are_held_out_whole(world):
    data = load_critic_data([world.run])

    def prompts(rows) -> set[str]:
        return {part.rollout.prompts[i] for part, some in zip(data.rollouts, rows, strict=True) for i in some}

    train, held_out = hold_out(data, 0.25, by="prompt", seed=1)
    assert not prompts(train) & prompts(held_out)
    assert len(prompts(held_out)) == 32 and len(prompts(train)) == 96
    train, held_out = hold_out(data, 0.25, by="rollout", seed=1)
    assert sorted(map(len, held_out)) == [0, 0, 64] and sorted(map(len, train)) == [0, 64, 64]


def test_several_recordings_are_one(world):
    folders = world.run, world.record("b", seed=5, total_episodes=64)
    result = world.fit(*folders)
    assert result.facts.recordings == [str(Path(folder).resolve() / "rollouts") for folder in folders]
    assert result.facts.held_out["explained_variance"] > 0.5


def test_the_returns_are_those_of_the_run(world):
    """Monte Carlo returns of the shaped scores minus the KL, discounted; the settings come from the recording."""
    reference = {"ref_model": None, "kl_coef": 0.3, "gamma": 0.9, "score_clip": 105.0}
    folder = world.record("run", **reference)
    data = load_critic_data([folder])
    part = data.rollouts[0]
    rollout = part.rollout
    kl = (rollout.logprobs - rollout.ref_logprobs).double()
    for row in range(5):
        n = int(rollout.lengths[row])
        rewards = -0.3 * kl[row, :n]
        rewards[-1] += min(float(rollout.scores[row]), 105.0)
        expected = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]
        assert part.returns[row, :n].tolist() == pytest.approx([float(x) for x in expected])
    other = load_critic_data([folder], gamma=1.0, kl_coef=0.0)
    assert other.rollouts[0].returns[0, 0] == min(float(rollout.scores[0]), 105.0)


# Refusals


REFUSED = {
    "gamma": (
        {"gamma": 0.9},
        r"critic in value_head_from=.* was fitted on returns with gamma=1.0, but the run has gamma=0.9: set it to 1.0",
    ),
    "shaping": ({"score_clip": 5.0}, r"fitted on returns with score_clip=None, but the run has score_clip=5.0"),
    "weights": (
        {"reward_weights": (2.0,)},
        r"fitted on the rewards by_prompt \(weight 1\), but the run has by_prompt \(weight 2\)",
    ),
    "separate": (
        {"value_model": True},
        r"is a critic of the kind 'shared', but the run's is 'separate': leave out value_model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_of_another_kind_is_refused_before_a_model_is_loaded(world, monkeypatch, case):
    folder = str(world.critic.folder)
    settings, message = REFUSED[case]
    if settings.get("value_model"):
        settings = {"value_model": world.policy}

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_policy", load)
    with pytest.raises(ValueError, match=message):
        world.start(value_head_from=folder, **settings)


def test_a_run_with_other_rewards_tokenizer_or_model_is_refused(world, make_model, tokenizer):
    folder = str(world.critic.folder)

    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    with pytest.raises(ValueError, match=r"rewards by_prompt \(weight 1\), but the run has length \(weight 1\)"):
        world.start(value_head_from=folder, reward_funcs=length)
    tokenizer.add_tokens(["qq"])
    with pytest.raises(ValueError, match=r"tokens of another tokenizer \(30 tokens, .*\) than the run's \(31 tokens"):
        world.start(value_head_from=folder, processing_class=tokenizer)
    make_model(seed=1).save_pretrained(world.tmp / "other")
    AutoTokenizer.from_pretrained(world.policy).save_pretrained(world.tmp / "other")
    with pytest.raises(
        ValueError, match=r"fitted on hidden states of '.*policy', but the run's model \('.*other'\) has"
    ):
        world.start(value_head_from=folder, model=str(world.tmp / "other"))


def test_a_model_that_was_trained_a_little_is_refused_and_its_copies_are_not(world):
    """One step at a rate of 1e-5 changes the values of eight tokens by less than 0.01; its digest tells it."""
    start, folder = {"value_head_from": str(world.critic.folder)}, world.tmp / "trained"
    shutil.copytree(world.policy, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-5)
    model.save_pretrained(folder)
    own, theirs = r"its weights have the digest \w+", rf"critic's model had {world.critic.facts.weights}"
    message = rf"of '.*policy', but the run's model \('.*trained'\) has others: {own}, those of the {theirs}; start"
    with pytest.raises(ValueError, match=message):
        world.start(**start, model=str(folder))
    config = lora_config(2, target_modules=("c_attn",))
    with pytest.raises(ValueError, match=message):
        world.start(**start, model=str(folder), peft_config=config)
    world.start(**start, peft_config=config)
    world.start(**start, peft_config=LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights="pissa"))
    half = AutoModelForCausalLM.from_pretrained(world.policy, dtype=torch.bfloat16)
    assert copy_fingerprint(half) == copy_fingerprint(half.float()) == world.critic.facts.weights


def test_an_adapter_that_is_merged_has_no_digest(world, make_trainer):
    """Another machine's products round otherwise, so that only the values of eight tokens are compared."""
    trainer = world.start(peft_config=lora_config(2, target_modules=("c_attn",)), learning_rate=0.02)
    trainer.step(trainer.rollout(PROMPTS[:64]))
    model = str(trainer.save_model())
    critic = world.fit(world.run, model=model)
    assert critic.facts.weights is None
    world.start(value_head_from=str(critic.folder), model=model)
    with pytest.raises(ValueError, match=r"hidden states of '.*', but .*policy'\) has others: its values of eight"):
        world.start(value_head_from=str(critic.folder))


def test_the_parts_of_a_fitted_critic_stay_together(world):
    run, lora = world.run, {"lora_rank": 2, "lora_target_modules": ("c_attn",)}
    separate = world.fit(run, name="separate", kind="separate", value_model=world.policy, num_epochs=1)
    with pytest.raises(ValueError, match=r"trunk of a fitted critic, whose head is beside it.*set value_head_from"):
        world.start(value_model=str(separate.folder))
    with pytest.raises(
        ValueError, match=r"kind 'separate', but the run's is 'shared': name that folder as value_model"
    ):
        world.start(value_head_from=str(separate.folder))
    adapter = str(world.fit(run, name="adapter", kind="adapter", num_epochs=1, **lora).folder)
    with pytest.raises(
        ValueError, match=r"kind 'adapter', but the run's is 'shared': set critic='adapter' with lora_rank=2"
    ):
        world.start(value_head_from=adapter)
    with pytest.raises(
        ValueError, match=r"adapter with lora_rank=2, lora_alpha=4.* but the run's has lora_rank=2, lora_alpha=9"
    ):
        config = lora_config(2, alpha=9, target_modules=("c_attn",))
        world.start(value_head_from=adapter, critic="adapter", peft_config=config)
    world.start(value_head_from=adapter, critic="adapter", peft_config=lora_config(2))  # PEFT's choice: c_attn
    with pytest.raises(ValueError, match=r"is no adapter for this model and configuration: .* of its weights differ"):
        config = lora_config(2, target_modules=("all-linear",))
        world.start(value_head_from=adapter, critic="adapter", peft_config=config)


def test_a_damaged_or_newer_critic_is_refused(world):
    folder = world.critic.folder
    shutil.copytree(folder, world.tmp / "copy")
    folder, facts = world.tmp / "copy", json.loads((folder / "critic.json").read_text())
    file = folder / "critic.json"
    for content, message in (
        ("{", "critic.json is damaged .*: fit the critic again"),
        (json.dumps({**facts, "format": 1}), "has format 1, but this version reads format 2: fit the critic again"),
        (json.dumps({**facts, "more": 1}), "critic.json is damaged .*more"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            world.start(value_head_from=str(folder))


def test_recordings_that_do_not_belong_together(world):
    one = world.run
    for name, settings, message in (
        ("gamma", {"gamma": 0.9}, r"run/rollouts was recorded with gamma=1.0 and .*gamma/rollouts with gamma=0.9"),
        ("weights", {"reward_weights": (3.0,)}, r"with rewards={'by_prompt': 1.0} and .*rewards={'by_prompt': 3.0}"),
        ("clip", {"score_clip": 5.0}, r"with score_clip=None and .*with score_clip=5.0: their returns are not of one"),
    ):
        with pytest.raises(ValueError, match=message):
            world.fit(one, world.record(name, total_episodes=64, **settings))
    assert world.fit(one, str(world.tmp / "gamma"), gamma=1.0).facts.gamma == 1.0


def test_recordings_that_nothing_can_be_fitted_on(world, make_model, tokenizer):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        world.fit(str(world.tmp / "nowhere"))
    few = world.record("few", rollout_batch_size=4, total_episodes=4, train_dataset=[{"prompt": "abc"}])
    with pytest.raises(
        ValueError, match=r"4 responses of 1 prompt, of which none can be held out: record more, or set"
    ):
        world.fit(few)
    with pytest.raises(ValueError, match=r"4 responses of 1 rollout, of which none can be held out"):
        world.fit(few, split_by="rollout")
    two = world.record("two", rollout_batch_size=4, total_episodes=4, train_dataset=[{"prompt": p} for p in "abcd"])
    with pytest.raises(ValueError, match="too few are scored to hold any out"):
        world.fit(two)
    shutil.copytree(Path(world.run) / "rollouts", cut := world.tmp / "rollouts")
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged: rollout-000001.safetensors has \d+ bytes instead of \d+"):
        world.fit(str(cut))
    tokenizer.add_tokens(["qq"])
    make_model(vocab_size=31).save_pretrained(world.tmp / "other")
    tokenizer.save_pretrained(world.tmp / "other")
    with pytest.raises(
        ValueError, match=r"tokens of another tokenizer \(30 tokens.*policy\) than .*other's \(31 tokens"
    ):
        world.fit(world.run, model=str(world.tmp / "other"))


def test_a_model_object_must_be_named_and_a_run_is_not_overwritten(world, make_model, tokenizer):
    folder = world.record("run", model=make_model(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="was a model object, which no folder holds: save it, and name the folder"):
        world.fit(folder)
    assert world.fit(folder, model=world.policy).facts.model == world.policy
    with pytest.raises(
        ValueError, match=r"run holds a run or a recording, whose files would be replaced: name another"
    ):
        world.fit(folder, model=world.policy, name="run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "separate"}, "kind='separate' needs a value_model to start from"),
        ({"kind": "adapter"}, "kind='adapter' needs lora_rank"),
        ({"num_epochs": 3}, "num_epochs=3 has no effect: kind='shared' is solved exactly"),
        ({"lora_rank": 3}, "lora_rank=3 has no effect: kind='shared' has no adapter"),
        ({"value_model": "x"}, "value_model='x' has no effect: kind='shared' stands on the policy's own model"),
        ({"value_head_from": "x"}, "value_head_from='x' has no effect: kind='shared' fits a new head"),
        ({"eval_fraction": 1.0}, "eval_fraction must be between 0 and 1"),
        ({"rollouts": ()}, "rollouts is empty"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CriticFitArgs(**{"rollouts": ("a",), "output_dir": "x", **settings})
    with pytest.raises(ValueError, match="device='cpu' has no effect: no model reads the recording"):
        CriticReportArgs(rollouts="a", device="cpu")


# Reports and commands


def test_a_report_in_words_a_table_a_picture_and_json(world, capsys):
    folder = world.run
    assert main(["critic", "report", folder]) == 0
    text = capsys.readouterr().out
    assert "in 3 of 3 rollouts the value head was new" in text and "it explains nothing (" in text
    assert "it supports gae_lambda=1: values that explain nothing" in text
    assert "so there is more to learn than this critic has" in text  # the words of the prompts tell
    written = json.loads((Path(folder) / "critic_report.json").read_text())
    assert (Path(folder) / "critic_report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["critic", "report", f"{folder}/rollouts", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["lambdas"] == written["lambdas"] and printed["responses"] == 192


def test_a_report_of_noise_says_how_little_it_can_tell(world):
    noise = random.Random(0)
    folder = world.record("noise", total_episodes=64, reward_funcs=lambda p, c, **_: [noise.random() for _ in c])
    said = say_report(report_critic(CriticReportArgs(rollouts=folder)))
    assert any("so neither explains more than chance would in 64 responses: record more, or" in line for line in said)


def test_fit_and_report_as_commands(world, capsys):
    folder, critic = world.run, str(world.tmp / "fitted")
    assert main(["critic", "fit", folder, "--output-dir", critic, "--device", "cpu", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    assert "a shared critic, on 3" in text and "it explains nothing" not in text
    assert f"start a run with value_head_from={critic}" in text
    assert main(["critic", "report", folder, "--critic", critic, "--device", "cpu", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    assert "this critic was fitted on these rollouts, most of which it has seen" in text
    other = world.record("other", gamma=0.9, total_episodes=64)
    assert main(["critic", "report", other, "--critic", critic]) == 2
    assert "was fitted with gamma=1.0, but the returns of" in capsys.readouterr().err
    assert main(["critic", "report", folder, "--critic", folder]) == 2
    assert "holds no fitted critic (critic.json)" in capsys.readouterr().err


def test_the_report_of_a_run_is_about_the_values_that_it_sampled_with(world):
    """Values of a run that starts from a fitted critic; what it explains is what the run's own metric says."""
    critic = str(world.critic.folder)
    trainer = world.start(value_head_from=critic, save_rollouts=True, learning_rate=1e-9, value_learning_rate=0.0)
    trainer.train()
    folder = trainer.args.output_dir
    report = report_critic(CriticReportArgs(rollouts=folder, last=1))
    metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if "value/explained_variance" in row][-1]
    assert report["responses"] == 64
    assert report["critic"]["explained_variance"] == pytest.approx(last["value/explained_variance"], abs=1e-4)
    assert report["notes"] == [] and report["critic"]["explained_variance"] > 0.5


def test_a_recording_without_a_critic_has_no_values(world):
    folder = world.record("run", advantage_estimator="reinforce")
    with pytest.raises(ValueError, match="recorded without a critic, so that it holds no values: name a fitted one"):
        report_critic(CriticReportArgs(rollouts=folder))
    assert world.fit(folder).facts.held_out["explained_variance"] > 0.5


def test_a_new_heads_values_are_the_mean_return(world):
    data = load_critic_data([world.run])
    mean = torch.cat([part.returns[part.mask] for part in data.rollouts]).mean()
    for values, part in zip(recorded_values(data), data.rollouts, strict=True):
        assert (values[part.mask] == mean).all() and (values[~part.mask] == 0).all()
