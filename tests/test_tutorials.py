"""The tutorials run as they are written, in small; concepts and FAQ name settings and metrics that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from classic.cli import COMMANDS as CLASSIC
from classic.cli import main as classic_ppo
from rlhf_ppo.cli import COMMANDS as LANGUAGE
from rlhf_ppo.cli import main as rlhf_ppo
from rlhf_ppo.runtime.logs.metrics import METRICS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = [DOCS / "tutorials" / f"{name}.md" for name in ("cartpole", "language-model", "chat-model")]
LOOKED_UP = [DOCS / "faq.md", *sorted((DOCS / "concepts").glob("*.md"))]

SMALLER = {
    r"--total-timesteps [0-9_]+": "--total-timesteps 2048",
    r"--total-episodes \d+": "--total-episodes 8 --rollout-batch-size 8 --max-new-tokens 8 --eval-size 4",
    r"--num-samples \d+": "--num-samples 2 --max-new-tokens 8",
    r"--num-prompts \d+": "--num-prompts 4",
    r"--seeds \d+": "--seeds 1 --total-timesteps 2048",
    r"(?<=examples/chat_data.py)": " --questions 12 --samples 1",
    r"--probe-prompts \d+": "--probe-prompts 2",
    r"--num-epochs \d+": "--num-epochs 1",
}
"""What a test changes in a command, so that it takes a second."""


def steps(page: Path) -> list[tuple[str, str]]:
    """Return the Python blocks and the commands of a page, in order."""
    found: list[tuple[str, str]] = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        if language == "python":
            found.append(("python", block))
        elif language == "sh":
            found += [
                ("sh", line) for line in block.replace("\\\n", " ").splitlines() if line.partition("#")[0].strip()
            ]
    return found


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as a shell would, in this process."""
    for wanted, smaller in SMALLER.items():
        line = re.sub(wanted, smaller, line)
    said, _, command = line.rpartition(" | ")
    if said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(said)[-1] + "\n"))
    program, *words = shlex.split(command, comments=True)
    if program == "python":
        script = runpy.run_path(str(ROOT / words[0]))
        assert script["main"](words[1:]) in (0, None), line
    else:
        # The doctor's answer 1 is its opinion of a reward.
        codes = (0, 1) if words[0] in ("doctor", "advise") else (0,)
        assert {"rlhf-ppo": rlhf_ppo, "classic-ppo": classic_ppo}[program](words) in codes, line


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_it_is_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("rlhf_ppo", "examples"):  # readers are in the project's folder
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict[str, object] = {"__name__": "__main__"}
    taken = steps(page)
    assert len(taken) > 5
    for language, text in taken:
        if language == "sh":
            run(text, monkeypatch)
        else:
            if file := re.match(r"# (\w+\.py)\n", text):  # a file that the reader saves
                Path(file[1]).write_text(text, encoding="utf-8")
            exec(text, names)


def known() -> set[str]:
    """Return the names of all settings and commands' fields."""
    classes = [cls for commands in (LANGUAGE, CLASSIC) for cls, _ in commands.values()]
    return {field.name for cls in classes for field in dataclasses.fields(cls)} | {"judge_funcs", "reward_funcs"}


@pytest.mark.parametrize("page", [*LOOKED_UP, *TUTORIALS], ids=lambda page: page.stem)
def test_settings_and_metrics_that_a_page_names_exist(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    metrics = [word for word in code if re.fullmatch(r"[a-z]+/[a-z_0-9/]+", word) and (ROOT / word).exists() is False]
    families = {key.partition("/")[0] for key in METRICS}
    assert not [word for word in metrics if word not in METRICS and word.partition("/")[0] in families]
    settings = {word.partition("=")[0] for word in code if re.fullmatch(r"[a-z]+(_[a-z]+)+(=\S+)?", word)}
    public = runpy.run_path(str(ROOT / "rlhf_ppo" / "core" / "__init__.py"))["__all__"]
    assert settings <= known() | {*public} | NAMES, settings - known() - {*public} - NAMES


NAMES = {"top_k", "top_p", "gradient_alive", "peak_bytes", "pad_is_eos", "chat_template_kwargs", "last_update"}
"""Words in code that are no settings: columns, checks, attributes, and settings that are refused."""


def test_the_faq_answers_each_question_with_a_name_and_a_link():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    answers = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert 20 <= len(answers) <= 30
    for answer in answers:
        question, _, body = answer.partition("\n")
        assert "`" in body and re.search(r"\]\([\w/-]+\.md", body), question


def test_each_concept_has_a_picture_an_equation_metrics_and_600_words_at_most():
    concepts = sorted((DOCS / "concepts").glob("*.md"))
    assert [page.stem for page in concepts] == ["advantage", "kl", "ratio", "value"]
    for page in concepts:
        text = page.read_text(encoding="utf-8")
        assert f"images/concept-{page.stem}.png" in text and "What healthy looks like" in text and "    " in text
        assert 300 <= len(text.split()) <= 600, page.stem


def load_pictures():
    spec = importlib.util.spec_from_file_location("concept_images", DOCS / "concept_images.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_lambda_shows_bias_that_falls_and_noise_that_rises():
    found = load_pictures().lambda_errors([0, 0.5, 0.9, 1], walks=500)
    # Under lambda 0 the bias is the difference of the critic's errors (0.2 a state) on both sides, 0.2 * sqrt(2) for
    # many states; lambda 0.9 leaves little of it.
    assert 0.1 < found["bias"][0] < 0.4 and found["bias"][0] > 2 * found["bias"][2]
    assert found["noise"] == sorted(found["noise"]) and found["noise"][0] < 1e-9 and found["noise"][-1] > 0.5


@pytest.mark.slow
def test_the_pictures_of_the_concepts_are_drawn(tmp_path, monkeypatch):
    pictures = load_pictures()
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.main(["--episodes", "64", "--runs", str(tmp_path / "runs")])
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [
        f"concept-{n}" for n in ("advantage", "kl", "ratio", "value")
    ]
