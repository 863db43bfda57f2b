"""Conversations as token ids: with templates of several families' habits, and without one."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.data import tokenise
from fedclient.prompts import answer_ids, end_ids, prompt_ids
from fedclient.records import DataError, Example, read_examples

# ChatML with a system prompt of its own, as Qwen's older templates have; the wording is not SmolLM's.
QWEN = """
{%- set given = messages[0].role == "system" -%}
<|im_start|>system
{{ messages[0].content if given else "You were made in a harbour." }}<|im_end|>
{% for turn in messages[1:] if given %}
{{- "<|im_start|>" ~ turn.role ~ "\n" ~ turn.content ~ "<|im_end|>\n" }}
{%- endfor %}
{%- for turn in messages if not given %}
{{- "<|im_start|>" ~ turn.role ~ "\n" ~ turn.content ~ "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""

# The same habit, but an empty system message counts as none.
QWEN_EMPTY = QWEN.replace(
    "{{ messages[0].content if given", "{{ messages[0].content if given and messages[0].content"
)

# ChatML with neither a system prompt of its own nor anything that it refuses.
CHATML = """
{%- for turn in messages %}
{{- "<|im_start|>" ~ turn.role ~ "\n" ~ turn.content ~ "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""

# No system role, strict turns, "model" for the assistant, and a turn that does not end with EOS.
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("there is no system here") }}{% endif %}
{%- for turn in messages %}
  {%- if turn.role != ("user", "assistant")[loop.index0 % 2] %}
    {{- raise_exception("speak in turn") }}
  {%- endif %}
  {{- "<start_of_turn>" ~ ("model" if turn.role == "assistant" else turn.role) ~ "\n" }}
  {{- turn.content | trim ~ "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}"""

# Brackets instead of roles; whatever is not in turn is refused.
MISTRAL = """
{{- bos_token }}
{%- for turn in messages %}
  {%- if (turn.role == "user") == (loop.index0 % 2 == 1) or turn.role == "system" %}
    {{- raise_exception("user and assistant only, in turn") }}
  {%- endif %}
  {%- if turn.role == "user" %}{{ "[INST] " ~ turn.content ~ " [/INST]" }}
  {%- else %}{{ " " ~ turn.content ~ eos_token }}{% endif %}
{%- endfor %}"""

# A system turn at all events, with today's date in it.
LLAMA = """
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- set given = messages[0].role == "system" %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday is " ~ date_string ~ "\n\n" }}
{{- (messages[0].content if given else "") ~ "<|eot_id|>" }}
{%- for turn in (messages[1:] if given else messages) %}
  {{- "<|start_header_id|>" ~ turn.role ~ "<|end_header_id|>\n\n" ~ turn.content ~ "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""

# Takes a system message without a word and leaves it out.
DEAF = """
{%- for turn in messages if turn.role != "system" %}
{{- "<" ~ turn.role ~ ">" ~ turn.content ~ "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant>" }}{% endif %}"""

SPECIAL = ("<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")  # fmt: skip
TEMPLATES = {"qwen": QWEN, "qwen-empty": QWEN_EMPTY, "chatml": CHATML, "gemma": GEMMA,
             "mistral": MISTRAL, "llama": LLAMA, "deaf": DEAF}  # fmt: skip
ENDS = {"qwen": "<|im_end|>", "qwen-empty": "<|im_end|>", "chatml": "<|im_end|>",
        "gemma": "<end_of_turn>", "mistral": "<eos>", "llama": "<|eot_id|>", "deaf": "<eos>",
        "none": "<eos>"}  # fmt: skip

texts = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)


def made(template: str | None, begin: str | None = "adds") -> Any:
    """A byte-level tokenizer. ``begin``: it "adds" its begin token to texts, "has" one, or None."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin == "adds":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
        )
    names = {"eos_token": "<eos>", "pad_token": "<eos>"} | ({"bos_token": "<bos>"} if begin else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: made(template) for name, template in TEMPLATES.items()} | {"none": made(None)}


def example(*turns: tuple[str, str]) -> Example:
    return Example(turns, "")


def asked(tokenizer: Any, *turns: tuple[str, str]) -> str:
    return str(tokenizer.decode(prompt_ids(example(*turns, ("assistant", "So.")), tokenizer)))


def learnt(tokenizer: Any, answer: str) -> str:
    return str(
        tokenizer.decode(answer_ids(example(("user", "Why?"), ("assistant", answer)), tokenizer))
    )


def in_order(text: str, parts: Sequence[str]) -> bool:
    """Whether ``parts`` occur in ``text``, one behind the other."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_as_the_template_ends_a_turn(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    end = end_ids(tokenizer)
    assert tokenizer.decode(end) == ENDS[name]
    assert len(end) == 1  # without the line's end that follows it
    assert learnt(tokenizer, "Because.").strip() == f"Because.{ENDS[name]}"
    (tokens,) = tokenise([example(("user", "Why?"), ("assistant", "So."))], tokenizer, 500)
    assert tokens.ids[-1] == end[-1]
    assert tokenizer.decode(tokens.ids[tokens.labels_from :]).strip() == f"So.{ENDS[name]}"


@pytest.mark.parametrize("name", [*TEMPLATES, "none"])
@given(st.data())
def test_every_word_of_a_conversation_is_asked_in_order(
    tokenizers: dict[str, Any], name: str, data: st.DataObject
) -> None:
    """Whatever the template takes: system messages or none, one or more exchanges."""
    exchanges = data.draw(st.lists(st.tuples(texts, texts), max_size=2))
    turns = [("system", data.draw(texts))] if data.draw(st.booleans()) else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", data.draw(texts)))
    text = asked(tokenizers[name], *turns)
    assert in_order(text, [content for _, content in turns])
    assert "So." not in text


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral", "llama", "qwen"])
def test_a_prompt_is_what_the_template_makes_of_it(name: str, tokenizers: dict[str, Any]) -> None:
    """Where the template takes a conversation as it is, it is not touched."""
    tokenizer = tokenizers[name]
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    if name == "qwen":
        turns.insert(0, ("system", "Be brief."))
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=True,
        **({"date_string": "26 Jul 2024"} if name == "llama" else {}),
    )
    assert asked(tokenizer, *turns) == rendered


@pytest.mark.parametrize("name", ["qwen", "qwen-empty"])
def test_a_template_adds_no_system_prompt_of_its_own(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    assert "harbour" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False
    )
    assert "harbour" not in asked(tokenizer, ("user", "Why?"))
    assert "parrot" in asked(tokenizer, ("system", "Be a parrot."), ("user", "Why?"))


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral", "deaf"])
def test_nothing_is_added_where_the_template_adds_nothing(
    name: str, tokenizers: dict[str, Any]
) -> None:
    assert "system" not in asked(tokenizers[name], ("user", "Why?"))


@pytest.mark.parametrize("name", ["gemma", "mistral", "deaf"])
def test_a_system_message_that_is_refused_opens_the_question(
    name: str, tokenizers: dict[str, Any]
) -> None:
    whole = asked(tokenizers[name], ("system", "Be a parrot."), ("user", "Why?"))
    assert whole == asked(tokenizers[name], ("user", "Be a parrot.\n\nWhy?"))


def test_two_questions_in_a_row_are_one_where_turns_are_strict(
    tokenizers: dict[str, Any],
) -> None:
    assert asked(tokenizers["gemma"], ("user", "One?"), ("user", "Two?")) == asked(
        tokenizers["gemma"], ("user", "One?\n\nTwo?")
    )
    assert "One?<|im_end|>" in asked(tokenizers["chatml"], ("user", "One?"), ("user", "Two?"))


def test_what_no_template_of_the_kind_takes_is_named(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="assistant, user, assistant") as caught:
        asked(tokenizers["gemma"], ("assistant", "Hello."), ("user", "Who is there?"))
    assert "Who is there?" in str(caught.value)


def test_without_a_template_each_turn_has_its_label(tokenizers: dict[str, Any]) -> None:
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    assert asked(tokenizers["none"], *turns) == (
        "<bos>Be brief.\nQuestion: One?\nAnswer: Two.\nQuestion: Three?\nAnswer:"
    )
    assert learnt(tokenizers["none"], "Four.") == " Four.<eos>"


@pytest.mark.parametrize(("begin", "times"), [("adds", 1), ("has", 0), (None, 0)])
def test_the_begin_token_is_there_if_the_tokenizer_would_add_it(
    begin: str | None, times: int
) -> None:
    """Without a template; a template writes its own."""
    ids = prompt_ids(example(("user", "Why?"), ("assistant", "So.")), made(None, begin))
    assert ids.count(SPECIAL.index("<bos>")) == times
    assert ids.index(SPECIAL.index("<bos>")) == 0 if times else True
    ids = prompt_ids(example(("user", "Why?"), ("assistant", "So.")), made(GEMMA, "adds"))
    assert ids.count(SPECIAL.index("<bos>")) == 1


@pytest.mark.parametrize("name", ["qwen", "chatml", "gemma", "mistral", "llama"])
@given(texts, texts)
def test_prompt_and_answer_are_the_finished_conversation(
    tokenizers: dict[str, Any], name: str, question: str, answer: str
) -> None:
    """Token for token as the template writes both together, up to the end of the turn."""
    tokenizer = tokenizers[name]
    turns = [("system", "Be brief.")] if name == "qwen" else []
    turns += [("user", question), ("assistant", answer)]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        **({"date_string": "26 Jul 2024"} if name == "llama" else {}),
    )
    (tokens,) = tokenise([example(*turns)], tokenizer, 1000)
    assert tokens.ids == tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.ids[tokens.labels_from :]).strip() == answer + ENDS[name]


def test_a_tokenizer_without_an_end_token() -> None:
    tokenizer = made(None)
    tokenizer.eos_token = None
    assert end_ids(tokenizer) == []
    assert learnt(tokenizer, "So.") == " So."


@given(texts, texts)
def test_a_tokenizer_that_puts_a_space_before_texts(question: str, answer: str) -> None:
    """Prompt and answer are tokenised apart, yet make the text that both make together."""
    from tokenizers import pre_tokenizers

    tokenizer = made(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    one = example(("user", question), ("assistant", answer))
    (tokens,) = tokenise([one], tokenizer, 500)
    whole = tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"]
    assert tokens.ids == [*whole, tokenizer.eos_token_id]


def day(number: int) -> Any:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 3, number, 4, 5, 6, tzinfo=tz)

    return Clock


FORMATS = ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%d/%m/%y %H:%M", "no date", "%F"]


@pytest.mark.parametrize("wording", FORMATS)
def test_the_date_is_always_the_same(wording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    template = LLAMA.replace("%d %b %Y", wording).replace(
        "date_string is not", "true or date_string is"
    )
    one = example(("user", "Why?"), ("assistant", "So."))
    found, naive = set(), set()
    for number in (3, 4):
        monkeypatch.setattr(chat_template_utils, "datetime", day(number))
        tokenizer = made(template)  # a process of its own: nothing is remembered
        found.add(tuple(prompt_ids(one, tokenizer)))
        naive.add(
            tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
        )
    assert len(found) == 1
    assert len(naive) == (1 if "%" not in wording else 2)  # the clock was indeed set
    expected = datetime.datetime(2024, 7, 26, 12, tzinfo=datetime.UTC).strftime(wording)
    assert f"\n\nToday is {expected}\n\n" in made(None).decode(found.pop())


def test_a_fixed_clock_changes_nothing_else(tokenizers: dict[str, Any]) -> None:
    """The template is rendered line for line as without it, white space included."""
    for head in ("", "\n", "  ", "{%- set x = 1 %}\n", "  {% set x = 1 %}\n", "{# #}\n\n"):
        dated, plain = made(head + LLAMA), made(head + LLAMA.replace("strftime_now", "str_now"))
        rendered = plain.apply_chat_template(
            [{"role": "user", "content": "Why?"}],
            tokenize=False,
            add_generation_prompt=True,
            date_string="26 Jul 2024",
        )
        assert asked(dated, ("user", "Why?")) == rendered


def test_one_tokenizer_may_change_its_template(tokenizers: dict[str, Any]) -> None:
    tokenizer = made(QWEN)
    assert tokenizer.decode(end_ids(tokenizer)) == "<|im_end|>"
    tokenizer.chat_template = GEMMA
    assert tokenizer.decode(end_ids(tokenizer)) == "<end_of_turn>"


def test_the_embedded_models_ids_stay(default_model_folder: Path) -> None:
    """Whatever is learnt about other models: measured figures rest on these very ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    tokens = tokenise(read_examples("chatterbot"), tokenizer, 128)
    written = json.dumps([[one.ids, one.labels_from] for one in tokens])
    assert hashlib.sha256(written.encode()).hexdigest() == (
        "9b5b859a9c4a33d570aa8f23c0480aef7ba7039cd9e797a30bd6a9a716e2dcb9"
    )
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]
