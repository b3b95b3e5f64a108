"""Launch: how many processes torchrun or accelerate started, and which of them this is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

SIZE, RANK = "WORLD_SIZE", "RANK"
"""torchrun and accelerate set them: how many processes they start, and the number of each."""


class Launch(NamedTuple):
    """What the launcher said."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine."""
    local_size: int = 1
    """Processes on this machine."""


def read_launch() -> Launch:
    """Read the launcher's environment variables; without them this is the only process.

    Raises:
        ValueError: they announce several processes, but not how to find the others.
    """
    size = _number(SIZE, 1)
    if size == 1:
        return Launch()
    if missing := [name for name in (RANK, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"{SIZE}={size} in the environment announces {size} processes, but not how to find them: "
            f"{', '.join(missing)} is not set. Start them by torchrun or accelerate launch, or unset {SIZE}"
        )
    rank = _number(RANK, 0)
    return Launch(rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size))


def is_launched_after_the_first() -> bool:
    """Whether a launcher started this process after the first one."""
    return os.environ.get(SIZE, "1").strip() not in ("", "1") and os.environ.get(RANK, "0").strip() != "0"


def refuse_silent_launcher() -> None:
    """Raise a ValueError if accelerate was asked for several processes and has started one, as it does on CPU.

    It then sets the variables by which they would find each other, but not their number.
    """
    if SIZE in os.environ or "ACCELERATE_USE_CPU" not in os.environ or "MASTER_ADDR" not in os.environ:
        return
    count = _asked_of_launcher()
    if count == 1:
        return  # somebody else set MASTER_ADDR
    raise ValueError(
        f"accelerate launch was asked for {count or 'several'} processes but has started one, as it does on CPU "
        f"without a word: use torchrun --nproc-per-node {count or 'N'} -m rlhf_ppo ... (or a script instead of -m), "
        "or --num_processes 1"
    )


def _asked_of_launcher() -> int | None:
    """Return the number of processes in the command line of this process's parent; None if it names none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return None
    named = [word.replace("_", "-").partition("=") for word in words]
    for (flag, _, value), following in zip(named, [*words[1:], ""], strict=True):
        if flag == "--num-processes" and (value or following).isdecimal():
            return int(value or following)
    return None


def require_one_process(what: str, why: str) -> None:
    """Raise a ValueError if a launcher has started several processes for ``what``, which ``why`` says runs in one."""
    if (size := _number(SIZE, 1)) > 1:
        raise ValueError(
            f"{SIZE}={size} in the environment announces {size} processes, but {what} runs in one: {why}. Start it "
            f"without torchrun or accelerate launch (or unset {SIZE})"
        )


def own_gpu(device: torch.device) -> torch.device:
    """Return the device, which must be this process's alone if it is a GPU.

    Raises:
        ValueError: this machine runs more processes than it has GPUs.
    """
    import torch

    launch = read_launch()
    if device.type == "cuda" and launch.local_size > torch.cuda.device_count():
        raise ValueError(
            f"{launch.local_size} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: "
            f"start one for each GPU (--nproc-per-node {torch.cuda.device_count()}), or set device='cpu'"
        )
    return device


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, str(default)).strip()
    if not given.isdecimal() or (name == SIZE and int(given) < 1):
        raise ValueError(f"{name}={given!r} in the environment is no number of processes: unset it")
    return int(given)
