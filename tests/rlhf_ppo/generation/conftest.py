"""Fixtures of the decoding tests."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ppo.models.actor_critic import ActorCritic


@pytest.fixture
def make(make_model, wake_critic):
    """``make(kind)``: an actor-critic whose values differ."""

    def make_actor_critic(kind: str = "gpt2", **settings: Any) -> ActorCritic:
        model = ActorCritic(make_model(kind, **settings))
        wake_critic(model)
        return model

    return make_actor_critic
