"""The dashboard in a real browser, over a real run that is under way: every view, and every action."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.control import OPERATOR, ControlQueue
from fedserver.dashboard.registry import VIEWS
from fedserver.ledger import Entry, Ledger
from fedserver.live_log import LiveLog
from simulations.benchmarks.dashboard_process import dashboard_process
from simulations.engines import run_local

PATIENCE = 120_000  # milliseconds; a busy machine is slow, not wrong
FAULTS = ("moderate", "serious", "critical")


@dataclass
class Visit:
    """A page that is watched: whatever it says, asks for or is refused is kept."""

    page: Any
    address: str
    wrong: list[str] = field(default_factory=list)

    def open(self, path: str) -> None:
        self.page.goto(self.address + path)

    def listen(self) -> None:
        def console(message: Any) -> None:
            if message.type in ("error", "warning"):
                self.wrong.append(f"{self.page.url}: {message.text}")

        def request(asked: Any) -> None:
            if not asked.url.startswith((self.address, "data:")):
                self.wrong.append(f"asked {asked.url}")

        self.page.on("console", console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", request)
        self.page.on(
            "response",
            lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 500 else None,
        )


@dataclass
class LiveRun:
    """A simulation in a thread, which waits at every round that it is told to pause before."""

    folder: Path
    thread: threading.Thread
    failures: list[BaseException]

    def entries(self, kind: str) -> list[Entry]:
        ledger = Ledger(self.folder)
        found = list(ledger.entries(kind))
        ledger.close()
        return found

    def last_action(self) -> dict[str, Any]:
        return self.entries(OPERATOR)[-1].content


def _module(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tools = _module("browser")


def opened(page: Any, button: str) -> Any:
    """The form of an action, which is folded away until its summary is clicked."""
    part = page.locator("#actions details").filter(
        has=page.get_by_role("button", name=button, exact=True, include_hidden=True)
    )
    part.locator("summary").click()
    return part.locator("form")


@pytest.fixture(scope="module")
def live_run(
    make_configuration: Callable[..., RunConfiguration], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveRun]:
    """A run of mixed families that pauses before its second round."""
    folder = tmp_path_factory.mktemp("served") / "live"
    failures: list[BaseException] = []

    def emit(event: events.Event) -> None:
        if event == events.RoundStarted(1):
            ControlQueue(folder).ask(
                "pause", {}, who="test", role="operator", reason="to be looked at"
            )

    def work() -> None:
        try:
            run_local(make_configuration(name="live", rounds=6), folder, emit)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield LiveRun(folder, thread, failures)
    if thread.is_alive():
        for action in ("stop", "resume"):
            ControlQueue(folder).ask(action, {}, who="test", role="operator", reason="the end")
        thread.join(60)


@pytest.fixture(scope="module")
def served(live_run: LiveRun, finished_run: Path) -> Iterator[str]:
    """The link of a dashboard process over the live and the finished run."""
    root = live_run.folder.parent
    shutil.copytree(finished_run, root / "mixed")
    with dashboard_process(root) as (link, process):
        yield link
        # After all views and actions: what needs torch has happened in processes of its own.
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.fixture(scope="module")
def visit(served: str) -> Iterator[Visit]:
    with tools.browser() as browser:
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        context.set_default_timeout(PATIENCE)
        found = Visit(context.new_page(), served.split("/login")[0])
        found.listen()
        found.page.goto(served)
        yield found
        context.close()


@pytest.fixture(autouse=True)
def _what_goes_wrong_is_its_tests_own(visit: Visit) -> None:
    visit.wrong.clear()


def test_a_page_follows_the_run_and_every_action_reaches_the_ledger(
    visit: Visit, live_run: LiveRun
) -> None:
    """In the order in which an operator would: look, act, and see what came of it, without a reload."""
    page = visit.page
    visit.open("/")
    page.get_by_role("link", name="live", exact=True).click()
    page.wait_for_selector("#standing >> text=paused")
    marked = page.evaluate("() => { window.stays = true; return true; }")
    assert marked
    control = page.context.new_page()
    control.set_default_timeout(PATIENCE)
    Visit(control, visit.address, visit.wrong).listen()

    def act(button: str, action: str, **fields: str) -> None:
        """Fill a form, press its button, and wait until the run says that it has been applied."""
        before = len(live_run.entries(OPERATOR))
        control.goto(visit.address + "/runs/live/control")
        form = opened(control, button)
        for name, value in fields.items():
            box = form.locator(f"[name={name}]")
            if box.evaluate("e => e.tagName") == "SELECT":
                box.select_option(value)
            else:
                box.fill(value)
        form.locator("[name=reason]").fill(f"a test of {action}")
        form.get_by_role("button", name=button, exact=True).click()
        # The row changes by itself: the page is told and asks for the table again.
        row = control.locator("#rows-requests tbody tr").first
        row.locator("text=applied").wait_for()
        entry = live_run.entries(OPERATOR)[before]
        content = entry.content
        assert (content["action"], content["who"], content["role"]) == (action, "local", "operator")
        assert content["reason"] == f"a test of {action}"

    def revoke(node: str) -> None:
        """By keyboard, over the page that asks for the name; another name revokes nothing."""
        before = len(live_run.entries(OPERATOR))
        control.goto(visit.address + "/runs/live/control")
        control.locator("summary", has_text="Revoke a node").focus()
        control.keyboard.press("Enter")
        control.locator("#revoked").select_option(node)
        control.get_by_role("button", name="Go on to revoke it").press("Enter")
        for typed in ("another", node):
            control.get_by_label("Type its name to confirm").fill(typed)
            control.locator("[name=reason]").fill("a test of revoke")
            control.get_by_role("button", name="Revoke", exact=True).press("Enter")
            if typed != node:
                control.locator("[role=alert]", has_text="nothing was revoked").wait_for()
                assert len(live_run.entries(OPERATOR)) == before
                control.goto(f"{visit.address}/runs/live/control?revoke={node}")
        control.locator("#kept-out li", has_text=node).locator(
            ".chip", has_text="revoked"
        ).wait_for()
        assert live_run.entries(OPERATOR)[before].content["action"] == "revoke"

    act("Set for the next round", "next_round", deadline_seconds="55", quorum="1")
    act("Drain", "drain", node="phone")
    act("Quarantine", "quarantine", node="school")
    revoke("helpdesk")
    act("Readmit", "readmit", node="school")
    assert live_run.last_action()["arguments"] == {"node": "school"}
    # Who is kept out is named, and only who may come back is offered for it.
    control.goto(visit.address + "/runs/live/control")
    assert control.locator("#kept-out li").all_inner_texts() == [
        "helpdesk revoked",
        "phone drained",
    ]
    assert control.locator("#readmitted option").all_text_contents() == ["phone"]
    assert "helpdesk" not in control.locator("#revoked option").all_text_contents()

    act("Resume", "resume")
    # The first page has seen it all through its stream.
    page.locator("#standing .chip", has_text="finished").wait_for()
    page.locator("#tiles >> text=after round 6").wait_for()
    live_run.thread.join()
    assert not live_run.failures
    rounds = live_run.entries("round")
    assert page.evaluate("() => window.stays")
    shown = page.locator("#tiles dt:has-text('Sent up') + dd data").get_attribute("value")
    kinds = ("round", "evaluation", "ablation")
    sent = [e for kind in kinds for e in live_run.entries(kind)]
    assert int(shown) == sum(node["bytes_up"] for e in sent for node in e.content["nodes"])
    taking_part = [{node["node"] for node in entry.content["nodes"]} for entry in rounds]
    assert {"phone", "helpdesk"} <= taking_part[0]
    assert all(not {"phone", "helpdesk"} & names for names in taking_part[1:])
    assert {n["plan"]["deadline_seconds"] for n in rounds[1].content["nodes"]} >= {55.0}
    control.close()
    # The browser says so too when the server refuses what was typed to confirm.
    assert [said for said in visit.wrong if "actions/revoke: Failed" not in said] == []
    visit.wrong.clear()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_every_view_opens_clean_and_accessible(visit: Visit, width: int, scheme: str) -> None:
    page = visit.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    source = tools.axe()
    paths = ["/", "/server", "/start", "/compare?run=mixed&run=live", "/runs/mixed/rounds/2"]
    paths += ["/devices", "/access", "/runs/mixed/rounds/2/replay", "/runs/mixed/ledger/verify"]
    paths += ["/runs/mixed/rounds/3/distances"]
    paths += [f"/runs/mixed/{view.name}".rstrip("/") for view in VIEWS]
    for path in paths:
        visit.open(path)
        page.wait_for_load_state("load")
        beyond = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert beyond <= 0, f"{path} is {beyond} pixels too wide at {width}"
        # Chromium's own tools evaluate without the page's policy.
        page.evaluate(source)
        found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")
        bad = [
            (v["id"], v["nodes"][0]["html"][:200])
            for v in found["violations"]
            if v["impact"] in FAULTS
        ]
        assert bad == [], path
    assert visit.wrong == []


def test_a_page_is_fetched_once_a_change_and_keeps_what_is_typed(
    visit: Visit, live_run: LiveRun
) -> None:
    """However many of its parts follow the run, and however often it changes."""
    folder, page = live_run.folder.parent / "changing", visit.page
    folder.mkdir()
    log = LiveLog(folder, lambda event: None)
    nodes = (events.NodeInfo("clinic", "LoRA, rank 4", 10, 2),)
    log(events.RunStarted("changing", "braid", 9, 1, nodes, "model", str(folder)))
    for view, parts in (("control", 4), ("ledger", 3)):
        asked: list[str] = []
        listen = lambda request, asked=asked: asked.append(request.url)  # noqa: E731
        visit.open(f"/runs/changing/{view}")
        page.locator("#connection", has_text="live").wait_for()
        page.wait_for_selector("body[data-events]")
        assert page.locator("[data-follows]").count() >= parts
        if view == "control":
            page.get_by_text("Another deadline").click()
            page.locator("#deadline").fill("55")
        page.on("request", listen)
        reason = f"what stands above the view {view}"
        log(events.PhaseStarted(1, "held", reason=reason))
        page.locator("#standing", has_text=reason).wait_for()
        page.wait_for_load_state("networkidle")
        here = [url for url in asked if url.endswith(f"/{view}")]
        # Its jobs, which change no file of the run, are looked for every few seconds.
        more = view == "control"
        assert 1 <= len(here) <= 1 + more
        if more:
            assert page.locator("#deadline").input_value() == "55"
        asked.clear()
        page.evaluate(
            "for (let n = 0; n < 50; n++) document.body.dispatchEvent(new Event('run-changed'))"
        )
        log(events.PhaseStarted(1, "train", 1, 1, 60.0, reason=f"{reason}, once more"))
        page.locator("#standing", has_text="once more").wait_for()
        assert len([url for url in asked if url.endswith(f"/{view}")]) <= 3 + 10 * more
        page.remove_listener("request", listen)
    log(events.RoundsEnded("finished"))
    shutil.rmtree(folder)
    assert visit.wrong == []


def test_links_stand_in_one_line_and_columns_within_the_page(
    visit: Visit, live_run: LiveRun
) -> None:
    """On a phone the navigation; at a desk whatever nodes say of themselves, without scrolling."""
    page, folder = visit.page, live_run.folder.parent / "wide"
    folder.mkdir()
    nodes = tuple(
        events.NodeInfo(
            f"node-{n}-" + "of-a-long-name" * 3, "sketch 4", 10**6, 10**5,
            "a single-board computer behind the greenhouse", "NVIDIA GeForce RTX 4090 Laptop GPU",
            16, 10**12, "python 3.11, " * 8,
        )
        for n in range(3)
    )  # fmt: skip
    log = LiveLog(folder, lambda event: None)
    log(events.RunStarted("wide", "braid", 2, 1, nodes, "model", str(folder)))
    log(events.RoundsEnded("finished"))
    page.set_viewport_size({"width": 1440, "height": 900})
    visit.open("/runs/wide/fleet")
    box = page.locator("#rows-fleet .scroll")
    assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
    for width in (390, 360):
        page.set_viewport_size({"width": width, "height": 900})
        visit.open("/access")
        links = page.locator(".top nav a")
        assert links.count() == 5
        assert len({links.nth(n).bounding_box()["y"] for n in range(5)}) == 1
    shutil.rmtree(folder)
    assert visit.wrong == []


def test_search_sort_verify_and_downloads_work_by_keyboard_and_click(visit: Visit) -> None:
    page = visit.page
    page.set_viewport_size({"width": 1440, "height": 900})
    visit.open("/runs/mixed/log")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("searchbox").fill("nothing-has-this-word")
    page.wait_for_selector("text=No line holds these words")
    page.get_by_role("searchbox").fill("committed")
    page.wait_for_selector("#rows-log tbody tr")
    assert page.locator("#rows-log tbody tr").count() == 3
    assert "q=committed" in page.url
    visit.open("/runs/mixed/ledger")
    page.get_by_role("link", name="Verify everything").click()
    page.wait_for_selector("#verified >> text=are sound")
    page.locator("#replay-round").select_option("2")
    page.get_by_role("button", name="Replay").click()
    page.wait_for_selector("#replayed >> text=has the recorded digest")
    shown = page.locator("#replayed code").all_inner_texts()
    visit.open("/runs/mixed/rounds/2")
    recorded = page.locator("dt:has-text('State after it') + dd").inner_text()
    assert shown == [recorded, recorded]
    visit.open("/runs/mixed/robustness")
    page.get_by_role("button", name="Measure distances").click()
    page.wait_for_selector("#measured >> text=Distances were measured of round 3")
    page.get_by_role("link", name="Distance, round 3").wait_for()
    visit.open("/runs/mixed/rounds")
    page.get_by_role("link", name="Evaluation loss", exact=True).click()
    page.wait_for_selector("th[aria-sort=ascending]")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert Path(download.value.path()).read_text().startswith("round,quorum,loss,eval_loss")
    assert page.locator(".chart canvas").count() == 1
    assert visit.wrong == []


def test_one_signs_in_at_another_site_and_comes_back_signed_in(
    visit: Visit, finished_run: Path, openid_issuer: Any, tmp_path: Path
) -> None:
    """The session's cookie is strict, and the browser comes from the provider's site."""
    shutil.copytree(finished_run, tmp_path / "runs" / "mixed")
    settings = tmp_path / "oidc.toml"
    settings.write_text(
        f'issuer = "{openid_issuer.address}"\nclient_id = "dashboard"\nsecret_file = "secret"\n'
        'viewers = ["lab"]\n'
    )
    (tmp_path / "secret").write_text("the client's secret")
    process = subprocess.Popen(
        [sys.executable, "-m", "simulations.command", "dashboard", str(tmp_path / "runs"), "--port",
         "0", "--oidc", str(settings)],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        link = re.search(r"http\S+", process.stdout.readline())
        assert link is not None
        context = visit.page.context.browser.new_context()
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(link.group(0) + "runs/mixed/ledger")
        page.get_by_role("link", name="Sign in with localhost").click()
        page.get_by_role("heading", name="Chain").wait_for()
        assert page.url == link.group(0) + "runs/mixed/ledger"
        assert page.locator(".account .role").inner_text() == "viewer"
        assert said == []
        context.close()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_the_report_is_one_file_that_asks_for_nothing(visit: Visit, tmp_path: Path) -> None:
    """As it is downloaded, opened from a disk: its own policy lets it load and run nothing."""
    page = visit.page
    visit.open("/runs/mixed/rounds")
    with page.expect_download() as download:
        page.get_by_role("link", name="Report").click()
    kept = tmp_path / "report.html"
    download.value.save_as(kept)
    alone = page.context.new_page()
    asked: list[str] = []
    said: list[str] = []
    alone.on("request", lambda request: asked.append(request.url))
    alone.on("console", lambda message: said.append(message.text))
    alone.on("pageerror", lambda error: said.append(str(error)))
    alone.goto(kept.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [kept.as_uri()]
    assert said == []
    # The style sheet is the one that the policy names, or no line would have a width.
    line = alone.locator("path.line.main").first
    assert line.evaluate("e => getComputedStyle(e).strokeWidth") == "3.4px"
    alone.close()


def test_a_run_is_started_stopped_rolled_back_exported_and_continued(
    visit: Visit, live_run: LiveRun, make_configuration: Callable[..., RunConfiguration]
) -> None:
    """A finished run exports; one that is stopped takes a roll-back, which holds when it goes on."""
    page, root = visit.page, live_run.folder.parent
    folder = root / "again"

    def stop(event: events.Event) -> None:
        if event == events.RoundStarted(3):
            ControlQueue(folder).ask("stop", {}, who="test", role="operator", reason="enough")

    nodes = ({"name": "clinic"}, {"name": "school"})
    asked = make_configuration(
        name="again", preset="braid", rounds=4, nodes=nodes, contributions=False
    )
    run_local(asked, folder, stop)
    visit.open("/runs/again/control")
    for button, fields in (
        ("Roll back", {"round": "1"}),
        ("Continue", {}),
    ):
        form = opened(page, button)
        for name, value in fields.items():
            form.locator(f"[name={name}]").fill(value)
        form.locator("[name=reason]").fill("because")
        form.get_by_role("button", name=button, exact=True).click()
        page.wait_for_load_state("load")
    page.locator("#standing .chip", has_text="finished").wait_for()
    ledger = Ledger(folder)
    actions = [e.content["action"] for e in ledger.entries(OPERATOR)]
    assert actions == ["stop", "rollback", "continue"]
    assert len(list(ledger.entries("round"))) == 4
    assert ledger.verify() == []
    ledger.close()
    visit.open("/runs/again/rounds")
    # Who does not see the mark is told of it.
    page.locator(".chart[aria-label*='before round 4: back to round 1'] canvas").wait_for()
    visit.open("/runs/again/control")
    form = opened(page, "Export for peft")
    form.locator("[name=reason]").fill("to try it")
    form.get_by_role("button", name="Export for peft").click()
    page.wait_for_load_state("load")
    page.locator("#jobs tr", has_text="export").locator(".chip", has_text="finished").wait_for()
    page.locator("#rows-requests tr", has_text="export").locator(
        ".chip", has_text="done"
    ).wait_for()
    assert (folder / "exports" / "peft-round-4" / "adapter_config.json").is_file()
    visit.open("/start")
    page.get_by_label("Name of the run").fill("from-the-page")
    page.get_by_label("Scenario").select_option("quickstart")
    changes = f'base_model="{asked.base_model}"\ndata.source="/no/such/data.jsonl"'
    page.get_by_label("Changes").fill(changes)
    page.get_by_label("Reason").fill("a first one")
    page.get_by_role("button", name="Start").click()
    # Its process says why it refuses; nothing runs behind the test's back.
    page.locator("tr", has_text="simulate quickstart").locator(
        ".chip", has_text="failed"
    ).wait_for()
    assert visit.wrong == []
