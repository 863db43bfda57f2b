"""Self-contained HTML pages: the templates, their style, and the promise that they load nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedserver import quantities

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(template: str, **context: object) -> str:
    """A page from ``templates/``: every value is escaped, an unknown one is an error."""
    return _environment().get_template(template).render(**context)


def write_page(content: str, target: Path) -> Path:
    """Write a page whole or not at all: a report that was there stays until the new one is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.part")
    draft.write_text(content, encoding="utf-8")
    draft.replace(target)
    return target


def datum(value: float | int | None, shown: str, unit: str = "") -> Markup:
    """A number as it reads, with its exact value in the markup: nothing is lost by rounding."""
    if value is None:
        return Markup('<span class="missing">{}</span>').format(quantities.MISSING)
    return Markup('<data value="{}">{}</data>{}').format(repr(value), shown, unit)


def braid_mark(width: int = 132, height: int = 26) -> Markup:
    """Three strands that cross over and under each other: the decoration of a page's head."""
    steps, turns = 132, 2.25
    pieces: list[tuple[float, Markup]] = []
    for strand in range(3):
        phase = 2 * math.pi * strand / 3

        def place(step: float, phase: float = phase) -> str:
            angle = 2 * math.pi * turns * step / steps + phase
            x = 3 + (width - 6) * step / steps
            return f"{x:.1f},{height / 2 + (height / 2 - 4) * math.sin(angle):.1f}"

        for start in range(0, steps, 3):
            # In a flat braid (x, y) = (t, sin t) the strand is on top where sin 2t is positive.
            middle = 2 * math.pi * turns * (start + 1.5) / steps + phase
            path = "L".join(place(start + offset) for offset in (-0.4, 1, 2, 3.4))
            pieces.append(
                (
                    math.sin(2 * middle),
                    Markup(
                        '<path class="halo" d="M{0}"/><path class="strand tone-{1}" d="M{0}"/>'
                    ).format(path, strand),
                )
            )
    body = Markup("").join(piece for _, piece in sorted(pieces, key=lambda piece: piece[0]))
    return Markup('<svg class="braid" viewBox="0 0 {} {}" aria-hidden="true">{}</svg>').format(
        width, height, body
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment.globals.update(
        braid_mark=braid_mark,
        datum=datum,
        # The style sheet is ours and holds no value of a run, so it goes in as it is.
        style=Markup(style),
        # A browser itself holds the page to its promise: this style, no script, no request.
        policy=Markup(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"),
    )
    environment.filters.update(
        bytes=quantities.bytes_text,
        count=quantities.count_text,
        duration=quantities.duration_text,
        loss=quantities.loss_text,
        number=quantities.number_text,
        share=quantities.share_text,
    )
    return environment
