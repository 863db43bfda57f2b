"""What the live view draws: the table of nodes, a line for each finished round, the summary.

Names and reasons come from other machines: they are printed as text, never as markup, and without
characters that a terminal obeys.
"""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedserver import events, quantities
from fedserver.events import ACCEPTED
from fedserver.wording import printable
from simulations.progress import WAITING, WORKING, NodeState, RoundState, RunProgress, is_base

BAR_WIDTH = 16
ALL_SHOWN = 24


def header_text(run: events.RunStarted) -> Text:
    """What runs, in one line."""
    text = Text()
    text.append(printable(run.name), style="bold")
    text.append(
        f"  preset {printable(run.preset)} · {printable(run.base_model)} ·"
        f" {quantities.plural(len(run.nodes), 'node')} ·"
        f" {quantities.plural(run.rounds, 'round')}",
        style="dim",
    )
    if run.first_round > 1:
        text.append(f"  continues at round {run.first_round}", style="yellow")
    return text


def round_text(state: RoundState, progress: RunProgress, width: int | None = None) -> Text:
    """The line of a finished round; what matters least is left out where ``width`` is short."""
    text = Text()
    text.append(f"{'base' if is_base(state) else _label(state.round, progress):<11} ", "bold")
    if state.evaluation is not None:
        text.append(f"loss {quantities.loss_text(state.evaluation.loss)}")
        before = progress.previous_loss(state.round)
        if before is not None:
            change = state.evaluation.loss - before
            shown = quantities.signed(f"{change:+.3f}")
            text.append(f" ({shown})", style="green" if change < 0 else "red")
    elif state.told:
        text.append("not evaluated", style="dim")
    else:
        text.append("loss comes with the next replies", style="dim")
    for segment in _segments(state):
        if width is None or text.cell_len + segment.cell_len + 2 <= width:
            text.append("  ").append_text(segment)
    return text


def refusal_text(event: events.NodeReplied, progress: RunProgress) -> Text:
    """The line of a refused reply: who, what, why."""
    text = Text()
    text.append(f"{_label(event.round, progress):<11} ", style="bold")
    text.append(f"{printable(event.node)} refused: ", style="red")
    text.append(words(event.verdict))
    if event.reason:
        text.append(f"; {printable(event.reason)}")
    return text


def reply_text(event: events.NodeReplied, progress: RunProgress) -> Text:
    """The line of an accepted reply, where no table shows it."""
    parts = [printable(event.sends)]
    if event.train_loss is not None:
        first = quantities.loss_text(event.train_loss_first)
        parts.append(f"training loss {first} → {quantities.loss_text(event.train_loss)}")
    parts += [
        f"{quantities.bytes_text(event.bytes_up)} up",
        f"{quantities.bytes_text(event.bytes_down)} down",
        quantities.duration_text(event.seconds),
    ]
    did = "evaluated" if progress.evaluating else words(event.verdict)
    label = _label(event.round, progress)
    return Text(f"{label:<11} {printable(event.node)} {did}, {', '.join(parts)}")


def notice_text(event: events.Notice) -> Text:
    """A notice in the colour of its level."""
    style = {"warning": "yellow", "error": "bold red"}.get(event.level, "dim")
    return Text(f"{printable(event.level)}: {printable(event.text)}", style=style)


def words(verdict: str) -> str:
    """A verdict as it reads: "not finite"."""
    return printable(verdict).replace("_", " ")


def live_table(progress: RunProgress, now: float, *, width: int, height: int) -> RenderableType:
    """The moving part: the nodes of the round, rounds still to be evaluated, time."""
    if progress.run is None:
        return Text(f"starting, {quantities.duration_text(progress.elapsed(now))}", style="dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for name, numeric in (
        ("round", True),
        ("node", False),
        ("sends", False),
        ("steps", False),
        ("loss", True),
        ("up", True),
        ("down", True),
        ("verdict", False),
    ):
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    shown, hidden = _fitting(list(progress.nodes.values()), max(height - 9, 4))
    label = "final" if progress.evaluating else str(progress.current or "")
    for index, node in enumerate(shown):
        table.add_row(
            label if index == 0 else "",
            Text(printable(node.node)),
            printable(node.sends),
            _steps(node, progress.evaluating),
            "" if node.loss is None else quantities.loss_text(node.loss),
            _size(node.bytes_up),
            _size(node.bytes_down),
            _verdict(node, progress.evaluating),
        )
    parts: list[RenderableType] = [table]
    if hidden:
        counted = Counter(words(node.status) for node in hidden)
        told = ", ".join(f"{count} {status}" for status, count in sorted(counted.items()))
        parts.append(
            Text(f"and {quantities.plural(len(hidden), 'node')} more: {told}", style="dim")
        )
    parts += [
        round_text(state, progress, width)
        for _, state in sorted(progress.rounds.items())
        if not state.told and state.committed is not None
    ]
    parts.append(_time_line(progress, now))
    return Group(*parts)


def summary_panel(progress: RunProgress, finished: events.RunFinished) -> Panel:
    """The end of a run in a few lines."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in summary_rows(progress, finished):
        grid.add_row(name, Text(value))
    title = printable(progress.run.name) if progress.run else "run"
    last = progress.run.rounds if progress.run else 0
    how = "ended without a quorum" if last in finished.without_quorum else "finished"
    if finished.rounds is not None and finished.rounds < last:
        how = f"stopped after round {finished.rounds} of {last}"
    return Panel(grid, title=Text(f"{title} {how}"), title_align="left", expand=False)


def summary_rows(progress: RunProgress, finished: events.RunFinished) -> list[tuple[str, str]]:
    """Name and value of every line of the summary."""
    before, after = finished.before, finished.after
    rows = []
    if after is None and finished.evaluated is not None:
        told = quantities.loss_text(finished.evaluated.loss)
        which = "of the base model"
        if finished.evaluated_round != events.BASE_ROUND:
            which = f"after round {finished.evaluated_round}"
        rows.append(("evaluation loss", f"{told} {which}, the last that was evaluated"))
    elif after is None:
        rows.append(("evaluation", "the tuned model was not evaluated"))
    else:
        rows += [
            (
                "evaluation loss",
                _change(
                    quantities.loss_text(before.loss) if before else "",
                    quantities.loss_text(after.loss),
                    quantities.change_text(before.loss if before else None, after.loss),
                ),
            ),
            *_new_rows(before, after),
            (
                "perplexity",
                _change(
                    quantities.number_text(before.perplexity) if before else "",
                    quantities.number_text(after.perplexity),
                ),
            ),
            (
                "token accuracy",
                _change(
                    quantities.share_text(before.accuracy) if before else "",
                    quantities.share_text(after.accuracy),
                ),
            ),
        ]
    rows.append(
        (
            "network",
            f"{quantities.bytes_text(_known(finished.bytes_up, progress.bytes_up))} up,"
            f" {quantities.bytes_text(_known(finished.bytes_down, progress.bytes_down))} down",
        )
    )
    if len(finished.families) > 1:
        rows += [(words(work.family), _work(work)) for work in finished.families]
    rows.append(
        ("replies", f"{progress.accepted} accepted, {progress.refused} refused, late or missing")
    )
    if finished.without_quorum:
        told = quantities.spans_text(finished.without_quorum)
        rows.append(("no quorum", f"{told}: counted nothing"))
    rows.append(("time", quantities.duration_text(finished.seconds)))
    paths = (("report", finished.report), ("adapter", finished.adapter), ("head", finished.head))
    return rows + [(name, printable(value)) for name, value in paths if value]


def _work(work: events.FamilyWork) -> str:
    """What a family cost, and what it is worth."""
    nodes = "1 node" if work.nodes == 1 else f"{work.nodes} nodes"
    parts = [
        nodes,
        f"{quantities.bytes_text(work.bytes_up)} up, {quantities.bytes_text(work.bytes_down)} down",
        f"{quantities.duration_text(work.seconds)} of work",
    ]
    if work.contribution is not None:
        parts.append(f"loss {work.contribution:+.3f} without it")
    return ", ".join(parts)


def _label(number: int, progress: RunProgress) -> str:
    rounds = progress.run.rounds if progress.run else number
    return f"round {number}/{rounds}" if number <= rounds else "evaluation"


def _segments(state: RoundState) -> list[Text]:
    """The rest of a round's line, in the order of its weight."""
    parts = []
    committed = state.committed
    if committed is not None:
        replies = committed.accepted + committed.rejected
        style = "red" if committed.rejected else "green"
        if not committed.quorum:
            parts.append(Text("no quorum", "bold red"))
        parts += [
            Text(f"{committed.accepted}/{replies} accepted", style),
            Text(
                f"↑ {quantities.bytes_text(committed.bytes_up)}"
                f" ↓ {quantities.bytes_text(committed.bytes_down)}",
                "dim",
            ),
            Text(quantities.duration_text(committed.seconds), "dim"),
            Text(
                f"carry {committed.carry_rank}, tail"
                f" {quantities.share_text(committed.tail_energy)}",
                "dim",
            ),
        ]
    if state.evaluation is not None:
        parts.append(Text(f"accuracy {quantities.share_text(state.evaluation.accuracy)}", "dim"))
    return parts


def _fitting(nodes: list[NodeState], room: int) -> tuple[list[NodeState], list[NodeState]]:
    """As many nodes as fit: those at work first, then refused, waiting and accepted ones."""
    room = min(room, ALL_SHOWN)
    if len(nodes) <= room:
        return nodes, []
    urgency = {WORKING: 0, WAITING: 2}
    order = sorted(
        nodes, key=lambda node: urgency.get(node.status, 1 + (node.status == ACCEPTED) * 2)
    )
    chosen = {id(node) for node in order[: room - 1]}
    return (
        [node for node in nodes if id(node) in chosen],
        [node for node in nodes if id(node) not in chosen],
    )


def _steps(node: NodeState, evaluating: bool) -> RenderableType:
    if evaluating or node.status == WAITING:
        return Text("")
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1.0, completed=node.share, width=BAR_WIDTH)
    grid.add_row(bar, Text(f"{node.step}/{node.steps}" if node.steps else "", style="dim"))
    return grid


def _verdict(node: NodeState, evaluating: bool) -> Text:
    if node.status in (WAITING, WORKING):
        return Text("evaluating" if evaluating and node.status == WORKING else node.status, "dim")
    if node.status == ACCEPTED:
        return Text("evaluated" if evaluating else ACCEPTED, style="green")
    return Text(words(node.status), style="red")


def _size(count: int | None) -> str:
    return "" if count is None else quantities.bytes_text(count)


def _time_line(progress: RunProgress, now: float) -> RenderableType:
    remaining = progress.remaining(now)
    left = "" if remaining is None else f"about {quantities.duration_text(remaining)} left"
    if progress.evaluating:
        left = "evaluating the last round's model"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        ProgressBar(total=1.0, completed=progress.share(), width=BAR_WIDTH * 2),
        Text(f"{100 * progress.share():.0f} %"),
        Text(f"{quantities.duration_text(progress.elapsed(now))} elapsed", style="dim"),
        Text(left),
    )
    return grid


def _known(total: int | None, seen: int) -> int:
    """The run's total, else what this process saw of it."""
    return seen if total is None else total


def _new_rows(before: events.Evaluation | None, after: events.Evaluation) -> list[tuple[str, str]]:
    """The loss on answers that no node learnt word for word, where the data repeat themselves."""
    if after.new_loss is None:
        return []
    base = before.new_loss if before else None
    shown = _change(
        quantities.loss_text(base) if base is not None else "",
        quantities.loss_text(after.new_loss),
        quantities.change_text(base, after.new_loss),
    )
    repeated = after.tokens - after.new_tokens
    return [
        ("  on new rows", f"{shown}; {repeated:,} of {after.tokens:,} tokens repeat learnt rows")
    ]


def _change(before: str, after: str, change: str = "") -> str:
    shown = f"{before} → {after}" if before else after
    return f"{shown}  ({change})" if change else shown
