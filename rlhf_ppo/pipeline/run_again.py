"""Make the trainer of a `train` run again from its folder, with the run's newest policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.config.engine import in_process
from rlhf_ppo.config.rlhf import restore_settings
from rlhf_ppo.models.compare import OBJECT
from rlhf_ppo.pipeline.evaluation.evaluation_settings import find_reference
from rlhf_ppo.pipeline.train import load_prompts, make_trainer
from rlhf_ppo.runtime.checkpoints.resume import newest_good
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, read_run
from rlhf_ppo.trainer import PPOTrainer


def trainer_of(folder: Path, scratch: str, *, model: str | None, device: str | None) -> tuple[PPOTrainer, Path]:
    """Make the trainer of a `train` run again, with its newest policy; returns it and where that is from.

    Raises:
        ValueError: run.json does not name the run's model, data and rewards.
    """
    run = read_run(folder)
    missing = [name for name in ("model", "dataset", "reward") if not run.get(name) or run[name] == OBJECT]
    if missing:
        raise ValueError(
            f"{folder}/run.json does not name the run's {' and '.join(missing)}, without which nothing can be sampled "
            "anew: it is no run of `train`, or one from Python (there: trainer.explain(trainer.rollout(prompts)), or "
            "save_rollouts=True)"
        )
    changes: dict[str, Any] = {
        "output_dir": scratch,
        "device": device,
        "preset": None,
        "quiet": True,
        "report_to": (),
        "resume_from_checkpoint": None,
        "resume_override": False,
        "replay": None,
        "save_rollouts": False,
        "save_rollouts_gb": 1.0,
        **in_process(run),
        **({} if model is None else {"model": model}),
    }
    checkpoint = newest_good(folder)
    if checkpoint is None:
        changes |= _saved_model(folder, run)
    args = restore_settings(run, TrainArgs, **changes)
    trainer = make_trainer(args, *load_prompts(args))
    if checkpoint is None:
        return trainer, folder
    trainer.load_checkpoint(checkpoint.folder, override=True)
    return trainer, checkpoint.folder


def _saved_model(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which a run starts from what another one has saved at its end.

    Raises:
        ValueError: it has saved nothing, or a critic that needs the run's adapters.
    """
    if not is_model(folder):
        raise ValueError(f"{folder} holds neither a checkpoint nor a saved model to sample from: set save_every")
    if (folder / "value").is_dir():
        raise ValueError(
            f"the critic in {folder} is an adapter, which only a checkpoint can be sampled with: set save_every"
        )
    trunk = folder / "critic"
    lines = [line for line in RunDirectory(folder).read() if "kl/coef" in line]
    return {
        "model": str(folder),
        "ref_model": find_reference(str(folder), run),
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_target_modules"), None),
        "merge_adapter": False,
        "quantization": "none",
        "kl_coef": lines[-1]["kl/coef"] if lines else run["kl_coef"],
        **({"value_head_from": str(folder)} if any(folder.glob("value_head*")) else {}),
        **({"value_model": str(trunk)} if trunk.is_dir() else {}),
    }


def is_model(folder: Path) -> bool:
    """Return whether a run has saved its model in its folder."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
