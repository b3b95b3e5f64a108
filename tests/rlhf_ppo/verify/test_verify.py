"""verify: a sound run passes every check; each bug that is put in fails the check that is about it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from rlhf_ppo import RLHFConfig
from rlhf_ppo.cli import main
from rlhf_ppo.core.rewards import on_last_step
from rlhf_ppo.data import tokenization
from rlhf_ppo.generation import sampling
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward import runner
from rlhf_ppo.models.forward.runner import ModelRunner
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.training import gradients, rewards
from rlhf_ppo.training.checkpoints import checkpoint
from rlhf_ppo.training.models import load_models
from rlhf_ppo.training.rollouts import generate
from rlhf_ppo.verify import run_checks, verify_training
from rlhf_ppo.verify.verify import CHECKS

NAMES = [check.name for check in CHECKS]
RUNS = ["reference", "save_load", "resume", "processes"]
"""Checks that train."""
ONE_ROLLOUT = [name for name in NAMES if name not in RUNS]
STOPS = (0, 12, 16, 20, 24, 28)

CHAT = (
    "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
SAY_HI = [{"role": "user", "content": "hi"}]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def verify(tokenizer, make_model, prompts, tmp_path, monkeypatch):
    """``verify(only=..., **arguments and settings)``: a report on a tiny run."""

    monkeypatch.chdir(tmp_path)

    def run(only=ONE_ROLLOUT, *, train_dataset=None, model=None, reward_funcs=length, **given):
        arguments = {name: given.pop(name) for name in ("processing_class", "peft_config", "respond") if name in given}
        small = {
            "output_dir": "unwritten",
            "rollout_batch_size": 8,
            "max_new_tokens": 6,
            "num_epochs": 2,
            "num_minibatches": 2,
            "learning_rate": 1e-3,
            "stop_token_ids": STOPS,
            "device": "cpu",
            "precision": "fp32",
        }
        return verify_training(
            make_model() if model is None else model,
            reward_funcs,
            RLHFConfig(**{**small, **given}),
            [{"prompt": prompt} for prompt in prompts] if train_dataset is None else train_dataset,
            num_responses=8,
            only=only,
            **{"processing_class": tokenizer, **arguments},
        )

    return run


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_sound_run_passes(verify, make_model, kind):
    model = make_model(kind)
    before = copy.deepcopy(model.state_dict())
    report = verify(NAMES, model=model)
    assert report.passed, str(report)
    assert report.skipped == ("template", "processes")  # the prompts are text, and objects cannot be sent
    assert report["frequencies"].numbers["bins"] > 20 and report["nan_poison"].numbers["leaks"] == 0
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert not Path("unwritten").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_estimator": "rloo", "num_generations": 2},
        {"recompute_logprobs": True, "importance_weight_cap": 2.0, "objective": "cispo"},
        {"kl_loss": "exact", "kl_loss_coef": 0.1, "ent_coef": 0.01, "min_new_tokens": 2, "temperature": 0.7},
        {"stop_token_ids": None, "loss_aggregation": "sequence_mean", "decode_batch_size": 2, "objective": "penalty"},
        {"normalize_scores": True, "missing_eos_penalty": 1.0, "positive_loss_coef": 0.1, "stop_strings": ("e",)},
    ],
    ids=["rloo", "recompute", "banned", "slots", "shaped"],
)
def test_other_settings_pass(verify, settings):
    report = verify(**settings)
    assert report.passed, str(report)


def test_lora_and_several_turns_pass(verify, tokenizer):
    from peft import LoraConfig

    tokenizer.chat_template = CHAT
    chats = [{"prompt": SAY_HI}, {"prompt": [*SAY_HI, {"role": "assistant", "content": "ho"}, *SAY_HI]}]
    report = verify(
        NAMES,
        train_dataset=chats,
        peft_config=LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1),
        respond=lambda messages: "and" if len(messages) < 6 else None,
        max_turns=3,
        stop_token_ids=(0,),
    )
    assert report.passed, str(report)
    assert report.skipped == ("processes",)
    assert " 0 differ from what the sampler read" in report["trained_ids"].said


def test_template_variables_of_run_and_rows_reach_the_checks(verify, tokenizer):
    tokenizer.chat_template = "{{ style if style is defined else messages | length }} " + CHAT
    rows = [{"prompt": SAY_HI}, {"prompt": SAY_HI, "chat_template_kwargs": {"style": "b"}}]
    given = {"train_dataset": rows, "chat_template_kwargs": {"style": "e"}, "stop_token_ids": (0,)}
    report = verify(["trained_ids", "template"], respond=lambda messages: "and", max_turns=2, **given)
    assert report.passed, str(report)


# Bugs put in


def patched(monkeypatch, owner, name, change):
    """Replace ``owner.name`` by ``change(the original)``."""
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))


def dropout_left_on(monkeypatch):
    patched(monkeypatch, ActorCritic, "forward", lambda old: lambda self, *a, **k: old(self.train(), *a, **k))
    quiet = {"score_place", "eos_gradient", "trained_ids", "template", "reward"}
    return {*ONE_ROLLOUT} - quiet


def wrong_temperature(monkeypatch):
    def warmer(old):
        return lambda logits, u, temperature, banned=None: old(logits, u, 1.3 * temperature, banned)

    patched(monkeypatch, sampling, "sample_from_logits", warmer)
    return {"ratio", "standstill", "frequencies", "decode"}


def top_k(monkeypatch):
    def filtered(old):
        def sample(logits, u, temperature, banned=None):
            whole = logits.clone()
            few = logits.masked_fill(logits < logits.topk(12).values[:, -1:], -torch.inf)
            tokens = old(few, u, temperature, banned)[0]
            return tokens, whole.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], torch.zeros_like(u).float()

        return sample

    patched(monkeypatch, sampling, "sample_from_logits", filtered)
    return {"frequencies"}  # recorded as the model gives them, so that all else agrees


def stale_cache(monkeypatch):
    def late(old):
        def step(self, ids, positions, attention, cache):
            return old(self, ids, positions - int(ids.shape[1] == 1), attention, cache)

        return step

    patched(monkeypatch, ActorCritic, "decode", late)
    return {"ratio", "standstill", "decode"}


def weights_that_move(monkeypatch):
    def moving(old):
        def forward(self, *inputs, **options):
            if torch.is_grad_enabled():
                next(iter(self.policy_parameters())).data.add_(1e-6)
            return old(self, *inputs, **options)

        return forward

    patched(monkeypatch, ActorCritic, "forward", moving)
    return {"standstill"}


def mean_of_microbatch_means(monkeypatch):
    patched(monkeypatch, gradients, "ppo_loss", lambda old: lambda *a, denominator=None, **k: old(*a, **k))
    return {"microbatches"}


def mask_by_product(monkeypatch):
    monkeypatch.setattr("rlhf_ppo.core.losses.keep", lambda x, mask: x * mask)
    return {"nan_poison"}


def score_one_token_early(monkeypatch):
    def early(scores, kl, mask, kl_coef):
        return on_last_step(scores, mask).roll(-1, dims=1).to(kl.dtype) if scores.ndim == 1 else scores

    monkeypatch.setattr(rewards, "kl_penalized_rewards", early)
    return {"score_place"}


def mask_without_stop(monkeypatch):
    def cut(old):
        def sample(*inputs):
            sampled = old(*inputs)
            return sampled._replace(mask=sampled.mask & ~torch.isin(sampled.response_ids[:], torch.tensor(STOPS[1:])))

        return sample

    patched(monkeypatch, generate, "_sample", cut)
    return {"eos_gradient", "trained_ids", "decode"}  # the values of what is lost


def positions_count_padding(monkeypatch):
    monkeypatch.setattr(runner, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))
    monkeypatch.setattr(ModelRunner, "_can_pack", lambda self: False)
    # Set-up finds such a model and pads it otherwise; here it must not.
    monkeypatch.setattr(load_models, "check_forward", lambda *_, **__: None)
    return {"ratio", "standstill", "padding", "decode", "microbatches"}


def mask_from_ids(monkeypatch):
    def compared(old):
        return lambda rows, device: (lambda ids, mask: (ids, mask & (ids != 0)))(*old(rows, device))

    patched(monkeypatch, tokenization, "left_pad", compared)
    return {"pad_is_eos"}


def tokenized_again(monkeypatch):
    """Of each response one token becomes another, as where text is tokenized otherwise than it was sampled."""

    def again(old):
        def sample(*inputs):
            sampled = old(*inputs)
            return sampled._replace(response_ids=torch.where(sampled.response_ids == 5, 6, sampled.response_ids))

        return sample

    patched(monkeypatch, generate, "_sample", again)
    return {"ratio", "standstill", "decode", "trained_ids"}


BUGS = [
    *(dropout_left_on, wrong_temperature, top_k, stale_cache, weights_that_move, mean_of_microbatch_means),
    *(mask_by_product, score_one_token_early, mask_without_stop, positions_count_padding, mask_from_ids),
    tokenized_again,
]


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_fails_its_checks_and_no_other(verify, monkeypatch, bug):
    expected = bug(monkeypatch)
    report = verify()
    assert set(report.failures) == expected, str(report)


@pytest.mark.parametrize("kind", ["random", "rank", "none"])
def test_a_reward_that_is_not_a_function_of_the_response_is_seen(verify, kind):
    def reward(prompts, completions, **columns):
        if kind == "random":
            return [random.random() for _ in completions]
        if kind == "rank":
            return [float(i) for i, _ in enumerate(completions)]
        return [None if random.random() < 0.5 else 1.0 for _ in completions[1:]] + [1.0]

    report = verify(reward_funcs=reward)
    assert report.failures == ("reward",)
    assert report["reward"].numbers["reversed"] > 0.001
    assert (report["reward"].numbers["again"] == 0) == (kind == "rank")


def test_a_cache_does_not_hide_a_random_reward(verify):
    report = verify(["reward"], cache_rewards=True, reward_funcs=lambda p, c, **_: [random.random() for _ in c])
    assert report.failures == ("reward",)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT.replace("<|endoftext|>", "?"), "holds none of the stop tokens"),
        (
            CHAT.replace(
                "{% for m in messages %}", "{% for m in messages if m == messages[-1] or m['role'] == 'user' %}"
            ),
            "a further turn changes",
        ),
        (CHAT.replace("{{ m['role'][0]", "{{ messages | length }}{{ m['role'][0]"), "does not begin with"),
        (CHAT.replace("m['content']", "m['content'] | upper"), "the answer is not in the finished chat"),
    ],
    ids=["no stop token", "drops earlier turns", "counts messages", "changes the answer"],
)
def test_a_template_that_is_not_what_the_policy_reads_is_seen(verify, tokenizer, template, said):
    tokenizer.chat_template = template
    report = verify(train_dataset=[{"prompt": SAY_HI}], stop_token_ids=(0,))
    assert report.failures == ("template",), str(report)
    assert said in report["template"].said


def test_a_tokenizer_that_changes_between_calls_is_seen(verify, tokenizer):
    class Forgetful(type(tokenizer)):
        calls = 0

        def __call__(self, *inputs, **options):
            found = super().__call__(*inputs, **options)
            type(self).calls += 1
            if self.calls > 60 and len(found["input_ids"]) > 1:
                found["input_ids"] = found["input_ids"][:-1]
            return found

    tokenizer.__class__ = Forgetful
    assert "trained_ids" in verify(["trained_ids"], processing_class=tokenizer).failures


def test_a_reference_that_follows_the_policy_is_seen(verify, monkeypatch):
    def follows(old):
        def init(self, policy, *inputs, **options):
            old(self, policy, *inputs, **options)
            self.runner = ModelRunner(policy)

        return init

    patched(monkeypatch, Reference, "__init__", follows)
    report = verify(["reference", "save_load", "resume"])
    assert report.failures == ("reference",)
    assert report["reference"].numbers["gap_nats"] < 1e-3 < report["reference"].numbers["drift_nats"]


def test_another_reference_is_no_fault(verify, make_model, tokenizer, prompts):
    arguments = (make_model(), length, RLHFConfig(output_dir="x", device="cpu", stop_token_ids=STOPS))
    rows = [{"prompt": prompt} for prompt in prompts]
    report = verify_training(
        *arguments,
        rows,
        processing_class=tokenizer,
        ref_model=make_model(seed=4),
        response_tokens=4,
        only=["reference"],
    )
    assert report.passed and "nats per response" in report["reference"].said


def test_a_tokenizer_that_loads_otherwise_is_seen(verify, tokenizer):
    class Shifted(type(tokenizer)):
        def __call__(self, text, *inputs, **options):
            return super().__call__(text.replace("o", "e"), *inputs, **options)

    tokenizer.__class__ = Shifted
    report = verify(["save_load", "resume", "trained_ids"])
    assert report.failures == ("save_load",) and report["save_load"].numbers["texts"] > 0


def test_an_optimizer_that_is_lost_on_resume_is_seen(verify, monkeypatch):
    def without_moments(old):
        def load(state, found):
            old(state, found)
            state.optimizer.state.clear()

        return load

    patched(monkeypatch, checkpoint, "_load_weights", without_moments)
    report = verify(["reference", "save_load", "resume"])
    assert report.failures == ("resume",)
    assert report["resume"].numbers["weights"] > 0


def test_a_run_that_stops_fails_once(verify, monkeypatch):
    wrong_temperature(monkeypatch)
    report = verify(["reference", "save_load", "resume"])
    assert report.failures == ("resume",) and "RatioTripwireError" in report["resume"].said
    assert "training stopped" in report["save_load"].said


def test_the_page_has_every_check():
    page = (Path(__file__).parents[3] / "docs/proof.md").read_text(encoding="utf-8")
    assert [line for line in NAMES if f"| `{line}` |" not in page] == []


# The command


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, prompts, monkeypatch) -> Path:
    """A working folder with a model, a reward file, prompts and settings."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "import random\ndef length(prompts, completions, **columns):\n    return [1.0 * len(c) for c in completions]\n"
        "def noise(prompts, completions, **columns):\n    return [random.random() for c in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "train.yaml").write_text(
        "model: model\ndataset: prompts.jsonl\nrollout_batch_size: 8\nnum_minibatches: 2\nmax_new_tokens: 6\n"
        "learning_rate: 1e-3\ndevice: cpu\nprecision: fp32\noutput_dir: run\ntotal_episodes: 8000\neval_every: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_what_it_proves_and_ends_with_0_or_1(folder, capsys):
    flags = ["verify", "--config", "train.yaml", "--only", "ratio", "reward"]
    assert main([*flags, "--reward", "reward.py:length"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("model: 8 responses of ") and "2 passed in " in said
    assert "passed   ratio   before the first step new and old log-probs agree (ratio 1)" in said
    assert main([*flags, "--reward", "reward.py:noise", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["passed"] and [row["passed"] for row in facts["results"]] == [True, False]
    assert "temperature 0" in facts["results"][1]["cure"] and facts["results"][1]["numbers"]["again"] > 0.001
    assert not Path("run").exists() and not Path("verify").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "ration"], "only='ration' names no check; did you mean 'ratio'?"),
        (["--reward", "reward.py:gone"], "has no function 'gone'"),
        (["--dataset", "prompt.jsonl"], "prompt.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, flags, said):
    reward = [] if "--reward" in flags else ["--reward", "reward.py:length"]
    assert main(["verify", "--config", "train.yaml", *reward, *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--replay", "run"], ["--resume", "auto"], ["--num-responses", "0"]])
def test_settings_that_verify_cannot_follow_are_refused(folder, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--config", "train.yaml", "--reward", "reward.py:length", *flags])
    assert ended.value.code == 2 and flags[0][2:].replace("-", "_") in capsys.readouterr().err


def test_a_launcher_is_refused(folder, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["verify", "--config", "train.yaml", "--reward", "reward.py:length"]) == 2
    assert "run it without a launcher" in capsys.readouterr().err


def test_two_processes_are_compared_by_their_metrics(folder, capsys, monkeypatch):
    """The launcher is left out: what it would start runs here, once as it is and once with a bug."""

    class Ended:
        def __init__(self, code: int) -> None:
            self.returncode, self.stderr = code, "error: x"

    def here(*words):
        def run(subject, target):
            small = f"--output-dir {target} --total-episodes 16 --eval-size 0 --eval-every 0 --quiet".split()
            return Ended(main(["train", "--config", "train.yaml", "--reward", run_checks.OWN_REWARD, *small, *words]))

        return run

    flags = ["verify", "--config", "train.yaml", "--reward", "reward.py:noise", "--only", "processes"]
    for words, code in (((), 0), (("--seed", "1"), 1)):
        monkeypatch.setattr(run_checks, "_run_processes", here(*words))
        assert main(flags) == code, capsys.readouterr().out
        assert "one process and two: score/mean" in capsys.readouterr().out
    monkeypatch.setattr(run_checks, "_run_processes", lambda *_: Ended(3))
    assert main(flags) == 1
    assert "ended with code 3: error: x" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder, capsys):
    assert main(["verify", "--config", "train.yaml", "--reward", "reward.py:noise", "--only", "processes"]) == 0
    assert "1 passed" in capsys.readouterr().out
