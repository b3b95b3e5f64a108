"""Train on labelled data: what sft and reward share, from the optimizer and its steps to the saved folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_scheduler

from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.adapters.quantization import round_weights
from rlhf_ppo.models.compare import probe_logits, require_saved
from rlhf_ppo.models.loading import saved_bytes
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.files import save_or_rescue
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.runtime.logs.progress import ProgressDisplay, model_rows, print_summary
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.logs.trackers import reporting
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.package import versions
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.gradients import sum_over_processes
from rlhf_ppo.training.stability import nonfinite_parameters

SupervisedArgs = SFTArgs | RewardTrainingArgs


def make_optimizer(parameters: Iterable[Any], args: SupervisedArgs, steps: int) -> tuple[AdamW, LRScheduler]:
    """Make a fused AdamW over parameters or parameter groups, and its schedule: linear warm-up, then cosine to zero."""
    optimizer = AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    return optimizer, get_scheduler("cosine", optimizer, _warmup_steps(args, steps), steps)


def _warmup_steps(args: SupervisedArgs, steps: int) -> int:
    """Return the warm-up; one that is longer than the run is shortened to a tenth of the run, which is printed.

    Otherwise the whole run would be spent at a small share of its learning rate.
    """
    given, short = args.warmup_steps, steps // 10
    if given <= steps:
        return given
    if not args.quiet:
        print(f"warmup_steps={given} is more than the run's {steps} optimizer steps: shortened to {short}")
    return short


def take_step(
    model: nn.Module,
    compute_losses: Callable[[], dict[str, Tensor]],
    optimizer: AdamW,
    scheduler: LRScheduler,
    *,
    processes: ProcessGroup,
    max_grad_norm: float,
    where: str,
    bf16: bool = False,
) -> dict[str, float]:
    """Backpropagate a loss, clip the gradient's norm, and take the optimizer step.

    Args:
        model: it is trained in place.
        compute_losses: computes this process's part of the ``loss`` [], without gradients where it has no row of the
            batch, and its part of other numbers [].
        optimizer, scheduler: of :func:`make_optimizer`.
        processes: those that have the other parts.
        max_grad_norm: largest norm of the whole gradient.
        where: names the step in messages.
        bf16: compute in bfloat16.
    Returns:
        The loss and the other numbers of the whole batch.
    Raises:
        NonFiniteGradientError: the loss or its gradient is non-finite, so the step is not taken; says ``where``.
    """
    with computing(model, bf16=bf16):
        losses = compute_losses()
        if losses["loss"].requires_grad:
            losses["loss"].backward()
    parts = {name: x.detach() for name, x in losses.items()}
    totals = {n: float(x) for n, x in sum_over_processes(processes, model, MetricAverage(), parts)[1].items()}
    norm, value = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)), totals["loss"]
    if not math.isfinite(value + norm):
        remedy = "lower learning_rate" + (", or set precision to fp32" if bf16 else "")
        raise NonFiniteGradientError(
            f"{where}: the loss is {value:.3g} and its gradient's norm {norm:.3g}, so nothing was saved; {remedy}"
        )
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return totals


@contextmanager
def supervised_run(
    model: nn.Module,
    args: SupervisedArgs,
    rows: dict[str, str],
    total: int,
    *,
    run: RunDirectory,
    processes: ProcessGroup,
    unit: str,
    bf16: bool = False,
) -> Iterator[ProgressDisplay]:
    """Run with the threads of ``args`` and draws of this process's own: print the summary, then show progress.

    The run's folder is started, and what is logged in it goes to trackers, too.

    Args:
        model: it is trained on the device where its parameters are.
        args: settings.
        rows: the summary's rows on data and run.
        total: the progress at the end, in ``unit``.
        run: its folder.
        processes: those that share the work.
        unit: what the progress counts, such as pairs.
        bf16: whether matrix products are in bf16.
    """
    name = str(args.model or getattr(args, "architecture", None))
    device = next(model.parameters()).device
    if not processes.first:
        seed_everything(args.seed + processes.rank)  # other rows need other dropout masks
    if not processes.alone:
        rows = {"processes": f"{processes.size}, each with all weights", **rows}
    settings = dataclasses.asdict(args)
    run.start({**settings, "versions": versions("torch", "transformers", "peft")})
    with (
        torch_threads(args.num_threads, model),
        reporting(run, args.report_to, project="rlhf-ppo", settings=settings),
    ):
        about_model = model_rows(name, model, device=device, bf16=bf16)
        print_summary({**about_model, **rows, "folder": args.output_dir}, quiet=args.quiet)
        with ProgressDisplay(unit, total, each="step", quiet=args.quiet) as progress:
            progress.phase("update")
            yield progress


def round_trained(model: nn.Module, save_dtype: str, where: str) -> None:
    """Round the trained weights to the number format in which they are saved; a frozen base stays as it was loaded.

    Raises:
        NonFiniteGradientError: a weight is non-finite in it; says which.
    """
    round_weights([p for p in model.parameters() if p.requires_grad], getattr(torch, save_dtype))
    if broken := nonfinite_parameters(model):
        raise NonFiniteGradientError(
            f"{where} {broken[0]} is non-finite in {save_dtype}, so nothing was saved; lower learning_rate"
        )


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    load: Callable[[str], nn.Module],
    processes: ProcessGroup,
) -> None:
    """Save model and tokenizer, then load the folder again and compare; the first process does both.

    Raises:
        OSError: they could not be written to ``folder``; says where they are instead.
        SavedModelError: the folder holds another model than the one that was trained.
    """
    adapted = hasattr(model, "peft_config")

    def write(new: Path) -> None:
        model.save_pretrained(new)
        if adapted:
            model.config.save_pretrained(new)  # names what the adapter lacks, such as the number of labels
        tokenizer.save_pretrained(new)

    def save() -> None:
        save_or_rescue(folder, write, needed=saved_bytes(model, adapted=adapted))
        require_saved(folder, probe_logits(model.float()), load)

    processes.on_first(save)
