"""Where every argument of TRL 1.12's PPO went: one table for `rlhf-ppo migrate` and docs/migrating-from-trl.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

KNOWN = Path(__file__).parents[1] / "assets" / "trl-1.12-ppo-fields.json"
"""The real classes' fields, kinds of value and defaults; made by `make trl-fields`."""

Fate = Literal["same", "changed", "automatic", "inert", "missing"]

FATES: dict[Fate, str] = {
    "same": "the same value under our name",
    "changed": "has a counterpart, but unit, meaning or default behaviour differ: the note says how it is converted",
    "automatic": "needs no setting here",
    "inert": "TRL's PPO accepts it and never acts on it; nothing is lost",
    "missing": "TRL's PPO acts on it and no setting here does",
}


class Row(NamedTuple):
    """What became of one field."""

    fate: Fate
    ours: tuple[str, ...] = ()
    """Settings of `rlhf-ppo train` that take its place, or come nearest."""
    note: str = ""


def _same(ours: str, note: str = "") -> Row:
    return Row("same", (ours,), note)


def _changed(ours: str, note: str) -> Row:
    return Row("changed", tuple(ours.split()), note)


def _automatic(note: str, nearest: str = "") -> Row:
    return Row("automatic", tuple(nearest.split()), note)


def _inert(note: str = "", nearest: str = "") -> Row:
    return Row("inert", tuple(nearest.split()), note)


def _missing(note: str, nearest: str = "") -> Row:
    return Row("missing", tuple(nearest.split()), note)


_COMPUTED = "TRL computes it and overwrites what was given."
_ONE_PROCESS = "Several processes are not here yet."
_TRACKERS = "A tracker's run is named after the run's folder, in the project rlhf-ppo."
_HUB = "No setting: call `PPOTrainer.push_to_hub(repo_id)` after training (private unless told otherwise)."
_PEFT = "No setting: give `PPOTrainer` a `peft_config` in Python."
_LOADER = "TRL's PPO builds its own data loader without it."
_TRAINER = "Belongs to transformers' Trainer loop, which PPO replaces."
_EVERY_ROLLOUT = "Every rollout's metrics are written to metrics.jsonl."
_CHECKPOINTING = "Trainer's loop would turn it on; TRL's PPO has a loop of its own and never does."

FIELDS: dict[str, dict[str, Row]] = {
    "ScriptArguments": {
        "dataset_name": _same("dataset", "Also a csv, jsonl or parquet file. Prompts are text: nothing to tokenise."),
        "dataset_config": _missing("Save the configuration's rows to a file and name the file."),
        "dataset_train_split": _same("split"),
        "dataset_test_split": _changed(
            "eval_dataset eval_split",
            "Name the data set again as `eval_dataset`, with this split as `eval_split`, in place of `eval_size`.",
        ),
        "dataset_streaming": _missing("Data sets are read whole."),
        "ignore_bias_buffers": _inert("Not read by TRL's PPO scripts."),
    },
    "ModelConfig": {
        "model_name_or_path": _changed(
            "model",
            "TRL's PPO scripts take only the tokenizer from it; the policy is `sft_model_path`. Left out: the "
            "tokenizer is read beside `model`.",
        ),
        "model_revision": _missing("Download the revision and name its folder."),
        "dtype": _changed(
            "precision",
            "TRL stores and updates weights in this format. Here they stay in float32; bfloat16 becomes "
            "`precision: bf16` (autocast).",
        ),
        "attn_implementation": _missing("transformers' default; pass a loaded model to `PPOTrainer` for another."),
        "use_peft": _changed("lora_rank", "Switches the adapter on: `lora_r` becomes `lora_rank`."),
        "lora_r": _same("lora_rank", "Only with `use_peft`."),
        "lora_alpha": _same("lora_alpha", "Only with `use_peft`; a whole number."),
        "lora_dropout": _inert("TRL's PPO sets every dropout to 0, this one too; so it is here."),
        "lora_target_modules": _same("lora_target_modules", "Only with `use_peft`."),
        "lora_target_parameters": _missing(_PEFT),
        "lora_modules_to_save": _missing(_PEFT),
        "lora_task_type": _automatic("Always CAUSAL_LM."),
        "use_rslora": _missing(_PEFT),
        "use_dora": _missing(_PEFT),
        "load_in_8bit": _changed("quantization", "`quantization: 8bit`; as in TRL it needs an adapter (`use_peft`)."),
        "load_in_4bit": _changed("quantization", "`quantization: 4bit`; as in TRL it needs an adapter (`use_peft`)."),
        "bnb_4bit_quant_type": _missing("Always nf4, TRL's default."),
        "use_bnb_nested_quant": _automatic("Always on; the numbers change in the last digits."),
        "bnb_4bit_quant_storage": _missing("bitsandbytes' default."),
    },
    "PPOConfig": {
        # PPO's own
        "sft_model_path": _same("model", "The policy, and the reference as it starts."),
        "reward_model_path": _changed(
            "reward value_model value_head_from",
            "The reward, read with its own tokenizer. TRL starts the critic from it too, a whole model of its own: "
            "`value_model` is that trunk, `value_head_from` its score head. Without these two lines the critic is a "
            "head on the policy's trunk.",
        ),
        "total_episodes": _same("total_episodes", "Without it TRL trains `num_train_epochs` x rows."),
        "response_length": _same("max_new_tokens"),
        "stop_token": _changed(
            "stop_token_ids",
            "Without it (TRL's default) TRL writes on behind the end-of-text token up to `response_length` and learns "
            'from what comes after. Here a response ends at the end-of-text token, which is TRL\'s "eos".',
        ),
        "stop_token_id": _changed(
            "stop_token_ids",
            "A list of one. TRL's `missing_eos_penalty` still looks for the tokenizer's EOS, so with another stop "
            "token it hits finished responses; here it looks for the stop tokens.",
        ),
        "temperature": _same("temperature", "Divides the logits of policy and reference, there as here."),
        "missing_eos_penalty": _same(
            "missing_eos_penalty", "Subtracted from the score, there as here (`missing_eos_mode` can replace it)."
        ),
        "num_ppo_epochs": _same("num_epochs"),
        "num_mini_batches": _changed(
            "num_minibatches",
            "TRL takes an optimizer step after every `gradient_accumulation_steps` microbatches, so a larger number "
            "adds no steps as long as it divides that; here each minibatch is a step. Converted to the steps that TRL "
            "took; set what you meant.",
        ),
        "local_rollout_forward_batch_size": _automatic(
            "A matter of memory: rollouts are read by tokens, not rows.", "microbatch_tokens"
        ),
        "num_sample_generations": _changed(
            "eval_every",
            "TRL prints nearly greedy responses to one batch of evaluation prompts this often; here the evaluation "
            "samples and scores all of them. Converted, unless `eval_steps` is given.",
        ),
        "whiten_rewards": _missing(
            "Advantages are whitened, there as here. Nearest: scores brought to one scale over the run.",
            "normalize_scores",
        ),
        "kl_coef": _same("kl_coef", "Or adaptive: `kl_target`."),
        "kl_estimator": _same("kl_estimator", "k2 is allowed too."),
        "cliprange": _same("clip_range"),
        "cliprange_value": _same("clip_range_vf"),
        "vf_coef": _same("vf_coef"),
        "gamma": _same("gamma"),
        "lam": _same("gae_lambda"),
        "model_adapter_name": _missing("One adapter; the reference is the model with it off."),
        "ref_adapter_name": _missing("One adapter; the reference is the model with it off."),
        "ds3_gather_for_generation": _missing(_ONE_PROCESS),
        "dataset_num_proc": _automatic("Prompts are tokenised in one process."),
        "world_size": _inert(_COMPUTED),
        "num_total_batches": _inert(_COMPUTED),
        "micro_batch_size": _inert(_COMPUTED),
        "local_batch_size": _inert(_COMPUTED),
        "batch_size": _inert(_COMPUTED, "rollout_batch_size"),
        "local_mini_batch_size": _inert(_COMPUTED),
        "mini_batch_size": _inert(_COMPUTED),
        # Batches, steps, optimizer
        "output_dir": _same(
            "output_dir", "TRL's scripts delete an existing folder first; here an earlier run is kept."
        ),
        "per_device_train_batch_size": _changed(
            "rollout_batch_size",
            "TRL's rollout is this x `gradient_accumulation_steps` x processes. As the size of a microbatch it has no "
            "counterpart: `microbatch_tokens` is automatic, and no gradient depends on it.",
        ),
        "gradient_accumulation_steps": _changed(
            "rollout_batch_size", "See `per_device_train_batch_size` and `num_mini_batches`."
        ),
        "num_train_epochs": _changed(
            "total_episodes", "Read by TRL only without `total_episodes`: multiply it by the rows yourself."
        ),
        "max_steps": _inert("TRL's PPO counts episodes.", "total_episodes"),
        "learning_rate": _same("learning_rate"),
        "lr_scheduler_type": _changed(
            "lr_scheduler_type",
            "constant (also constant_with_warmup), linear and cosine; other schedules are not here. TRL moves it once "
            "a rollout, here it moves every optimizer step.",
        ),
        "lr_scheduler_kwargs": _missing("Schedules have no settings of their own."),
        "warmup_steps": _changed(
            "warmup_steps", "TRL counts rollouts (or a share of them, below 1); here optimizer steps. Converted."
        ),
        "optim": _automatic("AdamW, fused; other optimizers are not here."),
        "optim_args": _missing("AdamW as torch has it."),
        "optim_target_modules": _missing("AdamW on all trained weights."),
        "weight_decay": _changed("weight_decay", "TRL spares biases and norms; here all trained weights decay."),
        "adam_beta1": _missing("Fixed at 0.9, TRL's default."),
        "adam_beta2": _missing("Fixed at 0.999, TRL's default."),
        "adam_epsilon": _missing("Fixed at 1e-8, TRL's default."),
        "max_grad_norm": _changed(
            "max_grad_norm",
            "TRL's PPO never clips; here the norm is held, by default at 1.0. 1e9 turns that off, and so does TRL's 0.",
        ),
        "average_tokens_across_devices": _inert(_TRAINER),
        "label_smoothing_factor": _inert(_TRAINER),
        "neftune_noise_alpha": _inert(_TRAINER),
        "auto_find_batch_size": _inert(_TRAINER),
        # Precision, memory, speed
        "bf16": _changed(
            "precision",
            "TRL's PPO makes its Accelerator without it: mixed precision comes from `accelerate launch` alone. Given "
            "as true: `precision: bf16`; false: `precision: fp32`; not given: auto.",
        ),
        "fp16": _missing("No float16: bf16 needs no loss scaling.", "precision"),
        "bf16_full_eval": _inert(_TRAINER),
        "fp16_full_eval": _inert(_TRAINER),
        "tf32": _missing("Set `torch.backends.cuda.matmul.fp32_precision` before training."),
        "activation_checkpointing": _inert(_CHECKPOINTING, "gradient_checkpointing"),
        "activation_checkpointing_kwargs": _inert(_CHECKPOINTING),
        "gradient_checkpointing": _inert(_CHECKPOINTING, "gradient_checkpointing"),
        "gradient_checkpointing_kwargs": _inert(_CHECKPOINTING),
        "torch_compile": _inert(_TRAINER, "generation"),
        "torch_compile_backend": _inert(_TRAINER),
        "torch_compile_mode": _inert(_TRAINER),
        "use_liger_kernel": _inert(_TRAINER + " The output layer is fused with its softmax here, always."),
        "liger_kernel_config": _inert(_TRAINER),
        "use_cache": _inert(_TRAINER),
        "torch_empty_cache_steps": _inert(_TRAINER),
        "use_cpu": _changed("device", "`device: cpu`."),
        "full_determinism": _inert("One seed, one machine, one result: always."),
        "seed": _same("seed", "The draws differ between the two projects."),
        "data_seed": _inert(_LOADER),
        # Evaluation, logs, checkpoints
        "eval_strategy": _changed(
            "eval_size eval_dataset",
            'TRL\'s PPO never evaluates; ppo_tldr.py loads the test split for printed samples unless this is "no". '
            '"no" becomes `eval_size: 0`; otherwise rows are set aside.',
        ),
        "eval_steps": _changed(
            "eval_every", "Rollouts, there as here; TRL's PPO ignores it. A share below 1 is converted."
        ),
        "eval_delay": _inert(_TRAINER),
        "eval_on_start": _inert("Evaluations run before and after training, always."),
        "per_device_eval_batch_size": _automatic("Evaluation uses `rollout_batch_size` and keeps a short last batch."),
        "eval_do_concat_batches": _inert(_TRAINER),
        "eval_use_gather_object": _inert(_TRAINER),
        "eval_accumulation_steps": _inert(_TRAINER),
        "prediction_loss_only": _inert(_TRAINER),
        "include_for_metrics": _inert(_TRAINER),
        "batch_eval_metrics": _inert(_TRAINER),
        "load_best_model_at_end": _inert(_TRAINER),
        "metric_for_best_model": _inert(_TRAINER),
        "greater_is_better": _inert(_TRAINER),
        "logging_strategy": _automatic(_EVERY_ROLLOUT),
        "logging_steps": _automatic(_EVERY_ROLLOUT),
        "logging_first_step": _automatic(_EVERY_ROLLOUT),
        "logging_nan_inf_filter": _inert(_TRAINER),
        "log_on_each_node": _automatic("One process."),
        "log_level": _inert(_TRAINER),
        "log_level_replica": _inert(_TRAINER),
        "include_num_input_tokens_seen": _inert("TRL's PPO never counts them.", ""),
        "disable_tqdm": _same("quiet"),
        "report_to": _changed("report_to", "tensorboard, wandb and trackio; other trackers are not here."),
        "run_name": _missing(_TRACKERS),
        "project": _missing(_TRACKERS),
        "trackio_space_id": _missing(_TRACKERS),
        "trackio_bucket_id": _missing(_TRACKERS),
        "trackio_static_space_id": _missing(_TRACKERS),
        "save_strategy": _changed("save_every", '"no" (and "epoch", which never comes in TRL\'s PPO): 0.'),
        "save_steps": _changed("save_every", "Rollouts, there as here; a share below 1 is converted."),
        "save_total_limit": _same("save_total_limit"),
        "save_only_model": _automatic("Checkpoints are always complete, critic and optimizer included."),
        "save_on_each_node": _automatic("One process."),
        "enable_jit_checkpoint": _inert(_TRAINER),
        "resume_from_checkpoint": _changed(
            "resume_from_checkpoint",
            "TRL's PPO cannot resume. Its checkpoints are no checkpoints here (the critic is not in them): give the "
            "folder as `model` to go on from its policy.",
        ),
        "ignore_data_skip": _inert(_TRAINER),
        "restore_callback_states_from_checkpoint": _inert(_TRAINER),
        "push_to_hub": _missing(_HUB),
        "hub_model_id": _missing(_HUB),
        "hub_token": _missing(_HUB + " The token is the one that `hf auth login` stored."),
        "hub_private_repo": _missing(_HUB),
        "hub_strategy": _missing(_HUB),
        "hub_always_push": _missing(_HUB),
        "hub_revision": _missing(_HUB),
        # Data loading, processes, scripts
        "dataloader_drop_last": _inert("TRL's PPO always drops the last batch. Here data sets cycle row by row."),
        "dataloader_num_workers": _inert(_LOADER),
        "dataloader_pin_memory": _inert(_LOADER),
        "dataloader_persistent_workers": _inert(_LOADER),
        "dataloader_prefetch_factor": _inert(_LOADER),
        "dataloader_multiprocessing_context": _inert(_LOADER),
        "dataloader_in_order": _inert(_LOADER),
        "remove_unused_columns": _inert("The scripts keep token ids alone; here the other columns reach the rewards."),
        "label_names": _inert(_TRAINER),
        "train_sampling_strategy": _inert(_LOADER),
        "length_column_name": _inert(_LOADER),
        "accelerator_config": _inert("TRL's PPO makes its Accelerator without it."),
        "parallelism_config": _inert("TRL's PPO makes its Accelerator without it."),
        "ddp_backend": _missing(_ONE_PROCESS),
        "ddp_timeout": _missing(_ONE_PROCESS),
        "ddp_find_unused_parameters": _inert("TRL's PPO makes its Accelerator without it."),
        "ddp_bucket_cap_mb": _inert("TRL's PPO makes its Accelerator without it."),
        "ddp_broadcast_buffers": _inert("TRL's PPO makes its Accelerator without it."),
        "ddp_static_graph": _inert("TRL's PPO makes its Accelerator without it."),
        "fsdp": _missing(_ONE_PROCESS),
        "fsdp_config": _missing(_ONE_PROCESS),
        "deepspeed": _missing(_ONE_PROCESS),
        "local_rank": _missing(_ONE_PROCESS),
        "debug": _inert(_TRAINER),
        "skip_memory_metrics": _inert(_TRAINER),
        "do_train": _inert("Not read by TRL's PPO scripts."),
        "do_eval": _inert("Not read by TRL's PPO scripts."),
        "do_predict": _inert("Not read by TRL's PPO scripts."),
    },
}

ROWS: dict[str, Row] = {name: row for rows in FIELDS.values() for name, row in rows.items()}
"""The same rows by field name alone: TRL's parser takes the three classes as one list of flags."""


def known_fields() -> dict[str, dict[str, Any]]:
    """``{field: {"kinds": [...], "default": ..., "choices": [...]}}`` of all three classes."""
    classes = json.loads(KNOWN.read_text(encoding="utf-8"))
    return {name: facts for cls in FIELDS for name, facts in classes[cls].items()}


HEADING = "## Every field\n"


def field_tables() -> str:
    """The part of docs/migrating-from-trl.md below its guide, made from the table."""
    facts = known_fields()
    text = f"{HEADING}\n" + "\n".join(f"- **{fate}**: {meaning}." for fate, meaning in FATES.items()) + "\n"
    for cls, rows in FIELDS.items():
        text += f"\n### {cls}\n\n| TRL | its default | ours | | note |\n|---|---|---|---|---|\n"
        for name, row in rows.items():
            ours = " ".join(f"`{setting}`" for setting in row.ours)
            text += f"| `{name}` | `{json.dumps(facts[name]['default'])}` | {ours} | {row.fate} | {row.note} |\n"
    return text


if __name__ == "__main__":  # python -m rlhf_ppo.trl.fields docs/migrating-from-trl.md
    page = Path(sys.argv[1])
    guide = page.read_text(encoding="utf-8").partition(HEADING)[0]
    page.write_text(guide + field_tables(), encoding="utf-8")
