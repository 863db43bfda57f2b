"""The configuration of a run: one TOML file, strict keys, one canonical identity.

A scenario file is read here because both the simulator and a deployed Flower ServerApp need it.
"""

from __future__ import annotations

from fedserver.scenario.data import DataConfiguration
from fedserver.scenario.edges import EdgeConfiguration
from fedserver.scenario.file import (
    SCENARIO_FOLDER,
    load,
    parse,
    scenario_names,
    scenario_path,
    to_toml,
)
from fedserver.scenario.mistakes import ConfigurationError
from fedserver.scenario.nodes import FAULTS, Fault, NodeConfiguration
from fedserver.scenario.run import RunConfiguration
from fedserver.scenario.strands import (
    MixingConfiguration,
    ProjectedConfiguration,
    ZerothOrderConfiguration,
)

__all__ = [
    "FAULTS",
    "SCENARIO_FOLDER",
    "ConfigurationError",
    "DataConfiguration",
    "EdgeConfiguration",
    "Fault",
    "MixingConfiguration",
    "NodeConfiguration",
    "ProjectedConfiguration",
    "RunConfiguration",
    "ZerothOrderConfiguration",
    "load",
    "parse",
    "scenario_names",
    "scenario_path",
    "to_toml",
]
