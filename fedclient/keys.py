"""A device's own key: made on the device, kept beside its cache, and never sent anywhere."""

from __future__ import annotations

from pathlib import Path

from aggregators.keys import KeyFileError, load_or_create, public_hex, sign
from fedclient.base_model import cache_folder

__all__ = ["KeyFileError", "load_or_create", "own_key_file", "public_hex", "sign"]


def own_key_file() -> Path:
    """Where a device's key lies unless its settings say otherwise."""
    return cache_folder() / "keys" / "node.pem"
