"""Backends are tested where they exist; the compiled module's own tests need the module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fedkernels as fk
from fedkernels.backends import cpu_backends

collect_ignore_glob = [] if "portable" in fk.backends() else ["test_compiled*.py"]
if "triton" not in fk.backends():
    collect_ignore_glob += ["test_triton*.py"]


@pytest.fixture(params=cpu_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for the CPU in turn, in use during the test; Triton has tests of its own."""
    before = fk.backend()
    fk.use_backend(request.param)
    yield request.param
    fk.use_backend(before)
