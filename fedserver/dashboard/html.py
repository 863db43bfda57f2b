"""HTML of views: the templates and how values read in them. Every value is escaped."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fedserver import quantities
from fedserver.dashboard import sound_values
from fedserver.dashboard.page import Page, run_address
from fedserver.dashboard.sound_values import plain
from fedserver.dashboard.tables import Column

NUMBERS = {
    "count": quantities.count_text,
    "bytes": quantities.bytes_text,
    "seconds": quantities.duration_text,
    "loss": quantities.loss_text,
    "share": quantities.share_text,
    "number": quantities.number_text,
}
"""How numbers of each kind of column read."""
MEASURES = {*NUMBERS, "bar", "time"}
"""Kinds of column whose values are numbers; whatever else stands there is a text."""
TEMPLATES = Path(__file__).resolve().parent / "templates"
GOOD = {"accepted", "finished", "member", "applied", "info", "met", "done"}
BUSY = {"running", "working", "paused", "pending", "requested"}
QUIET = {"waiting", "silent", "unknown", "drained", "stopped"}
# Characters that show another text than the one that is there, or none. The two joiners are not among
# them: some scripts cannot be written without.
DECEPTIVE = dict.fromkeys(
    [
        *(0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, 0xFEFF, 0xFFFE, 0xFFFF),
        *range(0x2028, 0x202F),
        *range(0x2060, 0x206A),
    ],
    "\ufffd",
)
DECEPTIVE |= dict.fromkeys(
    [*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)], "\ufffd"
)


def render(template: str, page: Page | None = None, **context: Any) -> str:
    """A template with a page's data and tables as ``data`` and ``tables``."""
    if page is not None:
        context |= {"data": page.data, "tables": page.tables}
    text = _environment().get_template(template).render(**context)
    # Half of a pair of code units, which JSON can hold, is no character and cannot be sent.
    return text.encode("utf-8", "replace").decode()


def compile_templates() -> None:
    """Compile all templates, so that no visitor waits for it."""
    environment = _environment()
    for name in environment.list_templates():
        environment.get_template(name)


def cell(row: dict[str, Any], column: Column) -> Markup:
    """One value as its column's kind reads, with the exact value in the markup."""
    value = row.get(column.key)
    if value is None or value == "":
        return Markup('<span class="missing">–</span>')
    shown = _shown(value, column.kind)
    address = row.get(column.link) if column.link else None
    return Markup('<a href="{}">{}</a>').format(address, shown) if address else shown


def _shown(value: Any, kind: str) -> Markup:
    if isinstance(value, float) and not math.isfinite(value):
        return escape(str(value))
    if kind in MEASURES and not isinstance(value, (int, float)):
        kind = "text"
    match kind:
        case "state":
            return chip(str(value))
        case "time":
            return moment(value)
        case "hash":
            text = clean(value)
            return Markup('<code title="{}">{}</code>').format(text, text[:12])
        case "mono":
            return Markup("<code>{}</code>").format(clean(value))
        case "bar":
            return Markup("{} {}").format(proportion(float(value)), _number(value, "share"))
        case "text":
            return Markup("<bdi>{}</bdi>").format(clean(value))
    return _number(value, kind)


def _number(value: float, kind: str) -> Markup:
    shown = NUMBERS[kind](value)
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


def chip(state: str) -> Markup:
    """A state as a word with a colour: the word says it, the colour repeats it."""
    kind = (
        "ok" if state in GOOD else "busy" if state in BUSY else "quiet" if state in QUIET else "no"
    )
    return Markup('<span class="chip {}">{}</span>').format(kind, clean(state.replace("_", " ")))


def moment(seconds: Any) -> Markup:
    """A time stamp, in UTC; the page's script shows it in the reader's zone. Of no date: a dash."""
    if not sound_values.moment(seconds):
        return Markup('<span class="missing">–</span>')
    when = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        when.isoformat(timespec="milliseconds"), when.strftime("%Y-%m-%d %H:%M:%S")
    )


def proportion(share: float) -> Markup:
    """A bar of a share; decoration beside a number.

    It ends at the whole. What is more than the whole makes a longer bar, drawn to the same width: the
    part beyond the whole has a colour of its own.
    """
    whole = min(1.0, 1.0 / share) if share > 0.0 else 1.0
    width = round(100 * min(max(share, 0.0), whole), 2)
    beyond = (
        Markup('<rect class="beyond" x="{}" width="{}" height="6"/>').format(width, 100 - width)
        if whole < 1.0
        else ""
    )
    return Markup(
        '<svg class="proportion" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"/><rect class="part" width="{}" height="6"/>{}</svg>'
    ).format(width, beyond)


def clean(value: Any) -> str:
    """A text of another machine without what would turn or hide its neighbours."""
    return str(value).translate(DECEPTIVE)


def address(path: str, **values: Any) -> str:
    """A path with the values that are set."""
    query = urlencode({key: value for key, value in values.items() if value not in ("", None, 1)})
    return f"{path}{'&' if '?' in path else '?'}{query}" if query else path


def plot(value: Any) -> str:
    """A chart's columns as JSON, for an attribute."""
    return clean(json.dumps(plain(value), allow_nan=False, ensure_ascii=False))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(cell=cell, chip=chip, moment=moment, address=address)
    environment.globals.update(run_address=run_address)
    environment.globals.update(proportion=proportion, plot=plot)
    environment.filters.update(
        spans=quantities.spans_text,
        bytes=quantities.bytes_text,
        count=quantities.count_text,
        duration=quantities.duration_text,
        loss=quantities.loss_text,
        number=quantities.number_text,
        share=quantities.share_text,
        plural=quantities.plural,
        clean=clean,
    )
    return environment
