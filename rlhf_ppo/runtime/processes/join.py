"""Join: meet the other processes that a launcher has started, and watch each other from then on."""

from __future__ import annotations

import datetime
import json
import os
import socket
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.processes.agreement import package_versions, require_same, require_same_settings
from rlhf_ppo.runtime.processes.errors import RaisedElsewhereError
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.runtime.processes.launch import Launch, read_launch, refuse_silent_launcher
from rlhf_ppo.runtime.processes.lines import Address
from rlhf_ppo.runtime.processes.voice import share_voice
from rlhf_ppo.runtime.processes.watch import Watch

TIMEOUT_S = 1800.0

_joined: ProcessGroup | None = None


def join_processes(*, timeout_s: float | None = None) -> ProcessGroup:
    """Join the processes that torchrun or accelerate started, once in a process; without a launcher, be alone.

    Args:
        timeout_s: how long a process waits for another, in seconds, at an exchange, and here; None: 1800, or what an
            earlier call has set.
    Raises:
        ValueError: the environment announces processes that cannot be found, or accelerate has left them out.
        RunError: a process did not come; names it.
    """
    global _joined
    launch = read_launch()
    if launch.size == 1:
        refuse_silent_launcher()
        return ALONE
    if _joined is None:
        limit = TIMEOUT_S if timeout_s is None else timeout_s
        timeout = datetime.timedelta(seconds=limit)
        joined = dist.is_initialized()  # a script may have joined them already, itself or by accelerate
        # Of such groups torch tells the store under this name alone.
        store = dist.distributed_c10d._get_default_store() if joined else _meet(launch, timeout)
        watch = Watch(launch.rank, launch.size)
        watch.start(partial(_tell, store), local=launch.local_size == launch.size)
        share_voice(watch)
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
        if not joined:
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, timeout=timeout, store=store, rank=launch.rank, world_size=launch.size)
        records: Any = dist.new_group(backend="gloo", timeout=timeout)
        group = ProcessGroup(launch.rank, launch.size, records, watch)
        Finalize(None, leave_processes, exitpriority=0)  # at the end of this process, also of one of multiprocessing
        _joined = group
        _joined.set_timeout(limit)
        require_same(group, "install the same versions everywhere", package_versions())
    elif timeout_s is not None:
        _joined.set_timeout(timeout_s)
    return _joined


def join_for(args: Any) -> ProcessGroup:
    """Join the other processes of a command, which must have the same settings; one of them is how long to wait."""
    processes = join_processes(timeout_s=args.process_timeout_s)
    require_same_settings(processes, args)
    return processes


def leave_processes() -> None:
    """Tell the others that this process ends without an error; does nothing if it is alone."""
    if _joined is not None and _joined.watch is not None:
        _joined.watch.leave()


def _tell(store: Store, own: Address | None) -> Address:
    """Give the others the first process's address, or wait for it."""
    if own is not None:
        store.set("rlhf_ppo/watch", json.dumps(own))
    return Address(*json.loads(store.get("rlhf_ppo/watch")))


def _meet(launch: Launch, timeout: datetime.timedelta) -> Store:
    """Make the store by which the processes find each other, as torch would, and wait there for all of them.

    Raises:
        RunError: a process has not come; names it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself keeps the store
    limit = f"within process_timeout_s={timeout.total_seconds():g}"
    try:
        store = TCPStore(
            host,
            port,
            is_master=launch.rank == 0 and not agents,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        raise RunError(
            f"process {launch.rank} of {launch.size} on {socket.gethostname()} could not find the first one at "
            f"{host}:{port} {limit} ({str(error).splitlines()[0]}): start it, with the same MASTER_ADDR and MASTER_PORT"
        ) from None
    # torchrun keeps one store over restarts: what earlier processes have left there is not ours.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"rlhf_ppo/{restart}/{launch.size}", store)
    keys = [f"came/{rank}" for rank in range(launch.size)]
    store.set(keys[launch.rank], socket.gethostname())
    try:
        store.wait(keys, timeout)
    except (dist.DistError, RuntimeError):
        came = [rank for rank, key in enumerate(keys) if store.check([key])]
        missing = [str(rank) for rank in range(launch.size) if rank not in came]
        error = RunError(
            f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {launch.size} did not come to {host}:{port} "
            f"{limit}: start one for each number, with the same MASTER_ADDR and MASTER_PORT"
        )
        raise error from (None if launch.rank == came[0] else RaisedElsewhereError("the first that came says it"))
    return store
