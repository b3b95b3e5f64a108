"""What is saved opens with plain transformers, holds no pickle, and is what push_to_hub uploads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".joblib"}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_saved_model_opens_and_gives_the_same_logits(make_trainer, make_model, prompts, kind):
    trainer = make_trainer(model=make_model(kind), learning_rate=0.01)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    with torch.no_grad():
        # GPT-2's activation is one fused kernel in the trainer: the same function, rounded elsewhere.
        torch.testing.assert_close(model(ids).logits, trainer.model.policy(ids).logits, atol=1e-5, rtol=1e-5)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.policy.parameters(), strict=True)
        )
        assert not torch.allclose(model(ids).logits, make_model(kind).eval()(ids).logits)


def test_a_run_writes_no_pickle(make_trainer, make_model):
    trainer = make_trainer(value_model=make_model(seed=1))
    trainer.train()
    files = [file for file in trainer.run.path.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"model.safetensors", "value_head.safetensors", "metrics.jsonl", "run.json"}
    assert not [file for file in files if file.suffix in PICKLES]
    # Pickles (protocol 2 and up) open with 0x80; zip archives, as torch.save writes them, with PK.
    assert not [file for file in files if file.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK")]


def test_saving_does_not_disturb_the_run(make_trainer, prompts, tmp_path):
    trainer, calm = make_trainer(), make_trainer()
    for t in (trainer, calm):
        t.step(t.rollout(prompts))
        if t is trainer:
            assert t.save_model(tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder"
        t.step(t.rollout(prompts))
    for a, b in zip(trainer.model.parameters(), calm.model.parameters(), strict=True):
        assert torch.equal(a, b)


def fill_disk(monkeypatch, when, *, but: Path | None = None) -> None:
    """No room once ``when()`` holds, or only under one folder."""
    usage = shutil.disk_usage("/")

    def free(path):
        room = not when() or (but is not None and Path(path).is_relative_to(but))
        return usage._replace(free=10**12 if room else 10)

    monkeypatch.setattr(shutil, "disk_usage", free)


def test_a_disk_without_room_for_the_model_is_found_before_training(make_trainer, monkeypatch):
    trainer = make_trainer()
    fill_disk(monkeypatch, lambda: True)
    with pytest.raises(OSError, match=r"the model that is saved into .* needs 0\.\d MB and the disk has 0\.0 MB free"):
        trainer.train()
    assert trainer.iteration == 0


@pytest.mark.parametrize("case", ["checkpoint", "elsewhere", "nowhere"])
def test_a_disk_that_fills_at_the_end_says_where_the_model_lies(make_trainer, monkeypatch, tmp_path, case):
    rescue = tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))
    trainer = make_trainer(save_every=2 if case == "checkpoint" else 0)
    earlier = trainer.save_model() / "model.safetensors"
    before = earlier.read_bytes()
    saved = trainer.run.path / "checkpoint-2"
    full = saved.is_dir if case == "checkpoint" else lambda: trainer.iteration == 2
    fill_disk(monkeypatch, full, but=rescue if case == "elsewhere" else None)
    with pytest.raises(OSError, match=r"the model is not in its place: .* cannot be written: it needs") as error:
        trainer.train()
    assert earlier.read_bytes() == before  # what was there stays whole
    said = str(error.value)
    if case == "checkpoint":
        assert f"{saved} holds it as it was after iteration 2: free some space" in said
    elif case == "elsewhere":
        (kept,) = rescue.iterdir()
        assert f"It was saved in {kept} instead" in said
        model = AutoModelForCausalLM.from_pretrained(kept)
        assert all(map(torch.equal, model.parameters(), trainer.model.policy.parameters()))
    else:
        assert "Saving it elsewhere failed, too: " in said


def test_what_is_saved_has_the_permissions_that_the_umask_asks_for(make_trainer, make_model, tmp_path):
    before = os.umask(0o027)
    try:
        trainer = make_trainer(save_every=2, value_model=make_model(seed=1))
        trainer.train()
        trainer.save_model(tmp_path / "elsewhere")
    finally:
        os.umask(before)
    files = [f for root in (trainer.run.path, tmp_path / "elsewhere") for f in root.rglob("*") if f.is_file()]
    assert {"model.safetensors", "trainable.safetensors", "run.json", "value_head.safetensors"} < {
        f.name for f in files
    }
    assert {f.name: oct(f.stat().st_mode & 0o777) for f in files} == {f.name: "0o640" for f in files}


def test_push_to_hub_uploads_what_save_model_writes(make_trainer, monkeypatch):
    calls: dict[str, object] = {}

    class FakeHub:
        def create_repo(self, repo_id, **options):
            calls["created"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path):
            calls["files"] = sorted(file.name for file in Path(folder_path).iterdir())
            return f"hub:{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    trainer = make_trainer()
    assert trainer.push_to_hub("me/model") == "hub:me/model"
    assert calls["created"] == ("me/model", {"private": True, "exist_ok": True})  # private unless asked otherwise
    assert trainer.push_to_hub() == f"hub:me/{trainer.run.path.name}"  # among the user's own
    written = sorted(file.name for file in trainer.save_model().iterdir())
    assert calls["files"] == written
    assert {"model.safetensors", "config.json", "tokenizer.json", "value_head.safetensors"} <= set(written)


def test_push_to_hub_refuses_an_adapter_whose_base_nobody_could_load(make_trainer, monkeypatch):
    """The base is an object that no folder holds; the model with the adapter merged in can be loaded by anybody."""
    pushed: list[list[str]] = []

    class FakeHub:
        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path):
            pushed.append([file.name for file in Path(folder_path).iterdir()])

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    trainer = make_trainer(peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"the adapter alone could not be loaded .* push_to_hub\(merge_adapter=True\)"):
        trainer.push_to_hub("me/model")
    assert pushed == []
    trainer.push_to_hub("me/model", merge_adapter=True)
    assert "model.safetensors" in pushed[0] and "adapter_config.json" not in pushed[0]


def test_a_run_goes_on_from_a_saved_model(make_trainer, prompts):
    first = make_trainer(learning_rate=0.01)
    first.train()
    second = make_trainer(model=first.args.output_dir, processing_class=None)
    rollout = second.rollout(prompts)
    # The new reference is the model as it was loaded.
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
    assert second.step(rollout)["kl/reference_nats_per_response"] == pytest.approx(0, abs=1e-4)
