"""Reports: what they say about runs that ended, run, were cut off or damaged; nothing in them runs or is fetched."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classic.cli import main as classic_main
from rlhf_ppo.cli import main
from rlhf_ppo.runtime.logs.run_directory import run_lock
from rlhf_ppo.runtime.report.page import report_at_end, write_report
from tests.runtime.report.conftest import make_language_run

VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """A page's elements and texts; it raises where one is not closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def has(self, section: str) -> bool:
        return any(attrs.get("id") == section for _, attrs in self.elements)


def report(*runs: Path) -> Page:
    return Page(write_report(runs))


def test_a_run_that_learned(language_run):
    page = report(language_run())
    assert "It learned" in page.text and "on 8 held-out prompts rose from 0.435 to 0.795 (+0.36 ± " in page.text
    assert "3.6 nats per response from the reference" in page.text
    for section in ("curves", "samples", "tokens", "distance", "more", "time", "settings"):
        assert page.has(section), section
    assert len([1 for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "chart"]) > 8
    assert "An iteration took 0.7 seconds, 1,286 generated tokens a second" in page.text
    assert not page.has("notes") and not page.has("differences")
    assert len(page.source) < 3e6


def test_whatever_a_model_writes_is_text(language_run):
    page = report(language_run())
    assert "<script>window.hacked" not in page.source and "<img src=x" not in page.source
    assert "</script><script>window.hacked = 1</script>" in page.text and "{{ 7*7 }}" in page.text
    # One script, which the page's own policy names by its digest; nothing from elsewhere.
    assert page.source.count("<script>") == page.source.count("</script>") == 1
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    for _, attrs in page.elements:
        assert not (attrs.get("src") or "").startswith(("http", "//")) and (attrs.get("href") or "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    assert "url(" not in page.source and "@import" not in page.source


def test_a_control_task(control_run):
    folder = control_run()
    (folder / "still.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    page = report(folder)
    assert "It learned" in page.text and "evaluated at the end, it returns 250 ± 3 (std)" in page.text
    assert "Step by step" in page.text and not page.has("samples")
    assert page.named("img")[0]["src"].startswith("data:image/png;base64,")
    assert "Return" in page.text and "CartPole-v1" in page.text


def test_a_picture_that_is_none_is_left_out_and_a_missing_one_is_said(control_run):
    folder = control_run()
    assert f"classic-ppo evaluate {folder} --video {folder}/still.png makes one" in report(folder).text
    (folder / "still.png").write_bytes(b"<script>")
    page = report(folder)
    assert not page.named("img") and "still.png is no PNG" in page.text


def test_what_stands_out_has_its_remedy(language_run):
    folder = language_run(learning_rate=1e-4, num_epochs=4, objective="clip", clip_range=0.2)
    rows = [
        {**json.loads(line), "policy/clip_fraction": 0.6}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(folder)
    assert "One thing stands out: updates too large." in page.text
    assert "learning_rate 0.0001 → 3.3e-05" in page.text


def test_what_the_watch_said_is_in_the_report(language_run):
    folder = language_run()
    row = {"iteration": 9, "symptom": "kl", "rule": "drift from the reference", "seen": "<b>30 nats</b>", "try": {}}
    (folder / "watch.jsonl").write_text(json.dumps(row) + "\n")
    text = report(folder).text
    assert "it was warned after 9 updates, drift from the reference (<b>30 nats</b>)." in text


def test_a_run_that_got_worse_and_one_that_did_not_move(language_run):
    assert "It got worse" in report(language_run("worse", gain=-0.03)).text
    flat = language_run("flat", gain=0.0)
    (flat / "eval_samples.jsonl").unlink()
    page = report(flat)
    assert "No clear change" in page.text and "There is no evaluation before and after training" in page.text
    assert "responses of the first and of the last rollouts" in page.text


@pytest.mark.parametrize(("gain", "headline"), [(1, "It rose and fell back"), (-1, "It fell and came back")])
def test_a_run_that_turned_did_not_learn(language_run, gain, headline):
    folder = language_run(updates=40)
    (folder / "eval_samples.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "policy/loss" in row]
    for i, row in enumerate(updates):
        row["score/mean"] = gain * (1.0 if i < 6 else 3.0 if i < 20 else 1.05)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(folder)
    assert headline in page.text and "within its noise" not in page.text


def test_a_judges_time_is_part_of_an_iterations(language_run):
    folder = language_run()
    rows = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    (folder / "timings.jsonl").write_text(
        "".join(json.dumps({**row, "judge": 0.3, "exchanged_bytes": 10**9}) + "\n" for row in rows)
    )
    assert "An iteration took 1 seconds" in report(folder).text


@pytest.mark.parametrize("odd", ["2", [2], {"a": 1}])
def test_settings_of_odd_types_break_no_report(language_run, odd):
    names = ("critic_warmup_rollouts", "kl_target", "clip_range", "num_epochs", "rollout_batch_size", "total_episodes")
    assert report(language_run(**dict.fromkeys(names, odd))).has("curves")


def test_several_seeds_are_one_line_and_the_first_difference_is_named(language_run):
    runs = [language_run("a"), language_run("b", seed=1, shift=0.01), language_run("c", kl_coef=0.3, gain=0.01)]
    page = report(*runs)
    assert "kl_coef 0.05 (2 seeds) ends highest" in page.text and "interquartile mean" in page.text
    assert any("interval" in (attrs.get("class") or "") for attrs in page.named("path"))
    # One run of each other setting is compared, and where there is one setting, its seeds.
    assert "a and c" in page.text and "a and b" not in page.text
    seeds = report(*runs[:2])
    assert "They first differ in rollout 1, in what was sampled. Their seeds differ" in seeds.text
    assert "One setting, 2 seeds" in seeds.text


def test_the_first_difference_is_where_it_is(language_run):
    one, other = language_run("one"), language_run("other", gain=0.03)
    assert "They are the same in all 12 rollouts that both have" in report(one, other).text
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows[6]["policy/loss"] = -0.02
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(one, other)
    assert "Rollouts 1 to 6 are the same. They first differ in rollout 7: what was sampled is the same" in page.text
    samples = [json.loads(line) for line in (other / "samples.jsonl").read_text().splitlines()]
    samples[14]["completion"] = "upon a time"
    (other / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert "are in rollout 8; they part after 5 characters" in report(one, other).text


def test_metrics_of_ones_own_and_of_other_kinds_of_runs_are_drawn(language_run, tmp_path):
    folder = language_run()
    rows = [{**json.loads(line), "custom/rhymes": 0.1} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "custom/rhymes" in report(folder).text
    (tmp_path / "sft").mkdir()
    rows = [{"progress/iteration": i, "sft/loss": 2 - 0.1 * i} for i in range(9)]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(tmp_path / "sft")
    assert "sft/loss" in page.text and "No verdict" in page.text and "There is no run.json" in page.text


def test_runs_of_both_frontends(language_run, control_run):
    page = report(language_run(), control_run())
    assert "Runs of both frontends" in page.text and "there is nothing to compare" in page.text
    assert "Return, control" in page.text and "KL to the reference, language" in page.text
    # Each in its own units: no chart has both.
    units = [attrs["data-read"].partition(",")[0] for attrs in page.named("svg") if "data-read" in attrs]
    assert {'{"x":"environment steps"', '{"x":"responses trained on"'} <= set(units)


def test_a_run_that_is_still_running_and_one_that_was_cut_off(language_run):
    folder = language_run(total_episodes=640)
    assert "It ended early, after 384 of 640 responses." in report(folder).text
    with run_lock(folder):
        assert "It is still running: 384 of 640 responses." in report(folder).text


def test_a_folder_with_nothing_but_settings(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "tiny", "total_episodes": 64}')
    page = report(tmp_path)
    assert "Nothing was learned yet" in page.text and "no update is in this folder yet" in page.text


def test_damage_is_left_out_and_said(language_run):
    folder = language_run()
    for name in ("metrics", "samples", "timings", "eval_samples"):
        file = folder / f"{name}.jsonl"
        lines = file.read_bytes().split(b"\n")
        lines[1:1] = [b'{"half', b"[1, 2]", b"\xff\xfe", b'{"iteration": "x", "progress/iteration": null}']
        file.write_bytes(b"\n".join(lines) + b'{"progress/iteration": 99, "sco')
    (folder / "run.json").write_text("{")
    for file in (folder / "tokens").iterdir():
        file.write_bytes(b"PAR1 nothing")
    page = report(folder)
    assert "metrics.jsonl: 3 lines (the first: 2) are damaged and left out." in page.text
    assert "run.json is damaged" in page.text and "rollout-000012.parquet is damaged" in page.text
    assert "It learned" in page.text and not page.has("tokens")


@pytest.mark.parametrize(
    "row",
    [
        {"progress/iteration": 1, "score/mean": float("nan")},
        {"progress/iteration": 1e308, "progress/episodes": 5, "score/mean": 1e299},
        {"progress/iteration": 1, "progress/episodes": True, "policy/loss": [1], "score/mean": "high"},
    ],
)
def test_odd_numbers_draw_no_curve_and_raise_nothing(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"args": 3, "reward": 5, "fingerprints": [], "max_grad_norm": "x"}))
    report(tmp_path)


def test_an_old_run_says_what_it_lacks(language_run):
    folder = language_run()
    for name in ("tokens", "responses"):
        for file in (folder / name).iterdir():
            file.unlink()
    (folder / "timings.jsonl").unlink()
    page = report(folder)
    assert "No tokens were recorded" in page.text and not page.has("time")


def test_a_long_run_with_long_texts_stays_small(language_run):
    folder = language_run(updates=3000)
    long = "word " * 20_000
    rows = [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]
    (folder / "eval_samples.jsonl").write_text("".join(json.dumps({**row, "completion": long}) + "\n" for row in rows))
    runs = [folder, *(language_run(f"more{i}", updates=300, seed=i) for i in range(6))]
    page = report(*runs)
    assert len(page.source) < 3e6 and "more characters)" in page.text


@pytest.mark.parametrize("command", [main, classic_main])
def test_the_commands(command, language_run, control_run, tmp_path, capsys):
    runs = [str(language_run()), str(control_run())]
    assert command(["report", runs[0]]) == 0
    assert capsys.readouterr().out == f"report   {runs[0]}/report.html\n"
    assert command(["report", *runs, "--output", str(tmp_path / "new" / "both.html")]) == 0
    assert "2 runs compared" in (tmp_path / "new" / "both.html").read_text()


@pytest.mark.parametrize("command", [main, classic_main])
def test_a_folder_that_is_no_run_is_one_sentence(command, language_run, tmp_path, capsys):
    language_run()
    for folder, why in (
        (tmp_path, f"holds no run: name a run's folder, such as {tmp_path / 'run'}"),
        (tmp_path / "no", "does not exist"),
    ):
        assert command(["report", str(folder)]) == 2
        assert why in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["report"])


def test_a_report_that_fails_ends_no_run(tmp_path):
    with pytest.warns(UserWarning, match="report.html could not be written"):
        report_at_end(tmp_path / "nothing", quiet=True)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**20), st.floats(), st.text(max_size=5))
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2))
CHANGES = st.tuples(st.integers(0, 30), st.integers(0, 30), st.one_of(VALUES, st.just("absent")))
"""Which row, which of its fields, and what it then holds."""


@given(changes=st.lists(CHANGES, min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_no_json_breaks_a_report(changes, tmp_path_factory, damageable):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(damageable, folder, dirs_exist_ok=True)
    for name in ("metrics", "samples", "eval_samples", "timings", "run"):
        file = folder / ("run.json" if name == "run" else f"{name}.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row, place, value in changes:
            chosen = rows[row % len(rows)]
            key = list(chosen)[place % len(chosen)] if chosen else "iteration"
            chosen.pop(key, None)
            chosen |= {} if value == "absent" else {key: value}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(folder)


@pytest.fixture(scope="module")
def damageable(tmp_path_factory):
    """A run's folder with all files."""
    return make_language_run(
        tmp_path_factory.mktemp("runs") / "run", learning_rate=1e-4, max_grad_norm=1.0, clip_range=0.2
    )
