"""The engine of generation=vllm: publish the policy to the server, and have responses sampled with its latest state."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.generation.record import Record, Sampled
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.sampling import RowsOf, draw_by_row
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.generation.vllm.server import Answer, Ask, Served, VLLMServer
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.saving import write_adapter
from rlhf_ppo.runtime.command_line.user_code import has_ended, start
from rlhf_ppo.runtime.http_json import in_lanes

_MOST_AT_ONCE = 256
"""Most simultaneous requests, each of which has a thread here."""


class VLLMEngine:
    """Sampling by a vLLM server, of the policy that was published last.

    A policy's adapter is loaded by the server from a folder under a name that says what is in it; without an adapter
    the server reads all weights. What it caches of prompts is kept apart by the same name.
    """

    def __init__(
        self, server: VLLMServer, served: Served, folder: Path, *, vocabulary: int, at_once: int | None
    ) -> None:
        """Publish nothing yet.

        Args:
            server: the server.
            served: its model.
            folder: where policies are written; the server reads them under the same path.
            vocabulary: the policy's vocabulary size.
            at_once: maximum number of simultaneous requests; None: one for each response.
        """
        self.server, self.served, self.folder, self.vocabulary = server, served, folder, vocabulary
        self.at_once = min(at_once or _MOST_AT_ONCE, _MOST_AT_ONCE)
        self.policy, self.digest = served.name, ""
        """What requests call the policy, and what tells it from others."""
        self._sampling = threading.Lock()

    # The policy

    def publish(self, policy: Any, digest: str, base: str | None) -> None:
        """Have the server sample from this policy from now on; waits for responses that are being sampled.

        Args:
            policy: all of its weights.
            digest: of them.
            base: folder or hub id of the model under the policy's adapter, if it has one.
        Raises:
            VLLMError: the server did not take it.
        """
        with self._sampling:
            place, last = self.folder / f"rlhf-ppo-{digest}", self.policy
            shutil.rmtree(self.folder, ignore_errors=True)
            place.mkdir(parents=True)
            if hasattr(policy, "peft_config"):
                write_adapter(policy, policy.active_adapter, place, place, base)
                self.server.load_adapter(place.name, place.resolve())
                if last != self.served.name:
                    self.server.unload_adapter(last)
            else:
                policy.save_pretrained(place)
                self.server.reload_weights(place.resolve())

    def wait(self) -> None:
        """Wait for responses that are being sampled."""
        with self._sampling:
            pass

    def room(self, room: int | None, max_new_tokens: int) -> int | None:
        """Return the most tokens before a response, for the server's context as for our model's (``room``)."""
        longest = self.served.max_model_len
        return room if longest is None else min(longest - max_new_tokens, longest if room is None else room)

    def use(self, digest: str, *, adapter: bool) -> None:
        """Note, on every process, which policy the server has been given."""
        self.policy, self.digest = f"rlhf-ppo-{digest}" if adapter else self.served.name, digest

    def withdraw(self, *, first: bool) -> None:
        """Forget, on every process, which policy the server has; the first has it unloaded, and deletes its folder."""
        last, self.policy, self.digest = self.policy, self.served.name, ""
        if first:
            shutil.rmtree(self.folder, ignore_errors=True)
            if last != self.served.name:
                self.server.unload_adapter(last, patient=False)

    # Responses

    def __call__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        stop_detector: StopStringDetector | None = None,
        whole: RowsOf | None = None,
    ) -> SampledResponses:
        """Sample as :func:`rlhf_ppo.generation.decoding.sample_responses` does, but for entropies: those are 0.

        Each response has a seed of its own, drawn from ``generator`` by its row and turn in the rollout. ``model``
        is not read. What ends a response is decided here; where the server stopped for another reason, it goes on.

        Raises:
            VLLMError: the server failed; says how.
        """
        device = torch.device("cpu") if generator is None else generator.device
        seeds = draw_by_row(
            lambda n, source: torch.randint(0, 2**62, (n,), generator=source, device=device),
            len(prompt_ids),
            generator,
            whole,
        ).tolist()
        prompts = [ids[keep].tolist() for ids, keep in zip(prompt_ids, prompt_mask, strict=True)]
        said: list[list[int]] = [[] for _ in prompts]
        record, live = Record(len(prompts), params, prompt_ids.device), list(range(len(prompts)))
        with self._sampling:
            policy, salt = self.policy, self.digest or self.policy
            while live:
                asks = [_ask(policy, salt, prompts[row], said[row], params, seeds[row]) for row in live]
                answers, going = self._complete(asks), list[int]()
                for row, answer in zip(live, answers, strict=True):
                    if not _record(record, row, said[row], answer, params, stop_detector):
                        going.append(row)
                live = going
        return record.responses(has_values=False)

    def _complete(self, asks: Sequence[Ask]) -> list[Answer]:
        """Have the server answer some requests, ``at_once`` of them at a time."""
        complete = partial(self.server.complete, vocabulary=self.vocabulary)
        answers = start(partial(in_lanes, complete, asks, self.at_once), math.inf)
        has_ended(answers, None)  # raises Interrupted if a signal arrives
        return answers.result()


def _ask(policy: str, salt: str, prompt: list[int], said: list[int], params: SamplingParams, seed: int) -> Ask:
    """Return the request for what is missing of a response."""
    n = len(said)
    return Ask(
        policy=policy,
        salt=salt,
        ids=[*prompt, *said],
        seed=seed + n,
        max_tokens=params.max_new_tokens - n,
        min_tokens=max(0, params.min_new_tokens - n),
        temperature=params.temperature,
        stop_token_ids=params.stop_token_ids,
        stop_strings=params.stop_strings,
    )


def _record(
    record: Record,
    row: int,
    said: list[int],
    answer: Answer,
    params: SamplingParams,
    stop_detector: StopStringDetector | None,
) -> bool:
    """Record what was sampled of a response, up to where it ends; return whether it has ended."""
    first, ended = len(said), False
    device = record.mask.device
    for token in answer.ids:
        said.append(token)
        # A stop token that min_new_tokens bans is never sampled.
        ended = token in params.stop_token_ids
        if stop_detector is not None:
            ended |= bool(stop_detector.add(torch.tensor([token]), torch.tensor([row])))
        if ended:
            break
    n = len(said) - first
    last = torch.zeros(n, dtype=torch.bool, device=device)
    last[-1] = ended
    tokens = torch.tensor(said[first:], dtype=torch.long, device=device)
    logprobs = torch.tensor(answer.logprobs[:n], dtype=record.logprobs.dtype, device=device)
    record.add(
        torch.full_like(tokens, row),
        torch.arange(first, len(said), device=device),
        torch.ones_like(last),
        Sampled(tokens, logprobs, torch.zeros_like(logprobs), None),
        last,
    )
    return ended or len(said) >= params.max_new_tokens
