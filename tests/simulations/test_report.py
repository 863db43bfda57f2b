"""A report holds every number of its run, loads nothing, and lets no text of a node become markup."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulations.report import report_html, write_report
from simulations.run_directory import Run, RunDirectoryError, Sample, read_run

MakeRun = Callable[..., Path]
HOSTILE = (
    '</style></script><script>alert(1)</script><img src="//evil.example/x" onerror=x>&amp;"\'`'
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
METRIC_KEYS = [
    "round", "loss", "eval_loss", "eval_accuracy", "bytes_up", "bytes_down", "seconds", "families",
    "accepted", "rejected", "epsilon", "carry_rank", "tail_energy", "head", "nodes",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(fake_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "quickstart"))


def numbers(value: object) -> list[float | int]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_of_the_metrics_is_on_the_page_exactly(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    folder = fake_run(tmp_path / "run", rounds=5)
    page = outline(write_report(folder).read_text(encoding="utf-8"))
    shown = {float(value) for tag, key, value in page.attributes if (tag, key) == ("data", "value")}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        for number in numbers(json.loads(line)):
            assert float(number) in shown


def test_what_each_family_cost_and_is_worth_is_on_the_page(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    folder = fake_run(tmp_path / "run")
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    work = {"updates": 6, "bytes_up": 1234, "bytes_down": 5678, "seconds": 91.5, "weight": 0.875}
    for families in (
        {"low_rank": work | {"nodes": 2, "contribution": 0.31415}},
        {
            "low_rank": work | {"nodes": 2, "contribution": 0.31415},
            "seed_scalars": work | {"nodes": 4, "contribution": None},
        },
    ):
        path.write_text(json.dumps(summary | {"families": families}), encoding="utf-8")
        page = outline(report_html(read_run(folder)))
        shown = {value for tag, key, value in page.attributes if (tag, key) == ("data", "value")}
        # A single family is the run itself, and needs no table.
        assert ({"0.31415", "0.875"} <= shown) == (len(families) > 1)
        assert ("seed-scalars" in page.text) == (len(families) > 1)


def test_every_node_verdict_reason_answer_and_digest_is_on_the_page(run: Run, outline: Any) -> None:
    text = outline(report_html(run)).text
    for entry in run.rounds:
        for reply in entry.nodes:
            assert reply.node in text
            assert reply.reason in text
            assert reply.verdict.replace("_", " ") in text
    for sample in run.samples:
        for words in (sample.question, sample.base, sample.tuned, sample.category):
            assert words in text
    for key in ("base_digest", "layout", "head", "preset", "version", "base_model"):
        assert run.word(key) in text
    assert run.scenario.strip() in text
    assert "fedbraid simulate quickstart/scenario.toml" in text


def test_the_page_loads_nothing_and_runs_nothing(run: Run, outline: Any) -> None:
    html = report_html(run)
    page = outline(html)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & set(page.tags)
    for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
        assert set(page.values(name)) <= {"data:,"}
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in " ".join(page.values("content"))


@pytest.mark.parametrize("nodes", [1, 6, 60])
def test_the_page_is_well_formed_and_accessible(
    fake_run: MakeRun, fake_node: Any, tmp_path: Path, outline: Any, nodes: int
) -> None:
    names = [fake_node(f"node {i}", 2 + i % 3, ("a",), "phone") for i in range(nodes)]
    page = outline(write_report(fake_run(tmp_path, nodes=names)).read_text(encoding="utf-8"))
    assert page.unbalanced == []
    count = Counter(page.tags)
    assert count["h1"] == count["main"] == count["html"] == 1
    assert ("html", "lang", "en") in page.attributes
    assert count["caption"] == count["table"]
    assert len(page.values("scope")) == count["th"]
    identities = page.values("id")
    assert len(identities) == len(set(identities))
    for drawing in page.values("aria-labelledby"):
        assert set(drawing.split()) <= set(identities)
    # Every drawing has a title and a description, or is hidden from readers.
    assert count["svg"] == page.values("role").count("img") + page.values("aria-hidden").count(
        "true"
    )
    assert count["desc"] == page.values("role").count("img")


@settings(max_examples=25)
@given(words=st.text(max_size=60) | st.just(HOSTILE))
def test_untrusted_text_is_text(run: Run, outline: Any, words: str) -> None:
    def page_with(told: str) -> Any:
        rounds = tuple(
            replace(
                entry,
                head=told,
                families=((told, 6),),
                nodes=tuple(
                    replace(reply, node=f"{told}{i}", reason=told, verdict=told, categories=told)
                    for i, reply in enumerate(entry.nodes)
                ),
            )
            for entry in run.rounds
        )
        summary = {**run.summary, "base_model": told, "head": told, "adapter": told}
        return outline(
            report_html(
                replace(
                    run,
                    name=told,
                    preset=told,
                    scenario=told,
                    rounds=rounds,
                    summary=summary,
                    samples=(Sample(told, told, told, told, told),),
                    problems=(told,),
                )
            )
        )

    # Whatever the words are, the page has the elements that it has with harmless words.
    harmless, hostile = page_with("x"), page_with("x" + words.replace("\r", ""))
    assert hostile.tags == harmless.tags
    assert hostile.unbalanced == []
    assert [key for _, key, _ in hostile.attributes] == [key for _, key, _ in harmless.attributes]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    lines=st.lists(
        st.dictionaries(st.sampled_from(METRIC_KEYS), anything)
        | st.fixed_dictionaries(
            {
                "round": st.integers(-1, 4),
                "eval_loss": st.floats(),
                "bytes_up": st.integers(),
                "nodes": st.lists(
                    st.fixed_dictionaries(
                        {"node": st.text(max_size=9), "train_loss": st.floats(), "weight": anything}
                    ),
                    max_size=3,
                ),
            }
        ),
        max_size=4,
    ),
    summary=anything
    | st.dictionaries(st.sampled_from(["before", "after", "bytes_up", "seconds", "head"]), anything)
    | st.fixed_dictionaries({"before": st.fixed_dictionaries({"loss": st.floats()})}),
    samples=anything,
)
def test_any_json_gives_a_page(
    tmp_path_factory: pytest.TempPathFactory, outline: Any, lines: Any, summary: Any, samples: Any
) -> None:
    folder = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    assert outline(html).unbalanced == []
    for drawn in re.findall(r"<(?:path|rect|text|circle) [^>]*>", html):
        assert "nan" not in drawn
        assert "inf" not in drawn


@given(
    kept=st.sets(
        st.sampled_from(["scenario.toml", "metrics.jsonl", "summary.json", "samples.json"])
    )
)
def test_missing_files_are_said_and_never_fatal(
    fake_run: MakeRun, tmp_path_factory: pytest.TempPathFactory, outline: Any, kept: set[str]
) -> None:
    folder = fake_run(tmp_path_factory.mktemp("run"))
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    if not kept - {"samples.json"}:
        with pytest.raises(RunDirectoryError, match=re.escape(str(folder))):
            write_report(folder)
        return
    page = outline(write_report(folder).read_text(encoding="utf-8"))
    for name in ("scenario.toml", "metrics.jsonl", "summary.json"):
        assert (f"{name} is missing" in page.text) == (name not in kept)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_a_cut_metrics_file_keeps_its_whole_lines(
    fake_run: MakeRun, tmp_path: Path, share: float
) -> None:
    folder = fake_run(tmp_path, rounds=4)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    cut = whole[: int(len(whole) * share)]
    path.write_bytes(cut)
    run = read_run(folder)
    assert len(run.rounds) == cut.count(b"\n")
    broken = bool(cut) and not cut.endswith(b"\n")
    assert any("metrics.jsonl line" in problem for problem in run.problems) == broken
    write_report(folder)


def test_a_round_that_is_written_twice_counts_once(fake_run: MakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert [entry.round for entry in read_run(folder).rounds] == [1, 2, 3]


@pytest.mark.parametrize(("before", "after", "word"), [(2.0, 1.0, "lower"), (1.0, 2.0, "higher")])
def test_the_headline_tells_the_direction(
    run: Run, outline: Any, before: float, after: float, word: str
) -> None:
    assert run.before is not None
    changed = replace(
        run, before=replace(run.before, loss=before), after=replace(run.before, loss=after)
    )
    share = abs(after / before - 1)
    assert f"{100 * share:.1f}\u202f% {word}" in outline(report_html(changed)).text


def test_a_run_without_evaluation_claims_nothing(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    folder = fake_run(tmp_path, evaluate=False)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["before"] = None
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = outline(write_report(folder).read_text(encoding="utf-8")).text
    assert "lower" not in text
    assert "not evaluated" in text


def test_the_style_has_enough_contrast() -> None:
    style = Path(str(report_html.__code__.co_filename)).with_name("templates") / "style.css"
    schemes = re.findall(r":root \{(.*?)\}", style.read_text(encoding="utf-8"), re.DOTALL)[:2]
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for ground in ("card", "paper"):
            for name in ("ink", "soft", "accent", "good", "bad"):
                assert contrast(colours[name], colours[ground]) >= 4.5
        for tone in range(8):
            assert contrast(colours[f"tone-{tone}"], colours["card"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else math.pow((p + 0.055) / 1.055, 2.4) for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
