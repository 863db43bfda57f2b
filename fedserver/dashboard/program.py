"""How one of the programs of this installation is started as a process of its own."""

from __future__ import annotations

import sys

FEDBRAID = "simulations.command"


def command_line(*arguments: str, program: str = FEDBRAID) -> list[str]:
    """``fedbraid ARGUMENTS``, or another module's ``main``, by this interpreter.

    Modules that lie where it is started are not taken for those of the installation.
    """
    return [sys.executable, "-P", "-m", program, *arguments]
