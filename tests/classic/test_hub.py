"""Sharing: what is uploaded, the card, and an agent that comes back; against a stand-in for the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import classic
from classic.cli import main
from classic.hub import from_hub, push_to_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder; ``calls`` has the options of what was created and asked for."""
    calls = {}

    class FakeHub:
        def create_repo(self, repo_id, **options):
            calls["created"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path):
            target = tmp_path / "hub" / repo_id
            target.mkdir(parents=True)
            for file in Path(folder_path).iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            return f"hub:{repo_id}"

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls["asked"] = (revision, sorted(allow_patterns))
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise OSError(f"404: there is no {repo_id}\nmore words")
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return SimpleNamespace(calls=calls, folder=tmp_path / "hub")


def test_an_agent_goes_there_and_comes_back(hub, small):
    agent = classic.PPO("tests/Match-v0", small()).learn(200)
    with pytest.warns(UserWarning, match="no video of 'tests/Match-v0' is uploaded: a video needs"):
        assert push_to_hub(agent, "me/match", episodes=5) == "hub:me/match"
    assert hub.calls["created"] == ("me/match", {"private": True, "exist_ok": True})  # private unless asked otherwise
    files = {file.name for file in (hub.folder / "me" / "match").iterdir()}
    assert files == {"README.md", "agent.json", "model.safetensors", "normalizer.safetensors", "optimizer.safetensors"}
    loaded = from_hub("me/match", revision="v1")
    assert loaded.evaluate(5) == agent.evaluate(5)
    # No code and no pickle is downloaded.
    kinds = ["agent.json", "model.safetensors", "normalizer.safetensors", "optimizer.safetensors"]
    assert hub.calls["asked"] == ("v1", kinds)
    assert from_hub("me/match", gamma=0.5).args.gamma == 0.5


def test_the_card_has_the_result_where_the_hub_looks_for_it(hub, small):
    agent = classic.PPO("tests/Match-v0", small()).learn(200)
    push_to_hub(agent, video=False, episodes=5)
    text = (hub.folder / "me" / "ppo-tests-Match-v0" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    (result,) = head["model-index"][0]["results"]
    mean = agent.evaluate(5)["mean_return"]
    assert result["metrics"][0]["value"].startswith(f"{mean:.2f} +/- ")
    assert result["dataset"]["name"] == "tests/Match-v0"
    assert {"reinforcement-learning", "ppo", "tests/Match-v0"} <= set(head["tags"])
    assert "from_hub('me/ppo-tests-Match-v0')" in text and "| `num_steps` | `16` |" in text


def test_a_video_lies_beside_the_card(hub, small, monkeypatch):
    monkeypatch.setattr("classic.hub.record_video", lambda agent, file: file.write_bytes(b"frames"))
    push_to_hub(classic.PPO("tests/Match-v0", small()), "me/match", episodes=2)
    assert (hub.folder / "me" / "match" / "replay.mp4").read_bytes() == b"frames"


def test_an_agent_that_is_not_there_is_one_sentence(hub):
    with pytest.raises(ValueError, match=r"^agent 'me/none' cannot be loaded .* \(OSError\): 404: .*me/none$"):
        from_hub("me/none")


def test_the_command_line_pushes(hub, small, tmp_path, capsys):
    classic.PPO("tests/Match-v0", small()).save(tmp_path / "agent")
    words = ["push", str(tmp_path / "agent"), "me/match", "--private", "False", "--video", "False", "--episodes", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out == "hub:me/match\n" and hub.calls["created"][1]["private"] is False


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr_schedule": "math:cos"}, "lr_schedule"),
        ({"wrappers": ("gymnasium.wrappers:FlattenObservation",)}, "wrappers"),
    ],
)
def test_code_that_a_downloaded_agent_names_must_be_named_by_the_user_too(settings, name, hub, small):
    agent = classic.PPO("tests/Match-v0", small(**settings))
    push_to_hub(agent, "me/match", video=False, episodes=2)
    with pytest.raises(ValueError, match=rf"agent 'me/match' names code in {name}: '.*'. If you trust it"):
        from_hub("me/match")
    assert getattr(from_hub("me/match", **settings).args, name) == settings[name]
    wanted = settings[name] if isinstance(settings[name], str) else list(settings[name])
    assert f"from_hub('me/match', {name}={wanted!r})" in (hub.folder / "me" / "match" / "README.md").read_text()
    push_to_hub(classic.PPO("tests/Match-v0", small(lr_schedule="piecewise:0.5=0.1")), "me/x", video=False, episodes=2)
    assert from_hub("me/x").args.lr_schedule == "piecewise:0.5=0.1"


def test_an_environments_module_is_code_too(hub, small):
    push_to_hub(classic.PPO("classic:tests/Match-v0", small()), "me/match", video=False, episodes=2)
    with pytest.raises(ValueError, match="names code in env: 'classic:tests/Match-v0'"):
        from_hub("me/match")
    assert from_hub("me/match", "tests/Match-v0").env_id == "tests/Match-v0"


def test_where_a_run_writes_is_neither_uploaded_nor_taken_over(hub, small, tmp_path):
    settings = {"output_dir": str(tmp_path / "mine"), "save_every": 5, "report_to": ("tensorboard",)}
    agent = classic.PPO("tests/Match-v0", small(**settings))
    push_to_hub(agent, "me/match", video=False, episodes=2)
    for file in ("agent.json", "README.md"):
        text = (hub.folder / "me" / "match" / file).read_text()
        assert str(tmp_path) not in text and "tensorboard" not in text
    agent.save(hub.folder / "me" / "older")  # as earlier versions uploaded it
    args = from_hub("me/older").args
    assert (args.output_dir, args.save_every, args.report_to) == (None, 0, ())
    assert from_hub("me/older", output_dir=str(tmp_path / "new")).args.output_dir == str(tmp_path / "new")


def test_a_wrapper_that_writes_files_must_be_named_too(hub, small, monkeypatch):
    agent = classic.PPO("tests/Match-v0", small())
    agent.run = replace(agent.run, args=replace(agent.args, wrappers=("RecordVideo(video_folder=/tmp/x)",)))
    agent.save(hub.folder / "me" / "match")
    with pytest.raises(ValueError, match="a wrapper that writes files in wrappers: 'RecordVideo"):
        from_hub("me/match")
    assert from_hub("me/match", wrappers=()).args.wrappers == ()
