"""Choose how weights are spread over processes where the settings leave it open, by what fits."""

from __future__ import annotations

from dataclasses import replace

from rlhf_ppo.models.costs.memory import fits, peaks, usable
from rlhf_ppo.models.costs.setup import Setup


def choose_sharding(setup: Setup) -> Setup:
    """Return the setup with what its settings leave open about sharding decided, by the peaks of all phases.

    ``sharding="auto"`` is none where that fits, else full; ``sharded_decoding="auto"`` is whole where that fits, else
    layers. A quantised base is never sharded.
    """
    alone = replace(setup, sharding="none", gathers_whole=True)
    sharding, decoding = setup.args.sharding, setup.args.sharded_decoding
    if setup.processes == 1 or setup.args.quantization != "none":
        return alone
    if sharding == "auto":
        sharding = "none" if fits(alone) else "full"
    whole = replace(alone, sharding=sharding)
    if sharding == "none" or decoding == "whole":
        return whole
    decodes = decoding == "auto" and peaks(whole)["generate"] <= usable(whole)
    return whole if decodes else replace(whole, gathers_whole=False)
