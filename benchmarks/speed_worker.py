"""One side of the speed comparison in a process of its own; prints one JSON line (see speed.py)."""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from speed_workloads import WORKLOADS, Workload, make_models, make_prompts, make_tokenizer


def resident_bytes() -> int:
    """Memory that this process has in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def static_bytes(*models: torch.nn.Module, trained: tuple[torch.nn.Module, ...]) -> int:
    """Weights of all models, and gradients and both moments of the trained ones."""
    parameters = {id(p): p for model in models for p in model.parameters()}
    moving = {id(p) for model in trained for p in model.parameters()}
    return sum(p.nbytes * (4 if i in moving else 1) for i, p in parameters.items())


def run_ours(work: Workload, *, separate_critic: bool, precision: str) -> dict:
    """This project: all through PPOTrainer.train()."""
    from rlhf_ppo import PPOTrainer, RLHFConfig
    from rlhf_ppo.rewards import RewardModel

    imports = resident_bytes()
    models, tokenizer = make_models(work), make_tokenizer(work)
    if not separate_critic:
        del models["value"]
    times, lengths = [], []

    def record(trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        times.append((time.perf_counter(), dict(trainer.timings)))
        lengths.append(metrics["response/length_tokens"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=models["policy"],
            ref_model=models["reference"],
            value_model=models["value"] if separate_critic else None,
            reward_funcs=RewardModel(models["reward"], tokenizer),
            processing_class=tokenizer,
            train_dataset=[{"prompt": prompt} for prompt in make_prompts(work)],
            args=RLHFConfig(
                output_dir=folder,
                total_episodes=work.prompts * (work.iterations + 1),
                rollout_batch_size=work.prompts,
                max_new_tokens=work.new_tokens,
                stop_token_ids=(0,) if work.spread else (),
                num_epochs=work.epochs,
                num_minibatches=work.minibatches,
                learning_rate=1e-6,
                precision=precision,
                quiet=True,
            ),
            callbacks=[record],
        )
        static = static_bytes(trainer.model, trainer.reference.model, models["reward"], trained=(trainer.model,))
        trainer.train()
    totals = defaultdict(float)
    for _, phases in times[1:]:
        for name, seconds in phases.items():
            totals[name] += seconds
    return report(work, [t for t, _ in times], totals, imports, static, lengths[1:])


def run_peer(work: Workload) -> dict:
    """TRL 1.12.0: its trainer, its loop; phases are timed around its own functions."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    imports = resident_bytes()
    models, tokenizer = make_models(work), make_tokenizer(work)
    tokenizer.padding_side = "left"
    times, phases, lengths = [], defaultdict(float), []

    @contextmanager
    def phase(name: str):
        started = time.perf_counter()
        yield
        phases[name] += time.perf_counter() - started

    generate, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward
    truncate = ppo_trainer.truncate_response

    def timed_generate(*args, **kwargs):
        with phase("generate"):
            return generate(*args, **kwargs)

    def timed_forward(model, *args, **kwargs):
        if model is not models["reference"]:
            return forward(model, *args, **kwargs)
        with phase("reference"):
            return forward(model, *args, **kwargs)

    def timed_reward(model, *args, **kwargs):
        with phase("score" if model is models["reward"] else "reference"):
            return get_reward(model, *args, **kwargs)

    def measured_truncate(*args):
        result = truncate(*args)
        lengths.append(float((result != tokenizer.pad_token_id).sum(dim=1).float().mean()))
        return result

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generate, timed_forward
    ppo_trainer.get_reward, ppo_trainer.truncate_response = timed_reward, measured_truncate

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append((time.perf_counter(), dict(phases)))
            phases.clear()

    rows = [{"input_ids": ids} for ids in tokenizer(make_prompts(work))["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                total_episodes=work.prompts * (work.iterations + 1),
                # One "device batch" that holds the rollout: then its num_mini_batches does add optimizer steps.
                per_device_train_batch_size=work.prompts,
                gradient_accumulation_steps=1,
                num_mini_batches=work.minibatches,
                num_ppo_epochs=work.epochs,
                response_length=work.new_tokens,
                stop_token="eos" if work.spread else None,
                temperature=1.0,
                learning_rate=1e-6,
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=10_000,
            ),
            processing_class=tokenizer,
            model=models["policy"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[Record()],
        )
        trained = (models["policy"], models["value"])
        static = static_bytes(*models.values(), trained=trained)
        trainer.train()
    totals = defaultdict(float)
    for _, seconds in times[1:]:
        for name, value in seconds.items():
            totals[name] += value
    totals["update"] = times[-1][0] - times[0][0] - sum(totals.values())
    return report(work, [t for t, _ in times], totals, imports, static, lengths[1:] or [work.new_tokens])


def report(work: Workload, ends: list[float], phases: dict, imports: int, static: int, lengths: list[float]) -> dict:
    """What both sides print: medians over the timed iterations."""
    seconds = sorted(b - a for a, b in zip(ends, ends[1:], strict=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = ends[-1] - ends[0]
    return {
        "seconds": seconds[len(seconds) // 2] if len(seconds) % 2 else sum(seconds[len(seconds) // 2 - 1 :][:2]) / 2,
        "all_seconds": seconds,
        "mean_tokens": sum(lengths) / len(lengths),
        "phases": {name: value / total for name, value in phases.items()},
        "peak_bytes": peak,
        "peak_above_static_bytes": peak - imports - static,
        "imports_bytes": imports,
        "static_bytes": static,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("peer", "like", "defaults"))
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    work = WORKLOADS[flags.workload]
    if flags.side == "peer":
        result = run_peer(work)
    else:
        like = flags.side == "like"
        result = run_ours(work, separate_critic=like, precision="fp32" if like else "auto")
    print(json.dumps({"side": flags.side, "workload": flags.workload, **result}))


if __name__ == "__main__":
    main()
