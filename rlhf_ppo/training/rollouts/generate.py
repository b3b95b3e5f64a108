"""Generate: each process samples responses to its prompts, and all of them make the whole rollout of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.data.chat import Prompt, TemplateOptions
from rlhf_ppo.data.detokenization import Before, TextPieces, before_each
from rlhf_ppo.data.prompts import PromptBatch
from rlhf_ppo.data.template_options import TOOLS
from rlhf_ppo.data.tokenization import encode_prompts, require_vocabulary
from rlhf_ppo.generation.environments.episodes import Episodes
from rlhf_ppo.generation.multi_turn import Hook, Opening, RespondError, Talk, sample_conversations
from rlhf_ppo.generation.rollout import Rollout, SampledResponses
from rlhf_ppo.generation.sampling import RowsOf
from rlhf_ppo.generation.stop_strings import StopStringDetector, response_texts
from rlhf_ppo.generation.tools.calls import Tools, tool_counts
from rlhf_ppo.models.acceleration.working_copy import computing, round_again
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.loading import vocabulary_size
from rlhf_ppo.models.sharded.in_step import taking_part
from rlhf_ppo.models.sharded.sharding import whole_weights
from rlhf_ppo.runtime.command_line.user_code import has_ended, start
from rlhf_ppo.runtime.logs.run_directory import append_line
from rlhf_ppo.runtime.machine.signals import deferring_stops, stopping_if_asked
from rlhf_ppo.runtime.processes.group import Part, Work
from rlhf_ppo.runtime.side_by_side import Calls
from rlhf_ppo.training.outside.publish import publish
from rlhf_ppo.training.run import Run


class _Own(NamedTuple):
    """This process's n rows of a rollout."""

    batch: PromptBatch
    """The whole rollout's prompts."""
    ids: Tensor | None
    """[B, P] they encoded, left-padded; None: environments choose them."""
    mask: Tensor | None
    """[B, P] bool."""
    rows: range
    generator: torch.Generator
    """Of the whole rollout's draws."""
    templates: Sequence[TemplateOptions] = ()
    """[B] what each chat is rendered with besides messages."""

    @property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """This process's prompts, ids and mask [n, P]."""
        assert self.ids is not None and self.mask is not None
        here = slice(self.rows.start, self.rows.stop)
        longest = int(self.mask[here].sum(dim=1).max())
        return self.ids[here, -longest:], self.mask[here, -longest:]

    @property
    def prompts(self) -> list[Prompt]:
        """[n]"""
        return list(self.batch.prompts[self.rows.start : self.rows.stop])


def generate(run: Run, model: ActorCritic, batch: PromptBatch, generator: torch.Generator) -> Rollout:
    """Sample one response, or conversation, per prompt, recording log-probs and values.

    Arguments and errors are those of :func:`rlhf_ppo.training.rollouts.collect.collect`.
    """
    return start_generating(run, model, batch, generator)()


def start_generating(
    run: Run, model: ActorCritic, batch: PromptBatch, generator: torch.Generator, *, ahead: bool = False
) -> Callable[[], Rollout]:
    """Prepare what :func:`generate` does; returns what does the rest.

    Args:
        ahead: let a server sample from now on, in a thread: the model may change meanwhile.
    """
    with run.stopwatch.phase("generate"):
        templates = run.template.of_columns(batch.columns, len(batch.prompts))
        own = _Own(batch, None, None, run.own_rows(len(batch.prompts)), generator, templates)
        if run.episodes is None:
            own = own._replace(**_encoded(run, batch.prompts, templates))
        served = run.engine is not None
        round_again(model)  # callbacks may change weights through .data
        publish(run, model)

    def sample_own() -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        if not own.rows:
            return {}, None
        with nullcontext() if served else computing(model, bf16=run.bf16):
            return (_respond_to if run.respond is None else _converse)(run, model, own)

    work = partial(_wait_for, start(sample_own, math.inf)) if ahead else sample_own

    def finish() -> Rollout:
        with run.stopwatch.phase("generate"):
            if served:
                parts = run.processes.exchange(work)
            else:
                with _weights_for_decoding(run, model) as for_exchange:
                    parts = run.processes.exchange(for_exchange(work))
            return _join(run, model, own, parts)

    return finish


def _wait_for(sampled: Future[Any]) -> Any:
    """Return what a thread has sampled; raises :class:`Interrupted` if a signal arrives first."""
    has_ended(sampled, None)
    return sampled.result()


def _encoded(run: Run, prompts: Sequence[Prompt], templates: Sequence[TemplateOptions]) -> dict[str, Tensor]:
    """Encode prompts: ids and mask [B, P]."""
    ids, mask = encode_prompts(
        prompts,
        run.tokenizer,
        room=run.room,
        truncate=run.args.overlong_prompts == "truncate",
        device=run.device,
        templates=templates,
    )
    return {"ids": ids, "mask": mask}


@contextmanager
def _weights_for_decoding(run: Run, model: ActorCritic) -> Iterator[Callable[[Work], Work]]:
    """Gather a sharded model's weights for decoding; yields what turns the work into work for an exchange.

    Layers that are gathered one by one need every process at each decode step of any: then the work is done before the
    exchange.
    """

    def at_once(work: Work) -> Work:
        together = run.processes.computing_together
        with deferring_stops(), taking_part(model, "decode", lambda: _decode_nothing(run, model), together):
            result = work()
        return partial(stopping_if_asked, result)

    if run.plan.sharding is not None and run.plan.decoding == "layers":
        yield at_once
        return
    with nullcontext() if run.plan.sharding is None else whole_weights(model, model.policy):
        yield lambda work: work


def _decode_nothing(run: Run, model: ActorCritic) -> None:
    """Run one decode step on one token, for the other processes' sake."""
    one = torch.ones(1, 1, dtype=torch.long, device=run.device)
    with computing(model, bf16=run.bf16):
        model.decode(one, torch.zeros_like(one), one.bool(), model.runner.new_cache(1))


def _respond_to(run: Run, model: ActorCritic, own: _Own) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sample a response to each of this process's prompts."""
    pieces, (ids, mask) = TextPieces(run.tokenizer), own.encoded
    before = before_each(pieces, own.prompts, ids, mask)
    whole = RowsOf(own.rows, len(own.batch.prompts))
    sampled = _sample(run, model, ids, mask, before, own.generator, whole)
    texts = response_texts(sampled, pieces, before, run.sampling.stop_strings)
    return _tensors(sampled), {"completions": [*texts]}


def _sample(
    run: Run,
    model: ActorCritic,
    ids: Tensor,
    mask: Tensor,
    before: list[Before],
    generator: torch.Generator,
    whole: RowsOf,
) -> SampledResponses:
    strings, detector = run.sampling.stop_strings, None
    if strings:
        detector = StopStringDetector(TextPieces(run.tokenizer), strings, before)
    sampled = run.sample(model, ids, mask, run.sampling, generator=generator, stop_detector=detector, whole=whole)
    return sampled._replace(values=model.in_reward_units(sampled.values, sampled.mask))


def _converse(run: Run, model: ActorCritic, own: _Own) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Hold a conversation about each of this process's prompts."""

    def sample(ids: Tensor, mask: Tensor, before: list[Before], talks: list[Talk]) -> SampledResponses:
        rows, turns = [talk.number for talk in talks], [talk.turns for talk in talks]
        whole = RowsOf(rows, len(own.batch.prompts), turns)
        return _sample(run, model, ids, mask, before, own.generator, whole)

    try:
        said = sample_conversations(
            sample,
            _talks(run, own),
            run.sampling,
            encode=lambda talk, prompt: _encode_opening(run, model, talk, prompt, own.templates[talk.number]),
            calls=Calls(run.args.respond_concurrency, run.args.respond_timeout_s),
            max_turns=run.args.max_turns,
            room=run.room,
            tokenizer=run.tokenizer,
            device=run.device,
            read=run.respond.read if isinstance(run.respond, Tools) else None,
        )
    except RespondError as error:
        # Only this process knows what was said here.
        name = "failed_rollout.jsonl" if run.processes.first else f"failed_rollout-{run.processes.rank}.jsonl"
        file = write_failed(run.folder.path / name, ({"conversation": told} for told in error.conversations))
        message = f"{error}. All conversations are in {file}"
        raise RespondError(message, error.conversations) from error.__cause__
    tensors = {"environment": said.environment, "turns": said.turns, "context_full": said.context_full}
    facts: dict[str, Any] = {"completions": said.completions, "conversations": said.messages}
    if isinstance(run.respond, Tools):
        facts["tool_counts"] = [tool_counts(messages) for messages in said.messages]
    if run.episodes is not None:
        facts["prompts"] = said.prompts
    return {**_tensors(said.sampled), **tensors}, facts


def _talks(run: Run, own: _Own) -> list[Talk]:
    """Return this process's conversations, which have not begun."""
    partner = run.respond
    assert partner is not None
    if isinstance(partner, Episodes):
        return [Talk(row, partner.new(), own.batch.row(row)) for row in own.rows]
    talks, (ids, mask) = list[Talk](), own.encoded
    for row, prompt, x, keep in zip(own.rows, own.prompts, ids, mask, strict=True):
        template = own.templates[row]
        answers = partner.for_row(template.get(TOOLS, ())) if isinstance(partner, Tools) else partner
        talks.append(Talk(row, Hook(answers), Opening(prompt, x[keep].tolist(), template)))
    return talks


def _encode_opening(run: Run, model: ActorCritic, talk: Talk, prompt: Prompt, template: TemplateOptions) -> Opening:
    """Encode a prompt that an environment chose."""
    ids, mask = _encoded(run, [prompt], [template]).values()
    require_vocabulary(ids[0].tolist(), vocabulary_size(model.runner.config), f"conversation {talk.number}")
    return Opening(prompt, ids[0][mask[0]].tolist(), template)


def _tensors(sampled: SampledResponses) -> dict[str, Tensor]:
    named = {**sampled._asdict(), "banned": None if sampled.banned is None else sampled.banned.where}
    return {name: x for name, x in named.items() if x is not None}


def _join(run: Run, model: ActorCritic, own: _Own, parts: Sequence[Part]) -> Rollout:
    """Make the whole rollout of what each process has sampled."""
    parts = [part for part in parts if part.facts is not None]  # a process may have had no row
    names, facts = list(parts[0].tensors), list(parts[0].facts)
    tensors: dict[str, Any] = {name: _rows([part.tensors[name] for part in parts], run.device) for name in names}
    said: dict[str, Any] = {name: [text for part in parts for text in part.facts[name]] for name in facts}
    if "banned" in tensors:
        tensors["banned"] = BannedTokens(tensors["banned"], run.sampling.stop_token_ids)
    prompts = said.pop("prompts", list(own.batch.prompts))
    ids, mask = (own.ids, own.mask) if run.episodes is None else _encoded(run, prompts, own.templates).values()
    assert ids is not None and mask is not None
    tensors = {"values": None, **tensors, "prompt_ids": ids, "prompt_mask": mask}
    said |= {"foreign": run.engine is not None, "value_scale": model.value_scale}
    return Rollout(prompts, own.batch.columns, **tensors, **said)


def _rows(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Put rows [b, ...] under each other, each padded on the right with zeros to the longest."""
    if len(parts) == 1 or parts[0].ndim == 1:
        return torch.cat([part.to(device) for part in parts])
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part.to(device), (0, longest - part.shape[1])) for part in parts])


def write_failed(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write what a reward function or ``respond`` failed on."""
    file.unlink(missing_ok=True)
    for row in rows:
        append_line(file, row)
    return file
