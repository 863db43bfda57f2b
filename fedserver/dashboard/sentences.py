"""What an event of a run says, as a sentence for people; which node and which round stand beside it."""

from __future__ import annotations

from fedserver import events
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.sound_values import sound_event
from fedserver.quantities import bytes_text, duration_text, loss_text, plural, share_text

PHASES = {
    "plan": "The server plans what each node is to do.",
    "aggregate": "The accepted updates are added up.",
    "commit": "The round is written into the ledger.",
    "paused": "The run is paused until an operator resumes it.",
}
NOTHING = {
    "missing": "Nothing came",
    "revoked": "Revoked",
    "late": "Came too late",
}
"""Verdicts on what the gate has not refused."""
ENDS = {
    "finished": "The run has finished",
    "no_quorum": "The run has ended without a quorum",
    "stopped": "The run was stopped",
    "interrupted": "The run was interrupted",
    "failed": "The run has failed",
}


def sentence(told: Row) -> str | None:
    """Of one line of a log; None for an event that this version does not know."""
    match events.from_json(sound_event(told)):
        case events.RunStarted() as run:
            begins = f"{run.name} begins: {plural(run.rounds, 'round')}"
            if run.first_round > 1:
                begins = f"{run.name} goes on with round {run.first_round} of {run.rounds}"
            nodes = plural(len(run.nodes), "node")
            return f"{begins}, {nodes}, preset {run.preset}, base model {run.base_model}."
        case events.RoundStarted():
            return "The round begins."
        case events.PhaseStarted() as phase:
            return _phase(phase)
        case events.PlansSent(_, nodes, size):
            return f"{plural(nodes, 'plan')} sent, {bytes_text(size)} in all."
        case events.NodeStarted():
            return "It has received its plan."
        case events.NodeReplied() as reply:
            return _reply(reply)
        case events.EvaluationDone() as found:
            model = "base model" if found.round == events.BASE_ROUND else "model after this round"
            return (
                f"Evaluation loss of the {model}: {loss_text(found.loss)},"
                f" {share_text(found.accuracy)} of {plural(found.tokens, 'token')} right."
            )
        case events.RoundCommitted() as done:
            missed = "" if done.quorum else "The quorum was missed and the model stays as it was: "
            loss = "" if done.loss is None else f", training loss {loss_text(done.loss)}"
            return (
                f"{missed}{plural(done.accepted, 'reply')} accepted, {done.rejected:,} not{loss};"
                f" {bytes_text(done.bytes_up)} up and {bytes_text(done.bytes_down)} down in"
                f" {duration_text(done.seconds)}."
            )
        case events.RoundsEnded(outcome, reason):
            return _ended(ENDS.get(outcome, f"The run has ended: {outcome}"), reason)
        case events.Notice(_, text):
            return text
        case _:
            return None


def level(told: Row) -> str:
    """info, warning or error."""
    match events.from_json(sound_event(told)):
        case events.NodeReplied(verdict=verdict) if verdict != events.ACCEPTED:
            return "warning"
        case events.RoundCommitted(quorum=False):
            return "warning"
        case events.PhaseStarted(phase="held"):
            return "warning"
        case events.RoundsEnded(outcome="failed"):
            return "error"
        case events.RoundsEnded(outcome="interrupted" | "no_quorum"):
            return "warning"
    return str(told.get("level") or "info")


def spoken(value: object) -> str:
    """A plain value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _phase(phase: events.PhaseStarted) -> str:
    asked = plural(phase.nodes, "node")
    within = (
        "" if phase.deadline_seconds is None else f" within {duration_text(phase.deadline_seconds)}"
    )
    match phase.phase:
        case "train":
            needed = f"; the round needs {plural(phase.quorum, 'update')}" if phase.quorum else ""
            return f"{asked} asked to train{within}{needed}."
        case "evaluate":
            return f"{asked} asked to evaluate the model{within}."
        case "held":
            return _ended("The run is held", phase.reason)
    return PHASES.get(phase.phase, f"Next is the phase {phase.phase}.")


def _reply(reply: events.NodeReplied) -> str:
    if reply.verdict != events.ACCEPTED:
        how = NOTHING.get(reply.verdict, f"Refused, {reply.verdict.replace('_', ' ')}")
        return _ended(how, reply.reason)
    loss = ""
    if reply.train_loss is not None:
        first = reply.train_loss_first
        loss = f"; training loss {'' if first is None else f'{loss_text(first)} → '}"
        loss += loss_text(reply.train_loss)
    return (
        f"Accepted: {reply.sends}, {bytes_text(reply.bytes_up)} after"
        f" {duration_text(reply.seconds)} of work{loss}."
    )


def _ended(text: str, reason: str) -> str:
    told = f"{text}: {reason}" if reason else text
    return told if told.endswith((".", "!", "?")) else f"{told}."
