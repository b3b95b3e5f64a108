"""The table of other projects' arguments is complete, names settings that exist, and is what the pages show."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from rlhf_ppo.cli import TrainArgs
from rlhf_ppo.config.migration_table import FATES, ROWS, SOURCES
from rlhf_ppo.migration.arguments import PAGES, known_fields
from rlhf_ppo.migration.page import field_tables

ROOT = Path(__file__).parents[3]
SETTINGS = {field.name for field in fields(TrainArgs)}


@pytest.mark.parametrize("source", SOURCES)
def test_every_field_of_a_project_has_one_row(source):
    names = [name for row in ROWS if source in row.sources for name in row.names if name in known_fields(source)]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    assert set(names) == set(known_fields(source))


def test_every_row_is_of_known_projects_names_and_settings():
    for row in ROWS:
        assert row.sources and set(row.sources) <= SOURCES.keys(), row
        assert all(any(name in known_fields(source) for source in row.sources) for name in row.names), row
        assert set(row.ours) <= SETTINGS, row
        assert row.fate in FATES and bool(row.ours) >= (row.fate in ("same", "converted")), row
        assert row.note or row.fate == "same", f"{row}: says nothing"


@pytest.mark.parametrize("source", SOURCES)
def test_the_page_is_the_table(source):
    page = (ROOT / PAGES[source]).read_text(encoding="utf-8")
    assert page.endswith(field_tables(source)), "run: python -m rlhf_ppo.migration.page"


@pytest.mark.parametrize("source", SOURCES)
def test_each_field_stands_once_in_the_tables(source):
    tables = field_tables(source)
    assert all(len(re.findall(rf"^\|.*`{name}` \(", tables, re.MULTILINE)) == 1 for name in known_fields(source))
