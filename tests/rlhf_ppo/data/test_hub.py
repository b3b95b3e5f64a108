"""Sources: what a folder, the cache or the hub does not have is one line with the way out; a local server plays hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from rlhf_ppo.cli import main
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.data.hub import cached_snapshot
from rlhf_ppo.models.loading import load_policy, load_tokenizer

ROOT = Path(__file__).parents[3]


class Hub(BaseHTTPRequestHandler):
    """Knows gated repositories by name, and no others."""

    def do_HEAD(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


def snapshot(cache: Path, name: str, revision: str, kind: str = "model", file: str = "model.safetensors") -> Path:
    folder = cache / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"")
    return folder


def test_fault_33_missing_and_gated_on_the_hub_are_one_line_and_the_cached_revision_is_offered(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_address[1]}"
    kept = snapshot(tmp_path / "cache", "me/gated-but-here", "abc123")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    generate = "generate --prompt x --device cpu --model"
    train = "train --model embedded --reward len:len --output-dir run --eval-size 0 --dataset"
    cases = [f"{generate} me/none", f"{generate} me/gated", f"{generate} me/gated-but-here", f"{train} me/none"]
    cases.append(f"{train} me/gated")
    script = (
        "import sys, json\nfrom rlhf_ppo.cli import main\n"
        "for argv in json.loads(sys.argv[1]): print('case', main(argv.split()), file=sys.stderr)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, json.dumps(cases)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    server.shutdown()
    server.server_close()
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "case"))]
    assert lines[1::2] == ["case 2"] * 5, done.stderr
    missing, gated, here, no_rows, gated_rows = lines[::2]
    assert "model 'me/none' cannot be loaded: no such folder, and the hub has no such model" in missing
    assert "HF_TOKEN" in missing and "cache" not in missing
    assert f"agree to terms: do so on {hub}/me/gated, and set HF_TOKEN" in gated
    assert f"the cache has revision abc123: name its folder, {kept}" in here
    assert "data set me/none cannot be read: no such folder, and the hub has no such dataset" in no_rows
    assert f"{hub}/datasets/me/gated" in gated_rows or "no such dataset" in gated_rows


def test_fault_33_offline_a_cached_revision_is_offered(tmp_path, monkeypatch):
    """Without refs/main the cache does not say which revision is meant: none is guessed, the newest is named."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'me/model' cannot be loaded.*unreachable.*offline: a folder") as error:
        load_policy("me/model")
    assert "cache" not in str(error.value) and "\n" not in str(error.value)
    old, new = snapshot(tmp_path, "me/model", "old"), snapshot(tmp_path, "me/model", "new")
    os.utime(old, (1, 1))
    with pytest.raises(ValueError, match=f"the cache has revision new: name its folder, {new}"):
        load_policy("me/model")
    snapshot(tmp_path, "me/rows", "r1", kind="dataset", file="train.jsonl")
    with pytest.raises(ValueError, match=r"data set me/rows cannot be read.*unreachable.*cache has revision r1"):
        load_rows("me/rows")


def test_a_revision_without_weights_is_not_offered(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot(tmp_path, "me/model", "half", file="config.json")
    assert cached_snapshot("me/model") is None and cached_snapshot("never/heard-of-it") is None


def test_damaged_and_missing_weights_are_one_line(tmp_path, make_model, tokenizer, capsys):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = ["generate", "--prompt", "a", "--device", "cpu", "--model", str(tmp_path)]
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(generate) == 2
    assert "cannot be loaded: a safetensors file is damaged" in capsys.readouterr().err
    weights.unlink()
    assert main(generate) == 2
    assert "the folder has no readable model" in capsys.readouterr().err


def test_an_adapter_without_its_parts_is_one_line(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text("no json")
    with pytest.raises(ValueError, match=r"adapter_config\.json does not describe an adapter"):
        load_policy(str(config.parent))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "r": 2}
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(ValueError, match=r"its weights, adapter_model\.safetensors, are gone"):
        load_policy(str(config.parent))
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read .*damaged"):
        load_policy(str(config.parent))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be loaded: the folder has none") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", b'{"prompt": "a"}\n{"prompt": '), ("rows.parquet", b"PAR0 and so on")]
)
def test_a_damaged_data_file_is_one_line_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data set .*{name} cannot be read: (JSON parse error|Parquet magic bytes)"):
        load_rows(str(tmp_path / name))
