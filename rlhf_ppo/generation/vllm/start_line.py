"""The line that starts a vLLM server which a run can use."""

from __future__ import annotations

import shlex

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be (config/lora.py of vLLM 0.32.0)."""


def start_line(model: str | None, *, lora_rank: int | None, bf16: bool) -> str:
    """Return the shell command that starts a server for a policy.

    Args:
        model: folder or hub id that the server loads; None: there is none yet.
        lora_rank: of the policy's adapter; None: all weights are trained.
        bf16: the run computes in bfloat16.
    """
    flags = [
        *("--host", "127.0.0.1", "--port", "8000"),  # what follows lets anyone who reaches it change its weights
        *("--dtype", "bfloat16" if bf16 else "float32"),
        # A model's own generation config would set top_p and the like where a request does not.
        *("--generation-config", "vllm"),
        # Of the distribution that is sampled from: at the run's temperature.
        *("--logprobs-mode", "processed_logprobs"),
    ]
    variable = "VLLM_SERVER_DEV_MODE=1"  # without it there is no request that replaces the weights
    if lora_rank is not None:
        variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        rank = next((size for size in _RANKS if size >= lora_rank), lora_rank)
        # The next adapter is loaded while the last one is still there.
        flags += ["--enable-lora", "--max-lora-rank", str(rank), "--max-cpu-loras", "2"]
    return f"{variable} vllm serve {shlex.quote(model) if model else 'FOLDER'} {' '.join(flags)}"
