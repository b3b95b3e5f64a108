"""Read data sets in the forms of LLaMA-Factory and ms-swift, and make chat prompts of their rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "bot": "assistant"}
"""Roles of ShareGPT's form -> those of chat templates."""

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
_QUERIES = {"prompt": "query", "response": "response", "history": "history", "system": "system"}
"""Part of a row -> its column, in Alpaca's form and in ms-swift's older one."""

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
"""Of files that can be read."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a data file.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    from rlhf_ppo.data.files import load_rows  # loads the datasets library, which the other commands need not

    return load_rows(str(file)).to_list()


def find_dataset_info(folders: list[Path]) -> tuple[dict[str, Any], Path] | None:
    """Find and read LLaMA-Factory's dataset_info.json; returns it with its folder.

    Raises:
        ValueError: the file is not JSON.
    """
    for folder in folders:
        file = folder / "dataset_info.json"
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8")), folder
            except ValueError as error:
                raise ValueError(f"{file} is not valid JSON ({error}): correct it") from None
    return None


def described_prompts(rows: list[dict[str, Any]], info: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Make prompts of rows as dataset_info.json describes them.

    Args:
        rows: of the data file.
        info: the data set's entry: formatting, columns, tags.
        where: names the data set in messages.
    Raises:
        ValueError: a row without the columns; names it.
    """
    columns = info.get("columns", {})
    if info.get("formatting", "alpaca") != "sharegpt":
        # As LLaMA-Factory does: with `columns`, a part that is not listed is not read.
        names = (
            {part: columns.get(part) for part in _ALPACA} if columns else {**_ALPACA, "history": None, "system": None}
        )
        return [_from_parts(row, names, f"{where} row {i}") for i, row in enumerate(rows, start=1)]
    tags = info.get("tags", {})
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags[f"{name}_tag"]: name for name in ("user", "assistant", "system") if f"{name}_tag" in tags}
    messages, system = columns.get("messages", "conversations"), columns.get("system")
    return [
        _from_messages(row.get(messages), role, content, roles, row.get(system or ""), f"{where} row {i}")
        for i, row in enumerate(rows, start=1)
    ]


def usual_prompts(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Make prompts of rows in one of the forms that ms-swift recognises by itself.

    Raises:
        ValueError: none of them; names the row and its columns.
    """
    made: list[dict[str, Any]] = []
    for i, row in enumerate(rows, start=1):
        at = f"{where} row {i}"
        listed = row.get("messages") or row.get("conversations")
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            keys = ("role", "content") if "role" in listed[0] else ("from", "value")
            made.append(_from_messages(listed, *keys, {}, row.get("system"), at))
        elif "instruction" in row:
            made.append(_from_parts(row, _ALPACA, at))
        elif "query" in row:
            made.append(_from_parts(row, _QUERIES, at))
        else:
            raise ValueError(
                f"{at} has the columns {', '.join(row)}, but prompts are read from messages, conversations, "
                "instruction or query: rename one of them, or make a column prompt"
            )
    return made


def _from_parts(row: Mapping[str, Any], names: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """Make a prompt of columns: earlier turns, an instruction with its input below, and the response as reference."""
    part = {name: row.get(column or "") for name, column in names.items()}
    text = "\n".join(str(part[name]) for name in ("prompt", "query") if part.get(name))
    if not text:
        raise ValueError(
            f"{where} has no {names['prompt'] or 'column for the prompt'}: remove the row, or correct the column's name"
        )
    messages = [{"role": "system", "content": part["system"]}] if part.get("system") else []
    for question, reply in part.get("history") or ():
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return _prompt([*messages, {"role": "user", "content": text}], part.get("response"))


def _from_messages(
    listed: Any, role: str, content: str, roles: Mapping[str, str], system: Any, where: str
) -> dict[str, Any]:
    """Make a prompt of a conversation, without the reply that ends it."""
    if not isinstance(listed, list) or not all(isinstance(m, dict) and role in m and content in m for m in listed):
        raise ValueError(f"{where} has no list of messages with {role} and {content}: correct columns and tags")
    named = {**_ROLES, **roles}
    messages = [{"role": named.get(m[role], m[role]), "content": m[content]} for m in listed]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise ValueError(f"{where} has no message before the reply: remove the row")
    return _prompt(messages, reply)


def _prompt(messages: list[dict[str, Any]], reference: Any) -> dict[str, Any]:
    return {"prompt": messages} | ({"reference": reference} if reference else {})
