"""Sources of examples: what they hold, and what is said about what cannot be read."""

from __future__ import annotations

import gzip
import json
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
    "messages not a list": '{"messages": "hello"}',
    "no messages": '{"messages": []}',
    "unknown role": '{"messages": [{"role": "bot", "content": "x"}]}',
    "no content": '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}',
    "no answer at the end": '{"messages": [{"role": "assistant", "content": "x"},'
    ' {"role": "user", "content": "y"}]}',
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
