"""Transfers: what arrives is what was sent, and a reading waits for no work behind it."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.runtime.machine.transfers import Reading, indices_on


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_arrives_is_what_was_sent(device):
    x = torch.arange(6.0, device=device).view(2, 3)
    rows = indices_on(x.device, [1, 0, 1])
    assert rows.device == x.device and rows.dtype == torch.long and rows.tolist() == [1, 0, 1]
    reading = Reading(x[rows].requires_grad_())
    assert reading.wait().tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5]] and not reading.wait().requires_grad
    assert indices_on(x.device, []).dtype == torch.long


@pytest.mark.cuda
def test_a_reading_waits_for_no_work_behind_it():
    number = torch.zeros(1, device="cuda")
    torch.cuda._sleep(1_000)  # the first call loads its kernel
    torch.cuda.synchronize()
    for _ in range(3):
        number += 1
        reading, queued = Reading(number), torch.cuda.Event()
        torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
        number += 1
        queued.record()
        assert not queued.query() and int(reading.wait()) % 2 == 1 and not queued.query()
        torch.cuda.synchronize()
