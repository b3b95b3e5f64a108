"""Choose how weights are spread over processes where the settings leave it open, by what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rlhf_ppo.models.costs.memory import fits, peaks, usable
from rlhf_ppo.models.costs.setup import Setup


def choose_sharding(setup: Setup, sharding: Literal["auto", "none", "full", "hybrid"]) -> Setup:
    """Return the setup with its sharding decided: "auto" is none where that fits, else full.

    A quantised base is never sharded. Weights are gathered whole for decoding where that fits, else layer by layer.
    """
    if setup.processes == 1 or setup.args.quantization != "none":
        return setup
    if sharding == "auto":
        sharding = "none" if fits(setup) else "full"
    whole = replace(setup, sharding=sharding)
    decodes = peaks(whole)["generate"] <= usable(whole)
    return whole if sharding == "none" or decodes else replace(whole, gathers_whole=False)
