"""Models: the policy with its critic, the frozen reference, and how both are read at response positions only."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ppo.core import PolicyOutput, entropy_from_logits, token_logprobs

EMBEDDED_MODEL = str(Path(__file__).parent / "assets" / "stories-gpt2")
"""Folder of the small GPT-2 that comes with the package, by name "embedded"."""


def resolve_model(model: Any) -> Any:
    """The folder behind the name "embedded"; anything else unchanged."""
    return EMBEDDED_MODEL if isinstance(model, str) and model == "embedded" else model


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so that padding on the left changes nothing."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def find_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """The config of a model or of a folder or hub id.

    Raises:
        ValueError: it is neither a folder with a config nor to be had from the hub; says which was tried.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return cast(PreTrainedModel, model).config
    if not isinstance(model, str):
        raise ValueError(f"a model must be a hub id, a folder or a transformers model, got {type(model).__name__}")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            why = f"the folder holds no model that transformers can read ({str(error).splitlines()[0]})"
        else:
            why = 'no such folder, and the hub has no such model or is out of reach (offline: a folder, or "embedded")'
        raise ValueError(f"model {model!r} cannot be loaded: {why}") from error


def load_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """The model's config, refused if it is not a decoder-only language model.

    Raises:
        ValueError: nothing to load under that name, or an encoder-decoder model; names its type.
    """
    config = find_config(model)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; PPO here treats prompt and response as one sequence "
            "and needs a decoder-only causal language model (GPT-2, Llama, Qwen, ...)"
        )
    return cast(PretrainedConfig, config)


def load_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: a model object that does not say where it came from.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError("this model was not loaded from a folder or hub id; pass its tokenizer as processing_class")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_policy(model: str | PreTrainedModel) -> PreTrainedModel:
    """A causal language model in float32, from a hub id or folder, or the given one."""
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    return model


def load_trunk(model: str | PreTrainedModel) -> PreTrainedModel:
    """The model without its head, for a critic of its own."""
    if isinstance(model, str):
        return AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    return cast(PreTrainedModel, model.base_model)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that holds vocabulary and hidden size (a multimodal model's lies one level down)."""
    return model.config.get_text_config()


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens the model can read, or None where its config sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(config: PretrainedConfig, max_new_tokens: int) -> int | None:
    """Most tokens a prompt may have beside ``max_new_tokens`` of response; None: the model sets no limit."""
    limit = context_length(config)
    return None if limit is None else limit - max_new_tokens


def freeze(model: nn.Module) -> nn.Module:
    """The model in evaluation mode without gradients."""
    return model.eval().requires_grad_(False)


def _accepts(model: nn.Module, name: str) -> bool:
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return name in _forward_parameters(type(base))


@cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    # Looked up at every decoding step, so read once a class.
    return frozenset(inspect.signature(model_class.forward).parameters)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, **kwargs: Any) -> Any:
    if _accepts(model, "position_ids"):
        kwargs["position_ids"] = positions
    return model(input_ids=ids, attention_mask=mask.long(), **kwargs)


def _inputs(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P + T - 1] whose last T positions predict the response: its last token is never an input."""
    return torch.cat([prompt_ids, response_ids[:, :-1]], dim=1), torch.cat([prompt_mask, mask[:, :-1]], dim=1)


def response_logits(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor, *, hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, T, V] of the response's tokens and, if asked, the last hidden states [B, T, O] they came from.

    Step t is read at the position before token t; the prompt's own logits are never computed.
    """
    length = response_ids.shape[1]
    ids, attention = _inputs(prompt_ids, prompt_mask, response_ids, mask)
    kwargs: dict[str, Any] = {"logits_to_keep": length} if _accepts(model, "logits_to_keep") else {}
    output = _forward(
        model, ids, attention, position_ids(attention), use_cache=False, output_hidden_states=hidden, **kwargs
    )
    return output.logits[:, -length:], output.hidden_states[-1][:, -length:] if hidden else None


class ActorCritic(nn.Module):
    """A policy and its critic: a value head on the policy's own trunk, or on a separate one, or none at all.

    Everything runs in evaluation mode, updates included: dropout would make old and new log-probs of the same weights
    differ, and the ratio would measure noise.
    """

    def __init__(self, policy: nn.Module, *, critic: bool = True, value_trunk: PreTrainedModel | None = None) -> None:
        """Put a value head on ``value_trunk``, or on the policy's trunk if there is none; ``critic=False``: no head."""
        super().__init__()
        self.policy = policy
        self.value_trunk = value_trunk
        self.value_head: nn.Linear | None = None
        if critic:
            trunk = cast(PreTrainedModel, policy if value_trunk is None else value_trunk)
            self.value_head = nn.Linear(text_config(trunk).hidden_size, 1)
            # A critic that starts at 0 lets the first rollouts be judged by their rewards alone.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.eval()

    @property
    def shares_trunk(self) -> bool:
        """True if one forward pass of the policy also gives the values."""
        return self.value_head is not None and self.value_trunk is None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def decode(
        self, ids: Tensor, attention: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor | None, Any]:
        """One decoding step: logits [B, V] of the next token, the value [B] (shared trunk only), and the cache."""
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if _accepts(self.policy, "logits_to_keep") else {}
        output = _forward(
            self.policy,
            ids,
            attention,
            positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=self.shares_trunk,
            **kwargs,
        )
        value = self._head(output.hidden_states[-1][:, -1]) if self.shares_trunk else None
        return output.logits[:, -1], value, output.past_key_values

    def _head(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)

    def separate_values(
        self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor
    ) -> Tensor | None:
        """[B, T] values from the separate critic, or None without one."""
        if self.value_trunk is None or self.value_head is None:
            return None
        ids, attention = _inputs(prompt_ids, prompt_mask, response_ids, mask)
        output = _forward(self.value_trunk, ids, attention, position_ids(attention), use_cache=False)
        return self._head(output.last_hidden_state[:, -response_ids.shape[1] :])

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> PolicyOutput:
        """Log-probs, values and entropy [B, T] of recorded responses under the current weights.

        Args:
            prompt_ids, prompt_mask: [B, P], left-padded.
            response_ids, mask: [B, T], right-padded.
            temperature: divides the logits; the same one as at sampling.
            entropy: compute it (otherwise None).
        """
        logits, hidden = response_logits(
            self.policy, prompt_ids, prompt_mask, response_ids, mask, hidden=self.shares_trunk
        )
        logits = logits.float()
        values = (
            self.separate_values(prompt_ids, prompt_mask, response_ids, mask) if hidden is None else self._head(hidden)
        )
        return PolicyOutput(
            logprobs=token_logprobs(logits, response_ids, temperature=temperature),
            values=values,
            entropy=entropy_from_logits(logits, temperature=temperature) if entropy else None,
        )

    def save_critic(self, folder: Path) -> None:
        """Write the value head (and a separate trunk) beside the policy, as safetensors."""
        if self.value_head is None:
            return
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")
        if self.value_trunk is not None:
            self.value_trunk.save_pretrained(folder / "critic")


class Reference:
    """The frozen policy that the KL is measured against: a model of its own, or the policy with its adapter off."""

    def __init__(self, policy: nn.Module, model: PreTrainedModel | None, *, adapter_off: bool) -> None:
        """Freeze ``model``, or a copy of the policy as it is now; under ``adapter_off`` no copy is needed."""
        self.policy = policy
        self.model = None if adapter_off else freeze(copy.deepcopy(policy) if model is None else model)

    @contextmanager
    def _active(self) -> Iterator[nn.Module]:
        if self.model is not None:
            yield self.model
        else:
            with cast(Any, self.policy).disable_adapter():
                yield self.policy

    @torch.no_grad()
    def logprobs(
        self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor, *, temperature: float
    ) -> Tensor:
        """[B, T] log-probs of the response tokens under the reference, at the policy's temperature."""
        with self._active() as model:
            logits, _ = response_logits(model, prompt_ids, prompt_mask, response_ids, mask, hidden=False)
        return token_logprobs(logits.float(), response_ids, temperature=temperature)
