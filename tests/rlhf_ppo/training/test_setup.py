"""Setting up a run: what does not fit together is refused by name before anything is trained."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from rlhf_ppo import PPOTrainer, RewardModel, RLHFConfig
from rlhf_ppo.generation.stop_tokens import stop_tokens


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model is a failure: what is tested must be found out before."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_policy", load)
    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_trunk", load)


def test_an_encoder_decoder_is_refused_by_name(make_trainer, tmp_path, no_loading):
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match=r"'t5' is an encoder-decoder model.*needs a decoder-only"):
        make_trainer(model=T5ForConditionalGeneration(config))
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder model"):
        make_trainer(model=str(tmp_path))
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder model"):
        make_trainer(ref_model=str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_given_in_half_precision_is_trained_in_float32(make_trainer, make_model, prompts, dtype):
    """transformers loads what was saved; steps of PPO are lost in half precision, or overflow."""

    def trained(model, **others):
        trainer = make_trainer(model=model, **others)
        metrics = [trainer.step(trainer.rollout(prompts)) for _ in range(2)]
        assert {p.dtype for p in [*trainer.model.parameters(), *trainer.reference.model.parameters()]} == {
            torch.float32
        }
        return metrics

    def given(seed):
        return make_model(seed=seed).to(dtype)

    with pytest.warns(UserWarning, match=f"weights in {str(dtype)[6:]}; they are converted to float32. Load"):
        halves = trained(given(0), ref_model=given(1), value_model=given(2))
    assert halves == trained(given(0).float(), ref_model=given(1).float(), value_model=given(2).float())


def test_a_model_given_as_reward_and_as_critic_becomes_two(make_trainer, make_classifier, tokenizer, prompts):
    judge = make_classifier().to(torch.bfloat16)
    reward = RewardModel(judge, tokenizer)
    trainer = make_trainer(reward_funcs=reward, value_model=judge)
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    trainer.step(trainer.rollout(prompts))
    assert all(torch.equal(before[name], value) for name, value in judge.state_dict().items())
    assert {p.dtype for p in judge.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.value_trunk.parameters()} == {torch.float32}


def test_an_adapter_in_half_precision_is_trained_in_float32(make_trainer, make_model):
    halves = get_peft_model(make_model(), LoraConfig(r=2)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="PeftModel.* has weights in bfloat16"):
        trainer = make_trainer(model=halves)
    assert {p.dtype for p in trainer.model.trainable_parameters()} == {torch.float32}
    frozen = make_trainer(model=make_model().to(torch.bfloat16), peft_config=LoraConfig(r=2)).model
    assert {p.dtype for p in frozen.trainable_parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in frozen.parameters()}


def test_settings_of_another_kind_are_refused_at_once(make_trainer, tokenizer, no_loading):
    with pytest.raises(TypeError, match="args must be an RLHFConfig, got dict"):
        PPOTrainer(model="embedded", reward_funcs=len, args={"output_dir": "run"})


def test_fault_3_a_missing_pad_token_stays_missing(make_trainer, tokenizer, prompts, tmp_path):
    """Masks do the work, so the user's tokenizer is neither given a pad token nor turned round, nor saved so."""
    tokenizer.padding_side = "right"
    trainer = make_trainer()
    trainer.step(trainer.rollout(prompts))
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right" and len(tokenizer) == 30
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(trainer.save_model(tmp_path / "saved"))
    assert saved.pad_token is None and saved.padding_side == "right"


def test_fault_10_vocabularies_that_differ(make_trainer, make_model, no_loading):
    for name in ("ref_model", "value_model"):
        with pytest.raises(ValueError, match=f"{name} has a vocabulary of 31 tokens and model one of 30"):
            make_trainer(**{name: make_model(vocab_size=31)})


def test_fault_10_a_tokenizer_of_another_model(make_trainer, make_model, no_loading):
    with pytest.raises(ValueError, match="train_dataset row 0: token id 23 is not in the model's vocabulary of 12"):
        make_trainer(model=make_model(vocab_size=12), stop_token_ids=(0,))


def test_stop_tokens_come_from_settings_then_generation_config_then_config_then_tokenizer(
    make_trainer, make_model, tokenizer
):
    def stops(model, **settings):
        return make_trainer(model=model, **settings).stop_token_ids

    assert stops(make_model(), stop_token_ids=(5, 6)) == (5, 6)
    model = make_model()
    model.generation_config.eos_token_id = [7, 8]
    assert stops(model, stop_token_ids=None) == (7, 8)
    model.generation_config.eos_token_id, model.config.eos_token_id = None, 9
    assert stops(model, stop_token_ids=None) == (9,)
    model.config.eos_token_id = None
    assert stops(model, stop_token_ids=None) == (tokenizer.eos_token_id,) == (0,)
    with pytest.raises(ValueError, match=r"stop tokens \(30,\) must lie in the vocabulary \[0, 30\)"):
        stops(make_model(), stop_token_ids=(30,))


def test_an_end_of_text_that_ends_no_response_is_a_warning(make_trainer, make_model):
    model = make_model()
    model.generation_config.eos_token_id = [7, 8]
    with pytest.warns(UserWarning, match=r"stop at 7 \('e'\), 8 \('f'\), .* end of text is 0 .* Set stop_token_ids"):
        make_trainer(model=model, stop_token_ids=None)
    model.generation_config.eos_token_id = [7, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(model=model, stop_token_ids=None)
        make_trainer(model=model, stop_token_ids=(7,))  # whoever names the stop tokens means them


def test_an_adapter_stops_where_its_base_does(make_model, tokenizer, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_model()
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(base)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(adapter)
    assert stop_tokens(str(adapter), model.config, tokenizer) == (7, 8)


def test_an_end_of_text_id_outside_the_vocabulary_is_an_error(make_trainer, make_model, no_loading):
    """GPT2Config names 50256 whatever the vocabulary: a response would never stop."""
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 50256
    with pytest.raises(ValueError, match=r"stop tokens \(50256,\) must lie in the vocabulary .*set stop_token_ids"):
        make_trainer(model=model, stop_token_ids=None)


def test_no_stop_token_at_all_runs_to_the_limit(make_trainer, make_model, tokenizer, prompts):
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    trainer = make_trainer(model=model, stop_token_ids=None)
    rollout = trainer.rollout(prompts)
    assert rollout.mask.all() and not rollout.finished.any()


def test_a_model_object_without_a_tokenizer(make_trainer):
    with pytest.raises(ValueError, match="pass its tokenizer as processing_class"):
        make_trainer(processing_class=None)


def test_train_and_evaluate_say_which_data_set_they_miss(make_model, tokenizer, tmp_path):
    args = RLHFConfig(output_dir=str(tmp_path), device="cpu", quiet=True)
    trainer = PPOTrainer(make_model(), lambda p, c, **_: [1.0] * len(p), args, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"train\(\) needs a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match=r"evaluate\(\) needs an eval_dataset"):
        trainer.evaluate()


def test_a_reference_adapter_and_a_reference_model_contradict(make_trainer, make_model, no_loading):
    with pytest.raises(ValueError, match=r"with peft_config the reference is the same model.*drop ref_model"):
        make_trainer(ref_model=make_model(), peft_config=LoraConfig(target_modules=["c_attn"]))


def test_reinforce_and_a_critic_contradict(make_trainer, make_model, no_loading):
    with pytest.raises(ValueError, match=r"objective='reinforce' has no critic, but a value_model is given"):
        make_trainer(objective="reinforce", value_model=make_model())


def test_output_dir_is_a_file(make_trainer, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        make_trainer(output_dir=str(file))


def test_one_model_in_two_roles_is_two_models(make_trainer, make_model, prompts):
    """model, ref_model and value_model may be one object: policy and critic learn, the reference stays."""
    model = make_model()
    trainer = make_trainer(model=model, ref_model=model, value_model=model)
    rollout = trainer.rollout(prompts)
    before = [p.clone() for p in trainer.reference.model.parameters()]
    trainer.step(rollout)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.reference.model.parameters(), strict=True))
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())
    start = make_model()
    for part, original in ((trainer.model.policy, start), (trainer.model.value_trunk, start.transformer)):
        moved = [not torch.equal(a, b) for a, b in zip(part.parameters(), original.parameters(), strict=True)]
        assert any(moved)


def test_reference_and_critic_from_one_object(make_trainer, make_model, prompts):
    other = make_model(seed=1)
    trainer = make_trainer(ref_model=other, value_model=other)
    assert all(p.requires_grad for p in trainer.model.value_trunk.parameters())
    trainer.step(trainer.rollout(prompts))
    expected = make_model(seed=1)
    for now, then in zip(trainer.reference.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ["./nope", "embeded", "nobody/nothing"])
def test_fault_33_a_model_that_is_nowhere_is_one_line_with_its_name(make_trainer, name):
    with pytest.raises(ValueError, match=f"model '{name}' cannot be loaded: no such folder, and the hub") as error:
        make_trainer(model=name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_says_so(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="the folder has no readable model"):
        make_trainer(model=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "a model must be a hub id, a folder or a transformers model, got int"),
        ({"reward_funcs": 3}, "a reward must be a function, a model, a folder, a hub id or an address, got int"),
        ({"reward_funcs": "r.py"}, "names a file but no function: write r.py:function"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number or None, got the text '1e-4'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)


def test_a_reward_file_with_a_syntax_error_names_file_and_line(make_trainer, tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ndef broken(:\n")
    with pytest.raises(ValueError, match=r"bad\.py: .* \(bad\.py, line 2\)"):
        make_trainer(reward_funcs=f"{tmp_path / 'bad.py'}:broken")


def test_an_output_folder_that_cannot_be_made_is_named(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file/run cannot be created: Not a directory"):
        make_trainer(output_dir=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize("prompts", ["Once upon a time", []])
def test_rollout_takes_a_list_of_prompts(make_trainer, prompts):
    with pytest.raises(ValueError, match="takes a list of one or more prompts"):
        make_trainer().rollout(prompts)


def test_every_argument_of_the_trainer_is_documented():
    text = PPOTrainer.__init__.__doc__
    names = inspect.signature(PPOTrainer.__init__).parameters.keys() - {"self"}
    assert [name for name in names if f"\n            {name}: " not in text] == []
