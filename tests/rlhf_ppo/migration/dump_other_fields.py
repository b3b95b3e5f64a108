"""Print the fields of other projects' PPO arguments as JSON, from their unpacked wheels: see `make migration-fields`.

Their classes are read as syntax trees, because importing them needs their whole environments. The answer belongs into
rlhf_ppo/assets/migration-fields.json, beside TRL 1.12's.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOTS = {
    "trl-0x": {"PPOConfig": "PPOConfig"},
    "llama-factory": dict.fromkeys(
        ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    ),
    "ms-swift": {"RLHFArguments": None},
}
"""Project -> the classes whose fields its parser takes."""

FOLDERS = {
    "trl-0x": ["trl/trainer/ppo_config.py"],
    "llama-factory": ["llamafactory/hparams"],
    "ms-swift": ["swift/arguments", "swift/trainers", "swift/rlhf_trainers", "swift/ray_utils", "swift/ray"],
}
"""Project -> where in its wheel the classes are."""

ALIASES = {"BaseTrainingArguments": "Seq2SeqTrainingArguments"}
"""Other names of base classes; Hf... is a class of transformers."""

# What scripts of TRL 0.x give to from_pretrained, generate and LoraConfig, whose classes are not TRL's.
SCRIPTS = {
    "from_pretrained": {"pretrained_model_name_or_path": (["null", "str"], None)},
    "generate": {
        "max_new_tokens": (["int", "null"], None),
        "min_new_tokens": (["int", "null"], None),
        "min_length": (["int"], 0),
        "temperature": (["float"], 1.0),
        "top_k": (["float"], 50.0),
        "top_p": (["float"], 1.0),
        "typical_p": (["float"], 1.0),
        "repetition_penalty": (["float"], 1.0),
        "no_repeat_ngram_size": (["int"], 0),
        "num_beams": (["int"], 1),
        "do_sample": (["bool"], False),
        "eos_token_id": (["int", "list", "null"], None),
        "pad_token_id": (["int", "null"], None),
    },
    "LoraConfig": {
        "r": (["int", "null"], None),
        "lora_alpha": (["int"], 8),
        "lora_dropout": (["float"], 0.0),
        "target_modules": (["list", "null", "str"], None),
        "bias": (["str"], "none"),
        "task_type": (["null", "str"], None),
        "modules_to_save": (["list", "null"], None),
    },
}

# Arguments of earlier releases, which configs still have.
EARLIER = {
    "llama-factory": {
        "TrainingArguments": {
            "warmup_ratio": (["float"], 0.0),
            "overwrite_output_dir": (["bool"], False),
            "logging_dir": (["null", "str"], None),
            "save_safetensors": (["bool"], True),
            "evaluation_strategy": (["null", "str"], None),
            "per_gpu_train_batch_size": (["int", "null"], None),
            "no_cuda": (["bool"], False),
            "include_num_input_tokens_seen": (["bool", "str"], False),
            "group_by_length": (["bool"], False),
            "torchdynamo": (["null", "str"], None),
        }
    },
    "ms-swift": {
        "RLHFArguments": {
            "train_type": (["null", "str"], None),
            "sft_type": (["null", "str"], None),
            "warmup_ratio": (["float", "null"], 0.0),
            "overwrite_output_dir": (["bool"], False),
            "logging_dir": (["null", "str"], None),
            "save_safetensors": (["bool"], True),
            "evaluation_strategy": (["null", "str"], None),
            "group_by_length": (["bool"], False),
        }
    },
}


def classes(files: Iterator[Path]) -> dict[str, ast.ClassDef]:
    """The classes of files, by name."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def kinds(hint: ast.expr) -> tuple[set[str], list[str]]:
    """Kinds of value of a type hint, as JSON and the command line know them, and its words where it lists them."""
    if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
        return kinds(ast.parse(hint.value, mode="eval").body)
    if isinstance(hint, ast.Constant):
        return {"null"}, []
    if isinstance(hint, ast.BinOp):
        found = [kinds(hint.left), kinds(hint.right)]
    elif isinstance(hint, ast.Subscript):
        inner = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        match name(hint.value):
            case "Literal":
                words = [part.value for part in inner]
                texts = [word for word in words if isinstance(word, str)]
                return {"null" if w is None else type(w).__name__ for w in words}, texts if len(texts) > 1 else []
            case "Optional":
                found = [({"null"}, []), kinds(inner[0])]
            case "Union":
                found = [kinds(part) for part in inner]
            case "List" | "list":
                return {"list"}, []
            case "Dict" | "dict":
                return {"dict"}, []
            case "Suppress" | "Annotated":
                return kinds(inner[0])
            case "Type" | "type":
                return {"str"}, []
            case other:
                raise ValueError(other)
    else:
        plain = {"int", "float", "str", "bool", "dict", "list"}
        return {name(hint).lower() if name(hint).lower() in plain else "str"}, []
    words = [word for _, some in found for word in some]
    return set().union(*(kind for kind, _ in found)), words if {"str"} == set().union(*(k for k, _ in found)) - {
        "null"
    } else []


def default(node: ast.expr | None) -> Any:
    """The default of a field: a constant, a field(...) or a member of an enumeration, whose value is its name."""
    if isinstance(node, ast.Call):
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default_factory" in arguments:
            made = arguments["default_factory"]
            return default(made.body) if isinstance(made, ast.Lambda) else {"list": [], "dict": {}}.get(name(made))
        return default(arguments.get("default"))
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    if isinstance(node, ast.BinOp):
        return eval(compile(ast.Expression(node), "", "eval"))  # numbers alone, such as 768 * 768
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # computed when the program starts
        return None


def fields(cls: ast.ClassDef, known: dict[str, ast.ClassDef], base: dict[str, ast.ClassDef]) -> dict[str, Any]:
    """The fields of a dataclass and of its bases."""
    found: dict[str, Any] = {}
    for parent in reversed(cls.bases):
        called = ALIASES.get(name(parent), name(parent))
        places = [base] if called.startswith("Hf") or called == cls.name else [known, base]
        called = called.removeprefix("Hf")
        if place := next((place for place in places if called in place), None):
            found |= fields(place[called], known if place is known else base, base)
    for line in cls.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and "ClassVar" not in ast.dump(line):
            made = line.value
            if isinstance(made, ast.Call) and any(k.arg == "init" and not k.value.value for k in made.keywords):
                continue
            if name(line.annotation) == "InitVar":
                continue
            accepted, words = kinds(line.annotation)
            value = default(made)
            accepted |= {"null"} if value is None else set()
            found[line.target.id] = {"kinds": sorted(accepted), "default": value} | (
                {"choices": words} if words else {}
            )
    return found


def plain(described: dict[str, tuple[list[str], Any]]) -> dict[str, Any]:
    return {field: {"kinds": accepted, "default": value} for field, (accepted, value) in described.items()}


def describe(source: str, wheel: Path, transformers: Path) -> dict[str, Any]:
    places = [wheel / folder for folder in FOLDERS[source]]
    files = (f for place in places for f in ([place] if place.is_file() else sorted(place.rglob("*.py"))))
    known = classes(files)
    base = classes(transformers / "transformers" / file for file in ("training_args.py", "training_args_seq2seq.py"))
    found = {cls: fields(known[cls], known, base) for cls in ROOTS[source]}
    for cls, described in (SCRIPTS if source == "trl-0x" else EARLIER[source]).items():
        found[cls] = plain(described) | found.get(cls, {})
    version = next(wheel.glob("*.dist-info")).name.split("-")[1]
    return {"versions": {source: version}, **{cls: dict(sorted(f.items())) for cls, f in found.items()}}


if __name__ == "__main__":
    file, transformers = Path(sys.argv[1]), Path(sys.argv[2])
    everything = json.loads(file.read_text())
    for pair in sys.argv[3:]:
        source, _, wheel = pair.partition("=")
        given = Path(wheel)
        everything[source] = (
            json.loads(given.read_text()) if given.suffix == ".json" else describe(source, given, transformers)
        )
    # One field a line, so that a change of one field is a change of one line.
    sections = []
    for source, parts in everything.items():
        lines = [
            f'    "{part}": {json.dumps(f)}'
            if part == "versions"
            else f'    "{part}": {{\n' + ",\n".join(f'      "{n}": {json.dumps(d)}' for n, d in f.items()) + "\n    }"
            for part, f in parts.items()
        ]
        sections.append(f'  "{source}": {{\n' + ",\n".join(lines) + "\n  }")
    file.write_text("{\n" + ",\n".join(sections) + "\n}\n")
