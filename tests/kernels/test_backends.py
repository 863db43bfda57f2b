"""A backend is chosen by name, and a machine without a compiler has the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import fedkernels as fk
from fedkernels.backends import cpu_backends

WITHOUT_EXTENSION = """
import sys
sys.modules["fedkernels._cpu"] = None  # what an import meets where there is no such file
import fedkernels as fk
assert fk.backend() == "reference" and set(fk.backends()) <= {"reference", "triton"}
assert fk.noise(1, 2, (3, 4)).shape == fk.noise(1, 2, (3, 4)).shape == (3, 4)
"""

WITHOUT_INTERPRETER = """
import sys, pytest, torch
import fedkernels as fk
from fedkernels.backends import _Selection, uses_triton
assert "triton" not in sys.modules, "importing fedkernels imports Triton"
assert ("triton" in fk.backends()) <= torch.cuda.is_available()
assert not uses_triton(torch.device("cpu"))
_Selection.name = "triton"
with pytest.raises(ValueError, match="TRITON_INTERPRET"):
    uses_triton(torch.device("cpu"))
"""


def test_the_fastest_backend_is_the_default_and_the_reference_is_always_there():
    assert fk.backends()[0] == "reference"
    assert fk.backend() == cpu_backends()[-1]


def test_a_machine_with_a_compiler_has_the_compiled_backend():
    # The build falls back to the reference without failing: a broken build must show here.
    compiler = shutil.which("c++") or shutil.which("cl")
    assert compiler is None or "portable" in fk.backends()


def test_a_chosen_backend_is_in_use(backend):
    assert fk.backend() == backend


def test_triton_is_imported_when_asked_for_and_interprets_only_when_told():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_INTERPRETER]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_backend_is_refused_and_the_choice_stays():
    before = fk.backend()
    with pytest.raises(ValueError, match="abacus"):
        fk.use_backend("abacus")
    assert fk.backend() == before


def test_without_the_extension_the_reference_works_and_says_so_once():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTENSION], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""
