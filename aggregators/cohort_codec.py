"""The wire form of cohorts: each total as a lossless update whose numbers are exact digits."""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from aggregators.codec import Header, check_header, update_from_parts, update_parts
from aggregators.cohort import Cohort, CohortMember
from aggregators.exact_numbers import ExactNumbers
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.totals import Total, tensors_of, vectors
from aggregators.update import UpdateRejected, Verdict

SCHEMA = 1
NUMBERS, DIGITS = "numbers", "digits"
MOST_TOTALS = 1 << 12
LARGEST_WEIGHT = 10**13


def cohort_parts(cohort: Cohort) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a cohort. TypeError for a family that has no vector of numbers."""
    tensors: dict[str, Tensor] = {}
    described = []
    for place, total in enumerate(cohort.totals):
        fields, own = update_parts(total.form)
        one: dict[str, Any] = {"weight": total.weight, "form": fields, "held": _unlike(total)}
        if not isinstance(total.form, LowRank):
            if own.pop(NUMBERS, None) is None:
                raise TypeError(f"no codec for totals of the family {total.family!r}")
            digits = torch.cat([part.digits for part in total.numbers.values()], dim=1)
            own[DIGITS], one["lowest"] = ExactNumbers(digits).wire()
        described.append(one)
        tensors |= {f"{place}.{key}": tensor for key, tensor in own.items()}
    header = {
        "schema": SCHEMA,
        "family": cohort.family,
        "layout": cohort.layout.fingerprint,
        "totals": described,
        "members": [member.model_dump(mode="json") for member in cohort.members],
    }
    return header, tensors


def read_cohort(header: Header, tensors: dict[str, Tensor], layout: Layout) -> Cohort:
    """The cohort that ``cohort_parts`` wrote. Raises UpdateRejected and nothing else."""
    check_header(header, layout)
    described, members = header.get("totals"), header.get("members")
    if not isinstance(described, list) or not isinstance(members, list):
        raise UpdateRejected(Verdict.MALFORMED, "a cohort has totals and members")
    if len(described) > MOST_TOTALS:
        raise UpdateRejected(Verdict.MALFORMED, f"a cohort of {len(described)} totals")
    owned: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, _, part = key.partition(".")
        owned.setdefault(place, {})[part] = tensor
    if unknown := sorted(owned.keys() - {str(place) for place in range(len(described))}):
        raise UpdateRejected(Verdict.UNKNOWN_TENSOR, f"a tensor of no total: {unknown[0]!r}")
    totals = [_total(one, owned.get(str(n), {}), layout) for n, one in enumerate(described)]
    try:
        # Strict, by way of JSON, as envelopes are.
        found = [CohortMember.model_validate_json(json.dumps(m), strict=True) for m in members]
        return Cohort(totals, found)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UpdateRejected(Verdict.MALFORMED, f"member {where}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None


def _total(one: Any, tensors: dict[str, Tensor], layout: Layout) -> Total:
    if not isinstance(one, dict) or not isinstance(one.get("form"), dict):
        raise UpdateRejected(Verdict.MALFORMED, "a total is not a JSON object")
    weight: Any = one.get("weight")
    if not _is_weight(weight, LARGEST_WEIGHT):
        raise UpdateRejected(Verdict.WEIGHT, f"a total of weight {weight!r:.20}")
    if one["form"].get("family") == LowRank.family:
        stacked = update_from_parts(one["form"], tensors, layout)
        return Total(stacked, weight, held=_held(one, stacked, layout))
    digits, lowest = tensors.pop(DIGITS, None), one.get("lowest")
    if digits is None or NUMBERS in tensors or type(lowest) is not int:
        raise UpdateRejected(Verdict.MALFORMED, "a total has digits, and a place of the lowest")
    if digits.ndim != 2 or len(digits) < 1:
        raise UpdateRejected(Verdict.SHAPE, f"digits {list(digits.shape)} are of no numbers")
    # One zero that stands for all: no memory is taken before the form has said that it has so many.
    count = digits.shape[1]
    zeros = torch.zeros(1, dtype=torch.float64).expand(count)
    form = update_from_parts(one["form"], tensors | {NUMBERS: zeros}, layout)
    try:
        parts = vectors(form)
    except TypeError as error:
        raise UpdateRejected(Verdict.WRONG_FAMILY, str(error)) from None
    sizes = [len(part) for part in parts.values()]
    if sum(sizes) != count:
        raise UpdateRejected(Verdict.SHAPE, f"{count} numbers, not {sum(sizes)}")
    try:
        numbers = ExactNumbers.from_wire(digits, lowest)
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None
    split = torch.split(numbers.digits, sizes, dim=1)
    numbered = dict(zip(parts, map(ExactNumbers, split), strict=True))
    return Total(form, weight, numbered, _held(one, form, layout))


def _unlike(total: Total) -> list[list[float]]:
    """Tensor id and weight of tensors that some members lack, or that all of a stack was cut from."""
    layout, own = total.form.layout, set(tensors_of(total.form))
    return [
        [layout.tensor_id(name), held]
        for name, held in sorted(total.held.items())
        if held != total.weight or name not in own
    ]


def _held(one: dict[str, Any], form: Any, layout: Layout) -> dict[str, float]:
    found = dict.fromkeys(tensors_of(form), one["weight"])
    unlike = one.get("held")
    if not isinstance(unlike, list):
        raise UpdateRejected(Verdict.MALFORMED, "a total says which tensors some members lack")
    for pair in unlike:
        match pair:
            case [tensor_id, held] if (
                type(tensor_id) is int
                and 0 <= tensor_id < len(layout)
                and _is_weight(held, one["weight"])
            ):
                found[layout.tensors[tensor_id].name] = held
            case _:
                raise UpdateRejected(
                    Verdict.WEIGHT, f"no tensor and weight of its members: {pair!r:.60}"
                )
    return found


def _is_weight(value: Any, most: float) -> bool:
    """Whether it is a sum of counts of examples: a whole number, at least 1."""
    return type(value) in (int, float) and 1 <= value <= most and value == int(value)
