"""Train once with this project or with a trainer of TRL, and print a line of JSON (see time_to_score.py).

Runs in the environment of the side that it measures. Every side is measured by the same code: responses to held-out
prompts, their scores, and their KL to the start. Clocks stand still meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Spec = dict[str, Any]
"""model, prompts, held_out, batch, minibatches, epochs, new_tokens, episodes, learning_rate, kl_coef, seed, every,
draws, until; a learning_rate or kl_coef of None leaves the side's default.

``until``: [score, KL] at which to stop, after two evaluations that have it; None: after all episodes.
"""


def load_model(kind: Any, folder: str, **changes: Any) -> Any:
    """Load a model in float32 from safetensors alone; weights that the folder lacks are tied, or drawn (a head)."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
    model = kind.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    model.tie_weights()
    if unexpected != ["lm_head.weight"][: len(unexpected)] or {*missing} - {"lm_head.weight", "score.weight"}:
        raise ValueError(f"{folder}: {missing} are missing and {unexpected} do not fit")
    return model


def load_tokenizer(folder: str) -> Any:
    """Load a tokenizer that pads on the left."""
    return AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)


class Reached(Exception):  # noqa: N818
    """Ends a run that has what it was for, whatever trainer it is in."""


def sentiment() -> Callable[[list[str]], list[float]]:
    """Return the scores of rlhf_ppo.rewards.toy:positive_sentiment, for environments without this project."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer: Any = SentimentIntensityAnalyzer()
    return lambda texts: [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


class Meter:
    """Clocks of training, and the curve of held-out measurements: [episodes, CPU seconds, wall seconds, score, KL]."""

    def __init__(self, spec: Spec, score: Callable[[list[str]], list[float]]) -> None:
        self.spec, self.score, self.curve = spec, score, []
        self.tokenizer = load_tokenizer(spec["model"])
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.reference = load_model(AutoModelForCausalLM, spec["model"]).eval()
        self.cpu = self.wall = 0.0

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def note(self, policy: Any, episodes: int) -> None:
        """Measure if it is time to; ``policy``: the model in training."""
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall
        if episodes % self.spec["every"] == 0 or episodes >= self.spec["episodes"]:
            training = policy.training
            score, kl = self.measure(policy.eval())
            policy.train(training)
            self.curve.append([episodes, self.cpu, self.wall, score, kl])
            until = self.spec["until"]
            last = self.curve[-2:]
            if until and len(last) == 2 and all(point[3] >= until[0] and point[4] <= until[1] for point in last):
                raise Reached
        self.start()

    @torch.no_grad()
    def measure(self, policy: Any) -> tuple[float, float]:
        """Return mean score and KL in nats per response over the same draws at every call."""
        spec, eos = self.spec, self.tokenizer.eos_token_id
        scores, kls = [], []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(spec["draws"]):
                batch = self.tokenizer(spec["held_out"], return_tensors="pt", padding=True)
                sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                whole = policy.generate(
                    **batch, max_new_tokens=spec["new_tokens"], pad_token_id=eos, eos_token_id=eos, **sampling
                )
                response = whole[:, batch["input_ids"].shape[1] :]
                ended = response == eos
                mask = ended.cumsum(1) - ended.long() == 0  # up to the first end of text, which counts
                attended = torch.cat([batch["attention_mask"], mask.long()], dim=1)
                ours, theirs = (self._logprobs(m, whole, attended, mask.shape[1]) for m in (policy, self.reference))
                kls += ((ours - theirs) * mask).sum(1).tolist()
                scores += self.score(self.tokenizer.batch_decode(response, skip_special_tokens=True))
        return sum(scores) / len(scores), sum(kls) / len(kls)

    def _logprobs(self, model: Any, ids: torch.Tensor, attended: torch.Tensor, length: int) -> torch.Tensor:
        """Return the log-probs [rows, length] of the last ids."""
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits[:, -length - 1 : -1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]


def given(spec: Spec, **names: str) -> dict[str, Any]:
    """Return the settings that the spec gives, under the side's names."""
    return {name: spec[key] for name, key in names.items() if spec[key] is not None}


def run_ours(spec: Spec, meter: Meter, folder: str) -> None:
    """Train with this project."""
    from rlhf_ppo import PPOTrainer, RLHFConfig
    from rlhf_ppo.rewards.toy import positive_sentiment

    def note(trainer: Any, metrics: dict[str, float]) -> None:
        meter.note(trainer.model.policy, int(metrics["progress/episodes"]))

    trainer = PPOTrainer(
        model=spec["model"],
        reward_funcs=positive_sentiment,
        train_dataset=[{"prompt": prompt} for prompt in spec["prompts"]],
        args=RLHFConfig(
            output_dir=folder,
            total_episodes=spec["episodes"],
            rollout_batch_size=spec["batch"],
            num_minibatches=spec["minibatches"],
            num_epochs=spec["epochs"],
            max_new_tokens=spec["new_tokens"],
            seed=spec["seed"],
            quiet=True,
            **given(spec, learning_rate="learning_rate", kl_coef="kl_coef"),
        ),
        callbacks=[note],
    )
    meter.start()
    meter.note(trainer.model.policy, 0)
    trainer.train()


def trl_arguments(spec: Spec, folder: str) -> dict[str, Any]:
    """Return what all of TRL's configs share; fp32, as speed.py has it, and no step that only saves memory."""
    return {
        "output_dir": folder,
        "seed": spec["seed"],
        "temperature": 1.0,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 100_000,
        "lr_scheduler_type": "linear",
        **given(spec, learning_rate="learning_rate"),
    }


def recorder(meter: Meter, policy: Any, episodes: Callable[[int], int | None]) -> Any:
    """Return a callback that notes after each step at which ``episodes(step)`` is a number."""
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            meter.note(policy, 0)

        def on_step_end(self, args, state, control, **kwargs):
            if (done := episodes(state.global_step)) is not None:
                meter.note(policy, done)

    return Record()


def run_trl_ppo(spec: Spec, meter: Meter, folder: str) -> None:
    """Train with TRL 1.12's PPO: a separate value model from the policy's weights, as its examples do."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = load_tokenizer(spec["model"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy, reference = (load_model(AutoModelForCausalLM, spec["model"]) for _ in range(2))
    torch.manual_seed(spec["seed"])  # the value head's weights
    value = load_model(AutoModelForSequenceClassification, spec["model"], num_labels=1)
    reward, get_reward = torch.nn.Identity(), ppo_trainer.get_reward

    def score(model: Any, ids: torch.Tensor, pad: int, context: int) -> Any:
        # It takes reward models only, not functions: this stands in for one, at no cost but the function's own.
        if model is not reward:
            return get_reward(model, ids, pad, context)
        texts = tokenizer.batch_decode(ids[:, context:], skip_special_tokens=True)
        return None, torch.tensor(meter.score(texts)), None

    ppo_trainer.get_reward = score
    rows = [{"input_ids": ids} for ids in tokenizer(spec["prompts"])["input_ids"]]
    trainer = PPOTrainer(
        args=PPOConfig(
            **trl_arguments(spec, folder),
            **given(spec, kl_coef="kl_coef"),
            total_episodes=spec["episodes"],
            # One "device batch" for the whole rollout, so that its num_mini_batches does add optimizer steps.
            per_device_train_batch_size=spec["batch"],
            num_mini_batches=spec["minibatches"],
            num_ppo_epochs=spec["epochs"],
            response_length=spec["new_tokens"],
            stop_token="eos",
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        callbacks=[recorder(meter, policy, lambda step: step * spec["batch"])],
    )
    meter.start()
    trainer.train()


def run_trl_group(spec: Spec, meter: Meter, folder: str, kind: str) -> None:
    """Train with TRL's GRPO or RLOO, four responses per prompt."""
    import trl
    from datasets import Dataset

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return meter.score(completions)

    updates = spec["minibatches"] * spec["epochs"]
    policy = load_model(AutoModelForCausalLM, spec["model"])
    trainer = getattr(trl, f"{kind}Trainer")(
        model=policy,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(
            **trl_arguments(spec, folder),
            **given(spec, beta="kl_coef"),
            per_device_train_batch_size=spec["batch"] // spec["minibatches"],
            generation_batch_size=spec["batch"],
            num_generations=4,
            num_iterations=spec["epochs"],
            max_completion_length=spec["new_tokens"],
            max_steps=spec["episodes"] // spec["batch"] * updates,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in spec["prompts"]]),
        processing_class=load_tokenizer(spec["model"]),
        callbacks=[recorder(meter, policy, lambda step: None if step % updates else step // updates * spec["batch"])],
    )
    meter.start()
    trainer.train()


def main() -> None:
    side, text = sys.argv[1:]
    spec = json.loads(text)
    meter = Meter(spec, sentiment())
    with tempfile.TemporaryDirectory() as folder, suppress(Reached):
        if side.startswith("ours"):
            run_ours(spec, meter, folder)
        elif side == "trl_ppo":
            run_trl_ppo(spec, meter, folder)
        else:
            run_trl_group(spec, meter, folder, side.removeprefix("trl_").upper())
    print("\n" + json.dumps({"curve": meter.curve}))


if __name__ == "__main__":
    main()
