"""How a conversation is put to a model: by its chat template, or in plain words where it has none.

What a template does is found by rendering small conversations and comparing, never by its wording: does
it put in a system prompt of its own, does it take one, and with which token does a turn end?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from fedclient.records import DataError, Example

Message = tuple[str, str]

SYSTEM, QUESTION, ANSWER = "the system's words", "the user's words", "the assistant's words"
# What a template may raise for a conversation that it does not take.
REFUSALS = (TemplateError, ValueError, TypeError)

# Noon of a Friday. A template that writes today's date would give other token ids every day.
CLOCK = {"%A": "Friday", "%a": "Fri", "%B": "July", "%b": "Jul", "%d": "26", "%e": "26", "%-d": "26",
         "%m": "07", "%-m": "7", "%Y": "2024", "%y": "24", "%j": "208", "%H": "12", "%I": "12",
         "%M": "00", "%S": "00", "%p": "PM", "%D": "07/26/24", "%F": "2024-07-26", "%T": "12:00:00",
         "%R": "12:00", "%Z": "UTC", "%z": "+0000"}  # fmt: skip


@dataclass(frozen=True)
class _Dialect:
    """What a chat template does.

    ``silence``: a system text that keeps it from one of its own. ``before``: a prompt as it renders it.
    ``lead``: white space between a prompt and an answer. ``end``: token ids that end a turn.
    """

    takes_system: bool
    silence: str | None
    before: str
    lead: str
    end: tuple[int, ...]


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of everything before the answer: where generation begins. Raises DataError."""
    messages = example.messages[:-1]
    template = _template(tokenizer)
    if template is None:
        return _begin_ids(tokenizer) + _ids(tokenizer, _plain(messages))
    dialect = _dialect(tokenizer, template)
    if not dialect.takes_system:
        messages = _in_turn(messages)
    elif dialect.silence is not None and messages[0][0] != "system":
        messages = (("system", dialect.silence), *messages)
    rendered = _rendered(tokenizer, template, messages)
    if rendered is None:
        rendered = _rendered(tokenizer, template, _in_turn(example.messages[:-1]))
    if rendered is None:
        roles = ", ".join(role for role, _ in example.messages)
        raise DataError(
            f"the model's chat template refuses the roles {roles} (question"
            f" {example.messages[-2][1][:60]!r}); let user and assistant take turns, the user first"
        )
    return _ids(tokenizer, rendered)


def answer_ids(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the answer and of the end of its turn: what is learnt, and what is generated."""
    text = example.messages[-1][1]
    template = _template(tokenizer)
    # A space is the answer's: a prompt that ends with one would end with a token of its own.
    before, lead = "Answer:", " "
    if template is not None:
        dialect = _dialect(tokenizer, template)
        before, lead = dialect.before, dialect.lead
    answer = _continued(tokenizer, before, lead + text) if lead else _ids(tokenizer, text)
    return answer + end_ids(tokenizer)


def end_ids(tokenizer: Any) -> list[int]:
    """Token ids that end an answer, the last of which stops generation; empty where there is none.

    They are what the chat template puts behind an answer, as far as its first special token: a turn may
    end with another token than a text (``<end_of_turn>``, ``<|eot_id|>``). Without a template, or with
    one that puts no such token there, it is the end-of-text token.
    """
    template = _template(tokenizer)
    return _end_of_text(tokenizer) if template is None else list(_dialect(tokenizer, template).end)


@lru_cache(maxsize=8)
def _dialect(tokenizer: Any, template: str) -> _Dialect:
    asked = ("user", QUESTION)
    with_system = _rendered(tokenizer, template, [("system", SYSTEM), asked])
    # A template's own system prompt is what an empty one of ours makes shorter. Some templates look
    # whether there is a system message, others whether it is empty.
    lengths: dict[str | None, int] = {}
    for silence in (None, "", " "):
        messages = [asked] if silence is None else [("system", silence), asked]
        rendered = _rendered(tokenizer, template, messages)
        if rendered is not None:
            lengths[silence] = len(rendered)
    before = _rendered(tokenizer, template, [asked]) or ""
    finished = _rendered(tokenizer, template, [asked, ("assistant", ANSWER)], False) or ""
    upto, found, behind = finished.rpartition(ANSWER)
    between = upto.removeprefix(before) if upto.startswith(before) else ""
    return _Dialect(
        takes_system=with_system is not None and SYSTEM in with_system,
        silence=min(lengths, key=lengths.__getitem__, default=None),
        before=before,
        lead="" if between.strip() else between,
        end=tuple(_end_of_turn(tokenizer, behind if found else "")),
    )


def _end_of_turn(tokenizer: Any, behind: str) -> list[int]:
    """The token ids of what stands behind an answer, as far as the first special one."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = _continued(tokenizer, ANSWER, behind)
    for position, token in enumerate(ids):
        if token in special:
            return ids[: position + 1]
    return _end_of_text(tokenizer)


def _end_of_text(tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return [] if end is None else [int(end)]


def _begin_ids(tokenizer: Any) -> list[int]:
    """The begin token, if the tokenizer would put it before a text by itself."""
    begin = tokenizer.bos_token_id
    by_itself = list(tokenizer(QUESTION)["input_ids"])
    return [int(begin)] if begin is not None and by_itself[:1] == [begin] else []


def _plain(messages: Sequence[Message]) -> str:
    labels = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    return "\n".join([*(f"{labels[role]}{content}" for role, content in messages), "Answer:"])


def _in_turn(messages: Sequence[Message]) -> tuple[Message, ...]:
    """For templates that take user and assistant in turn: system texts open the next user message."""
    found: list[Message] = []
    system: list[str] = []
    for role, content in messages:
        if role == "system":
            system.append(content)
            continue
        parts = [content]
        if role == "user":
            parts, system = [*system, content], []
        if found and found[-1][0] == role:
            parts = [found.pop()[1], *parts]
        found.append((role, "\n\n".join(parts)))
    return tuple(found)


def _template(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    template = str(tokenizer.get_chat_template())
    if "strftime_now" in template:
        # A macro shadows the renderer's function of that name, which reads the clock. The renderer drops
        # a line's end behind a tag, and functions among its arguments.
        dated = "".join(f".replace('{key}', '{value}')" for key, value in CLOCK.items())
        template = (
            f"{{% macro strftime_now(format) %}}{{{{ format{dated} }}}}{{% endmacro %}}\n{template}"
        )
    return template


def _rendered(
    tokenizer: Any, template: str, messages: Sequence[Message], generate: bool = True
) -> str | None:
    """The conversation as text, None if the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        )
    except REFUSALS:
        return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continued(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of ``text`` behind ``before``: alone, some tokenizers would begin it otherwise."""
    start, whole = _ids(tokenizer, before), _ids(tokenizer, before + text)
    return whole[len(start) :] if whole[: len(start)] == start else _ids(tokenizer, text)
