"""Networks of the user's own: what they see, saved agents that ask for them, other widths for the critic, faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from torch import nn

import classic
from classic.cli import main
from classic.envs.parts import as_in_space
from classic.envs.spaces import batch_of_one, observation_encoder
from rlhf_ppo.runtime.logs.run_directory import RunDirectory

FACTORY = """
from torch import nn

def small(space):
    return nn.Sequential(nn.Linear(space.shape[0], 5), nn.GELU()), 5

def wrong_width(space):
    return nn.Linear(space.shape[0], 5), 6

def wrong_input(space):
    return nn.Linear(7, 5), 5

def no_width(space):
    return nn.Linear(1, 5)

def broken(space):
    raise KeyError("depth")

def doubles(space):
    return nn.Linear(1, 5).double(), 5
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY)
    return str(tmp_path / "own.py")


def small_network(space):
    return nn.Sequential(nn.Linear(space.shape[0], 5), nn.GELU()), 5


def test_a_network_of_ones_own_learns(small, learning_seed):
    settings = small(learning_rate=1e-2, gamma=0.5, seed=learning_seed)
    agent = classic.PPO("tests/Match-v0", settings, network=small_network).learn(6_000)
    assert agent.evaluate(20)["mean_return"] > 4.5  # 2.5 is luck, 5 the best
    own, other = agent.network.bodies
    assert isinstance(own.image.network[1], nn.GELU) and agent.args.network.endswith(":small_network")
    # Separate networks unless shared: the factory is called for each.
    assert not torch.equal(own.image.network[0].weight, other.image.network[0].weight)
    assert len(classic.PPO("tests/Match-v0", small(shared_network=True), network=small_network).network.bodies) == 1


def test_its_weights_come_from_the_seed_alone_and_nothing_else_is_disturbed(small, file):
    before = torch.get_rng_state()
    settings = small(network=f"{file}:small", seed=4)
    one = classic.PPO("tests/Match-v0", settings)
    torch.rand(3)
    torch.set_rng_state(before)
    other = classic.PPO("tests/Match-v0", settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(one.network.parameters(), other.network.parameters(), strict=True))


def test_a_saved_agent_asks_for_its_network(small, file, tmp_path):
    agent = classic.PPO("tests/Match-v0", small(network=f"{file}:small", hidden_sizes=())).learn(200)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"made by .*own\.py:small, .* give it, as PPO\.load"):
        classic.PPO.load(tmp_path / "agent")
    for given in (f"{file}:small", small_network):
        loaded = classic.PPO.load(tmp_path / "agent", network=given)
        assert loaded.evaluate(5) == agent.evaluate(5) and loaded.args.hidden_sizes == ()
    classic.PPO("tests/Match-v0", small()).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no network of its own: remove it"):
        classic.PPO.load(tmp_path / "plain", network=small_network)


def test_the_command_line_trains_resumes_and_evaluates_it(file, tmp_path, capsys):
    folder, network = str(tmp_path / "run"), ["--network", f"{file}:small"]
    words = ["train", "tests/Match-v0", "--output-dir", folder, "--quiet", "--num-envs", "2", "--num-steps", "8"]
    words += [
        "--num-minibatches",
        "2",
        "--total-timesteps",
        "32",
        "--eval-episodes",
        "2",
        "--save-every",
        "1",
        *network,
    ]
    assert main(words) == 0
    first = RunDirectory(folder).read()
    assert main([*words, "--resume", f"{folder}/checkpoint-1"]) == 0 and RunDirectory(folder).read() == first
    assert main(["evaluate", folder, "--episodes", "2", *network]) == 0
    capsys.readouterr()
    assert main(["evaluate", folder, "--episodes", "2"]) == 2
    assert f"--network {file}:small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("wrong_width", r"says that it makes 6 features, but of 2 observations it made \(2, 5\)"),
        ("wrong_input", r"failed on a batch of 2 observations of Box\(.*mat1 and mat2"),
        ("no_width", r"must return \(module, width\), .* got Linear"),
        ("broken", "failed: KeyError: 'depth'"),
        ("doubles", "torch.float64 on cpu: make them in float32"),
        ("smal", "has no function 'smal'; did you mean 'small'"),
    ],
)
def test_a_wrong_network_is_refused_before_training(function, words, small, file):
    with pytest.raises(ValueError, match=words):
        classic.PPO("tests/Match-v0", small(network=f"{file}:{function}"))


def test_it_sees_observations_as_their_space_has_them():
    space = Dict(
        {
            "camera": Box(0, 255, (36, 40, 3), np.uint8),
            "grid": Box(-1, 1, (2, 3), np.float32),
            "more": Tuple([Discrete(3, start=1), MultiBinary(2)]),
        }
    )
    space.seed(0)
    sample = space.sample()
    rows = torch.from_numpy(observation_encoder(space)(batch_of_one(space, sample)))
    seen = as_in_space(space, rows)
    torch.testing.assert_close(seen["camera"][0].permute(1, 2, 0) * 255, torch.from_numpy(sample["camera"]).float())
    torch.testing.assert_close(seen["grid"][0], torch.from_numpy(sample["grid"]))
    assert seen["more"][0][0].tolist() == [float(sample["more"][0] == i) for i in (1, 2, 3)]
    assert seen["more"][1][0].tolist() == sample["more"][1].tolist()
    image = torch.full((1, 3, 36, 40), 255, dtype=torch.uint8)  # alone, it is encoded as bytes
    assert as_in_space(space["camera"], image).unique().tolist() == [1.0]


def test_the_critic_may_have_widths_of_its_own(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small(hidden_sizes=(8,), value_hidden_sizes=(32, 16))).learn(100)
    assert [x.out_features for x in agent.network.critic if isinstance(x, nn.Linear)] == [32, 16, 1]
    assert [x.out_features for x in agent.network.policy if isinstance(x, nn.Linear)] == [8, 2]
    assert agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    agent.save(tmp_path)
    assert classic.PPO.load(tmp_path).evaluate(3) == agent.evaluate(3)
    same = classic.PPO("tests/Match-v0", small(value_hidden_sizes=(16,))).learn(100)
    plain = classic.PPO("tests/Match-v0", small()).learn(100)
    assert torch.equal(same.network.critic[0].weight, plain.network.critic[0].weight)
    with pytest.raises(ValueError, match=r"value_hidden_sizes=\(8,\) is for separate .* shared_network=True"):
        classic.PPO("tests/Match-v0", small(value_hidden_sizes=(8,), shared_network=True))
    with pytest.raises(ValueError, match="value_hidden_sizes must be positive widths"):
        small(value_hidden_sizes=(8, 0))


@pytest.mark.parametrize("shared", [False, True])
def test_there_may_be_no_hidden_layer(shared, small):
    agent = classic.PPO("tests/Match-v0", small(hidden_sizes=(), shared_network=shared)).learn(100)
    assert len(agent.network.policy) == 1 and agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


def test_a_device_that_is_not_here_is_refused_and_a_saved_agent_moves_to_the_cpu(small, tmp_path, monkeypatch):
    for device in ("cuda:77", "gpu"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            classic.PPO("tests/Match-v0", small(device=device))
    agent = classic.PPO("tests/Match-v0", small()).learn(100)
    agent.save(tmp_path)
    settings = tmp_path / "agent.json"
    settings.write_text(settings.read_text().replace('"device": "cpu"', '"device": "cuda:77"'))
    with pytest.warns(UserWarning, match="device 'cuda:77' cannot be used here.*: the agent is loaded on the CPU"):
        assert classic.PPO.load(tmp_path).evaluate(3) == agent.evaluate(3)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("tests/Match-v0", {}),
        ("tests/Aim-v0", {"squash": True}),
        ("tests/Aim-v0", {"objective": "penalty", "target_kl": 0.01}),
        ("tests/Recall-v0", {"recurrent": "lstm", "recurrent_size": 8}),
        ("tests/Recall-v0", {"recurrent": "gru", "recurrent_size": 8}),
        ("tests/Side-v0", {"shared_network": True}),
        ("tests/Allowed_info-v0", {"recompute_advantages": True}),
    ],
)
def test_a_gpu_computes_what_the_cpu_does(env_id, settings, small, tmp_path):
    """The first rollout's actions and losses; later ones drift apart by rounding."""
    there = classic.PPO(env_id, small(**settings, device="cuda", output_dir=str(tmp_path), save_every=1)).learn(64)
    here = classic.PPO(env_id, small(**settings)).learn(64)
    assert {x.device.type for x in there.network.parameters()} == {"cuda"}
    for name in ("policy/loss", "policy/entropy", "value/mean"):
        assert there.last_metrics[name] == pytest.approx(here.last_metrics[name], abs=1e-3)
    there.save(tmp_path / "agent")
    loaded = classic.PPO.load(tmp_path / "agent", device="cpu")
    assert loaded.evaluate(3)["mean_length"] == there.evaluate(3)["mean_length"]
    there.explain()
    again = classic.PPO(env_id, small(**settings, device="cuda", output_dir=str(tmp_path), save_every=1))
    again.learn(64, resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_lazy_layers_come_from_the_seed_too(small):
    def lazy(space):
        return torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Tanh()), 8

    before = torch.get_rng_state()
    one = classic.PPO("tests/Match-v0", small(), network=lazy)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    other = classic.PPO("tests/Match-v0", small(), network=lazy)
    assert all(torch.equal(x, y) for x, y in zip(one.network.parameters(), other.network.parameters(), strict=True))


def test_a_function_that_returns_the_same_module_twice_is_refused(small):
    layer = torch.nn.Linear(1, 4)

    def same(space):
        return torch.nn.Sequential(layer), 4

    with pytest.raises(ValueError, match="returned layers that it had made before, so actor and critic would share"):
        classic.PPO("tests/Match-v0", small(), network=same)
    classic.PPO("tests/Match-v0", small(shared_network=True), network=same)


def test_a_network_without_weights_on_images_is_loaded(small, tmp_path):
    def pooled(space):
        return torch.nn.Sequential(torch.nn.AvgPool2d(6), torch.nn.Flatten()), 36

    agent = classic.PPO("tests/Side-v0", small(), network=pooled)
    agent.save(tmp_path)
    assert classic.PPO.load(tmp_path, network=pooled).evaluate(2) == agent.evaluate(2)
