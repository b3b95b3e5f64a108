"""Folders and hub ids: find their files, load safetensors, refuse pickles, and explain why loading failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
INDEX = "model.safetensors.index.json"


def find_file(source: str, name: str) -> Path | None:
    """Find a file of a folder or hub id; None if there is none of that name."""
    if Path(source).is_dir():
        return file if (file := Path(source) / name).is_file() else None
    try:
        return Path(str(cached_file(source, name)))
    except OSError:  # no such repository or file, or the hub is unreachable
        return None


def refuse_pickles(folder: str) -> None:
    """Raise a ValueError with the remedy if all weights of this folder are pickles."""
    path = Path(folder)
    found = [name for name in _PICKLES if (path / name).is_file()]
    if found and not any(path.glob("*.safetensors")):
        raise ValueError(pickle_message(folder, found[0]))


def pickle_message(source: str, name: str) -> str:
    """Explain that a file is a pickle, and what to do."""
    return (
        f"{source} has {name}, a pickle, which can run code when it is opened and is never read here: if you trust "
        "it, load it elsewhere and save it again with model.save_pretrained(folder), which writes safetensors"
    )


def read_weights(kind: Any, source: str, *, new: Literal["none", "pooler", "head"] = "none", **options: Any) -> Any:
    """Load ``kind.from_pretrained`` in float32, from safetensors only.

    Args:
        kind: one of transformers' Auto classes.
        source: folder or hub id.
        new: weights that may be missing, and are then random: none, BERT's pooler (which no hidden state depends on),
            or everything outside the trunk.
        options: for ``from_pretrained``.
    Raises:
        ValueError: no weights, a damaged file, or other missing weights.
    """
    refuse_pickles(source)
    index = find_file(source, INDEX)
    shards = [] if index is None else list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    # transformers opens any file that an index names.
    if pickled := [name for name in shards if not str(name).endswith(".safetensors")]:
        raise ValueError(pickle_message(f"model {source!r}: {INDEX}", pickled[0]))
    try:
        model, info = kind.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"model {source!r} cannot be loaded: a safetensors file is damaged ({error}), copy or download it again"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"model {source!r} cannot be loaded: {explain_load_failure(source, error)}") from error
    trunk = f"{model.base_model_prefix}."
    missing = [
        name
        for name in sorted(info["missing_keys"])
        if not (new != "none" and "pooler." in name) and not (new == "head" and not name.startswith(trunk))
    ]
    if missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"model {source!r} has no weights for {few}, which {type(model).__name__} needs: they would be random. "
            "Name a model that was saved for this use (rlhf-ppo reward trains reward models), or repair its files"
        )
    return model


def explain_load_failure(source: str, error: BaseException, *, kind: str = "model") -> str:
    """Explain why loading a folder or hub id failed, in one line, with the revision that is still in the cache.

    Args:
        source: folder or hub id.
        error: raised by transformers or datasets.
        kind: "model" or "dataset".
    """
    if "trust_remote_code" in str(error):
        return "it needs custom code, which is never run here (trust_remote_code is off): use another model"
    if Path(source).is_dir():
        return f"the folder has no readable {kind} ({(str(error).splitlines() or [''])[0]})"
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{source}"
        why = f"its owner asks you to agree to terms: do so on {page}, and set HF_TOKEN to your token"
    elif any(isinstance(c, RepositoryNotFoundError) or type(c).__name__ == "DatasetNotFoundError" for c in causes):
        why = f"no such folder, and the hub has no such {kind} (is the name right? a private one needs HF_TOKEN)"
    else:
        instead = 'a folder, or "embedded"' if kind == "model" else "a folder or file"
        why = f"no such folder, and the hub is unreachable or has no such {kind} (offline: {instead})"
    snapshot = cached_snapshot(source, kind)
    return why if snapshot is None else f"{why}; the cache has revision {snapshot.name}: name its folder, {snapshot}"


def cached_snapshot(source: str, kind: str = "model") -> Path | None:
    """Return the newest complete revision of a hub id in the local cache, or None."""
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.replace('/', '--')}" / "snapshots"
    if not folder.is_dir():
        return None
    needed = "*.safetensors" if kind == "model" else "*.*"
    complete = [revision for revision in folder.iterdir() if any(revision.rglob(needed))]
    return max(complete, key=lambda revision: revision.stat().st_mtime, default=None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
