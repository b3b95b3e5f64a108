"""Sources: the files behind a folder's name or a hub id, why one cannot be had, and that none is a pickle."""

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
_INDEX = "model.safetensors.index.json"


def find_file(source: str, name: str) -> Path | None:
    """A file of a folder or hub id, or None where it has none of that name."""
    if Path(source).is_dir():
        return file if (file := Path(source) / name).is_file() else None
    try:
        return Path(str(cached_file(source, name)))
    except OSError:  # no such repository or file, or the hub is out of reach
        return None


def refuse_pickles(folder: str) -> None:
    """Raise a ValueError that names the remedy if this is a folder whose weights are pickles alone."""
    path = Path(folder)
    found = [name for name in _PICKLES if (path / name).is_file()]
    if found and not any(path.glob("*.safetensors")):
        raise ValueError(pickle_message(folder, found[0]))


def pickle_message(source: str, name: str) -> str:
    """That a file is a pickle, and what to do."""
    return (
        f"{source} holds {name}, a pickle, which can run code when it is opened and is never read here: if you trust "
        "it, load it elsewhere and save it again with model.save_pretrained(folder), which writes safetensors"
    )


def read_weights(kind: Any, source: str, *, new: Literal["none", "pooler", "head"] = "none", **options: Any) -> Any:
    """``kind.from_pretrained`` in float32, from safetensors alone.

    Args:
        kind: one of transformers' Auto classes.
        source: folder or hub id.
        new: what may be missing there and is then random: nothing, BERT's pooler (no token's state depends on it), or
            all outside the trunk.
        options: for ``from_pretrained``.
    Raises:
        ValueError: no such weights, a file that is cut short or not what it says, or other weights are missing.
    """
    refuse_pickles(source)
    index = find_file(source, _INDEX)
    shards = [] if index is None else list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    # transformers opens what an index names, whatever it is.
    if pickled := [name for name in shards if not str(name).endswith(".safetensors")]:
        raise ValueError(pickle_message(f"model {source!r}: {_INDEX}", pickled[0]))
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
            "Name a model that was saved for this use (a reward model comes from rlhf-ppo reward), or mend its files"
        )
    return model


def explain_load_failure(source: str, error: BaseException, *, kind: str = "model") -> str:
    """Why a folder or hub id cannot be read, in one line, with the revision that the hub's cache still has.

    Args:
        source: folder or hub id.
        error: what transformers or datasets raised.
        kind: "model" or "dataset".
    """
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run here (trust_remote_code is off): take another model"
    if Path(source).is_dir():
        return f"the folder holds no {kind} that can be read ({(str(error).splitlines() or [''])[0]})"
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{source}"
        why = f"its owner asks you to agree to terms: do so on {page}, and set HF_TOKEN to your token"
    elif any(isinstance(c, RepositoryNotFoundError) or type(c).__name__ == "DatasetNotFoundError" for c in causes):
        why = f"no such folder, and the hub has no such {kind} (is the name right? a private one needs HF_TOKEN)"
    else:
        instead = 'a folder, or "embedded"' if kind == "model" else "a folder or file"
        why = f"no such folder, and the hub is out of reach or has no such {kind} (offline: {instead})"
    snapshot = cached_snapshot(source, kind)
    return why if snapshot is None else f"{why}; the cache has revision {snapshot.name}: name its folder, {snapshot}"


def cached_snapshot(source: str, kind: str = "model") -> Path | None:
    """The newest revision of a hub id in the local cache that has contents, or None."""
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
