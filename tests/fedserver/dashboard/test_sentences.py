"""Every event of a run is a sentence, whatever it holds; nothing of a program's own words is left."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fedserver import events
from fedserver.dashboard.jobs import in_words
from fedserver.dashboard.sentences import level, sentence

FLOATS = st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf])
# In small letters: what is looked for below is a program's own words in capitals.
TEXT = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
LOGGED = (
    events.RunStarted, events.RoundStarted, events.PhaseStarted, events.PlansSent,
    events.NodeStarted, events.NodeReplied, events.EvaluationDone, events.RoundCommitted,
    events.RoundsEnded, events.Notice,
)  # fmt: skip


def values(kind: type[events.Event]) -> st.SearchStrategy[events.Event]:
    plain = {"int": st.integers(0, 10**12), "float": FLOATS, "str": TEXT, "bool": st.booleans()}
    parts = {
        name: plain[word.partition(" |")[0]] | (st.none() if "None" in word else st.nothing())
        for name, word in kind.__annotations__.items()
        if word.partition(" |")[0] in plain
    }
    if kind is events.RunStarted:
        parts["nodes"] = st.just(())
    return st.builds(kind, **parts)


@given(st.one_of([values(kind) for kind in LOGGED]))
def test_every_event_is_a_sentence_of_its_own_numbers(event: events.Event) -> None:
    told = json.loads(json.dumps(events.to_json(event)))
    text = sentence(told)
    assert text
    assert not re.search(r"\b(True|False|None|quorum \d|nodes \d)\b", text)
    assert "_" not in text
    assert level(told) in ("info", "warning", "error") or isinstance(event, events.Notice)
    if isinstance(event, events.RoundCommitted):
        assert f"{event.accepted:,}" in text
        assert ("quorum was missed" in text) == (not event.quorum)
        assert ("training loss" in text) == (event.loss is not None and math.isfinite(event.loss))
    assert in_words(json.dumps(told)).endswith(text)


def test_the_log_of_a_real_run_is_sentences(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    sign_in("vera")
    with (runs / "mixed" / "events.jsonl").open("a") as log:
        of_tomorrow = {"event": "of_tomorrow", "quorum": True, "share": 0.25, "who": "Straße"}
        log.write(json.dumps({"time": 0, **of_tomorrow}))
        log.write("\n")
    found: list[str] = []
    pages, number = 1, 0
    while number < pages:
        number += 1
        table = client.get(f"/api/v1/runs/mixed/log?page={number}").json()["tables"]["log"]
        pages = table["pages"]
        found += [row["text"] for row in table["rows"]]
    assert found[0] == "quorum yes, share 0.25, who Straße"
    for text in found[1:]:
        assert text.endswith(".") or ": " in text or "final evaluation" in text, text
        assert not re.search(r"\b(True|False|None|quorum \d)\b", text), text
    assert sum("replies accepted" in text for text in found) == 3
    # What stands there is found by its words, as is what stands in the file alone.
    for words, count in (
        ("replies ACCEPTED", 3),
        ("ROUND_committed Straße", 0),
        ("straße", 1),
        ("zebra", 0),
    ):
        table = client.get("/api/v1/runs/mixed/log", params={"q": words}).json()["tables"]["log"]
        assert table["total"] == count, words
