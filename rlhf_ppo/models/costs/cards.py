"""Cards: what GPUs and this machine's CPU can do, by their makers' specifications, and the share that runs reach."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace

import torch

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Card:
    """A device; rates are the specification's, dense, without sparsity."""

    name: str
    memory: float
    """Bytes."""
    bf16: float
    """Multiplications and additions per second of bfloat16 matrix products, summed in float32."""
    fp32: float
    """The same of float32 matrix products, as torch computes them by default (without TF32)."""
    bandwidth: float
    """Bytes per second that the memory gives."""
    link: float
    """Bytes per second that a device sends to others of its node, in one direction."""
    source: str
    matmul_share: float = 0.45
    """Share of the peak that forward and backward passes reach. An assumption on GPUs."""
    bandwidth_share: float = 0.7
    """Share of the bandwidth that decoding and the optimizer reach. An assumption on GPUs."""
    link_share: float = 0.75
    """Share of a link that collectives reach. An assumption."""
    usable: float = 0.92
    """Share of the memory that is left beside the driver, communication buffers and fragmentation. An assumption."""
    launch: float = 6e-6
    """Seconds for which the host is busy with one operator, an assumption; decoding with CUDA graphs has none."""
    overhead: float = 0.0
    """Bytes that a process takes beside its tensors and what it had imported; on GPUs part of what is not usable."""


CARDS = {
    card.name: card
    for card in (
        Card("A100-40", 40 * GB, 312 * TERA, 19.5 * TERA, 1555 * GB, 300 * GB, "NVIDIA A100 datasheet, SXM4 40 GB"),
        Card("A100-80", 80 * GB, 312 * TERA, 19.5 * TERA, 2039 * GB, 300 * GB, "NVIDIA A100 datasheet, SXM4 80 GB"),
        Card("H100", 80 * GB, 989 * TERA, 67 * TERA, 3350 * GB, 450 * GB, "NVIDIA H100 datasheet, SXM5"),
        Card("H200", 141 * GB, 989 * TERA, 67 * TERA, 4800 * GB, 450 * GB, "NVIDIA H200 datasheet, SXM"),
        Card("L40S", 48 * GB, 362 * TERA, 91.6 * TERA, 864 * GB, 32 * GB, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
        Card("RTX4090", 24 * GB, 165.2 * TERA, 82.6 * TERA, 1008 * GB, 32 * GB, "NVIDIA Ada whitepaper; PCIe 4.0 x16"),
        Card("RTX3090", 24 * GB, 71 * TERA, 35.6 * TERA, 936 * GB, 32 * GB, "NVIDIA GA102 whitepaper; PCIe 4.0 x16"),
    )
}
"""Name -> GPU."""

CPU = Card(
    "cpu",
    memory=0,
    bf16=0.24 * TERA,
    fp32=0.118 * TERA,
    bandwidth=20 * GB,
    link=2 * GB,
    source="measured on two AMD EPYC cores with AVX512-BF16, docs/performance.md; memory: this machine's",
    matmul_share=1.0,
    bandwidth_share=1.0,
    link_share=1.0,
    usable=0.9,
    launch=8e-5,
    overhead=0.11 * GB,
)
"""A CPU like the one that benchmarks ran on; its rates are measured ones, so all of them is reached."""


def own_card(device: torch.device) -> Card:
    """Return a card with the memory of this process's GPU, or of the machine; its rates say nothing."""
    if device.type != "cuda":
        return find_card("cpu")
    memory = torch.cuda.get_device_properties(device).total_memory
    return replace(CARDS["H100"], name="this GPU", memory=float(memory))


def find_card(name: str) -> Card:
    """Return a card by its name.

    Raises:
        ValueError: no such card; lists the known ones, and the closest.
    """
    if name == "cpu":
        return replace(CPU, memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    plain = {card.lower().replace("-", ""): card for card in (*CARDS, "cpu")}
    asked = name.lower().replace("-", "").replace(" ", "").replace("nvidia", "").replace("gb", "")
    if plain.get(asked) in CARDS:
        return CARDS[plain[asked]]
    close = difflib.get_close_matches(asked, plain, n=1, cutoff=0.5)
    meant = f" (did you mean {plain[close[0]]!r}?)" if close else ""
    raise ValueError(f"unknown card {name!r}{meant}; known: {', '.join(plain.values())}")
