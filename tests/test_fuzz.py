"""Anything for a setting or a score is accepted or refused by name, never another error; hypothesis looks for one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import classic
from classic.presets.resolve import resolve
from rlhf_ppo import HTTPReward, RLHFConfig, StepRewards
from rlhf_ppo.cli import TrainArgs
from rlhf_ppo.core.validation import require_types
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError, coerce_scores
from rlhf_ppo.runtime.command_line.settings import parse_settings, read_yaml

FUZZ = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
FEW = settings(FUZZ, max_examples=40)

NUMBERS = st.integers(-3, 70) | st.integers() | st.floats() | st.sampled_from([1e-5, 0.2, 1.0, 10**400])
WORDS = st.sampled_from(["clip", "gae", "none", "auto", "1e-5", "NaN", "--seed", "-1", "", "True", "a b", "é\n"])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=4)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS, x, max_size=2), max_leaves=4)
OTHERS = VALUES | st.tuples(NUMBERS, NUMBERS) | st.binary(max_size=2) | st.builds(object) | st.sets(st.integers())


def names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def mapping(cls: type, values: st.SearchStrategy[Any], *, known: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Up to four settings, most of them known ones."""
    key = st.sampled_from(names(cls))
    return st.dictionaries(key if known else key | key | key | st.text(max_size=6), values, max_size=4)


TRAIN, CONTROL = mapping(TrainArgs, VALUES), mapping(classic.PPOArgs, VALUES)


# Settings


@FUZZ
@given(mapping(RLHFConfig, OTHERS, known=True))
@example({"seed": 2**70}).via("torch takes no such seed")
def test_fault_30_any_value_of_a_language_models_setting_is_kept_or_refused_by_name(given_settings):
    try:
        args = RLHFConfig(**{"output_dir": "x", **given_settings})
    except ValueError as error:
        assert any(name in str(error) for name in given_settings), error
        return
    assert {name: getattr(args, name) for name in given_settings} == given_settings
    assert args.num_optimizer_steps >= 1 and args.rollout_batch_size % args.num_minibatches == 0


@FUZZ
@given(mapping(classic.PPOArgs, OTHERS, known=True))
def test_fault_30_any_value_of_a_control_tasks_setting_is_kept_or_refused_by_name(given_settings):
    try:
        resolve(classic.PPOArgs(**given_settings), "CartPole-v1")
    except ValueError as error:
        assert any(name in str(error) for name in given_settings), error


@FUZZ
@given(TRAIN.map(lambda found: (TrainArgs, found)) | CONTROL.map(lambda found: (classic.PPOArgs, found)))
def test_fault_30_any_mapping_in_a_file_is_read_or_refused_by_its_key(tmp_path_factory, pair):
    cls, content = pair
    file = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        found = read_yaml(file, cls)
    except ValueError as error:
        assert str(file) in str(error) and any(repr(key)[1:-1] in str(error) for key in content), error
        return
    assert set(found) == set(content)
    required = {"output_dir": "o", "model": "m", "reward": ("r",), "dataset": ("d",)} if cls is TrainArgs else {}
    try:
        cls(**{**required, **found})
    except ValueError as error:
        assert any(key in str(error) for key in content), error


@FUZZ
@given(st.binary(max_size=30) | st.text("[]{}:,-!&*%@ \n\tax1.'\"", max_size=30).map(str.encode))
@example(b"[" * 5000).via("PyYAML's parser calls itself")
@example(b'seed: !!int ""').via("IndexError in PyYAML")
@example(b"seed: !!bool maybe").via("KeyError in PyYAML")
@example(b"seed: " + b"1" * 5000).via("Python reads no whole number that long")
@example(b"\xff\xfe\x00").via("not UTF-8")
def test_fault_30_any_bytes_in_a_file_are_settings_or_one_error_with_its_name(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    file.write_bytes(content)
    try:
        read_yaml(file, RLHFConfig)
    except ValueError as error:
        assert str(file) in str(error)


@FEW
@given(mapping(RLHFConfig, st.text(max_size=5) | WORDS | NUMBERS.map(str)))
def test_fault_30_any_words_as_flags_are_settings_or_end_with_help(capsys, flags):
    argv = ["--output-dir", "x", *(word for key, value in flags.items() for word in (f"--{key}", value))]
    try:
        parse_settings(RLHFConfig, argv, prog="fuzz")
    except ValueError as error:
        assert any(name in str(error) for name in [*flags, "config"]), error
    except SystemExit as ended:
        shown = capsys.readouterr()
        assert ended.code in (0, 2) and shown.err + shown.out


@FEW
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6))
@example("--seed").via("a value that looks like a flag")
@example("None").via("text that looks like another type")
def test_text_in_a_file_arrives_as_it_is(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    file.write_text(yaml.safe_dump({"stop_strings": [text]}, allow_unicode=True), encoding="utf-8")
    assert parse_settings(RLHFConfig, ["--output-dir", "x", "--config", str(file)], prog="fuzz").stop_strings == (text,)


# Scores

FLOATS = st.floats() | st.integers(-5, 5)
SCORE = (
    FLOATS
    | st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.integers().filter(lambda i: abs(i) > 10**300)
    | FLOATS.map(np.float64)
    | st.booleans().map(np.bool_)
    | st.integers(-5, 5).map(np.int32)
    | FLOATS.map(lambda x: torch.tensor(float(x)))
    | FLOATS.map(lambda x: torch.tensor([float(x)]))
    | st.lists(FLOATS, max_size=4)
    | st.lists(FLOATS, max_size=4).map(lambda x: np.array(x, dtype=float))
    | st.lists(st.tuples(st.integers(-1, 5) | st.none(), FLOATS | st.text(max_size=1)), max_size=2).map(StepRewards)
    | st.builds(object)
    | st.complex_numbers()
    | st.binary(max_size=2)
    | st.dictionaries(st.text(max_size=1), FLOATS, max_size=1)
)


def arrays(count: int) -> st.SearchStrategy[Any]:
    shape = st.sampled_from([(count,), (count, 1), (1, count), (), (count, 2), (count, 1, 1), (count + 1,)])
    array = st.tuples(shape, st.sampled_from([np.float32, np.int64, np.bool_, np.complex64, object, "U1"])).map(
        lambda pair: np.zeros(pair[0], dtype=pair[1])
    )
    tensor = st.tuples(shape, st.sampled_from([torch.float16, torch.bfloat16, torch.int8, torch.bool])).map(
        lambda pair: torch.ones(pair[0], dtype=pair[1])
    )
    return array | tensor


ANSWER = st.lists(SCORE, min_size=2, max_size=2) | st.lists(SCORE, max_size=3) | arrays(2) | SCORE


@settings(FUZZ, max_examples=400)
@given(ANSWER, st.booleans())
@example([10**400, 1.0], True).via("a whole number beyond all floats")
def test_fault_12_any_answer_of_a_reward_is_numbers_or_an_error_with_name_got_and_expected(answer, drop):
    """Two completions of three tokens each."""

    def judge(prompts, completions):
        return answer

    try:
        scores = score(
            judge,
            ["p", "q"],
            ["abc", "def"],
            {},
            completion_ids=[[1, 2, 3], [4, 5, 6]],
            decode=lambda ids: "".join("?abcdef"[i] for i in ids),
            drop_nonfinite=drop,
            needs_scores=False,
        )
    except RewardError as error:
        words = str(error)
        assert "'judge'" in words and len(words) < 1000
        assert "expected 2 numbers" in words or "completion 'abc'" in words or "completion 'def'" in words
        return
    assert len(scores) == 2
    assert all(value is None or (type(value) is float and math.isfinite(value)) for value in scores)


@FEW
@given(ANSWER)
def test_fault_12_without_token_ids_scores_are_one_number_each(answer):
    try:
        scores = coerce_scores(answer, 2, "judge")
    except RewardError as error:
        assert "expected 2 numbers (or None)" in str(error)
        return
    assert all(value is None or type(value) is float for value in scores)


# Answers over HTTP

ROW = st.fixed_dictionaries({}, optional={"id": st.sampled_from(["0", "1", "2", 0, None, ["0"]]), "score": VALUES})
REPLY = st.fixed_dictionaries({"scores": st.lists(ROW, min_size=2, max_size=2) | VALUES}) | VALUES


@FUZZ
@given(REPLY)
@example({"scores": [{"id": "0", "score": {"steps": "abc"}}, {"id": "1", "score": {"steps": [[1]]}}]}).via("no steps")
def test_fault_15_any_json_from_a_server_is_scores_or_an_error_that_names_the_server(reply):
    """What the client makes of a reply once it has been read as JSON, and scoring of what the client gives."""
    reward = HTTPReward("http://127.0.0.1:1")
    reward._client.post = lambda *_, **__: reply  # pyright: ignore[reportAttributeAccessIssue]
    try:
        scores = score(
            reward,
            ["p", "q"],
            ["abc", "def"],
            {},
            completion_ids=[[0], [1]],
            decode=lambda i: ["abc", "def"][i[0]] if i else "",
            needs_scores=False,
        )
    except RewardError as error:
        assert "127.0.0.1:1" in str(error) and len(str(error)) < 1000
        return
    assert all(value is None or math.isfinite(value) for value in scores)


# Kinds of values


@dataclasses.dataclass
class Kinds:
    number: float = 0.0
    whole: int = 0
    switch: bool = False
    text: str = ""
    several: tuple[float, ...] = ()
    maybe: int | None = None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("number", True, "number must be a number, got True"),
        ("number", "1e-5", "number must be a number, got the text '1e-5'"),
        ("number", math.inf, "number must be a number, got inf"),
        ("number", 10**400, "number must be a number, got 1000"),
        ("whole", 2.5, "whole must be a whole number, got 2.5"),
        ("whole", False, "whole must be a whole number, got False"),
        ("switch", 1, "switch must be True or False, got 1"),
        ("text", None, "text must be text, got None"),
        ("several", "ab", "several must be a tuple, each item a number, got the text 'ab'"),
        ("several", (1, None), r"several must be a tuple, each item a number, got \(1, None\)"),
        ("maybe", "x", "maybe must be a whole number or None, got the text 'x'"),
    ],
)
def test_fault_30_a_value_of_another_kind_is_named(name, value, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        require_types(Kinds(**{name: value}))


def test_values_of_the_right_kind_pass(tmp_path):
    require_types(Kinds(1, np.int64(2), True, tmp_path, [1.5, np.float32(2)], None))
