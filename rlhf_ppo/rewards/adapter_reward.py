"""Reward adapters: a reward model that is an adapter on the policy's own base, which is in memory once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ppo.data.hub import find_file
from rlhf_ppo.models.forward import without_adapter_wrapper
from rlhf_ppo.models.loading import find_config, load_tokenizer, resolve_model
from rlhf_ppo.models.lora import REWARD_ADAPTER, add_adapter, load_adapter, use_adapter
from rlhf_ppo.models.value_head import read_head
from rlhf_ppo.rewards.reward_model import RewardModel


def reward_adapter_config(source: Any) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says, if ``source`` is the folder or hub id of a sequence classifier's adapter."""
    if not isinstance(source, str) or ":" in source or (file := find_file(source, "adapter_config.json")) is None:
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return config if config.get("task_type") == "SEQ_CLS" else None


class AdapterReward(RewardModel):
    """A reward model that is an adapter and a head on the policy's own base, which must not be trained itself."""

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        model: str | PreTrainedModel,
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """Check what can be checked before the policy is loaded; :meth:`attach` does the rest.

        Args:
            source: folder or hub id of the adapter.
            config: what its adapter_config.json says.
            model: the policy's, before it gets its adapter.
            chat_template, max_length: see :class:`RewardModel`.
        Raises:
            ValueError: the adapter belongs to another base, or has no linear head for one label.
        """
        base = resolve_model(config["base_model_name_or_path"])
        # An adapter's folder is its base with the adapter merged: other weights than the reward was trained on.
        name = model if isinstance(model, str) else model.config._name_or_path
        if base != name and Path(base).resolve() != Path(name).resolve():
            raise ValueError(
                f"share_reward_base=True, but reward {source!r} is an adapter of {base!r} and the policy's model is "
                f"{name!r}: leave share_reward_base out, and the reward loads its own base"
            )
        self.__name__ = Path(source).name
        self.read_with(load_tokenizer(source), find_config(model), chat_template=chat_template, max_length=max_length)
        self.batch_size = 32
        self.source = source
        self.head = read_head(source, find_config(model), setting="reward")

    def attach(self, policy: Any, *, own_base: bool) -> None:
        """Add the adapter to the policy, frozen.

        Args:
            policy: PEFT model.
            own_base: its base is, and stays, the model that lies under the base's name.
        Raises:
            ValueError: it is not: the scores would be those of no reward model.
        """
        from peft import PeftConfig

        if not own_base:
            raise ValueError(
                f"share_reward_base=True, but the policy's base is not, or does not stay, the one that reward "
                f"{self.source!r} was trained on: it was changed in memory, or peft_config changes or trains weights "
                "of it. Leave share_reward_base out, and the reward loads its own base"
            )

        config = PeftConfig.from_pretrained(self.source)
        config.inference_mode = True
        cast(Any, config).modules_to_save = None  # the head, which lies here
        config.task_type = "CAUSAL_LM"
        add_adapter(policy, REWARD_ADAPTER, config)
        file = find_file(self.source, "adapter_model.safetensors")
        assert file is not None  # its head was read from there
        load_adapter(policy, REWARD_ADAPTER, file)
        policy.eval()  # a new adapter's dropout is on
        self.policy, self.trunk = policy, without_adapter_wrapper(policy).base_model
        self.head = {name: x.to(next(policy.parameters()).device) for name, x in self.head.items()}

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """The head on the state of each row's last token; nothing after it is attended to."""
        width, device = max(len(row) for row in rows), self.head["weight"].device
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        attention = (torch.arange(width, device=device) <= last[:, None]).long()
        with use_adapter(self.policy, REWARD_ADAPTER):
            states = self.trunk(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        ends = states[torch.arange(len(rows), device=device), last].float()
        return nn.functional.linear(ends, self.head["weight"], self.head["bias"]).squeeze(-1)


def share_reward_base(
    sources: Any,
    model: str | PreTrainedModel,
    *,
    has_own_adapter: bool,
    chat_template: str | None = None,
    max_length: int | None = None,
) -> Any:
    """Reward sources with the one that is an adapter of the policy's base replaced by an :class:`AdapterReward`.

    Raises:
        ValueError: the policy's base is trained itself, or not exactly one of the sources is a reward adapter.
    """
    if not has_own_adapter:
        raise ValueError(
            "share_reward_base=True needs a frozen base, but without peft_config (lora_rank on the command line) the "
            "policy's base is what is trained, and the scores would move with it"
        )
    listed = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    configs = [reward_adapter_config(source) for source in listed]
    if sum(config is not None for config in configs) != 1:
        raise ValueError(
            "share_reward_base=True needs one reward that is an adapter of a sequence-classification model (a folder "
            f"with adapter_config.json, task_type SEQ_CLS), got {listed!r}"
        )
    reading: dict[str, Any] = {"chat_template": chat_template, "max_length": max_length}
    return [
        s if config is None else AdapterReward(s, config, model, **reading)
        for s, config in zip(listed, configs, strict=True)
    ]
