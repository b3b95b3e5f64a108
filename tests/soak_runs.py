"""The two tiny runs that soak.py kills: one of each frontend."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
import torch._dynamo  # an optimizer's first step would, in each killed process again

Train = Callable[[Path, int, int], None]
"""``train(folder, rollouts, seed)``: the run, from wherever it is, to its end."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {},
    "penalty": {"target_kl": 0.01},
    "adaptive_clip": {"target_kl": 0.01},
    "dual_clip": {},
    "cispo": {},
    "a2c": {"num_minibatches": 1},
    "reinforce": {"num_minibatches": 1},
}


def objective(seed: int) -> dict[str, Any]:
    """The settings of an objective, another one for each seed."""
    name = list(OBJECTIVES)[seed % len(OBJECTIVES)]
    return {"objective": name, **OBJECTIVES[name]}


def language_model(sharding: str = "none") -> Train:
    """A language model's run; every other seed trains an adapter."""
    from peft import LoraConfig
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    import rlhf_ppo.trainer
    from rlhf_ppo import PPOTrainer, RLHFConfig

    # The picture at a run's end, when everything is saved, takes longer than the run.
    rlhf_ppo.trainer.plot_run = lambda *_: None
    rlhf_ppo.trainer.report_run = lambda *_: None
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 28}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    with tempfile.TemporaryDirectory() as folder:  # the first save takes half a second, in each killed process again
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)

    def tokenizer() -> PreTrainedTokenizerFast:
        """One token a character."""
        vocabulary = {character: i for i, character in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz "])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", model_max_length=32)

    def early_letters(prompts, completions, **columns):
        """Letters before n, plus noise from Python's global generator, which a resumed run must go on with."""
        return [sum("a" <= x < "n" for x in text) / 6 + 0.1 * random.random() for text in completions]

    # Each of several processes would draw other noise than one that resumes.
    early_letters.whole_rollout = True  # pyright: ignore[reportFunctionMemberAccess]

    def train(folder: Path, rollouts: int, seed: int) -> None:
        torch.manual_seed(seed)
        adapter = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        settings = {"num_minibatches": 2, **objective(seed)}
        if settings["objective"] == "reinforce":
            settings["advantage_estimator"] = "reinforce"
        trainer = PPOTrainer(
            GPT2LMHeadModel(GPT2Config(**sizes)),
            early_letters,
            RLHFConfig(
                output_dir=str(folder),
                total_episodes=4 * rollouts,
                rollout_batch_size=4,
                num_epochs=1,
                max_new_tokens=6,
                learning_rate=1e-3,
                kl_target=1.0,
                normalize_scores=True,
                eval_every=4,
                save_every=1,
                save_best=True,
                save_total_limit=1,
                seed=seed,
                device="cpu",
                precision="fp32",
                quiet=True,
                sharding=sharding,
                process_timeout_s=20,  # one may be killed before the processes have met
                **settings,
            ),
            train_dataset=[{"prompt": text} for text in ("once", "the cat", "a", "blue moon", "no")],
            eval_dataset=[{"prompt": text} for text in ("to be", "or")],
            processing_class=tokenizer(),
            peft_config=adapter if seed % 2 else None,
        )
        trainer.train(resume_from_checkpoint="auto")

    return train


def control_task() -> Train:
    """A run of the classic frontend; every other seed plays on copies stepped one by one, with a memory."""
    import gymnasium.envs.classic_control.cartpole  # noqa: F401 - as above

    import classic
    import classic.explain
    import classic.report
    from classic.callbacks import evaluate_every

    classic.report.plot_curves = lambda *_, **__: None
    classic.explain.report_at_end = lambda *_, **__: None

    def train(folder: Path, rollouts: int, seed: int) -> None:
        copies = {"vectorization": "sync", "recurrent": "gru", "recurrent_size": 4} if seed % 2 else {}
        args = classic.PPOArgs(
            output_dir=str(folder),
            num_envs=2,
            num_steps=16,
            num_epochs=1,
            hidden_sizes=(8,),
            learning_rate=1e-2,
            normalize_observations=True,
            normalize_rewards=True,
            save_every=1,
            save_total_limit=1,
            seed=seed,
            quiet=True,
            **{"num_minibatches": 2, **objective(seed), **copies},
        )
        agent = classic.PPO("CartPole-v1", args)
        ends = [evaluate_every(4, episodes=1), lambda agent, metrics: agent.counters["iteration"] >= rollouts]
        # More steps than that: those that only reset do not count.
        agent.learn(32 * rollouts, callbacks=ends, resume_from_checkpoint="auto")
        agent.save(folder)

    return train


FRONTENDS: dict[str, Callable[..., Train]] = {"language": language_model, "classic": control_task}
"""Each imports what it needs when it is called."""
