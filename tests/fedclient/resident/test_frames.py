"""Frames, questions and replies: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.node import NodeSettings
from fedclient.resident import frames
from fedclient.resident.frames import Frame, FrameError
from fedclient.resident.question import QUERY_SECONDS, Question
from fedclient.resident.replies import Replies

headers = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.booleans())
questions = st.builds(
    Question,
    st.sampled_from(["query", "train", "evaluate"]),
    st.binary(),
    st.builds(NodeSettings, st.integers(0, 9), st.none() | st.text(), st.none() | st.text()),
)


@given(headers, st.binary())
def test_a_frame_is_read_as_it_was_written(header: dict[str, object], payload: bytes) -> None:
    assert frames.from_bytes(frames.to_bytes(Frame(header, payload))) == Frame(header, payload)


@given(st.binary())
def test_other_bytes_are_refused(data: bytes) -> None:
    try:
        found = frames.from_bytes(data)
    except FrameError:
        return
    assert len(frames.to_bytes(found)) <= len(data) + 64  # a frame after all, spaces in its JSON


def test_a_socket_carries_frames_and_its_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, Frame({"a": 1}, b"x" * 100))
        frames.send(ours, Frame({}))
        assert frames.receive(theirs) == Frame({"a": 1}, b"x" * 100)
        assert frames.receive(theirs) == Frame({})
        ours.close()
        with pytest.raises(EOFError):
            frames.receive(theirs)


@given(questions, questions)
def test_a_question_is_its_bytes_and_settings(one: Question, other: Question) -> None:
    assert Question.from_frame(one.to_frame()) == one
    assert (one.identity == other.identity) == (one == other)
    assert one.plan == {}
    assert one.seconds == QUERY_SECONDS


@pytest.mark.parametrize(
    "header",
    [{}, {"kind": "steal", "settings": {}}, {"kind": "train", "settings": {"uid": 0}}],
)
def test_what_is_no_question_is_refused(header: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        Question.from_frame(Frame(header))


def test_the_last_replies_are_kept_and_a_killed_writers_leftovers_are_not(tmp_path: Path) -> None:
    replies = Replies(tmp_path, kept=2)
    for name in ("a", "b", "c"):
        replies.put(name, Frame({"memory": [1, 2, 0]}, name.encode()))
    (tmp_path / "d.part").write_bytes(b"half")
    replies = Replies(tmp_path, kept=2)
    found = [replies.get(name) for name in "abcd"]
    assert found[1:3] == [Frame({"memory": [1, 2, 0]}, name) for name in (b"b", b"c")]
    assert found[0] is found[3] is None
    (tmp_path / "b.reply").write_bytes(b"cut")
    assert replies.get("b") is None
    assert not list(tmp_path.glob("*.part"))
