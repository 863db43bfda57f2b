"""Examples from their sources: the embedded conversations, JSON lines, or a Hugging Face dataset."""

from __future__ import annotations

import difflib
import gzip
import json
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

EMBEDDED = "chatterbot"
HUB_PREFIX = "hf:"
ROLES = ("system", "user", "assistant")
QUESTION_KEYS = ("instruction", "question", "prompt", "input", "text")
ANSWER_KEYS = ("output", "response", "answer", "completion", "target")
CONTEXT_KEYS = ("context", "input")
CHOICES_KEY = "choices"


class DataError(Exception):
    """What is wrong with the data, in which file and line, and what to do."""


@dataclass(frozen=True)
class Example:
    """One exchange: (role, content) messages, the last of them the assistant's answer."""

    messages: tuple[tuple[str, str], ...]
    category: str

    @property
    def question(self) -> str:
        """The last user message, folded for comparison."""
        return _folded(self.messages[-2][1])

    @property
    def answer(self) -> str:
        """The answer, folded for comparison."""
        return _folded(self.messages[-1][1])


def read_examples(source: str, key: str | None = None) -> list[Example]:
    """All examples of a source. ``key`` names the column that becomes ``category``."""
    if source == EMBEDDED:
        return _embedded()
    if source.startswith(HUB_PREFIX):
        return _checked(_from_hub(source.removeprefix(HUB_PREFIX)), source, key)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"data source {source!r}: there is no such file; use {EMBEDDED!r}, a .jsonl or .jsonl.gz"
            f" file, or {HUB_PREFIX}NAME"
        )
    return _checked(_lines(path), str(path), key)


def _embedded() -> list[Example]:
    """The chatterbot-corpus package (BSD): consecutive utterances of every English conversation."""
    import yaml

    try:
        import chatterbot_corpus
    except ImportError:
        raise DataError(
            "the embedded data need the package chatterbot-corpus: pip install 'fedbraid[client]'"
        ) from None
    folder = Path(next(iter(chatterbot_corpus.__path__))) / "data" / "english"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    examples = []
    for path in sorted(folder.glob("*.yml")):
        with path.open(encoding="utf-8") as file:
            conversations = yaml.load(file, Loader=loader)["conversations"]
        for talk in conversations:
            # One entry of trivia.yml is a bare sentence: read as a list it would be its letters.
            if isinstance(talk, str):
                continue
            for asked, answered in pairwise(talk):
                messages = (("user", str(asked)), ("assistant", str(answered)))
                examples.append(Example(messages, path.stem))
    return examples


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        # Bytes, decoded line by line: a reader that decodes ahead of itself names the wrong line.
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not a JSON object: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: not a JSON object but {type(row).__name__}")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from None


def _from_hub(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except (OSError, ValueError, ConnectionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"dataset {name!r} cannot be loaded: {first}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


def _checked(
    rows: Iterable[tuple[str, Mapping[str, Any]]], source: str, key: str | None
) -> list[Example]:
    examples = []
    for where, row in rows:
        if key is not None and key not in row:
            near = difflib.get_close_matches(key, row, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(row)}"
            raise DataError(f"{where}: no column {key!r}{hint}")
        category = str(row[key]) if key is not None else str(row.get("category", ""))
        messages = _messages(where, row)
        _encodable(where, messages)
        examples.append(Example(messages, category))
    if not examples:
        raise DataError(f"{source}: holds no example")
    return examples


def _encodable(where: str, messages: tuple[tuple[str, str], ...]) -> None:
    """JSON can name half of a surrogate pair, which is no character: a tokenizer would fail on it."""
    for _, text in messages:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            ) from None


def _messages(where: str, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    if "messages" in row:
        return _given_messages(where, row["messages"])
    question = next((k for k in QUESTION_KEYS if _is_text(row.get(k))), None)
    answer = next((k for k in ANSWER_KEYS if k != question and k in row), None)
    if question is None or answer is None or row[answer] is None:
        raise DataError(
            f"{where}: needs 'messages', or a question ({', '.join(QUESTION_KEYS)}) and an answer"
            f" ({', '.join(ANSWER_KEYS)}); it has {', '.join(map(str, row)) or 'nothing'}"
        )
    if isinstance(row[answer], dict | list):
        raise DataError(f"{where}: {answer!r} is not a text but {type(row[answer]).__name__}")
    answered = str(row[answer])
    if not answered.strip():
        raise DataError(f"{where}: {answer!r} is empty")
    asked = str(row[question])
    # A hub data set of mixed rows holds None where a row has no such column.
    choices = None if row.get(CHOICES_KEY) is None else _choices(where, row[CHOICES_KEY])
    for extra in CONTEXT_KEYS:
        if extra != question and _is_text(row.get(extra)):
            asked = f"{asked}\n\n{row[extra]}"
            break
    if choices is not None:
        lettered = [
            f"{letter}. {text}"
            for letter, text in zip(string.ascii_uppercase, choices, strict=False)
        ]
        asked = "\n".join([asked, *lettered])
        answered = lettered[_chosen(where, choices, answer, row[answer])]
    return (("user", asked), ("assistant", answered))


def _choices(where: str, given: Any) -> list[str]:
    letters = len(string.ascii_uppercase)
    if not isinstance(given, list) or not all(map(_is_text, given)):
        raise DataError(
            f"{where}: {CHOICES_KEY!r} is not a list of texts; give one text for each choice, or"
            " name the column otherwise if the row is no multiple-choice question"
        )
    if not 2 <= len(given) <= letters:
        raise DataError(
            f"{where}: {CHOICES_KEY!r} holds {len(given)} texts; give 2 to {letters}, one a letter"
        )
    return [text.strip() for text in given]


def _chosen(where: str, choices: list[str], key: str, answer: Any) -> int:
    """Which choice an answer means: by its exact text, else its letter, else its index from 0.

    A number is an index and nothing else: texts are written as texts.
    """
    last = string.ascii_uppercase[len(choices) - 1]
    how = f"give the text of a choice, a letter A to {last}, or an index 0 to {len(choices) - 1}"
    if isinstance(answer, str):
        answer = answer.strip()
        if choices.count(answer) > 1:
            raise DataError(
                f"{where}: {key!r} is {answer!r}, which is the text of {choices.count(answer)}"
                " choices; make the choices differ, or give an index as a number"
            )
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer in string.ascii_letters:
            index = string.ascii_uppercase.index(answer.upper())
        elif answer.isascii() and answer.isdigit() and len(answer) <= 2:
            index = int(answer)
        else:
            raise DataError(f"{where}: {key!r} is {answer!r}, no choice of this row; {how}")
    elif isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    else:
        raise DataError(f"{where}: {key!r} is {answer!r}, which names no choice; {how}")
    if not 0 <= index < len(choices):
        raise DataError(
            f"{where}: {key!r} is {answer!r}, but there are {len(choices)} choices; {how}"
        )
    return index


def _given_messages(where: str, given: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list):
        raise DataError(f"{where}: 'messages' is not a list")
    messages = []
    for message in given:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: every message needs a role among {', '.join(ROLES)}")
        if not _is_text(message.get("content")):
            raise DataError(f"{where}: a message without content")
        messages.append((str(message["role"]), str(message["content"])))
    if len(messages) < 2 or messages[-1][0] != "assistant" or messages[-2][0] != "user":
        raise DataError(f"{where}: messages must end with a user's and the assistant's")
    return tuple(messages)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
