"""What the core's tests share: repeatable seeds, small hypothesis profiles, and one parameter for the device."""

import os

import pytest
import torch
from hypothesis import settings

from rlhf_ppo.core.kernels import vocabulary_blocks as vocabulary

# Derandomised: the same examples everywhere, so a red run can be repeated.
settings.register_profile("core", max_examples=50, deadline=None, derandomize=True, database=None)
settings.register_profile("mutation", parent=settings.get_profile("core"), max_examples=8)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "core"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="class", params=[vocabulary.BLOCK_WORDS, 2], ids=["one block", "blocks of 2 words"])
def block_words(request):
    """The size of a block of the vocabulary: all of it at once here, or many blocks with a short last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "BLOCK_WORDS", request.param)
        patch.setattr(vocabulary, "BLOCK_LOGITS", 0)
        yield
