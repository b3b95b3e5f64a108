"""A probe at set-up: a few tokens are read in every way that a run will read, and must give what a plain pass gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_ppo.models.activation_memory import checkpoint_layers
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.hidden_states import accepts, noting_states, without_adapter_wrapper
from rlhf_ppo.models.forward.runner import Reader, Sequences, position_ids
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.runtime.device import autocast

_LONG, _SHORT = 8, 3
"""Tokens of the two rows, so that the short one lies behind five left pads; the long one may be longer."""

_EXACT, _ROUNDED = 1e-4, 0.05
"""How far two ways may differ in float32, and in formats of 16, 8 or 4 bits: shares of the spread of the log-probs."""


_WINDOWS = (
    *("window_size", "sliding_window", "local_attention", "chunk_size", "chunk_length", "index_topk", "block_size"),
)
"""What settings are called beyond which an architecture may read otherwise than before."""

_USUAL = 1024
"""Tokens of a sequence where nobody says how long they get."""


_SMALL = 2**16
"""Numbers of a weight whose gradient is asked for."""


class Rows(NamedTuple):
    """Two rows of token ids: [1, L] and [1, 3]."""

    long: Tensor
    short: Tensor

    def padded(self) -> tuple[Tensor, Tensor]:
        """Both [2, L] with their mask, the short one behind left padding."""
        mask = torch.ones(2, self.long.shape[1], dtype=torch.bool, device=self.long.device)
        mask[1, :-_SHORT] = False
        return torch.cat([self.long, torch.cat([self.long[:, :-_SHORT], self.short], dim=1)]), mask


class Plain(NamedTuple):
    """What is said of the last three tokens of both rows: log-probs [3, V] of the next one, or states [3, O]."""

    long: Tensor
    short: Tensor


@torch.no_grad()
def probe(
    model: ActorCritic, reference: Reference | None = None, *, longest: int | None = None, bf16: bool = False
) -> None:
    """Settle how each model is read (see :class:`.Reader`): the fastest way that is right.

    Args:
        model: policy and critic, on their device.
        reference: if it has a model of its own, that is probed too.
        longest: most tokens of a sequence of the run; None: unknown. What attends through windows or in chunks that
            this exceeds is probed beyond them.
        bf16: the run computes in bfloat16.
    Raises:
        ValueError: no way gives this model's own numbers; names the model, its role and what differs.
    """
    longest = _USUAL if longest is None else longest
    _settle(model.reader, "model", longest, bf16=bf16, decodes=True)
    if model.value_reader is not None:
        _settle(model.value_reader, "value_model", longest, bf16=bf16)
    if reference is None:
        return
    if reference.model is None:
        reference.reader.read_as(model.reader)
    else:
        _settle(reference.reader, "ref_model", longest, bf16=bf16)


def probe_gradient(model: ActorCritic, *, bf16: bool, checkpoint: bool) -> None:
    """Take a backward pass through a few tokens and, if asked, let layers be computed again from then on.

    Raises:
        ValueError: the backward pass fails, or computing layers again changes the gradient; names the model.
    """
    name = _name(model.reader, "model")
    before = _gradient(model, name, bf16=bf16)
    if not checkpoint:
        return
    checkpoint_layers(model)
    after = _gradient(model, f"gradient_checkpointing: {name}", bf16=bf16)
    gap, largest = float((before - after).abs().max()), float(before.abs().max())
    if not gap <= (_ROUNDED if bf16 else _EXACT) * largest:
        raise ValueError(
            f"gradient_checkpointing: {name}, whose gradient changes by {gap / largest:.2g} of its largest entry when "
            "layers are computed again: leave it out"
        )


def _gradient(model: ActorCritic, name: str, *, bf16: bool) -> Tensor:
    """Of the log-probs and values of the probe's tokens, in the small ones of the trained weights."""
    ids, mask = _rows(model.reader, _LONG).padded()
    sequences = ids[:, :-_SHORT], torch.ones_like(mask)[:, :-_SHORT], ids[:, -_SHORT:], mask[:, -_SHORT:]
    trained = sorted(model.policy_parameters(), key=lambda p: p.numel())
    trained = [p for p in trained if p.numel() <= _SMALL] or trained[:1]
    try:
        with autocast(bf16, ids.device):
            output = model(*sequences, entropy=False)
        total = output.logprobs.sum() + (0.0 if output.values is None else output.values.sum())
        found = torch.autograd.grad(total, trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{name}: the backward pass of the update fails ({why}): take another model") from error
    return torch.cat([x.flatten().float() for x in found if x is not None] or [torch.zeros(1)])


@torch.no_grad()
def require_decoder(model: nn.Module) -> None:
    """Raise a ValueError that names a model in float32 if what it says of a token depends on the tokens after it."""
    reader = Reader(model.eval(), plain=True)
    _plain(reader, _rows(reader, _LONG), _name(reader, "model"), _EXACT)


def _settle(reader: Reader, role: str, longest: int, *, bf16: bool, decodes: bool = False) -> None:
    name, base = _name(reader, role), without_adapter_wrapper(reader.model)
    device = next(reader.model.parameters()).device
    full = all(p.dtype == torch.float32 for p in reader.model.parameters() if p.is_floating_point())
    exact = full and not getattr(base, "is_quantized", False)
    # A wrong way shows best where nothing is rounded; whether the run's own format allows it is asked after that.
    formats = [(False, _EXACT if exact else _ROUNDED)] + ([(True, _ROUNDED)] if bf16 else [])
    rows = _rows(reader, _length(base.config, longest))
    plain: dict[bool, Plain] = {}
    for low, tolerance in formats:
        with autocast(low, device):
            plain[low] = _plain(reader, rows, name, tolerance)

    def first_right(ways: Iterator[None], read: Callable[[Reader, Rows], Plain]) -> str | None:
        """Take the first of the ways that is right; returns what is wrong with the last if none is."""
        wrong = None
        for _ in ways:
            for low, tolerance in formats:
                with autocast(low, device):
                    wrong = _difference(read, reader, rows, plain[low], tolerance)
                if wrong is not None:
                    break
            if wrong is None:
                return None
        return wrong

    if (wrong := first_right(_ways_to_read(reader), _read)) is not None:
        raise ValueError(f"{name}: sequences read together are not what each is alone ({wrong}): take another model")
    if not decodes:
        return
    if (wrong := first_right(_ways_to_decode(reader), _decode)) is not None:
        raise ValueError(f"{name}: decoding does not give what reading whole texts gives ({wrong}): take another model")
    if not reader.keeps_states:
        warnings.warn(
            f"{name}, which cannot decode from a cache here (padding in front changes its numbers, or it keeps none "
            "that fits): each step reads all tokens again, which is right but slow",
            stacklevel=4,
        )


def _name(reader: Reader, role: str) -> str:
    base = without_adapter_wrapper(reader.model)
    return f"{role} is {base.config.model_type!r} ({type(base).__name__})"


def _length(config: PretrainedConfig, longest: int) -> int:
    """Tokens of the long row: eight, or enough to pass the widest window or chunk that the run will pass."""
    sizes = [
        value
        for name, value in vars(config.get_text_config()).items()
        if any(part in name for part in _WINDOWS) and isinstance(value, int) and value + _LONG <= longest
    ]
    return _LONG + max(sizes, default=0)


def _difference(
    read: Callable[[Reader, Rows], Plain], reader: Reader, rows: Rows, plain: Plain, tolerance: float
) -> str | None:
    """What is wrong with a way to read, or None."""
    try:
        found = read(reader, rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    gap = max(float(_gap(x, y[: len(x)])) for x, y in zip(found, plain, strict=True))
    spread = float(_spread(plain.long))
    unit = "nats" if reader.has_head else "in their states"
    return None if gap <= tolerance * spread else f"{gap:.2g} {unit} apart"


def _gap(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference; tokens that a model bans, at -inf in both, do not differ."""
    return torch.where(x == y, 0, (x - y).abs()).max()


def _spread(x: Tensor) -> Tensor:
    finite = x[torch.isfinite(x)]
    return finite.max() - finite.min()


def _plain(reader: Reader, rows: Rows, name: str, tolerance: float) -> Plain:
    """Both rows, each by itself, from nothing but its ids."""
    other = torch.cat([rows.long[:, :-_SHORT], rows.long[:, :_SHORT]], dim=1)
    two, alone = _alone(reader, torch.cat([rows.long, other])), _alone(reader, rows.short)[0]
    if torch.isnan(two).any():
        raise ValueError(f"{name}: its numbers are NaN: its weights are damaged or not finite")
    before = two[:, :-_SHORT]
    if not _gap(before[0], before[1]) <= tolerance * _spread(two):
        raise ValueError(
            f"{name}: what it says of a token changes with the tokens after it, so it is an encoder and cannot write "
            "text: take a decoder-only causal language model (BERT and its kin need is_decoder=true in their config)"
        )
    return Plain(two[0, -_SHORT:], alone)


def _alone(reader: Reader, ids: Tensor) -> Tensor:
    """[B, 6, V] or [B, 6, O]: the last six tokens, or as many as there are."""
    asked: dict[str, Any] = {"use_cache": False} if accepts(reader.model, "use_cache") else {}
    with noting_states(reader.states_from) as noted:
        output = reader.model(input_ids=ids, **asked)
    if reader.has_head:
        return output.logits[:, -2 * _SHORT :].float().log_softmax(dim=-1)
    return noted[0][:, -2 * _SHORT :].float()


def _rows(reader: Reader, length: int) -> Rows:
    ids = reader.probe_ids(length)
    return Rows(ids, ids[:, :_LONG].flip(1)[:, :_SHORT])


def _read(reader: Reader, rows: Rows) -> Plain:
    """As prompts with responses of three tokens and of two, whose last is never an input."""
    ids, mask = rows.padded()
    answers = torch.cat([ids[:, -2:], ids[:, :1]], dim=1)
    chosen = torch.tensor([[True, True, True], [True, True, False]], device=ids.device)
    sequences = Sequences(ids[:, :-2], mask[:, :-2], answers, chosen)
    if reader.has_head:
        found = reader.outputs(sequences).all_logits().float().log_softmax(dim=-1)
    else:
        found = reader.hidden(sequences).float()
    return Plain(found[:3], found[3:5])


def _decode(reader: Reader, rows: Rows) -> Plain:
    """The same tokens: prompts in one pass, then two steps; before the last one the long row leaves."""
    ids, mask = rows.padded()
    length = ids.shape[1]
    cache, positions = reader.new_cache(length), position_ids(mask)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, end in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        if end == length and reader.rows_leave:
            cache.reorder_cache(torch.tensor([1], device=ids.device))
            ids, mask, positions = ids[1:], mask[1:], positions[1:]
        logits, _ = reader.step(ids[:, start:end], positions[:, start:end], mask[:, :end], cache, hidden=False)
        for row, logprobs in zip(found[-len(logits) :], logits.float().log_softmax(dim=-1), strict=True):
            row.append(logprobs)
    return Plain(torch.stack(found[0]), torch.stack(found[1]))


def _ways_to_read(reader: Reader) -> Iterator[None]:
    """From the fastest to the slowest; each is set before it is yielded."""
    yield
    if reader.packs:
        reader.packs = False
        yield
    reader.pads_left = False
    yield


def _ways_to_decode(reader: Reader) -> Iterator[None]:
    if reader.pads_left:
        yield
        reader.rows_leave = False
        yield
        reader.rows_leave = True
    reader.keeps_states = False
    yield
