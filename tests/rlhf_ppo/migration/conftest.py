"""A folder with a policy, reward models in two projects' forms, and data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template whose tokens the tests' tokenizer has."""

ALPACA = [
    {"instruction": "say", "input": "a word", "output": "cat"},
    {"instruction": "say no", "input": "", "output": ""},
    *({"instruction": f"the cat {word}", "output": "so"} for word in ("sat", "ran", "ate", "hid")),
]
SHAREGPT = [
    {"talk": [{"by": "you", "text": "good day"}, {"by": "it", "text": "hello"}], "manner": "be calm"},
    {"talk": [{"by": "you", "text": "a"}, {"by": "it", "text": "b"}, {"by": "you", "text": "c"}]},
]
INFO = {
    "alpaca": {"file_name": "alpaca.json"},
    "talks": {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "manner"},
        "tags": {"role_tag": "by", "content_tag": "text", "user_tag": "you", "assistant_tag": "it"},
    },
    "elsewhere": {"hf_hub_url": "someone/prompts"},
}


@pytest.fixture
def place(tmp_path, make_model, make_classifier, tokenizer, monkeypatch) -> Path:
    """A policy, a classifier, a language model with a value head, and data; the working folder."""
    tokenizer.chat_template = TEMPLATE
    for name, model in (("policy", make_model()), ("classifier", make_classifier()), ("scored", make_model(seed=5))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    torch.manual_seed(3)
    head = {"v_head.summary.weight": torch.randn(1, 16), "v_head.summary.bias": torch.tensor([0.25])}
    save_file(head, tmp_path / "scored" / "value_head.safetensors")
    (tmp_path / "data").mkdir()
    for name, content in (("dataset_info", INFO), ("alpaca", ALPACA), ("talks", SHAREGPT)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path
