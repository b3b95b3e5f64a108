"""Checks of the chat template: what it renders is what the policy reads, over all turns."""

from __future__ import annotations

from rlhf_ppo.data.chat import Messages, TemplateOptions, render_chat, render_prompt, with_answer
from rlhf_ppo.data.tokenization import encode_bare
from rlhf_ppo.verify.report import Check, Finding
from rlhf_ppo.verify.subject import Subject

ANSWER = "An answer"


def _template(subject: Subject) -> Finding:
    chats: dict[tuple[str, ...], tuple[Messages, TemplateOptions]] = {}
    for prompt, options in zip(subject.rollout.prompts, _templates(subject), strict=True):
        if not isinstance(prompt, str):
            chats.setdefault(tuple(message["role"] for message in prompt), (prompt, options))
    if not chats:
        return Finding(None, "the prompts are text, which no template renders")
    problems = [problem for chat in chats.values() for problem in _chat_problems(subject, *chat)]
    problems += _conversation_problems(subject)
    said = f"{len(chats)} kinds of chats, rendered with an answer and a further turn: "
    said += "; ".join(problems) or "text is only added at the end, and a stop token follows the answer"
    return Finding(not problems, said, {"problems": len(problems)})


def _templates(subject: Subject) -> list[TemplateOptions]:
    return subject.run.template.of_columns(subject.rollout.columns, len(subject.rollout.prompts))


def _chat_problems(subject: Subject, chat: Messages, options: TemplateOptions) -> list[str]:
    tokenizer, stops, where = subject.run.tokenizer, subject.run.sampling.stop_token_ids, "the prompt"
    before = render_prompt(tokenizer, chat, where, options)
    answered = with_answer(chat, ANSWER, where)
    whole = render_chat(tokenizer, answered, where, options)
    if not whole.startswith(before):
        return [f"the finished chat does not begin with what the policy read ({_differ(before, whole)})"]
    said, found, end = whole[len(before) :].partition(ANSWER)
    if not found:
        return [f"the answer is not in the finished chat, which goes on with {said[:80]!r}"]
    problems = []
    if stops and not set(encode_bare(tokenizer, end)) & set(stops):
        problems.append(
            f"the template ends an answer with {end!r}, which holds none of the stop tokens {sorted(stops)}"
        )
    longer = render_prompt(tokenizer, [*answered, {"role": "user", "content": "and then?"}], where, options)
    if not longer.startswith(before + said + ANSWER):
        problems.append(f"a further turn changes what came before it ({_differ(whole, longer)})")
    return problems


def _conversation_problems(subject: Subject) -> list[str]:
    """Compare the conversations that were held with what the template makes of them, but for white space."""
    rollout, tokenizer = subject.rollout, subject.run.tokenizer
    special = set(tokenizer.all_special_ids)
    templates, different = _templates(subject), 0
    for row, conversation in enumerate(rollout.conversations or []):
        if isinstance(rollout.prompts[row], str):
            continue
        mask, real = rollout.mask[row], rollout.real[row]
        spoken = [turn.said for turn in subject.sampler.turns[row]]
        ids = [*rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist(), *rollout.response_ids[row][real].tolist()]
        read = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if any(special & set(said[:-1]) for said in spoken) or "\ufffd" in read or not mask.any():
            continue  # special tokens in the middle are not part of a message
        last = spoken[-1][-1] if spoken[-1] else None
        read = read.removesuffix(str(tokenizer.decode([last]))) if last in special else read
        rendered = render_chat(tokenizer, conversation, "the conversation", templates[row])
        different += not "".join(rendered.split()).startswith("".join(read.split()))
    return [f"{different} conversations read otherwise than the template renders them"] if different else []


def _differ(one: str, other: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[place : place + 40]!r} became {other[place : place + 40]!r}"


CHECKS = (
    Check(
        "template",
        _template,
        "the chat template renders what the policy reads: it only adds text, and a stop token follows the answer",
        "a template that drops or trims earlier turns (reasoning), or ends turns with a token that stops nothing",
        "stop_token_ids with the template's end-of-turn token; chat_template with one that keeps earlier turns",
    ),
)
