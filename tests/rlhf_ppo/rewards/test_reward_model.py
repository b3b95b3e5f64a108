"""Reward models: read with their own tokenizer, in evaluation mode, one number a text, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

from rlhf_ppo.data.tokenization import encode_text
from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer
from rlhf_ppo.rewards.loading import load_reward
from rlhf_ppo.rewards.reward_model import RewardModel


@pytest.fixture
def other_tokenizer():
    """A byte-pair tokenizer: the same text has other ids here than for the policy."""
    return train_tokenizer(["the cat sat on the mat with the hat"] * 50, 280, 64)


def one_at_a_time(model, tokenizer, texts: list[str]) -> list[float]:
    scores = []
    model.eval().config.pad_token_id = None  # no id is padding, so the model pools at the last position
    with torch.no_grad():
        for text in texts:
            scores.append(float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits))
    return scores


def test_fault_11_the_reward_model_reads_text_with_its_own_tokenizer(
    make_trainer, make_classifier, other_tokenizer, prompts
):
    classifier = make_classifier(vocab_size=len(other_tokenizer))
    trainer = make_trainer(reward_funcs=RewardModel(classifier, other_tokenizer))
    rollout = trainer.rollout(prompts)
    texts = [prompt + completion for prompt, completion in zip(prompts, rollout.completions, strict=True)]
    assert other_tokenizer(texts[0])["input_ids"] != trainer.tokenizer(texts[0])["input_ids"]
    expected = one_at_a_time(classifier, other_tokenizer, texts)
    torch.testing.assert_close(rollout.scores.float(), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_fault_11_padding_with_pad_equal_to_eos_changes_no_score(make_classifier, tokenizer, kind, batch_size):
    """Texts that end in end-of-text: a model that looks for the last id that is not pad reads one token early."""
    tokenizer.pad_token = tokenizer.eos_token
    model = make_classifier(kind)
    reward = RewardModel(model, tokenizer, batch_size=batch_size)
    completions = ["x<|endoftext|>", " longer text<|endoftext|>", "<|endoftext|>", "y"]
    scores = reward(["a"] * 4, completions)
    assert tokenizer("x<|endoftext|>")["input_ids"][-1] == tokenizer.pad_token_id
    expected = one_at_a_time(model, tokenizer, ["a" + completion for completion in completions])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len(set(scores)) == 4


def test_a_tokenizer_without_a_pad_token_still_scores_in_batches(make_classifier, tokenizer):
    model = make_classifier()
    scores = RewardModel(model, tokenizer)(["a", "b"], ["bc", "cdef"])
    assert tokenizer.pad_token is None
    assert scores == pytest.approx(one_at_a_time(model, tokenizer, ["abc", "bcdef"]), abs=1e-5)


def test_texts_that_together_use_the_whole_vocabulary_score_as_one_by_one(make_classifier):
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(6)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0")
    model = make_classifier("gpt2", vocab_size=6)
    texts = ["t1 t0", "t2 t3 t4 t5", "t5", "t0 t1 t2 t3 t4 t5 t1"]  # the last one needs all of them by itself
    wanted = one_at_a_time(model, tokenizer, texts)
    scores = RewardModel(model, tokenizer)([""] * len(texts), texts)
    assert scores == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("by_name", [True, False])
def test_an_encoder_decoder_is_no_reward_model(make_trainer, tokenizer, tmp_path, by_name):
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, num_labels=1)
    model = T5ForSequenceClassification(config)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"reward model .* is an encoder-decoder model \(t5\).* use a decoder"):
        make_trainer(reward_funcs=str(tmp_path / "judge") if by_name else model)


def test_fault_16_a_reward_model_in_train_mode_is_put_into_evaluation_mode(make_classifier, tokenizer):
    """GPT-2 brings dropout of 0.1: two calls agree only in evaluation mode. It is frozen, too."""
    model = make_classifier().train()
    reward = RewardModel(model, tokenizer)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert reward(["a"] * 3, ["bc", "de", "fg"]) == reward(["a"] * 3, ["bc", "de", "fg"])


def test_fault_16_more_than_one_label_is_refused_at_the_start(make_trainer, make_classifier, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"num_labels=3, but a reward is one number; use a model with num_labels=1"):
        RewardModel(make_classifier(num_labels=3), tokenizer)
    folder = tmp_path / "two-labels"
    make_classifier(num_labels=2).save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # refused by its config, before weights are read
    with pytest.raises(ValueError, match="reward model 'two-labels' has num_labels=2"):
        make_trainer(reward_funcs=str(folder))


def test_a_folder_is_a_reward(make_trainer, make_classifier, other_tokenizer, prompts, tmp_path):
    folder = tmp_path / "scorer"
    classifier = make_classifier(vocab_size=len(other_tokenizer))
    classifier.save_pretrained(folder)
    other_tokenizer.save_pretrained(folder)
    trainer = make_trainer(reward_funcs=str(folder))
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["score/part/scorer"] == pytest.approx(metrics["score/mean"])
    again = load_reward(str(folder), device="cpu")
    assert again(["the"], [" cat"]) == pytest.approx(one_at_a_time(classifier, other_tokenizer, ["the cat"]), abs=1e-5)


def test_a_bare_model_needs_its_tokenizer(make_trainer, make_classifier):
    with pytest.raises(ValueError, match=r"RewardModel\(model, tokenizer\)"):
        make_trainer(reward_funcs=make_classifier())


def test_chats_go_through_the_reward_tokenizers_template_or_are_written_out(make_classifier, tokenizer):
    reward = RewardModel(make_classifier(), tokenizer)
    chat = [{"role": "user", "content": "hi"}]
    assert reward._text(chat, "yo") == "user: hi\n\nassistant: yo"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"
    reward = RewardModel(make_classifier(), tokenizer)
    assert reward._text(chat, "yo") == "u.hi a.yo "
    assert reward._text("hi", " yo") == "hi yo"


TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"


def test_a_chat_template_can_be_given_and_then_text_prompts_are_a_user_message(make_classifier, tokenizer, tmp_path):
    model = make_classifier()
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    chat = [{"role": "user", "content": "hi"}]
    for given in (TEMPLATE, str(tmp_path / "chat.jinja")):
        reward = RewardModel(model, tokenizer, chat_template=given)
        assert reward._text("hi", "yo") == reward._text(chat, "yo") == "u.hi a.yo "
    assert tokenizer.chat_template is None  # the user's stays as it is
    with pytest.raises(ValueError, match="its tokenizer has no chat template"):
        RewardModel(model, tokenizer, chat_template="tokenizer")
    with pytest.raises(ValueError, match=r"chat template file nowhere\.jinja does not exist"):
        RewardModel(model, tokenizer, chat_template="nowhere.jinja")
    tokenizer.chat_template = TEMPLATE
    assert RewardModel(model, tokenizer, chat_template="tokenizer")._text("hi", "yo") == "u.hi a.yo "


def test_reading_settings_reach_reward_models_loaded_by_name_and_no_other_reward(
    make_trainer, make_classifier, tokenizer, tmp_path
):
    make_classifier().save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    settings = {"reward_chat_template": str(tmp_path / "chat.jinja"), "reward_max_length": 9}
    ((function, _),) = make_trainer(reward_funcs=str(tmp_path / "scorer"), **settings).fixed.rewards.values()
    assert function._text("hi", "yo") == "u.hi a.yo " and function.max_length == 9
    for name, value in settings.items():
        with pytest.raises(ValueError, match=f"{name}=.* is for reward models loaded by name"):
            make_trainer(**{name: value})
        with pytest.raises(ValueError, match=f"{name}=.* is for reward models loaded by name"):
            make_trainer(reward_funcs=RewardModel(make_classifier(), tokenizer), **{name: value})


def test_an_overlong_text_keeps_its_end_where_the_completion_is(make_classifier, tokenizer):
    model = make_classifier()
    reward = RewardModel(model, tokenizer, max_length=5)
    assert reward(["a long prompt "], ["abc"]) == pytest.approx(one_at_a_time(model, tokenizer, ["t abc"]), abs=1e-5)
    # Without max_length the limit is the smaller of the tokenizer's and the model's.
    tokenizer.model_max_length = 10**30
    assert RewardModel(model, tokenizer).max_length == 64
    assert len(RewardModel(model, tokenizer)(["x" * 100], ["abc"])) == 1
    assert tokenizer.truncation_side == "right"


def test_a_token_id_beyond_the_vocabulary_is_an_error_with_its_completion(make_classifier, tokenizer):
    """z is id 28."""
    reward = RewardModel(make_classifier(vocab_size=28), tokenizer)
    with pytest.raises(ValueError, match=r"completion 1: token id 28 is not in the model's vocabulary of 28"):
        reward(["a", "a"], ["y", "z"])


def test_a_start_token_that_the_template_wrote_is_not_written_again(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert encode_text(tokenizer, "ab", ended=True) == [0, 3, 4]
    assert encode_text(tokenizer, "<|endoftext|>ab", ended=True) == [0, 3, 4]


def test_a_real_sentiment_model_prefers_praise(real_data):
    folder = real_data / "models/minilm-sst2-reward-fp16"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    reward = RewardModel(str(folder))
    praise, blame = reward(["The film was "] * 2, ["wonderful, a joy to watch.", "a dull and lifeless mess."])
    assert praise > blame
    # Alone and in a batch with a longer text: the same score up to rounding.
    assert reward(["The film was "], ["wonderful, a joy to watch."]) == pytest.approx([praise], abs=1e-4)


@pytest.fixture(params=["gpt2", "llama"])
def base(request, make_model, tokenizer, tmp_path) -> str:
    make_model(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def classifier_adapter(base) -> Any:
    """A sequence-classification model with a random LoRA adapter on ``base``."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        config = LoraConfig(r=3, task_type="SEQ_CLS", init_lora_weights=False, lora_dropout=0.5)
        return get_peft_model(model, config)


def test_an_adapter_folder_loads_on_a_base_of_its_own_and_stays_frozen(
    make_trainer, base, classifier_adapter, tokenizer, prompts, tmp_path
):
    classifier_adapter.save_pretrained(tmp_path / "judge")
    expected = one_at_a_time(classifier_adapter, tokenizer, ["once upon a cat.", "ab", "dog and cow the longest"])
    texts = (["once upon", "a", "dog and cow"], [" a cat.", "b", " the longest"])
    policy = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(model=base, reward_funcs=str(tmp_path / "judge"), peft_config=policy)
    ((name, (reward, _)),) = trainer.fixed.rewards.items()
    assert name == "judge" and max(expected) - min(expected) > 0.01
    # Its adapter is merged into its base: the same up to float32 rounding.
    assert reward(*texts) == pytest.approx(expected, abs=1e-4)
    trainer.step(trainer.rollout(prompts))
    assert reward(*texts) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("critic", ["adapter", "separate"])
def test_a_critic_that_starts_as_the_reward_adapter(make_trainer, base, classifier_adapter, prompts, tmp_path, critic):
    """Value adapter and head are the reward's, or a whole trunk and its head: the value of a text is its score."""
    folder = str(tmp_path / "judge")
    classifier_adapter.save_pretrained(folder)
    kind = {"critic": critic, "value_model": folder if critic == "separate" else None}
    policy = LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(model=base, reward_funcs=folder, peft_config=policy, value_head_from=folder, **kind)
    rollout = trainer.rollout(prompts)
    # V_t has read the response's first t tokens, as text when they are decoded.
    parts = trainer.tokenizer.batch_decode([ids[:2].tolist() for ids in rollout.response_ids])
    ((reward, _),) = trainer.fixed.rewards.values()
    rows = [i for i, n in enumerate(rollout.lengths.tolist()) if n > 2]
    scores = reward([prompts[i] for i in rows], [parts[i] for i in rows])
    assert len(rows) > 2 and rollout.values[rows, 2].tolist() == pytest.approx(scores, abs=1e-4)
