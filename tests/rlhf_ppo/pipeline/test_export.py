"""Export: a checkpoint becomes the folder that the run itself saves at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ppo.cli import main
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.runtime.checkpoints.checkpoint import MANIFEST, file_facts, manifest_text


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for file in folder.rglob("*.safetensors") if "checkpoint-" not in str(file)]
    return {f"{f.relative_to(folder)}:{key}": x for f in files for key, x in load_file(f).items()}


@pytest.fixture
def saved(tmp_path: Path, make_model, tokenizer) -> str:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["whole", "separate critic", "adapters"])
def test_an_exported_checkpoint_equals_the_saved_model(tmp_path, make_trainer, saved, kind):
    given: dict[str, Any] = {"separate critic": {"value_model": saved}}.get(kind, {})
    if kind == "adapters":
        given = {"peft_config": lora_config(2), "critic": "adapter"}
    trainer = make_trainer(model=saved, total_episodes=8, save_every=1, **given)
    trainer.train()
    folder = tmp_path / "exported"
    assert main(["export", str(trainer.run.path), str(folder)]) == 0
    before, after = weights_in(trainer.run.path), weights_in(folder)
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == trainer.tokenizer.get_vocab()


def test_a_merged_export_is_a_plain_transformers_model(tmp_path, make_trainer, saved):
    trainer = make_trainer(model=saved, total_episodes=8, save_every=1, peft_config=lora_config(2))
    trainer.train()
    folder = tmp_path / "exported"
    assert main(["export", str(trainer.run.path / "checkpoint-1"), str(folder), "--merge-adapter"]) == 0
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(exported, trainer.model.policy(input_ids=ids).logits)


def test_an_adapter_on_an_object_needs_its_base_named(tmp_path, make_trainer, make_model, saved, capsys):
    trainer = make_trainer(model=make_model("llama"), total_episodes=8, save_every=1, peft_config=lora_config(2))
    trainer.train()
    words = ["export", str(trainer.run.path / "checkpoint-1"), str(tmp_path / "exported")]
    assert main(words) == 2
    assert "say where that is with --model" in capsys.readouterr().err
    assert main([*words, "--model", saved]) == 0


def test_a_checkpoint_of_an_earlier_version_says_so(tmp_path, make_trainer, saved, capsys):
    trainer = make_trainer(model=saved, total_episodes=8, save_every=1)
    trainer.train()
    folder = trainer.run.path / "checkpoint-1"
    state = json.loads((folder / "state.json").read_text())
    del state["models"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["state.json"] = file_facts(folder / "state.json")
    (folder / MANIFEST).write_text(manifest_text(manifest))
    assert main(["export", str(folder), str(tmp_path / "exported")]) == 2
    assert "an earlier version wrote it" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "exported")]) != 0
    assert not (tmp_path / "exported").exists()
