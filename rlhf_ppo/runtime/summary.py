"""The start of a run in a few lines: what is trained, on what, in which precision, and for how long."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rlhf_ppo.runtime import torch_environment
from rlhf_ppo.runtime.threads import usable_cpus


def model_rows(name: str, model: nn.Module, *, device: torch.device, bf16: bool) -> dict[str, str]:
    """The rows on a model that is about to be trained: its parameters, its device, its number format."""
    parameters = list(model.parameters())  # shared ones once
    total = sum(map(_size, parameters))
    trained = sum(_size(p) for p in parameters if p.requires_grad)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = f"{torch.get_num_threads()} on {usable_cpus()} CPUs"
    if torch_environment.THREADS_SPIN and torch.get_num_threads() > 1:
        threads += "; they spin while they wait: import rlhf_ppo before torch, or set OMP_WAIT_POLICY=PASSIVE"
    return {
        "model": name,
        "trained": f"{_count(trained)} of {_count(total)} parameters ({100 * trained / total:.3g} %)",
        "device": f"{device} {on}".strip(),
        "precision": "bf16 products, fp32 weights" if bf16 else "fp32",
        "threads": threads,
    }


def print_summary(rows: Mapping[str, str], *, quiet: bool = False) -> None:
    """Write the rows to standard error, which is where the progress goes, too."""
    if quiet:
        return
    console = Console(file=sys.stderr)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(Text(name, style="bold"), Text(text))  # as it is: a name may hold [/x]
        console.print(table)
        return
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}", file=sys.stderr, flush=True)


def _size(parameter: nn.Parameter) -> int:
    # bitsandbytes keeps two 4-bit numbers in a byte.
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
