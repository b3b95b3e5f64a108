"""Several turns: the sampled ids are trained on, replies are masked from the loss, and every ending is handled."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rlhf_ppo.core import compute_gae
from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.rewards.functions import StepRewards
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.training.advantages import next_decisions
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import _said_before

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def echo(messages: list[dict[str, str]]) -> str:
    """A reply of another length each time, so that rows differ."""
    return " you said " + messages[-1]["content"][:2]


def ending_early(messages: list[dict[str, str]]) -> str | None:
    """Some conversations end after the first turn, some after the second, the others go on."""
    turns = sum(message["role"] == "assistant" for message in messages)
    return None if len(messages[0]["content"]) % 3 == turns else " and"


@pytest.fixture
def talk(make_trainer):
    """A trainer for conversations of three turns of up to four tokens."""

    def make(**settings):
        return make_trainer(
            **{"respond": ending_early, "max_turns": 3, "max_new_tokens": 4, "stop_token_ids": (0, 12, 16), **settings}
        )

    return make


def real_ids(rollout, row: int) -> list[int]:
    return rollout.response_ids[row][rollout.real[row]].tolist()


# What is trained on


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "min_new_tokens": 2}])
def test_with_learning_rate_0_every_ratio_stays_1(talk, make_model, prompts, kind, padded, settings):
    """Prompts of different lengths, conversations of one to three turns, packed and padded, in microbatches."""
    trainer = talk(model=make_model(kind), learning_rate=0.0, microbatch_tokens=40, **settings)
    trainer.model.runner.packs = not padded
    rollout = trainer.rollout(prompts)
    assert rollout.turns.amax(dim=1).unique().numel() == 3
    metrics = trainer.step(rollout)
    assert metrics["policy/max_abs_log_ratio"] < 1e-5
    assert metrics["response/turns"] == pytest.approx(float(rollout.turns.amax(dim=1).float().mean()) + 1)
    # The reference is the untrained policy itself, so it must say the same about the same sequence.
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_logprobs": True, "importance_weight_cap": 2.0},
        {"ratio_level": "turn", "turn_credit": "turn", "gamma_turn": 0.9},
        {"ratio_level": "sequence", "adaptive_lambda_alpha": 0.5},
        {"kl_loss_coef": 0.1, "kl_loss": "exact", "min_new_tokens": 2},
        {"advantage_estimator": "rloo", "num_generations": 2},
        {"critic": "adapter", "peft_config": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)},
        {"gradient_checkpointing": True, "ent_coef": 0.1, "min_new_tokens": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_features_read_the_same_sequences(talk, prompts, settings):
    trainer = talk(learning_rate=0.0, microbatch_tokens=40, **settings)
    rollout = trainer.rollout(prompts)
    metrics = trainer.step(rollout)
    assert metrics["policy/max_abs_log_ratio"] < 1e-5 and metrics["response/turns"] > 1
    assert all(math.isfinite(value) for value in metrics.values())
    assert abs(metrics["kl/reference_nats_per_response"]) < 1e-4


@pytest.mark.parametrize("separate", [False, True])
def test_log_probs_and_values_are_those_of_the_whole_sequence_read_alone(
    talk, make_model, wake_critic, prompts, separate
):
    """A row as one plain sequence through the models: replies are attended to, padding is not."""
    trainer = talk(value_model=make_model(seed=1) if separate else None)
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    for row in range(len(prompts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        whole = torch.cat([prompt, rollout.response_ids[row][rollout.real[row]]])[None]
        chosen = rollout.mask[row][rollout.real[row]]
        with torch.no_grad():
            logprobs = trainer.model.policy(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            states = trainer.model.value_trunk or trainer.model.policy.base_model
            values = trainer.model.value_head(states(whole).last_hidden_state)[0, len(prompt) - 1 : -1, 0]
        expected = logprobs.gather(1, whole[0, len(prompt) :, None]).squeeze(1)
        # Decoding with a cache and one pass over the whole round differently.
        torch.testing.assert_close(rollout.logprobs[row][rollout.mask[row]], expected[chosen], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rollout.values[row][rollout.mask[row]], values[chosen], atol=1e-5, rtol=1e-5)


def test_nothing_is_recorded_at_the_tokens_of_replies(talk, prompts):
    """Every recorded fact about them is 0, and so is what the current policy says."""
    trainer = talk(respond=echo)
    rollout = trainer.rollout(prompts)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.05), trainer.args).experience
    assert rollout.environment.any() and not (rollout.environment & rollout.mask).any()
    for x in (old.advantages, old.returns, old.logprobs, rollout.ref_logprobs, rollout.entropy, rollout.values):
        assert (x[~rollout.mask] == 0).all()
    part = trainer.model(*rollout.sequences(range(len(prompts))))
    assert (part.logprobs[~rollout.mask] == 0).all() and (part.values[~rollout.mask] == 0).all()


def test_sampled_ids_are_trained_whatever_their_text_would_tokenise_to(talk, make_model):
    """A byte-pair tokenizer reads most random token sequences back as other tokens; also from turn to turn."""
    from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer

    pairs = train_tokenizer(["the cat sat on the mat with the hat"] * 50, 280, 64)
    trainer = talk(
        model=make_model(vocab_size=len(pairs)),
        processing_class=pairs,
        respond=lambda messages: " the mat",
        reward_funcs=lambda prompts, completions, **_: [float(len(text)) for text in completions],
        train_dataset=[{"prompt": "the cat"}],
        max_turns=2,
        stop_token_ids=(),
    )
    given: list[list[int]] = []
    sample = trainer.fixed.sample

    def watched(model, ids, mask, params, **settings):
        given.extend(row[keep].tolist() for row, keep in zip(ids, mask, strict=True))
        return sample(model, ids, mask, params, **settings)

    trainer.fixed = dataclasses.replace(trainer.fixed, sample=watched)
    rollout = trainer.rollout(["the cat"] * 8)
    said, heard = pairs("the cat")["input_ids"], pairs(" the mat")["input_ids"]
    first = [ids[:4].tolist() for ids in rollout.response_ids]
    assert [pairs(text)["input_ids"] for text in rollout.completions] != [real_ids(rollout, i) for i in range(8)]
    # The second turn was asked for with the first one's own ids.
    assert given[:8] == [said] * 8 and given[8:] == [said + ids + heard for ids in first]
    trained: list[Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: trained.extend(ids[keep] for ids, keep in zip(inputs[2], inputs[3], strict=True))
    )
    trainer.step(rollout)
    sampled = {tuple(ids[keep].tolist()) for ids, keep in zip(rollout.response_ids, rollout.mask, strict=True)}
    assert {tuple(ids.tolist()) for ids in trained} == sampled


def test_a_scripted_conversation_is_one_row(talk, script, tokenizer):
    """Golden: two turns; "x" is 26 and "y" 27. The stop token 0 stays an action, and replies lie outside the mask."""
    trainer = talk(
        respond=lambda messages: "xy" if messages[-1]["content"] else None, rollout_batch_size=2, max_turns=2
    )
    script([[5, 0, 9, 9], [0, 9, 9, 9]], [[6, 7, 8, 9]])
    rollout = trainer.rollout(["a", "no"])
    assert rollout.response_ids.tolist() == [[5, 0, 26, 27, 6, 7, 8, 9], [0] * 8]
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 1], [1] + [0] * 7]
    assert rollout.environment.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert rollout.turns.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]
    assert rollout.finished.tolist() == [False, True]
    # A text prompt's completion is the text as the policy read it.
    assert rollout.completions == ["cxydefg", ""]
    assert rollout.conversations[0] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "xy"},
        {"role": "assistant", "content": "defg"},
    ]


def test_eos_first_eos_never_and_exact_maximum_length(talk, script, prompts):
    """Faults 4 and 5 in each of two turns of at most two tokens: finite losses, exact lengths."""
    trainer = talk(
        respond=lambda messages: "x", max_turns=2, max_new_tokens=2, rollout_batch_size=4, stop_token_ids=(0,)
    )
    script([[0, 9], [5, 6], [5, 0], [0, 9]], [[0, 9], [0, 9], [5, 0], [5, 6]])
    rollout = trainer.rollout(prompts[:4])
    assert rollout.mask.int().tolist() == [[1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1], [1, 0, 1, 1, 0]]
    assert [real_ids(rollout, i) for i in range(4)] == [[0, 26, 0], [5, 6, 26, 0], [5, 0, 26, 5, 0], [0, 26, 5, 6]]
    assert rollout.lengths.tolist() == [2, 3, 4, 3]
    assert rollout.finished.tolist() == [True, True, True, False]
    metrics = trainer.step(rollout)
    assert metrics["response/eos_fraction"] == pytest.approx(3 / 4)
    assert metrics["response/length_tokens"] == pytest.approx(12 / 4)
    assert all(math.isfinite(value) for value in metrics.values())


def test_one_turn_needs_no_second_mask(make_trainer, prompts):
    """Without replies nothing is carried along for them."""
    rollout = make_trainer().rollout(prompts)
    assert rollout.real is rollout.mask
    assert rollout.sequences([0, 1])[4:6] == (None, None)
    assert rollout.turns is rollout.environment is rollout.banned is None


# Limits


def test_fault_2_a_full_context_ends_the_conversation_and_is_counted(talk, prompts):
    """The tiny models read 64 tokens. A turn starts only where four more fit, whatever the environment says."""
    trainer = talk(respond=lambda messages: " and then" * len(messages[0]["content"]), max_turns=3)
    rollout = trainer.rollout(prompts)
    lengths = rollout.prompt_mask.sum(dim=1) + rollout.real.sum(dim=1)
    assert int(lengths.max()) <= 64
    assert rollout.context_full.any() and not rollout.context_full.all()
    metrics = trainer.step(rollout)
    assert metrics["response/context_full_fraction"] == pytest.approx(float(rollout.context_full.float().mean()))
    # Every row ends with an action: a reply that nobody could answer is not there.
    last = rollout.real.sum(dim=1) - 1
    assert rollout.mask[torch.arange(len(prompts)), last].all()


def test_turns_use_the_room_up_to_its_last_token(talk, script):
    """Prompt 1, turn 4, reply n, turn 4: with n = 55 all 64 tokens of the context are used, with n = 56 it ends."""
    for n, turns in ((55, 2), (56, 1)):
        trainer = talk(respond=lambda messages, n=n: "x" * n, stop_token_ids=(), rollout_batch_size=2, max_turns=2)
        script(*[[[5, 6, 7, 8]] * 2] * turns)
        rollout = trainer.rollout(["a", "b"])
        assert rollout.context_full.tolist() == [turns == 1] * 2
        assert int(rollout.real.sum()) == 2 * (4 + (n + 4) * (turns - 1))
        trainer.step(rollout)


# Credit


def test_gae_equals_gae_on_the_sequence_without_replies(talk, wake_critic, prompts):
    trainer = talk(gamma=0.9, gae_lambda=0.8, kl_coef=0.3, normalize_advantages=False)
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    rollout = dataclasses.replace(rollout, ref_logprobs=rollout.ref_logprobs - 0.5 * rollout.mask)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, 0.3), trainer.args)
    old, scale = estimates.experience, estimates.value_scale
    for row in range(len(prompts)):
        keep = rollout.mask[row]
        n = int(keep.sum())
        # KL is 0.5 nats at each token; the score comes with the last.
        rewards = torch.full((1, n), -0.15)
        rewards[0, -1] += rollout.scores[row]
        values = rollout.values[row][keep][None]
        following = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
        last = torch.arange(n)[None] == n - 1
        expected, returns = compute_gae(
            rewards, values, following, last, torch.zeros_like(last), gamma=0.9, gae_lambda=0.8
        )
        torch.testing.assert_close(old.advantages[row][keep], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(old.returns[row][keep], scale.normalize(returns[0]), atol=1e-5, rtol=1e-5)


def test_process_rewards_land_on_the_tokens_that_complete_their_steps(talk, prompts):
    """(turn, end, score): the first character and the very last; a character is a token, end-of-text is none."""

    def reward(prompts, completions, *, conversations, **columns):
        said = [[m["content"] for m in messages if m["role"] == "assistant"] for messages in conversations]
        return [StepRewards([(0, 1, 0.25), (len(turns) - 1, len(turns[-1]), 2.0)]) for turns in said]

    rollout = talk(respond=echo, reward_funcs=reward, stop_token_ids=(), max_turns=3).rollout(prompts)
    characters = rollout.mask & (rollout.response_ids != 0)
    for row, turns, places in zip(rollout.token_scores, rollout.turns, characters, strict=True):
        expected = torch.zeros_like(row)
        expected[places.nonzero()[0]] = 0.25
        expected[places.nonzero()[-1]] = 2.0
        assert row.tolist() == expected.tolist() and turns[places][-1] == 2


@pytest.mark.parametrize(
    ("step", "message"),
    [((1, 0.5), r"\(turn, end, score\), got \(1, 0\.5\)"), ((3, 1, 1.0), "turn 3, but the turns are 0..2"),
     ((0, 99, 1.0), "character 99, outside")],
)  # fmt: skip
def test_process_rewards_outside_a_conversation_are_named(talk, prompts, step, message):
    def reward(prompts, completions, **columns):
        return [StepRewards([step]) for _ in completions]

    with pytest.raises(RewardError, match=message):
        talk(respond=echo, reward_funcs=reward, stop_token_ids=(), max_turns=3).rollout(prompts)


# The hook


def test_the_hook_sees_the_whole_conversation_as_one_list_that_grows(talk, prompts):
    seen: dict[int, list[int]] = {}

    def respond(messages):
        seen.setdefault(id(messages), []).append(len(messages))
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        return " and"

    rollout = talk(respond=respond).rollout(prompts)
    # After each turn, the last included: an environment must see every action.
    assert list(seen.values()) == [[2, 4, 6]] * len(prompts)
    assert [id(messages) for messages in rollout.conversations] == list(seen)


def test_a_turn_of_a_text_begins_behind_all_messages_of_the_reply(talk, script, prompts):
    """The reply's last message ends in a space that its ids have lost; the first one does not."""
    trainer = talk(respond=lambda messages: [{"role": "tool", "content": x} for x in ("a", "b ", "")], max_turns=3)
    rollout = trainer.rollout(prompts)
    assert [_said_before(rollout.conversations[0], turn) for turn in (1, 2)] == ["ab ", "ab "]


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda messages: 3, "returned int 3"),
        (lambda messages: {}["gone"], "raised KeyError: 'gone'"),
        (lambda messages: ["x"], r"returned list \['x'\]"),
        (lambda messages: [], r"returned list \[\]"),
        (lambda messages: {"role": "tool"}, r"returned dict \{'role': 'tool'\}"),
        (lambda messages: {"role": "tool", "content": 3}, "the content of the tool message must be text, got 3"),
        (lambda messages: messages, "must not write the policy's own messages"),
    ],
)
def test_a_hook_that_fails_is_named_with_the_conversation(talk, prompts, respond, message):
    with pytest.raises(RespondError, match=f"respond .*{message}.*once upon"):
        talk(respond=respond).rollout(prompts)


def test_fault_14_a_hook_that_hangs_is_abandoned_and_what_was_said_is_kept(talk, prompts):
    never = threading.Event()

    def respond(messages):
        return " and" if messages[0]["content"] != "she said" else never.wait() and None

    trainer = talk(respond=respond, respond_timeout_s=0.2)
    with pytest.raises(
        RespondError, match=r"within respond_timeout_s=0\.2, in conversation 4: .*she said.*failed_rollout\.jsonl"
    ):
        trainer.rollout(prompts)
    rows = trainer.run.read("failed_rollout.jsonl")
    assert [row["conversation"][0]["content"] for row in rows] == prompts
    # The fifth was asked about after its first turn; the others went on meanwhile.
    lengths = [len(row["conversation"]) for row in rows]
    assert lengths[4] == 2 and min(lengths) >= 2
    never.set()


def test_fault_14_a_run_that_a_hook_ended_resumes_with_the_same_conversations(talk):
    asked = 0

    def fails(at):
        def respond(messages):
            nonlocal asked
            asked += 1
            return messages[0]["content"] if asked < at else 1 / 0

        return respond

    # One after another: the same conversations are decoded together, so that the runs are equal to the last bit.
    settings = {"max_turns": 2, "total_episodes": 24, "save_every": 5, "respond_concurrency": 1}
    whole = talk(respond=fails(1000), **settings)
    whole.train()
    asked = 0
    cut = talk(respond=fails(20), **settings)  # 16 answers a rollout
    with pytest.raises(RespondError, match=r"ZeroDivisionError.*resume_from_checkpoint=.*checkpoint-1") as error:
        cut.train()
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    asked = 0
    talk(respond=fails(1000), output_dir=cut.args.output_dir, **settings).train(cut.run.path / "checkpoint-1")
    assert cut.run.read() == whole.run.read()


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"respond": None}, ("max_turns=3", "respond")),
        ({"max_turns": 1}, ("max_turns=1", "respond")),
        ({"respond": "file.py"}, ("respond", "str")),
        ({"generation": "static"}, ("generation='static'", "max_turns=3")),
        ({"turn_credit": "turn", "gamma": 0.9}, ("gamma_turn", "gamma=0.9")),
        ({"turn_credit": "turn", "max_turns": 1, "respond": None}, ("turn_credit='turn'", "max_turns=1")),
        ({"gamma_turn": 0.9}, ("gamma_turn=0.9", "turn_credit='token'")),
        ({"turn_credit": "word"}, ("turn_credit", "token, turn")),
        ({"max_turns": 0}, ("max_turns", "1 or more")),
        ({"respond_timeout_s": 0.0}, ("respond_timeout_s", "positive or None")),
        ({"respond_concurrency": 0}, ("respond_concurrency", "1 or more")),
        ({"max_turns": 1, "respond": None, "respond_concurrency": 5}, ("respond_concurrency=5", "max_turns=1")),
        ({"max_turns": 1, "respond": None, "respond_timeout_s": 5.0}, ("respond_timeout_s=5.0", "max_turns=1")),
    ],
)
def test_fault_30_contradictions_name_both(talk, settings, both):
    with pytest.raises(ValueError) as error:
        talk(**settings)
    assert all(name in str(error.value) for name in both)


def test_a_run_with_evaluation_trains_and_writes_its_samples(talk):
    trainer = talk(eval_dataset=[{"prompt": "once"}, {"prompt": "the dog"}])
    metrics = trainer.train()
    assert {"response/turns", "response/context_full_fraction", "eval/score_mean"} <= set(metrics)
    assert trainer.run.read("samples.jsonl")[0]["turns"] >= 1


# Chats


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


MESSAGES = [{"role": "user", "content": "hi"}]


def test_the_tokens_between_turns_are_what_the_template_adds(chat):
    """ "<u>hi.<a>" before the turn, "<u>hi.<a>x.<u>yes.<a>" with an answer: what is new is ".<u>yes.<a>"."""
    spoken = (
        chat,
        MESSAGES,
        {"role": "assistant", "content": "whatever  it was"},
        [{"role": "user", "content": "yes"}],
    )
    glue = chat(".<u>yes.<a>")["input_ids"]
    assert chat_reply_ids(*spoken, None) == glue
    # "." is id 29: if the policy ended its turn with it, it is there already; another stop token is not.
    assert chat_reply_ids(*spoken, 29) == glue[1:]
    assert chat_reply_ids(*spoken, 0) == glue


def test_a_chat_is_trained_on_as_the_template_would_show_it(talk, chat, script):
    seen: list[object] = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0, 1.0]

    trainer = talk(
        processing_class=chat,
        reward_funcs=reward,
        respond=lambda messages: "ok",
        train_dataset=[{"prompt": MESSAGES}],
        rollout_batch_size=2,
        max_turns=2,
        stop_token_ids=(29,),
    )
    script([[5, 29, 9, 9], [5, 6, 7, 8]], [[6, 29, 9, 9], [29, 9, 9, 9]])
    rollout = trainer.rollout([MESSAGES, MESSAGES])
    told = [
        [{"role": "assistant", "content": a}, {"role": "user", "content": "ok"}, {"role": "assistant", "content": b}]
        for a, b in (("c.", "d."), ("cdef", "."))
    ]
    # "." is no special token here, so it stays in the text of a turn that ended with it.
    assert rollout.completions == seen == told
    shown = [chat("c.<u>ok.<a>d.")["input_ids"], chat("cdef.<u>ok.<a>.")["input_ids"]]
    assert [real_ids(rollout, i) for i in range(2)] == shown
    assert MESSAGES == [{"role": "user", "content": "hi"}]
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


def test_a_reply_of_several_messages_is_one_of_each(talk, chat, script):
    results = [{"role": "tool", "content": "4"}, {"role": "user", "content": "ok"}]
    trainer = talk(
        processing_class=chat,
        reward_funcs=lambda prompts, completions, **_: [0.0, 1.0],
        respond=lambda messages: results,
        train_dataset=[{"prompt": MESSAGES}],
        rollout_batch_size=2,
        max_turns=2,
        stop_token_ids=(29,),
    )
    script([[5, 29, 9, 9]] * 2, [[6, 29, 9, 9]] * 2)
    rollout = trainer.rollout([MESSAGES, MESSAGES])
    assert real_ids(rollout, 0) == chat("c.<t>4.<u>ok.<a>d.")["input_ids"]
    assert rollout.turns[0].tolist() == [0] * (len(chat("c.<t>4.<u>ok.<a>")["input_ids"])) + [1, 1]
    assert rollout.completions[0] == [
        {"role": "assistant", "content": "c."}, *results, {"role": "assistant", "content": "d."}
    ]  # fmt: skip
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    # Of a text conversation they are the text that they hold.
    text = talk(respond=lambda messages: results, rollout_batch_size=2, max_turns=2, stop_token_ids=(29,))
    script([[5, 29, 9, 9]] * 2, [[6, 29, 9, 9]] * 2)
    assert text.rollout(["a", "b"]).completions[0] == "c.4okd."


def test_values_of_other_libraries_in_a_reply_are_plain_and_what_json_cannot_hold_is_refused(talk, chat):
    seen: list[list] = []
    fields = {"role": "tool", "content": "no", "score": np.float32(1), "path": Path("a"), "scores": np.arange(2)}

    def respond(messages):
        seen.append(messages)
        return fields

    small = {
        "processing_class": chat,
        "reward_funcs": lambda prompts, completions, **_: [*range(8)],
        "train_dataset": [{"prompt": MESSAGES}],
        "max_turns": 2,
    }
    trainer = talk(respond=respond, **small)
    trainer.train()
    assert seen[0][2] == {"role": "tool", "content": "no", "score": 1.0, "path": "a", "scores": [0, 1]}
    assert trainer.run.read("samples.jsonl")[0]["completion"][1] == seen[0][2]
    endless: list = []
    endless.append(endless)
    trainer = talk(respond=lambda messages: {"role": "tool", "content": "no", "of": endless}, **small)
    with pytest.raises(RespondError, match=r"respond must return what JSON can hold \(Circular.*it returned dict"):
        trainer.rollout([MESSAGES])


def test_a_template_that_rewrites_what_came_before_is_refused_at_the_start(talk, chat, make_model):
    chat.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match="does not render a conversation by adding to its end"):
        talk(processing_class=chat, train_dataset=[{"prompt": MESSAGES}])


def test_a_reward_model_reads_the_whole_chat(chat, make_classifier):
    from rlhf_ppo.rewards.reward_model import RewardModel

    model = RewardModel(make_classifier(), chat)
    said = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert model._text(MESSAGES, said) == "<u>hi.<a>a.<u>b."
    assert math.isfinite(model([MESSAGES], [said])[0])


def test_next_decisions_pass_over_replies():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    following, last = next_decisions(values, torch.tensor([[True, False, False, True]]))
    assert following[0, 0] == 4 and last.tolist() == [[False, False, False, True]]
