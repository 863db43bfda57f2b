"""The wire form of sketches: one vector of numbers, column by column, and what tells it apart.

The number of bytes is that of the coordinates and little more: a safetensors entry for each part of
each matrix would cost some 300 bytes of header a matrix. In float16 and int8 every column has a unit
of its own, for a gradient's coordinates may lie far below float16's smallest number.
"""

from __future__ import annotations

import itertools
import math
import string
from typing import Any

import torch
from torch import Tensor

from aggregators.layout import Layout
from aggregators.probe_codec import numbers_parts, only_parts, read_numbers
from aggregators.sketch import Sketch
from aggregators.update import UpdateRejected, Verdict

LARGEST_WIDTH = 4096


def sketch_parts(update: Sketch, dtype: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header fields and tensors of a sketch."""
    layout = update.layout
    widths = [(view.P.shape[1], view.R.shape[1]) for view in update.views.values()]
    values = [part for view in update.views.values() for part in (view.P.T, view.R.T)]
    values += update.whole.values()
    flat = torch.cat([v.flatten() for v in values] or [torch.zeros(0, dtype=torch.float64)])
    sections = _sections(layout, list(update.views), widths, list(update.whole))
    tensors = numbers_parts(flat, torch.tensor(sections, dtype=torch.int64), dtype)
    tensors["ids"] = _ids(layout, update.views)
    tensors["widths"] = torch.tensor(widths, dtype=torch.int32).reshape(-1, 2)
    tensors["whole"] = _ids(layout, update.whole)
    return {"basis": update.basis_digest}, tensors


def read_sketch(header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout) -> Sketch:
    """A sketch from what ``sketch_parts`` wrote. Raises UpdateRejected alone.

    Which basis is the round's is not known here: ``Basis.check`` compares.
    """
    digest = header.get("basis")
    if (
        not isinstance(digest, str)
        or len(digest) != 64
        or not set(digest) <= set(string.hexdigits.lower())
    ):
        raise UpdateRejected(Verdict.MALFORMED, "a sketch names the SHA-256 of its basis")
    only_parts(tensors, {"ids", "widths", "whole", "numbers", "largest"})
    if missing := sorted({"ids", "widths", "whole", "numbers"} - tensors.keys()):
        raise UpdateRejected(Verdict.MALFORMED, f"the sketch's part {missing[0]!r} is missing")
    sketched, whole = _read_ids(tensors["ids"], layout), _read_ids(tensors["whole"], layout)
    if set(sketched) & set(whole):
        raise UpdateRejected(Verdict.MALFORMED, "a tensor is both sketched and whole")
    widths = _read_widths(tensors["widths"], sketched, layout)
    sections = _sections(layout, sketched, widths, whole)
    numbers = tensors["numbers"]
    if numbers.ndim != 1 or len(numbers) != sum(sections):
        raise UpdateRejected(
            Verdict.SHAPE, f"numbers {list(numbers.shape)}, and the widths make {sum(sections)}"
        )
    flat = read_numbers(tensors, torch.tensor(sections, dtype=torch.int64))
    values = iter(torch.split(flat, sections))
    views = {}
    for name, (p, r) in zip(sketched, widths, strict=True):
        left = torch.stack(list(itertools.islice(values, p)), dim=1)
        views[name] = (left, torch.stack(list(itertools.islice(values, r)), dim=1))
    rest = {name: next(values).reshape(layout.shape(name)) for name in whole}
    try:
        return Sketch(layout, digest, views, rest)
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None


def _sections(
    layout: Layout, sketched: list[str], widths: list[tuple[int, int]], whole: list[str]
) -> list[int]:
    """Lengths of what shares a unit: P's columns and R's of each matrix, then each whole tensor."""
    sections: list[int] = []
    for name, (p, r) in zip(sketched, widths, strict=True):
        rows, columns = layout.shape(name)
        sections += [rows] * p + [columns] * r
    return sections + [math.prod(layout.shape(name)) for name in whole]


def _ids(layout: Layout, names: Any) -> Tensor:
    return torch.tensor([layout.tensor_id(name) for name in names], dtype=torch.int32)


def _read_ids(ids: Tensor, layout: Layout) -> list[str]:
    if ids.dtype != torch.int32 or ids.ndim != 1:
        raise UpdateRejected(Verdict.DTYPE, "a sketch's tensor ids must be a vector of int32")
    if bool((ids[1:] <= ids[:-1]).any()) or (
        len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < len(layout)
    ):
        raise UpdateRejected(Verdict.UNKNOWN_TENSOR, "tensor ids must ascend and be in the layout")
    return [layout.tensors[index].name for index in ids.tolist()]


def _read_widths(widths: Tensor, names: list[str], layout: Layout) -> list[tuple[int, int]]:
    if widths.dtype != torch.int32 or widths.shape != (len(names), 2):
        raise UpdateRejected(Verdict.SHAPE, "a sketch has two widths, int32, for each matrix")
    found = [(int(p), int(r)) for p, r in widths.tolist()]
    for name, (p, r) in zip(names, found, strict=True):
        if len(layout.shape(name)) != 2:
            raise UpdateRejected(Verdict.SHAPE, f"layer {name!r}: only matrices are sketched")
        if not 1 <= p <= r <= LARGEST_WIDTH:
            raise UpdateRejected(Verdict.SHAPE, f"layer {name!r}: P has {p} columns, and R {r}")
    return found
