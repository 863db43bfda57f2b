"""The Flower app that a deployment runs: a bundle that names entry points and holds no code.

``flwr run .`` bundles the sources. A deployed server and its devices have installed them, so this bundle
only says which installed app to load: no code travels to a device, and the bundle's hash, which devices
pin when they join, changes with the version.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import version

import tomli_w
from flwr.cli.build import build_fab_from_files

COMPONENTS = {"serverapp": "fedserver.app:app", "clientapp": "fedclient.app:app"}


@lru_cache(maxsize=1)
def bundle() -> bytes:
    """The app bundle (FAB) of the installed version; the same bytes on every host."""
    project = {
        "project": {
            "name": "fedbraid",
            "version": version("fedbraid"),
            "description": "The installed fedbraid",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedbraid",
                    "components": COMPONENTS,
                    # A run can only override keys that its bundle has.
                    "config": {
                        "scenario": "",
                        "output": "",
                        "set": "",
                        "resume": False,
                        "server-key": "",
                        "enrolment": "",
                    },
                }
            }
        },
    }
    content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})
    return content


def bundle_hash() -> str:
    """SHA-256 of the bundle, in hex: what devices pin."""
    return hashlib.sha256(bundle()).hexdigest()
