"""Deferred weights: build a model without them, shard it, and let each process read its own rows from the files.

So no process ever holds a whole model, neither in main memory nor on its device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from rlhf_ppo.data.hub import INDEX, find_file
from rlhf_ppo.models.acceleration.working_copy import matrices
from rlhf_ppo.models.loading import adapter_base, find_config
from rlhf_ppo.models.sharded.sharding import held_rows, local_part
from rlhf_ppo.models.sharded.skeleton import fill


class Stored(NamedTuple):
    """Where a parameter's values are."""

    file: Path
    key: str


class Loader:
    """Loads models: whole, or where that is possible and asked for without their weights, which are read later.

    In place of a deferred weight are zeros that nothing writes to, and so take no memory.
    """

    def __init__(self, *, defers: bool) -> None:
        """Defer weights, or load all models whole."""
        self.defers = defers
        self.sources: dict[int, Stored] = {}
        """id of a parameter that is deferred -> its values."""

    def load(self, kind: Any, source: Any, whole: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> Any:
        """Load a model.

        Args:
            kind: one of transformers' Auto classes, which builds it without weights.
            source: folder, hub id or model.
            whole: loads it with its weights.
            dtype: of deferred matrices.
        """
        model = self._build(kind, source, dtype) if self.defers and isinstance(source, str) else None
        return whole(source) if model is None else model

    def _build(self, kind: Any, source: str, dtype: torch.dtype) -> PreTrainedModel | None:
        """Build a model whose files hold every weight as it is; None: an adapter, or weights that are converted."""
        if adapter_base(source) is not None:
            return None
        config = find_config(source)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
        named = list(model.named_parameters(remove_duplicate=False))
        saved_buffers = set(model.state_dict()) - {name for name, _ in named}
        if saved_buffers or any(isinstance(x, WeightConverter) for x in get_model_conversion_mapping(model)):
            return None
        stored, found = _stored_weights(source), dict[int, Stored]()
        for name, parameter in named:  # tied weights have several names
            spelling = next((x for x in _spellings(name, model.base_model_prefix) if x in stored), None)
            if spelling is not None:
                found.setdefault(id(parameter), stored[spelling])
        if len(found) < len({id(p) for _, p in named}) or not _shapes_fit(model, found):
            return None
        own = {name: found[id(p)] for name, p in model.named_parameters()}
        rounded = {id(weight) for weight in matrices(model)}  # norms stay in float32
        formats = {name: dtype if id(p) in rounded else torch.float32 for name, p in model.named_parameters()}
        fill(model, {name: _untouched_zeros(p.shape, formats[name]) for name, p in model.named_parameters()})
        self.sources |= {id(p): own[name] for name, p in model.named_parameters()}
        model.eval().config._name_or_path = source
        if model.can_generate() and find_file(source, "generation_config.json") is not None:
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model


def simple_adapter(config: Any) -> bool:
    """Return whether adding an adapter needs none of the base's weights, and leaves them as they are."""
    if config is None:
        return True
    values = {name: getattr(config, name, None) for name in ("modules_to_save", "layer_replication", "use_dora")}
    starts_at_zero = getattr(config, "init_lora_weights", None) in (True, "gaussian")
    return starts_at_zero and not any(values.values()) and getattr(config, "bias", "none") == "none"


def named_sources(model: nn.Module, sources: Mapping[int, Stored]) -> dict[str, Stored]:
    """Return the sources by the names that the parameters have in a model that holds them, before it is sharded."""
    return {name: sources[id(p)] for name, p in model.named_parameters() if id(p) in sources}


@torch.no_grad()
def read_weights_held(model: nn.Module, sources: Mapping[str, Stored]) -> None:
    """Read what this process holds of each parameter, in the parameter's own number format.

    Raises:
        ValueError: a file is damaged.
    """
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, parameter in model.named_parameters():
            if name not in sources:
                continue
            file, key = sources[name]
            try:
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, "pt"))
                first, count = held_rows(parameter)
                stored = files[file].get_slice(key)
                values: Tensor = stored[first : first + count] if parameter.ndim else files[file].get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): copy or download it again") from error
            local_part(parameter).copy_(values)


def _untouched_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros in memory that the system hands out when it is written to; torch.zeros writes to it."""
    memory = np.frombuffer(mmap(-1, max(shape.numel() * dtype.itemsize, 1)), dtype=np.uint8)
    return torch.from_numpy(memory[: shape.numel() * dtype.itemsize]).view(dtype).view(shape)


def _stored_weights(source: str) -> dict[str, Stored]:
    """Find the tensors in the safetensors files of a folder or hub id."""
    if (index := find_file(source, INDEX)) is not None:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: find_file(source, name) for name in set(shards.values())}
        return {key: Stored(file, key) for key, name in shards.items() if (file := files[name]) is not None}
    if (file := find_file(source, "model.safetensors")) is None:
        return {}
    with safe_open(file, "pt") as tensors:
        return {key: Stored(file, key) for key in list(tensors.keys())}


def _spellings(name: str, prefix: str) -> Iterator[str]:
    yield name
    yield name.removeprefix(f"{prefix}.")
    yield f"{prefix}.{name}"


def _shapes_fit(model: nn.Module, found: Mapping[int, Stored]) -> bool:
    shapes: dict[Stored, list[int]] = {}
    for file in {source.file for source in found.values()}:
        with safe_open(file, "pt") as tensors:
            shapes |= {Stored(file, key): tensors.get_slice(key).get_shape() for key in list(tensors.keys())}
    return all(shapes.get(found[id(p)]) == list(p.shape) for p in model.parameters())
