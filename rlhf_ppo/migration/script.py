"""Read the constants of a TRL training script from its syntax tree; the script is never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_GENERATION = {"do_sample", "top_k", "top_p", "temperature", "min_length", "max_new_tokens", "num_beams"}
"""Names by which a dict of arguments for ``generate`` is known."""


class ScriptValues(NamedTuple):
    """What a script says about its run."""

    values: dict[str, Any]
    unread: dict[str, str]
    """Argument -> the expression whose value only running the script would tell."""


def read_script(path: Path) -> ScriptValues:
    """Read the keywords of ``PPOConfig`` and ``LoraConfig``, the policy's name and what is given to ``generate``.

    Raises:
        ValueError: not Python, or no ``PPOConfig(...)`` in it.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not Python ({error}): correct it, or give a YAML file or flags") from None
    names = _constants(tree)
    found = ScriptValues({}, {})
    configs = [call for call in _calls(tree) if _name(call.func) == "PPOConfig"]
    if not configs:
        raise ValueError(f"{path} has no PPOConfig(...): name the script that makes it, or give a YAML file or flags")
    for call in (*configs, *(call for call in _calls(tree) if _name(call.func) == "LoraConfig")):
        for keyword in call.keywords:
            if keyword.arg is not None:
                _store(found, keyword.arg, keyword.value, names)
    for name, value in _policies(tree):
        _store(found, name, value, names | found.values)
    for name, value in _generation(tree):
        if name not in found.values:
            _store(found, name, value, names)
    for name in found.values:
        found.unread.pop(name, None)
    return found


def _store(found: ScriptValues, name: str, node: ast.expr, names: dict[str, Any]) -> None:
    known, value = _value(node, names)
    if known:
        found.values[name] = value
    elif name not in found.values:
        found.unread[name] = ast.unparse(node)


def _value(node: ast.expr, names: dict[str, Any]) -> tuple[bool, Any]:
    """Return whether an expression is a constant, or a name of one, and its value."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = _name(node)
        return name in names, names.get(name)
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _constants(tree: ast.AST) -> dict[str, Any]:
    """Return the constants that a script assigns once, and the defaults of its dataclasses' fields."""
    names: dict[str, list[tuple[bool, Any]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(value, ast.Call) and _name(value.func) == "field":
            value = next((k.value for k in value.keywords if k.arg == "default"), value)
        known, constant = _value(value, {})
        if isinstance(target, ast.Name):
            names.setdefault(target.id, []).append((known, constant))
    return {name: values[0][1] for name, values in names.items() if len(values) == 1 and values[0][0]}


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(node: ast.AST) -> str:
    """Return the last part of a dotted name: PPOConfig for ``trl.PPOConfig``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _policies(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the name that the first ``AutoModelForCausalLMWithValueHead.from_pretrained`` loads."""
    for call in _calls(tree):
        method = call.func
        if not (isinstance(method, ast.Attribute) and method.attr == "from_pretrained" and call.args):
            continue
        if _name(method.value) == "AutoModelForCausalLMWithValueHead":
            yield "pretrained_model_name_or_path", call.args[0]
            return


def _generation(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the arguments for ``generate``, in dicts and calls; a sampler of response lengths gives the longest."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
            if {name for name, _ in pairs} & _GENERATION:
                yield from ((str(name), value) for name, value in pairs)
        elif isinstance(node, ast.Call) and _name(node.func) == "generate":
            yield from ((k.arg, k.value) for k in node.keywords if k.arg in _GENERATION)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target, call = _name(node.targets[0]), node.value
            if _name(call.func) == "LengthSampler" and len(call.args) == 2 and "input" not in target:
                yield "max_new_tokens", call.args[1]
