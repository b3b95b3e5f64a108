"""Value heads that start from a run, an old TRL checkpoint or a reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


def trl_checkpoint(model, folder: Path, *, sharded: bool = False) -> torch.Tensor:
    """What AutoModelForCausalLMWithValueHead.save_pretrained leaves behind, as its state dict names it."""
    folder.mkdir()
    weight = torch.linspace(-1, 1, 16)[None]
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.5])}
    body = {name: x.contiguous().clone() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    model.config.save_pretrained(folder)
    if not sharded:
        save_file({**body, **head}, folder / "model.safetensors")
        return weight
    save_file(body, folder / "model-00001-of-00002.safetensors")
    save_file(head, folder / "model-00002-of-00002.safetensors")
    shards = dict.fromkeys(body, "model-00001-of-00002.safetensors")
    shards |= dict.fromkeys(head, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return weight


@pytest.mark.parametrize("sharded", [False, True])
def test_a_value_head_from_an_old_trl_checkpoint(make_trainer, make_model, tmp_path, sharded):
    weight = trl_checkpoint(make_model(), tmp_path / "trl", sharded=sharded)
    head = make_trainer(value_head_from=str(tmp_path / "trl")).model.value_head
    assert torch.equal(head.weight, weight) and head.bias.tolist() == [0.5]


def test_fault_28_a_pickled_checkpoint_is_refused_with_the_remedy(make_trainer, make_model, tmp_path):
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        make_trainer(value_head_from=str(tmp_path))


def test_a_value_head_from_a_run(make_trainer, prompts):
    trainer = make_trainer(learning_rate=0.01)
    trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model()
    again = make_trainer(model=str(folder), value_head_from=str(folder))
    for name, x in load_file(folder / "value_head.safetensors").items():
        assert torch.equal(x, again.model.value_head.state_dict()[name]) and (x != 0).any()


def test_a_truncated_value_head_is_refused(make_trainer, tmp_path):
    folder = make_trainer().save_model()
    file = folder / "value_head.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"value_head_from='.*value_head.safetensors is damaged \(.*restore it"):
        make_trainer(model=str(folder), value_head_from=str(folder))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_critic_that_starts_as_the_reward_model_gives_its_score_after_each_token(
    make_trainer, make_classifier, prompts, tmp_path, kind
):
    make_classifier(kind).save_pretrained(tmp_path / "reward")
    trainer = make_trainer(value_model=str(tmp_path / "reward"), value_head_from=str(tmp_path / "reward"))
    rollout = trainer.rollout(prompts)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    reward.config.pad_token_id = None  # one row at a time: the last token is the last one
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        for t in range(n):  # V_t values the state before token t: the reward model has read as far as that
            ids = torch.cat([prompt, rollout.response_ids[row, :t]])[None]
            with torch.no_grad():
                score = reward(ids).logits[0, 0]
            torch.testing.assert_close(rollout.values[row, t], score, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_fit(make_trainer, make_model, make_classifier, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_policy", load)
    folder = tmp_path / "wide"
    trl_checkpoint(make_model(), folder)
    save_file({"v_head.summary.weight": torch.ones(1, 24)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="fits hidden states of width 24, but the model under it is 16 wide"):
        make_trainer(value_head_from=str(folder))
    make_classifier(num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"score.weight has shape \[2, 16\], but a value is one number"):
        make_trainer(value_head_from=str(tmp_path / "two"))
    make_model().save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no single linear head found"):
        make_trainer(value_head_from=str(tmp_path / "none"))
    shutil.rmtree(tmp_path / "none")
    with pytest.raises(ValueError, match=r"found neither value_head.safetensors nor model.safetensors"):
        make_trainer(value_head_from=str(tmp_path / "none"))
