"""Shapes: what a model's costs depend on, counted on a model without storage that its config alone describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.models.costs.public_models import public_config
from rlhf_ppo.models.loading import find_config, load_config, resolve_model

_WRITERS = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "fc_out", "wo", "w2")
"""Names of linear layers that write to the residual stream; of several in a block the last counts."""

_KINDS = {"policy": AutoModelForCausalLM, "critic": AutoModel, "reward": AutoModelForSequenceClassification}


class Linear(NamedTuple):
    """A linear layer inside a transformer layer."""

    name: str
    """Its own, such as q_proj."""
    attends: bool
    """It belongs to the attention, not to the MLP."""
    inputs: int
    outputs: int
    writes: bool
    """It writes the result of its block to the residual stream; the others read that."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; parameters are counted by kind, over all layers."""

    name: str
    architecture: str
    layers: int
    width: int
    """Of the residual stream."""
    vocabulary: int
    heads: int
    query_width: int
    """Query heads times their width."""
    key_width: int
    """Key heads times their width; values are as wide."""
    mlp_width: int
    gated: bool
    """The MLP multiplies two projections of its input."""
    norms: int
    """Norms of the residual stream in a layer."""
    fused_norms: bool
    """They are torch's LayerNorm, which keeps its input alone for the backward pass."""
    rotary: bool
    """Positions rotate queries and keys, in float32."""
    linears: tuple[Linear, ...]
    """Those of one layer."""
    embeddings: int
    attention: int
    mlp: int
    other: int
    """Norms, biases, and what has no kind of its own."""
    output: int
    """The output layer's own; 0 if it is tied to the embeddings, or if there is none."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.embeddings + self.attention + self.mlp + self.other + self.output

    @property
    def layer_matrices(self) -> int:
        """Those of the layers' linear layers."""
        return self.attention + self.mlp

    @property
    def matrices(self) -> int:
        """All but norms, biases, and what has no kind of its own."""
        return self.parameters - self.other

    @property
    def root(self) -> int:
        """Those of embeddings and output layer."""
        return self.embeddings + self.output

    def readers(self, *, attends: bool) -> list[Linear]:
        """Return the linear layers of a layer's attention, or MLP, that read the residual stream through its norm."""
        return [x for x in self.linears if x.attends == attends and not x.writes]

    def writer(self, *, attends: bool) -> Linear:
        """Return the linear layer that writes the result of a layer's attention, or MLP, to the residual stream."""
        return next(x for x in self.linears if x.attends == attends and x.writes)


def shape_of(model: str, kind: str = "policy") -> Shape:
    """Return the shape of a folder, a hub id or a model of :data:`PUBLIC_MODELS`; no weights are read.

    Args:
        model: folder or hub id.
        kind: policy, critic or reward.
    Raises:
        ValueError: there is no config, or the architecture is not a plain transformer; says which.
    """
    known = public_config(model)
    if known is not None:
        architecture, settings = known
        return read_shape(AutoConfig.for_model(architecture, **settings), kind, name=model)
    source = resolve_model(model)
    return read_shape(find_config(source) if kind == "reward" else load_config(source), kind, name=model)


def read_shape(config: PretrainedConfig, kind: str = "policy", *, name: str = "model") -> Shape:
    """Return the shape of the model that a config describes.

    Raises:
        ValueError: the architecture is not a plain transformer.
    """
    with torch.device("meta"):
        model: Any = _KINDS[kind].from_config(config, trust_remote_code=False)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    linears = [_linears(layer) for layer in layers]
    if any(p.ndim > 2 for layer in layers for p in layer.parameters()) or not layers:
        raise _unknown(name, config, "mixtures of experts and convolutions are not")
    if any(len(kinds) < 2 for kinds in ({x.attends for x in some} for some in linears)) or len(set(linears)) > 1:
        raise _unknown(name, config, "each layer must have the same attention and MLP")
    text, one = config.get_text_config(), linears[0]
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if kind == "policy" else None
    output = 0 if head is None or id(head.weight) in embeddings else head.weight.numel()
    matrices = {
        attends: len(layers) * sum(x.inputs * x.outputs for x in one if x.attends == attends)
        for attends in (True, False)
    }
    every = sum(p.numel() for p in model.parameters())
    counted = sum(embeddings.values()) + output + sum(matrices.values())
    width, heads = int(text.hidden_size), int(text.num_attention_heads)
    inner = next(x.inputs for x in one if x.writes and not x.attends)
    each = getattr(text, "head_dim", None) or width // heads
    norms = [m for n, m in layers[0].named_modules() if _is_norm(n, m, width)]
    return Shape(
        name=name,
        architecture=str(text.model_type),
        layers=len(layers),
        width=width,
        vocabulary=int(text.vocab_size),
        heads=heads,
        query_width=heads * each,
        key_width=int(getattr(text, "num_key_value_heads", None) or heads) * each,
        mlp_width=inner,
        gated=sum(x.outputs for x in one if not x.attends and not x.writes) >= 2 * inner,
        norms=len(norms),
        fused_norms=all(isinstance(m, nn.LayerNorm) for m in norms),
        rotary=any("rotary" in n for n, _ in model.named_modules()),
        linears=one,
        embeddings=sum(embeddings.values()),
        attention=matrices[True],
        mlp=matrices[False],
        other=every - counted,
        output=output,
    )


def rough_shape(config: PretrainedConfig, kind: str = "policy", *, name: str = "model") -> Shape:
    """Return the shape of any model: its weights as they are, its layers as those of a plain transformer if need be."""
    try:
        return read_shape(config, kind, name=name)
    except (ValueError, AttributeError):  # mixtures of experts, state spaces and their like
        text = config.get_text_config()
    with torch.device("meta"):
        model: Any = _KINDS[kind].from_config(config, trust_remote_code=False)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    width = int(getattr(text, "hidden_size", 1))
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    every = sum(p.numel() for p in model.parameters())
    return Shape(
        name=name,
        architecture=str(text.model_type),
        layers=max(len(layers), 1),
        width=width,
        vocabulary=int(text.vocab_size),
        heads=int(getattr(text, "num_attention_heads", 1)),
        query_width=width,
        key_width=width,
        mlp_width=inner,
        gated=True,
        norms=2,
        fused_norms=False,
        rotary=True,
        linears=(
            Linear("qkv", attends=True, inputs=width, outputs=3 * width, writes=False),
            Linear("out", attends=True, inputs=width, outputs=width, writes=True),
            Linear("up", attends=False, inputs=width, outputs=2 * inner, writes=False),
            Linear("down", attends=False, inputs=inner, outputs=width, writes=True),
        ),
        embeddings=sum(embeddings.values()),
        attention=0,
        mlp=matrices,
        other=every - sum(embeddings.values()) - matrices,
        output=0,
    )


def _linears(layer: nn.Module) -> tuple[Linear, ...]:
    """Return a layer's linear layers in their order."""
    found: list[Linear] = []
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            shape = tuple(module.weight.shape)
            outputs, inputs = shape[::-1] if isinstance(module, Conv1D) else shape
            attends = "att" in name.partition(".")[0]
            found.append(Linear(name.rpartition(".")[2], attends, inputs, outputs, writes=False))
    for attends in (True, False):
        block = [i for i, x in enumerate(found) if x.attends == attends]
        named = [i for i in block if found[i].name in _WRITERS]
        for last in (named or block)[-1:]:
            found[last] = found[last]._replace(writes=True)
    return tuple(found)


def _is_norm(name: str, module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,) and not isinstance(module, nn.Linear)


def _unknown(name: str, config: PretrainedConfig, why: str) -> ValueError:
    return ValueError(
        f"plan counts plain transformers, and {name!r} ({config.model_type}) is none: {why}. Plan for a plain model of "
        "its size (such as Qwen/Qwen2.5-7B), and expect other activations"
    )
