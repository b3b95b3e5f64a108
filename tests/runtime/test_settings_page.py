"""Pages of settings: sentences from the code, defaults, and what commands share."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ppo.runtime.command_line.settings_help import sentences
from rlhf_ppo.runtime.command_line.settings_page import command_sections


@dataclass
class Base:
    """What both need."""

    model: str
    """A folder,
    or a hub id."""
    rate: float | None = None
    """Either a|b."""


@dataclass
class More(Base):
    """Do more."""

    rate: float | None = 0.5
    """Another sentence."""
    loud: bool = False
    """Say more."""


COMMANDS = {"some": (Base, print), "more": (More, print)}


def test_a_field_has_the_sentence_of_the_class_that_sets_it_last():
    assert sentences(More) == {"model": "A folder, or a hub id.", "rate": "Another sentence.", "loud": "Say more."}


def test_a_section_a_command_and_what_an_earlier_one_has_by_name():
    first, second = command_sections("prog", COMMANDS).removeprefix("## ").split("\n## ")
    assert first.startswith("`prog some`\n\nWhat both need.\n")
    assert "| `model` | required | A folder, or a hub id. |\n| `rate` | `None` | Either a\\|b. |" in first
    assert "### Settings\n" in second and "| `loud` | `False` | Say more. |" in second
    assert "### What both need\n" in second and "| `rate` | `0.5` | Another sentence. |" in second
    assert "As in `some`: `model`." in second and "A folder" not in second


def test_what_stands_in_for_none_is_the_default_shown():
    assert "| `rate` | `0.1` | Either" in command_sections("prog", COMMANDS, {"rate": 0.1, "loud": True})
