"""One core: the same CartPole steps, as a rollout of classic and as responses of a language model, teach the same.

A language model is made that reads a state as a token and whose two possible next tokens are the two actions: the token
for the state that the taken action led to, and one token for all that was not taken. Its layers are the control
network's. Each frontend's own loop then trains on the same steps.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import classic
from classic.rollout import Rollout as ControlRollout
from rlhf_ppo import PPOTrainer, RLHFConfig, Rollout
from rlhf_ppo.core import ValueScale

STEPS, EPOCHS, RATE = 18, 4, 0.5
SAME = {"gamma": 0.97, "gae_lambda": 0.9, "vf_coef": 0.5, "ent_coef": 0.01, "normalize_values": False}
SAME |= {"num_epochs": EPOCHS, "num_minibatches": 1, "max_grad_norm": 1e9}


class Timed(CartPoleEnv):
    """CartPole whose episodes terminate by the clock, two of them (and the two resets) in every 18 steps."""

    ending = 0

    def __init__(self) -> None:
        super().__init__()
        self.theta_threshold_radians = self.x_threshold = 1e6

    def reset(self, **options):
        found = super().reset(**options)
        self.ending = STEPS - 2 - self.ending if self.ending else int(self.np_random.integers(3, STEPS - 5))
        self.t = 0
        return found

    def step(self, action):
        observation, _, _, _, info = super().step(action)
        self.t += 1
        return observation, 1.0 + 0.1 * self.t, self.t == self.ending, False, info


gymnasium.register("tests/TimedCartPole-v0", entry_point=Timed, disable_env_checker=True)


class TokenConfig(PretrainedConfig):
    model_type = "cartpole_tokens"


class Trunk(PreTrainedModel):
    """Token -> the state that it stands for -> the control network's shared layers."""

    config_class = TokenConfig

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the control network's."""

    def __init__(self, config: TokenConfig, states: Tensor, layers: nn.Module) -> None:
        super().__init__(config)
        self.register_buffer("states", states)
        self.layers = layers
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.layers(self.states[input_ids]))


class TokenPolicy(PreTrainedModel):
    """A causal language model over states, whose next token is an action's outcome."""

    config_class, base_model_prefix = TokenConfig, "trunk"

    def __init__(self, config: TokenConfig, trunk: Trunk, head: nn.Linear, outcomes: Tensor) -> None:
        super().__init__(config)
        self.trunk, self.head = trunk, head
        self.register_buffer("outcomes", outcomes)  # [V, 2] the token that follows each action
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the control network's."""

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        two = self.head(self.trunk(input_ids).last_hidden_state)
        logits = two.new_full((*input_ids.shape, self.config.vocab_size), -1e9)
        return CausalLMOutput(logits=logits.scatter(-1, self.outcomes[input_ids], two))


def episodes(rollout: ControlRollout) -> list[tuple[int, int, int]]:
    """(copy, first step, end) of each episode; all are whole."""
    found = []
    for copy, ends in enumerate(rollout.terminated.tolist()):
        start = 0
        for t, end in enumerate(ends):
            if end:
                found.append((copy, start, t + 1))
                start = t + 2  # after the step that resets
    assert sum(end - start for _, start, end in found) == int(rollout.mask.sum())
    return found


def language_of(rollout: ControlRollout, network: Any, values: Tensor) -> tuple[TokenPolicy, Rollout]:
    """The language model of a control network, and the rollout as responses, one an episode."""
    found = episodes(rollout)
    sizes = [end - start + 1 for _, start, end in found]  # states, the last one included
    vocabulary = sum(sizes) + 1
    states, outcomes = torch.zeros(vocabulary, 4), torch.full((vocabulary, 2), vocabulary - 1)
    width = max(sizes) - 1
    shape = len(found), width
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    recorded = {name: torch.zeros(shape) for name in ("logprobs", "values", "rewards")}
    prompts, first = torch.zeros(len(found), 1, dtype=torch.long), 0
    for row, (copy, start, end) in enumerate(found):
        n = end - start
        tokens = torch.arange(first, first + n + 1)
        states[tokens[:-1]] = rollout.observations[copy, start:end]
        outcomes[tokens[:-1], rollout.actions[copy, start:end]] = tokens[1:]
        prompts[row], ids[row, :n], mask[row, :n] = tokens[0], tokens[1:], True
        for name, x in (("logprobs", rollout.logprobs), ("values", values), ("rewards", rollout.rewards)):
            recorded[name][row, :n] = x[copy, start:end].float()
        first += n + 1
    config = TokenConfig(vocab_size=vocabulary, hidden_size=network.critic[0].in_features, eos_token_id=None)
    policy = TokenPolicy(config, Trunk(config, states, network.bodies[0].layers), network.policy[0], outcomes)
    responses = Rollout(
        prompts=["a"] * len(found),
        columns={},
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        response_ids=ids,
        mask=mask,
        finished=torch.ones(len(found), dtype=torch.bool),
        logprobs=recorded["logprobs"],
        entropy=torch.zeros(shape),
        values=recorded["values"],
        value_scale=ValueScale(),
        completions=[""] * len(found),
        ref_logprobs=recorded["logprobs"],
        scores=recorded["rewards"].double().sum(dim=1),
        scored=torch.ones(len(found), dtype=torch.bool),
        score_parts={"reward": recorded["rewards"].sum(dim=1).tolist()},
        token_scores=recorded["rewards"].double(),
    )
    return policy, responses


def steps_by(parameters: list[nn.Parameter], seen: list[list[Tensor]]) -> Any:
    """A plain step down the gradient, the same in both frontends, that notes the gradient."""

    @torch.no_grad()
    def step(*_: Any) -> None:
        seen.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.sub_(RATE * p.grad)
            p.grad.zero_()

    return step


@pytest.mark.parametrize("objective", ["clip", "penalty", "cispo", "a2c"])
def test_both_frontends_learn_the_same_from_the_same_steps(objective, tokenizer, tmp_path, monkeypatch):
    settings = {**SAME, "objective": objective}
    agent = classic.PPO(
        "tests/TimedCartPole-v0",
        classic.PPOArgs(
            num_envs=6, num_steps=STEPS, hidden_sizes=(16, 16), shared_network=True, seed=3, quiet=True, **settings
        ),
    )
    with torch.no_grad():  # an initial policy that is not near uniform, and a critic that says something
        agent.network.policy[-1].weight.mul_(100)
    start = {name: x.clone() for name, x in agent.network.state_dict().items()}
    ours: list[list[Tensor]] = []
    network = agent.network
    names = ["bodies.0.layers.0", "bodies.0.layers.2", "policy.0", "critic.0"]
    parameters = [network.get_parameter(f"{name}.{part}") for name in names for part in ("weight", "bias")]
    monkeypatch.setattr(agent.state.optimizer, "step", steps_by(parameters, ours))
    agent.learn(6 * (STEPS - 2))  # one rollout, its resets not counted
    rollout, estimate, _ = agent.last_update

    network.load_state_dict(start)
    policy, responses = language_of(rollout, network, estimate.values)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts),
        args=RLHFConfig(
            output_dir=str(tmp_path),
            kl_coef=0.0,
            stop_token_ids=(),
            rollout_batch_size=12,
            total_episodes=12,
            learning_rate=0.0,
            max_new_tokens=STEPS,
            device="cpu",
            precision="fp32",
            quiet=True,
            **settings,
        ),
        train_dataset=[{"prompt": "a"}],
        processing_class=tokenizer,
    )
    head = trainer.model.value_head
    head.load_state_dict(network.critic[0].state_dict())
    trainer.model.value_scale = ValueScale()
    layers = trainer.model.policy
    own = [*layers.trunk.layers.parameters(), *layers.head.parameters(), *head.parameters()]
    theirs: list[list[Tensor]] = []
    trainer.optimizer.register_step_pre_hook(steps_by(own, theirs))
    metrics = trainer.step(responses)

    assert len(ours) == len(theirs) == EPOCHS
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert max(float(x.abs().max()) for x in ours[0]) > 0.01
    logged = agent.last_metrics
    for name in ("policy/loss", "value/loss", "policy/approx_kl", "policy/clip_fraction", "optim/grad_norm"):
        assert metrics[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-5), name
    assert logged["policy/approx_kl"] > 1e-3
