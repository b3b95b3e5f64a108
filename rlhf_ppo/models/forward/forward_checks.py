"""Check at set-up, on a few tokens, that forward, decode and backward passes of the run give a plain pass's numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_ppo.models.acceleration.activation_memory import checkpoint_layers
from rlhf_ppo.models.acceleration.named_kernels import is_flash
from rlhf_ppo.models.acceleration.working_copy import computing, held_in_bf16
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.hidden_states import accepts, capture_states, without_adapter_wrapper
from rlhf_ppo.models.forward.runner import ModelRunner, Sequences, position_ids
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.sharding import gathered, is_share

_LONG, _SHORT = 8, 3
"""Tokens of the two rows, so that the short one has five tokens of left padding; the long one may be longer."""

_EXACT, _ROUNDED = 1e-4, 0.05
"""Tolerance in float32, and in formats of 16, 8 or 4 bits, as a share of the spread of the log-probs."""

_WINDOWS = "window_size", "sliding_window", "local_attention", "chunk_size", "chunk_length", "index_topk", "block_size"
"""Words in the names of config entries that set the length of an attention window or chunk."""

_DEFAULT_LONGEST = 1024
"""Longest sequence assumed where the run's is unknown."""

_SMALL = 2**16
"""Largest size of a weight whose gradient is compared."""


class Rows(NamedTuple):
    """Two rows of token ids: [1, L] and [1, 3]."""

    long: Tensor
    short: Tensor

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return both rows [2, L] with their mask, the short one left-padded."""
        mask = torch.ones(2, self.long.shape[1], dtype=torch.bool, device=self.long.device)
        mask[1, :-_SHORT] = False
        return torch.cat([self.long, torch.cat([self.long[:, :-_SHORT], self.short], dim=1)]), mask


class RowOutputs(NamedTuple):
    """Outputs at the last three tokens of both rows: log-probs [3, V] of the next token, or states [3, O]."""

    long: Tensor
    short: Tensor


@torch.no_grad()
def check_forward(
    model: ActorCritic,
    reference: Reference | None = None,
    *,
    longest: int | None = None,
    bf16: bool = False,
    decodes: bool = True,
) -> None:
    """Choose for each model the fastest correct way to run it (see :class:`.ModelRunner`).

    Args:
        model: policy and critic, on their device.
        reference: its model is checked too, if it has its own.
        longest: maximum tokens of a sequence in the run; None: unknown. Attention windows and chunks shorter than this
            are checked beyond their length.
        bf16: the run computes in bfloat16.
        decodes: the policy samples.
    Raises:
        ValueError: no way gives the plain pass's numbers; names the model, its role and what differs.
    """
    longest = _DEFAULT_LONGEST if longest is None else longest
    with gathered(model):
        _choose_ways(model.runner, "model", longest, bf16=bf16, decodes=decodes)
        if model.value_runner is not None:
            _choose_ways(model.value_runner, "value_model", longest, bf16=bf16)
    if reference is not None and reference.model is None:
        reference.runner.copy_layout(model.runner)
    elif reference is not None:
        with reference.active():
            _choose_ways(reference.runner, "ref_model", longest, bf16=reference.bf16)


def check_backward(model: ActorCritic, *, bf16: bool, checkpoint: bool) -> None:
    """Check the backward pass on a few tokens and, if ``checkpoint``, switch gradient checkpointing on.

    Raises:
        ValueError: the backward pass fails, or checkpointing changes the gradient; names the model.
    """
    name = _name(model.runner, "model")
    before = _gradient(model, name, bf16=bf16)
    if not checkpoint:
        return
    checkpoint_layers(model)
    after = _gradient(model, f"gradient_checkpointing: {name}", bf16=bf16)
    gap, largest = float((before - after).abs().max()), float(before.abs().max())
    if not gap <= (_ROUNDED if bf16 else _EXACT) * largest:
        raise ValueError(
            f"gradient_checkpointing: {name}, whose gradient changes by {gap / largest:.2g} of its largest entry when "
            "layers are recomputed: leave it out"
        )


def _gradient(model: ActorCritic, name: str, *, bf16: bool) -> Tensor:
    """Compute the gradient of log-probs and values at the rows' tokens, of the small trained weights."""
    ids, mask = _rows(model.runner, _LONG).padded()
    sequences = ids[:, :-_SHORT], torch.ones_like(mask)[:, :-_SHORT], ids[:, -_SHORT:], mask[:, -_SHORT:]
    trained = sorted((p for p in model.policy_parameters() if not is_share(p)), key=lambda p: p.numel())
    trained = [p for p in trained if p.numel() <= _SMALL] or trained[:1]
    try:
        with computing(model, bf16=bf16):
            output = model(*sequences, entropy=False)
            (output.logprobs.sum() + (0.0 if output.values is None else output.values.sum())).backward()
        found = [p.grad for p in trained]  # not by autograd.grad: sharded layers need whole backward passes
        model.zero_grad()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{name}: the backward pass of the update fails ({why}): take another model") from error
    return torch.cat([x.flatten().float() for x in found if x is not None] or [torch.zeros(1)])


@torch.no_grad()
def require_decoder(model: nn.Module) -> None:
    """Raise a ValueError that names the model if its output at a token depends on later tokens (float32 models)."""
    runner = ModelRunner(model.eval(), plain=True)
    _plain(runner, _rows(runner, _LONG), _name(runner, "model"), _EXACT)


def _choose_ways(runner: ModelRunner, role: str, longest: int, *, bf16: bool, decodes: bool = False) -> None:
    name, base = _name(runner, role), without_adapter_wrapper(runner.model)
    full = all(p.dtype == torch.float32 for p in runner.model.parameters() if p.is_floating_point())
    exact = full and not getattr(base, "is_quantized", False)
    # Float32 shows a wrong way best; then the run's own format is checked.
    formats = [(False, _EXACT if exact else _ROUNDED)] + ([(True, _ROUNDED)] if bf16 else [])
    # Shares of layers are gathered in bfloat16 alone, frozen models are held in it, and kernels for GPUs have no other.
    low_alone = is_flash(base.config._attn_implementation) or held_in_bf16(runner.model)
    if bf16 and (low_alone or any(map(is_share, runner.model.parameters()))):
        formats = formats[1:]
    runner.packs &= bf16 or not full or next(runner.model.parameters()).device.type != "cuda"
    rows = _rows(runner, _length(base.config, longest))
    plain: dict[bool, RowOutputs] = {}
    for low, tolerance in formats:
        with computing(runner.model, bf16=low):
            plain[low] = _plain(runner, rows, name, tolerance)

    def first_correct(ways: Iterator[None], run: Callable[[ModelRunner, Rows], RowOutputs]) -> str | None:
        """Stop at the first correct way; if none is, return what is wrong with the last."""
        wrong = None
        for _ in ways:
            for low, tolerance in formats:
                with computing(runner.model, bf16=low):
                    wrong = _difference(run, runner, rows, plain[low], tolerance)
                if wrong is not None:
                    break
            if wrong is None:
                return None
        return wrong

    if (wrong := first_correct(_ways_to_evaluate(runner), _evaluate)) is not None:
        raise ValueError(
            f"{name}: a batch of sequences gives other numbers than each alone ({wrong}): take another model"
        )
    if not decodes:
        return
    if (wrong := first_correct(_ways_to_decode(runner), _decode)) is not None:
        raise ValueError(f"{name}: decoding gives other numbers than a full forward pass ({wrong}): take another model")
    if not runner.uses_cache:
        warnings.warn(
            f"{name}, which cannot decode from a cache here (left padding changes its numbers, or it has no usable "
            "cache): each step runs over all tokens again, which is correct but slow",
            stacklevel=4,
        )


def _name(runner: ModelRunner, role: str) -> str:
    base = without_adapter_wrapper(runner.model)
    return f"{role} is {base.config.model_type!r} ({type(base).__name__})"


def _length(config: PretrainedConfig, longest: int) -> int:
    """Return the length of the long row: eight, or more than the widest window or chunk that the run exceeds."""
    sizes = [
        value
        for name, value in vars(config.get_text_config()).items()
        if any(part in name for part in _WINDOWS) and isinstance(value, int) and value + _LONG <= longest
    ]
    return _LONG + max(sizes, default=0)


def _difference(
    run: Callable[[ModelRunner, Rows], RowOutputs], runner: ModelRunner, rows: Rows, plain: RowOutputs, tolerance: float
) -> str | None:
    """Return what is wrong with a way to run the model, or None."""
    try:
        found = run(runner, rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    gap = max(float(_gap(x, y[: len(x)])) for x, y in zip(found, plain, strict=True))
    unit = "nats" if runner.has_head else "in their states"
    return None if gap <= tolerance * float(_spread(plain.long)) else f"{gap:.2g} {unit} apart"


def _gap(x: Tensor, y: Tensor) -> Tensor:
    """Return the largest difference; tokens at -inf in both do not differ."""
    return torch.where(x == y, 0, (x - y).abs()).max()


def _spread(x: Tensor) -> Tensor:
    finite = x[torch.isfinite(x)]
    return finite.max() - finite.min()


def _plain(runner: ModelRunner, rows: Rows, name: str, tolerance: float) -> RowOutputs:
    """Run each row alone, from its ids only."""
    other = torch.cat([rows.long[:, :-_SHORT], rows.long[:, :_SHORT]], dim=1)
    two, alone = _alone(runner, torch.cat([rows.long, other])), _alone(runner, rows.short)[0]
    if torch.isnan(two).any():
        raise ValueError(f"{name}: its outputs are NaN: its weights are damaged or non-finite")
    before = two[:, :-_SHORT]
    if not _gap(before[0], before[1]) <= tolerance * _spread(two):
        raise ValueError(
            f"{name}: its output at a token depends on later tokens, so it is an encoder and cannot generate "
            "text: take a decoder-only causal language model (BERT-like models need is_decoder=true in their config)"
        )
    return RowOutputs(two[0, -_SHORT:], alone)


def _alone(runner: ModelRunner, ids: Tensor) -> Tensor:
    """Return log-probs [B, 6, V] or states [B, 6, O] at the last six tokens, or fewer if there are fewer."""
    kwargs: dict[str, Any] = {"use_cache": False} if accepts(runner.model, "use_cache") else {}
    with capture_states(runner.states_module) as captured:
        output = runner.model(input_ids=ids, **kwargs)
    if runner.has_head:
        return output.logits[:, -2 * _SHORT :].float().log_softmax(dim=-1)
    return captured[0][:, -2 * _SHORT :].float()


def _rows(runner: ModelRunner, length: int) -> Rows:
    ids = runner.probe_ids(length)
    return Rows(ids, ids[:, :_LONG].flip(1)[:, :_SHORT])


def _evaluate(runner: ModelRunner, rows: Rows) -> RowOutputs:
    """Run the rows as prompts with responses of three and two tokens, whose last is never an input."""
    ids, mask = rows.padded()
    responses = torch.cat([ids[:, -2:], ids[:, :1]], dim=1)
    chosen = torch.tensor([[True, True, True], [True, True, False]], device=ids.device)
    sequences = Sequences(ids[:, :-2], mask[:, :-2], responses, chosen)
    if runner.has_head:
        found = runner.outputs(sequences).all_logits().float().log_softmax(dim=-1)
    else:
        found = runner.hidden(sequences).float()
    return RowOutputs(found[:3], found[3:5])


def _decode(runner: ModelRunner, rows: Rows) -> RowOutputs:
    """Decode the same tokens: prompts, then two steps; before the last the short row, repeated, replaces the long."""
    ids, mask = rows.padded()
    cache, positions, length = runner.new_cache(ids.shape[1]), position_ids(mask), ids.shape[1]
    going = found = list[Tensor](), list[Tensor]()
    for start, end in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        if end == length and runner.cache_shrinks:
            short = torch.tensor([1, 1, 1], device=ids.device)
            cache.reorder_cache(short)
            ids, mask, positions, going = ids[short], mask[short], positions[short], found[1:]
        logits, _ = runner.decode_step(ids[:, start:end], positions[:, start:end], mask[:, :end], cache, hidden=False)
        for row, logprobs in zip(going, logits[-len(going) :].float().log_softmax(dim=-1), strict=True):
            row.append(logprobs)
    return RowOutputs(torch.stack(found[0]), torch.stack(found[1]))


def _ways_to_evaluate(runner: ModelRunner) -> Iterator[None]:
    """Set the ways from fastest to slowest; yield after each."""
    yield
    if runner.packs:
        runner.packs = False
        yield
    runner.pads_left = False
    yield


def _ways_to_decode(runner: ModelRunner) -> Iterator[None]:
    if runner.pads_left:
        yield
        runner.cache_shrinks = False
        yield
        runner.cache_shrinks = True
    runner.uses_cache = False
    yield
