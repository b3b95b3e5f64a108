"""Make the value head (hidden state -> one number), or load one from a run, TRL, LLaMA-Factory or a reward model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_ppo.core import ValueScale
from rlhf_ppo.data.hub import find_file, pickle_message

VALUE_HEAD_FILE = "value_head.safetensors"

PICKLED_HEAD_FILE = "value_head.bin"
"""What LLaMA-Factory writes without safetensors: a pickle, which is never opened."""

_HEADS = ("v_head.summary", "score", "classifier")
"""Names of TRL's value head and of sequence classifiers' heads."""


class SavedHead(NamedTuple):
    """A linear value head, in float32."""

    weight: Tensor
    """[1, O]"""
    bias: Tensor
    """[1]"""
    scale: ValueScale
    """The units of its values."""


def make_value_head(width: int) -> nn.Linear:
    """Make a head whose values are 0, so that the first rollouts are judged by their rewards alone."""
    head = nn.Linear(width, 1).eval()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def save_value_head(head: nn.Linear, scale: ValueScale | None, file: Path) -> None:
    """Save a head's weight and bias as safetensors, with its scale in the file's metadata."""
    # One entry: safetensors writes several in any order, and a resumed run's file equals the whole run's.
    facts = {} if scale is None else {"value_scale": json.dumps(vars(scale))}
    save_file(head.state_dict(), file, metadata=facts)


def load_value_head(source: str, trunk: PretrainedConfig) -> SavedHead:
    """Load a linear head with one output; one that was not saved by a run of today predicts in the reward's own units.

    Args:
        source: folder or hub id of a run, an old TRL checkpoint or a LLaMA-Factory folder with a value head
            (``v_head.summary``), a one-label sequence classifier whose head is one linear layer, or an adapter of one.
        trunk: config of the model that the head is for.
    Raises:
        ValueError: no such head, or one of another shape or width.
    """
    where = f"value_head_from={source!r}"
    if find_file(source, VALUE_HEAD_FILE) is None and find_file(source, PICKLED_HEAD_FILE) is not None:
        raise ValueError(
            f"{where}: {PICKLED_HEAD_FILE} is a pickle, which can run code when it is opened and is never read here: "
            "if you trust it, load it elsewhere with torch.load(file, weights_only=True), and save the tensors as "
            f"{VALUE_HEAD_FILE} with safetensors.torch.save_file"
        )
    found: dict[str, Tensor] = {}
    scale = ValueScale()
    for name, file in _tensor_files(source, where):
        if file.name == VALUE_HEAD_FILE or _layer(name) in _HEADS:
            with safe_open(file, "pt") as tensors:
                found[name] = tensors.get_tensor(name).float()
                scale = _scale(tensors.metadata() or {})
    weights = [name for name in found if name.endswith("weight")]
    if len(weights) != 1:
        raise ValueError(
            f"{where}: no single linear head found, neither {VALUE_HEAD_FILE} nor a layer named "
            f"{' or '.join(_HEADS)}; give a run folder, a TRL checkpoint with a value head, or a one-label "
            "sequence-classification model whose head is one linear layer"
        )
    (name,) = weights
    weight = found[name]
    if weight.ndim != 2 or weight.shape[0] != 1:
        raise ValueError(
            f"{where}: {name} has shape {list(weight.shape)}, but a value is one number: [1, O] is needed (a "
            "classifier with num_labels=1)"
        )
    text = trunk.get_text_config()
    width = int(getattr(text, "word_embed_proj_dim", text.hidden_size))  # OPT-350m narrows its last states
    if weight.shape[1] != width:
        raise ValueError(
            f"{where} fits hidden states of width {weight.shape[1]}, but the model under it is {width} wide: take a "
            "head that was trained on this model"
        )
    return SavedHead(weight, found.get(name.removesuffix("weight") + "bias", torch.zeros(1)), scale)


def holds_reward_head(source: object) -> bool:
    """Return whether this is a folder with a causal language model (or an adapter of one) and TRL's value head beside.

    That is how LLaMA-Factory saves a reward model. A run of this project names its head's tensors otherwise.
    """
    if not isinstance(source, str) or not Path(source).is_dir():
        return False
    file = Path(source) / VALUE_HEAD_FILE
    if not file.is_file():
        return (Path(source) / PICKLED_HEAD_FILE).is_file()
    try:
        with safe_open(file, "pt") as tensors:
            return all(_layer(name) == _HEADS[0] for name in list(tensors.keys()))
    except SafetensorError:  # whoever reads the head says that it is damaged
        return False


def _scale(metadata: Mapping[str, str]) -> ValueScale:
    return ValueScale(**json.loads(metadata.get("value_scale", "{}")))


def adapter_labels(file: Path) -> int | None:
    """Return the number of labels of the linear head in an adapter's file, or None if it has no head."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as tensors:
        heads = [n for n in list(tensors.keys()) if _layer(n) in _HEADS and n.endswith("weight")]
        return int(tensors.get_slice(heads[0]).get_shape()[0]) if len(heads) == 1 else None


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").rpartition(".")[0]


def _tensor_files(source: str, where: str) -> Iterator[tuple[str, Path]]:
    """Yield (tensor name, file) of a run's value head, else of an adapter or a model, without loading tensors."""
    single = (VALUE_HEAD_FILE, "adapter_model.safetensors", "model.safetensors")
    if (file := next((file for name in single if (file := find_file(source, name))), None)) is not None:
        files = {file}
    elif (index := find_file(source, "model.safetensors.index.json")) is not None:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {shard for name, shard in shards.items() if _layer(name) in _HEADS}
        files = {file for shard in wanted if (file := find_file(source, shard)) is not None}
    elif find_file(source, "pytorch_model.bin") or find_file(source, "pytorch_model.bin.index.json"):
        raise ValueError(pickle_message(where, "pytorch_model.bin"))
    else:
        missing = "" if Path(source).exists() else " (no such folder here; read as a hub id)"
        raise ValueError(
            f"{where}{missing}: found neither {VALUE_HEAD_FILE} nor model.safetensors; name the folder of a run, of "
            "`critic fit` or of a reward model"
        )
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
        except SafetensorError as error:
            raise ValueError(
                f"{where}: {file} is damaged ({error}): restore it from a backup, or save it again"
            ) from None
        yield from ((name, file) for name in names)
