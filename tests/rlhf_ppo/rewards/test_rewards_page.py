"""The rewards page: its Python blocks run in order, its JSON is JSON, the settings it names exist."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from rlhf_ppo import RLHFConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), {"__name__": "page"})
    (row,) = [json.loads(line) for line in (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()]
    assert {"score/part/short", "score/part/slow_service", "score/shaped_mean"} <= set(row)


def test_json_blocks_are_json_and_settings_exist():
    assert [list(json.loads(block)) for block in re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)] == [
        ["items"],
        ["scores"],
    ]
    fields = {field.name for field in dataclasses.fields(RLHFConfig)}
    named = re.findall(r"`((?:score|reward|http|length|missing_eos|cache|normalize|drop)_[a-z_]+)`", PAGE)
    assert len(set(named)) > 10 and set(named) <= fields
