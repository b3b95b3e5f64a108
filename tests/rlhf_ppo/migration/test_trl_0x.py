"""Migrating a TRL 0.x script: its constants are read, it is never run; the guide's blocks hold what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rlhf_ppo.cli import main
from rlhf_ppo.migration.script import read_script
from rlhf_ppo.runtime.logs.metrics import METRICS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/coming-from/trl-0x.md").read_text(encoding="utf-8")
OLD = """
raise SystemExit("a script that is migrated is never run")

@dataclass
class ScriptArguments:
    model_name: Optional[str] = field(default="lvwerra/gpt2-imdb")

args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
RATE = 2e-5
config = PPOConfig(
    model_name=args.model_name, learning_rate=RATE, batch_size=64, mini_batch_size=8, gradient_accumulation_steps=4,
    init_kl_coef=0.1, target=3, log_with=args.log_with, kl_penalty="mse", steps=int(os.environ["STEPS"]),
)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name, peft_config=LoraConfig(r=4, lora_alpha=16))
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
shortest, longest = 4, 16
output_max_length = 16
sampler = LengthSampler(4, output_max_length)
"""


def test_constants_are_read_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.py").write_text(OLD)
    assert main(["migrate", "old.py"]) == 0
    text = capsys.readouterr().out
    ours = yaml.safe_load(text)
    assert text.startswith("# For `rlhf-ppo train --config THIS_FILE`, from TRL 0.11's arguments in old.py.")
    assert (ours["model"], ours["learning_rate"], ours["max_new_tokens"]) == ("lvwerra/gpt2-imdb", 2e-5, 16)
    assert (ours["rollout_batch_size"], ours["num_minibatches"]) == (64, 2)
    assert (ours["kl_coef"], ours["kl_target"], ours["kl_estimator"]) == (0.1, 3, "k2")
    assert (ours["max_grad_norm"], ours["lr_scheduler_type"], ours["gae_lambda"]) == (1e9, "constant", 0.95)
    assert (ours["lora_rank"], ours["lora_alpha"]) == (4, 16)
    assert "# steps: int(os.environ['STEPS']) is known to the running script alone; set total_episodes" in text
    for missing in ("dataset", "reward", "total_episodes"):
        assert missing not in ours and f"# {missing}: " in text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "has no PPOConfig"),
        ("def", "is not Python"),
        ("PPOConfig(learning_rat=1)", "did you mean 'learning_rate'"),
        ("PPOConfig(batch_size=10, mini_batch_size=4)", "batch_size=10 is not a multiple"),
        ("PPOConfig(ppo_epochs='many')", "ppo_epochs: takes int, got 'many'"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.py").write_text(code)
    assert main(["migrate", "old.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_guides_old_script_is_migrated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("gpt2-sentiment.py").write_text(PAGE.partition("```py\n")[2].partition("```")[0])
    assert read_script(Path("gpt2-sentiment.py")).values["max_new_tokens"] == 16
    assert main(["migrate", "gpt2-sentiment.py", "--output", "ours.yaml"]) == 0
    text = Path("ours.yaml").read_text()
    for line in PAGE.partition("```yaml\n")[2].partition("```")[0].splitlines():
        assert line in text, line


def test_the_guides_python_runs(place, monkeypatch):
    import datasets
    import transformers

    def label(texts, **options):
        return [[{"label": "NEGATIVE", "score": 0.0}, {"label": "POSITIVE", "score": len(t) / 50}] for t in texts]

    reviews = {"text": ["the cat sat on a mat and so on " * 8] * 4}
    monkeypatch.setattr(transformers, "pipeline", lambda *names, **options: label)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: reviews)
    train, loop, given = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    smaller = {"lvwerra/gpt2-imdb": "policy", "128": "2", "max_new_tokens=16": "max_new_tokens=4, report=False"}
    ids = {"1049, 13": "4, 5", "340, 757": "6, 7", "This film was": "the cat", "I went to see": "a"}
    names: dict = {}
    for block in (train, loop, given):
        for old, new in {**smaller, **ids}.items():
            block = block.replace(old, new)
        exec(block, names)
    assert Path("runs/sentiment/model.safetensors").is_file() and names["rollout"].foreign


def test_metrics_that_the_guide_names_exist():
    table = PAGE.partition("## Where its statistics are")[2].partition("\n## ")[0]
    named = {
        name
        for row in table.splitlines()
        if row[:2] == "| "
        for name in re.findall(r"`([a-z]+/\w+)`", row.split("|")[2])
    }
    assert len(named) > 12 and not named - METRICS.keys() - {"metrics.md"}
