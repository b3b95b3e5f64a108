"""Run one side of the speed comparison in its own process; print one JSON line (see speed.py)."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from speed_workloads import (
    EOS,
    SHORTEST,
    WORKLOADS,
    Workload,
    make_models,
    make_prompts,
    make_tokenizer,
    prompt_lengths,
)


def resident_bytes() -> int:
    """Return this process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def static_bytes(*models: torch.nn.Module, trained: tuple[torch.nn.Module, ...]) -> int:
    """Count bytes of all models' weights, and of gradients and both moments of the trained ones."""
    parameters = {id(p): p for model in models for p in model.parameters()}
    moving = {id(p) for model in trained for p in model.parameters() if p.requires_grad}
    return sum(p.nbytes * (4 if i in moving else 1) for i, p in parameters.items())


def ends(work: Workload) -> bool:
    """Return whether responses may end before the limit."""
    return work.spread or work.mean_tokens is not None


def adapter(work: Workload) -> Any:
    """Return the settings of the workload's adapter; None: all weights are trained."""
    if work.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=work.lora_rank, lora_alpha=work.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_for(
    work: Workload, folder: str, *, separate_critic: bool, precision: str, device: str = "cpu", **arguments: Any
) -> Any:
    """Return this project's trainer for a workload, and the bytes of its static state."""
    from rlhf_ppo import PPOTrainer, RLHFConfig
    from rlhf_ppo.rewards.reward_model import RewardModel

    models, tokenizer = make_models(work), make_tokenizer(work)
    trainer = PPOTrainer(
        model=models["policy"],
        ref_model=models["reference"] if work.lora_rank is None else None,
        peft_config=adapter(work),
        value_model=models["value"] if separate_critic else None,
        reward_funcs=RewardModel(models["reward"], tokenizer),
        processing_class=tokenizer,
        train_dataset=[{"prompt": prompt} for prompt in make_prompts(work)],
        args=RLHFConfig(
            output_dir=folder,
            total_episodes=work.prompts * (work.warmup + work.iterations),
            rollout_batch_size=work.prompts,
            max_new_tokens=work.new_tokens,
            stop_token_ids=(EOS,) if ends(work) else (),
            num_epochs=work.epochs,
            num_minibatches=work.minibatches,
            learning_rate=1e-6,
            precision=precision,
            device=device,
            quiet=True,
        ),
        **arguments,
    )
    frozen = [models["reward"]] if work.lora_rank is not None else [models["reward"], trainer.reference.model]
    return trainer, static_bytes(trainer.model, *frozen, trained=(trainer.model,))


def run_ours(work: Workload, *, separate_critic: bool, precision: str, device: str) -> dict:
    """Run this project through PPOTrainer.train()."""
    import rlhf_ppo.trainer  # noqa: F401
    from rlhf_ppo.models.compare import SavedModelError

    imports = resident_bytes()
    times, lengths = [], []

    def record(trainer: Any, metrics: dict[str, float]) -> None:
        times.append((time.perf_counter(), dict(trainer.timings)))
        lengths.append(metrics["response/length_tokens"])

    with tempfile.TemporaryDirectory() as folder:
        trainer, static = trainer_for(
            work, folder, separate_critic=separate_critic, precision=precision, device=device, callbacks=[record]
        )
        times.append((time.perf_counter(), {}))
        # What is loaded again of V's and R's policies is a plain model, and the run says so at its end.
        with suppress(SavedModelError) if ends(work) else nullcontext():
            trainer.train()
    return report(work, times, imports, static, lengths)


def run_peer(work: Workload, device: str) -> dict:
    """Run TRL 1.12.0 with its own trainer and loop, on a GPU in bf16; phases are timed around its functions."""
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
        wait(device)
        phases[name] += time.perf_counter() - started

    generate, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward
    truncate = ppo_trainer.truncate_response

    def timed_generate(*args, **kwargs):
        with phase("generate"):
            return generate(*args, **kwargs)

    def timed_forward(model, *args, **kwargs):
        if torch.is_grad_enabled():
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
        def on_train_begin(self, args, state, control, **kwargs):
            times.append((time.perf_counter(), {}))

        def on_step_end(self, args, state, control, **kwargs):
            wait(device)
            now = time.perf_counter()
            times.append((now, {**phases, "update": now - times[-1][0] - sum(phases.values())}))
            phases.clear()

    rows = [{"input_ids": ids} for ids in tokenizer(make_prompts(work))["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                total_episodes=work.prompts * (work.warmup + work.iterations),
                # One device batch a rollout (if memory allows), so that num_mini_batches does add optimizer steps.
                per_device_train_batch_size=work.prompts // work.peer_batches,
                gradient_accumulation_steps=work.peer_batches,
                num_mini_batches=work.minibatches,
                num_ppo_epochs=work.epochs,
                response_length=work.new_tokens,
                stop_token="eos" if ends(work) else None,
                temperature=1.0,
                learning_rate=1e-6,
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=device != "cpu",
                use_cpu=device == "cpu",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=10_000,
            ),
            processing_class=tokenizer,
            model=models["policy"],
            ref_model=models["reference"] if work.lora_rank is None else None,
            peft_config=adapter(work),
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[Record()],
        )
        kept = [model for name, model in models.items() if name != "reference" or work.lora_rank is None]
        static = static_bytes(trainer.policy_model, *kept, trained=(trainer.policy_model, models["value"]))
        trainer.train()
    return report(work, times, imports, static, lengths or [work.new_tokens] * (work.warmup + work.iterations))


def report(work: Workload, times: list, imports: int, static: int, lengths: list[float]) -> dict:
    """Return what both sides print; ``times``: the start of training and the end of each iteration, with its phases."""
    seconds = [b - a for (a, _), (b, _) in pairwise(times)][work.warmup :]
    phases: dict[str, float] = defaultdict(float)
    for _, part in times[1 + work.warmup :]:
        for name, value in part.items():
            phases[name] += value
    lengths = lengths[work.warmup :]
    on_gpu = {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(seconds)
    return {
        "seconds": seconds,
        "mean_tokens": sum(lengths) / len(lengths),
        "phases": {name: value / total for name, value in phases.items()},
        "peak_bytes": peak,
        "peak_above_static_bytes": peak - imports - static,
        "imports_bytes": imports,
        "static_bytes": static,
        **on_gpu,
    }


def wait(device: str) -> None:
    """Wait until a GPU has finished its queue."""
    if device != "cpu":
        torch.cuda.synchronize()


def response_lengths(work: Workload) -> torch.Tensor:
    """Return the lengths that a workload's responses have on average."""
    if work.mean_tokens is None:
        shortest = SHORTEST if work.spread else work.new_tokens
        return torch.linspace(shortest, work.new_tokens, work.prompts).round().long()
    shares = (torch.arange(work.prompts) + 0.5) / work.prompts
    lengths = torch.log1p(-shares) / math.log1p(-1 / work.mean_tokens)
    return lengths.ceil().long().clamp(1, work.new_tokens)


def run_floor(work: Workload) -> dict:
    """Time the iteration's dense matrix products alone: weights times activations, nothing else.

    Every product uses the fastest layout in use and preallocated memory. Attention's own
    products and an adapter's are left out; frozen weights have no gradient. bf16 where the defaults use it.
    """
    from rlhf_ppo.runtime.machine.device import cpu_multiplies_bf16

    d, vocabulary = work.width, work.vocabulary
    trunk = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    if work.llama is not None:
        heads, key_value_heads, gated = work.llama
        trunk = [(d, d), *[(d, d // heads * key_value_heads)] * 2, (d, d), *[(d, gated)] * 2, (gated, d)]
    lengths, prompts = response_lengths(work), torch.tensor(prompt_lengths(work))
    responses, tokens = int(lengths.sum()), int((lengths + prompts - 1).sum())
    adapts = work.lora_rank is not None
    buffers: dict[tuple, torch.Tensor] = {}

    def seconds(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        for shape in ((rows, inner), (inner, columns), (rows, columns)):
            buffers.setdefault((*shape, dtype), torch.randn(shape, dtype=dtype))
        a, b, out = (buffers[(*s, dtype)] for s in ((rows, inner), (inner, columns), (rows, columns)))
        times = []
        for _ in range(7 if rows * inner * columns < 1e9 else 3):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def total(dtype: torch.dtype, *, separate_critic: bool) -> float:
        @cache
        def forward(rows: int) -> float:
            return work.layers * sum(seconds(rows, i, o, dtype) for i, o in trunk)

        @cache
        def backward(rows: int, *, frozen: bool) -> float:
            inputs = work.layers * sum(seconds(rows, o, i, dtype) for i, o in trunk)
            return inputs + (0.0 if frozen else work.layers * sum(seconds(i, rows, o, dtype) for i, o in trunk))

        @cache
        def head(rows: int) -> float:  # the vocabulary as rows: up to twice as fast as columns
            return seconds(vocabulary, d, rows, dtype)

        @cache
        def head_backward(rows: int) -> float:
            return seconds(rows, vocabulary, d, dtype) + (0.0 if adapts else seconds(vocabulary, rows, d, dtype))

        alive = [int((lengths > t).sum()) for t in range(work.new_tokens)]
        decode = forward(int(prompts.sum())) + head(alive[0])
        decode += sum(forward(rows) + head(rows) for rows in alive[1:] if rows)
        read = forward(tokens) + head(responses // 4) * 4  # the reference
        score = forward(tokens + work.prompts)
        part, part_responses = tokens // work.minibatches, responses // work.minibatches
        update = forward(part) + backward(part, frozen=adapts) + head(part_responses) + head_backward(part_responses)
        if separate_critic:
            read += forward(tokens)
            update += forward(part) + backward(part, frozen=False)
        return decode + read + score + work.epochs * work.minibatches * update

    result = {
        "like": total(torch.float32, separate_critic=True),
        "defaults": total(torch.bfloat16 if cpu_multiplies_bf16() else torch.float32, separate_critic=False),
    }
    return {"seconds": result}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("peer", "like", "defaults", "floor"))
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jsonl", type=Path, help="also append the result to this file")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    work = WORKLOADS[flags.workload]
    if flags.side == "peer":
        result = run_peer(work, flags.device)
    elif flags.side == "floor":
        result = run_floor(work)
    else:
        like = flags.side == "like"
        result = run_ours(work, separate_critic=like, precision="fp32" if like else "auto", device=flags.device)
    row = json.dumps({"side": flags.side, "workload": flags.workload, **result})
    print(row)
    if flags.jsonl is not None:
        with flags.jsonl.open("a", encoding="utf-8") as file:
            file.write(f"{row}\n")


if __name__ == "__main__":
    main()
