"""Sources of examples: what they hold, and what is said about what cannot be read."""

from __future__ import annotations

import gzip
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient import records
from fedclient.records import DataError, read_examples

GOOD = '{"instruction": "a?", "output": "b"}'


def written(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_the_embedded_conversations() -> None:
    examples = read_examples("chatterbot")
    assert len(examples) == 2306
    by_category = Counter(example.category for example in examples)
    assert len(by_category) == 21
    for example in examples:
        assert [role for role, _ in example.messages] == ["user", "assistant"]
        assert all(isinstance(text, str) and text for _, text in example.messages)


@pytest.mark.parametrize(
    ("row", "asked", "answered"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n\n1 2", "3"),
        ({"instruction": "add", "input": "", "output": "3"}, "add", "3"),
        ({"instruction": "who?", "context": "Ann", "response": "Ann"}, "who?\n\nAnn", "Ann"),
        ({"question": "2+2?", "answer": 4}, "2+2?", "4"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"input": "only input", "target": "t"}, "only input", "t"),
    ],
)
def test_familiar_columns(row: dict[str, Any], asked: str, answered: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", json.dumps(row))
    (example,) = read_examples(str(path))
    assert example.messages == (("user", asked), ("assistant", answered))


@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)] * 2,
            st.sampled_from(["a", "b"]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    lines = [
        json.dumps({"question": q, "answer": a, "topic": t}, ensure_ascii=number % 2 == 0)
        for number, (q, a, t) in enumerate(rows)
    ]
    folder = tmp_path_factory.mktemp("read")
    path = written(folder / "x.jsonl", *lines)
    found = read_examples(str(path), "topic")
    assert [(e.messages[0][1], e.messages[1][1], e.category) for e in found] == rows
    with gzip.open(folder / "x.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_examples(str(folder / "x.jsonl.gz"), "topic") == found


def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{GOOD}\r\n".encode())
    assert len(read_examples(str(path))) == 2


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=12)


def choice_row(choices: Any, answer: Any) -> str:
    return json.dumps({"question": "which?", "choices": choices, "answer": answer})


@given(st.data(), st.lists(TEXTS, min_size=2, max_size=26, unique=True))
def test_a_choice_by_text_letter_or_index(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, choices: list[str]
) -> None:
    """All ways to name one choice mean it, unless another choice has that very text."""
    chosen = data.draw(st.integers(0, len(choices) - 1))
    letter = string.ascii_uppercase[chosen]
    names: list[Any] = [choices[chosen], f" {choices[chosen]}\n", chosen]
    names += [n for n in (letter, letter.lower(), str(chosen)) if n not in choices]
    path = tmp_path_factory.mktemp("choices") / "x.jsonl"
    for example in read_examples(
        str(written(path, *(choice_row(choices, name) for name in names)))
    ):
        (_, asked), (_, answered) = example.messages
        assert answered == f"{letter}. {choices[chosen]}"
        lettered = "\n".join(
            f"{a}. {text}" for a, text in zip(string.ascii_uppercase, choices, strict=False)
        )
        assert asked == f"which?\n{lettered}"


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["C", "A", "B"], "A", "B. A"),  # its text, not its letter
        (["c", "a", "b"], "A", "A. c"),  # no such text: the letter
        (["1", "2", "3"], "1", "A. 1"),  # its text, not its index
        (["1", "2", "3"], 1, "B. 2"),  # a number is an index
        (["1", "2", "3"], "0", "A. 1"),  # no such text: the index
        (["same", "same"], "B", "B. same"),
    ],
)
def test_what_an_answer_means(
    choices: list[str], answer: Any, expected: str, tmp_path: Path
) -> None:
    (example,) = read_examples(str(written(tmp_path / "x.jsonl", choice_row(choices, answer))))
    assert example.messages[-1] == ("assistant", expected)


def test_choices_stand_after_the_context(tmp_path: Path) -> None:
    row = {"question": "who?", "context": "Ann ran.", "choices": ["Bo", "Ann"], "answer": "Ann"}
    (example,) = read_examples(str(written(tmp_path / "x.jsonl", json.dumps(row))))
    assert example.messages[0][1] == "who?\n\nAnn ran.\nA. Bo\nB. Ann"


def test_no_choices_are_no_multiple_choice(tmp_path: Path) -> None:
    (example,) = read_examples(str(written(tmp_path / "x.jsonl", choice_row(None, "so"))))
    assert example.messages == (("user", "which?"), ("assistant", "so"))


BAD_LINES: dict[str, str | bytes] = {
    "half a line": '{"instruction": "a?", "outp',
    "a list": "[1, 2]",
    "a number": "3",
    "not UTF-8": b'{"instruction": "\xff\xfe", "output": "b"}',
    "nested without end": "[" * 100_000,
    "no answer": '{"instruction": "a?"}',
    "no question": '{"output": "b"}',
    "null answer": '{"instruction": "a?", "output": null}',
    "blank answer": '{"instruction": "a?", "output": "  "}',
    "blank question": '{"instruction": " ", "output": "b"}',
    "an answer that is no text": '{"instruction": "a?", "output": {"b": 1}}',
    "half a surrogate pair": '{"instruction": "a?", "output": "\\ud800"}',
    "messages not a list": '{"messages": "hello"}',
    "no messages": '{"messages": []}',
    "unknown role": '{"messages": [{"role": "bot", "content": "x"}]}',
    "no content": '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}',
    "no answer at the end": '{"messages": [{"role": "assistant", "content": "x"},'
    ' {"role": "user", "content": "y"}]}',
    "choices not a list": choice_row({"text": ["a", "b"]}, 0),
    "choices in one text": choice_row("a b", 0),
    "choices not of texts": choice_row(["a", 2], 0),
    "a blank choice": choice_row(["a", " "], 0),
    "no choices": choice_row([], 0),
    "one choice": choice_row(["a"], 0),
    "more choices than letters": choice_row([f"text {n}" for n in range(27)], 0),
    "an index too high": choice_row(["a", "b"], 2),
    "a negative index": choice_row(["a", "b"], -1),
    "an index as text too high": choice_row(["a", "b"], "2"),
    "a fraction": choice_row(["a", "b"], 1.0),
    "true": choice_row(["a", "b"], True),
    "a list of answers": choice_row(["a", "b"], [0]),
    "no such letter": choice_row(["x", "y"], "C"),
    "no such choice": choice_row(["x", "y"], "neither"),
    "two choices of one text": choice_row(["x", "x"], "x"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", GOOD, "", GOOD, BAD_LINES[name], GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    assert str(caught.value).startswith(f"{path}:4: ")


def test_a_bad_byte_far_down_is_named_by_its_own_line(tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", *[GOOD] * 700, b"\xff", GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    assert str(caught.value).startswith(f"{path}:701: ")


def test_messages_keep_their_turns(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    turns.append(("assistant", "d"))
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (example,) = read_examples(str(written(tmp_path / "x.jsonl", json.dumps(row))))
    assert example.messages == tuple(turns)
    assert example.question == "c"


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_file(text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "empty.jsonl", text)
    with pytest.raises(DataError, match="no example") as caught:
        read_examples(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "garbled", "not gzip"])
def test_a_damaged_archive(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    chance = "".join(f'{GOOD[:-2]}{number * 7919 % 1000}"}}\n' for number in range(400))
    packed = bytearray(gzip.compress(chance.encode()))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "garbled":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    else:
        packed = bytearray(chance.encode())
    path.write_bytes(packed)
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    assert str(caught.value).startswith(f"{path}:")


def test_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"question": "q", "answer": "a", "category": "c"}')
    with pytest.raises(DataError, match="did you mean 'category'") as caught:
        read_examples(str(path), "categroy")
    assert str(caught.value).startswith(f"{path}:1: ")
    with pytest.raises(DataError, match="question, answer, category"):
        read_examples(str(path), "xyz")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "chatterbox", "/"])
def test_a_missing_source(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_examples(source)


def test_a_hub_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="someone/some"):
        read_examples("hf:someone/some")


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"question": "q", "answer": "a", "topic": 3}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert read_examples("hf:someone/some", "topic") == [
        records.Example((("user", "q"), ("assistant", "a")), "3")
    ]
