"""A device's own key: made on the device, kept in one file there, and never sent anywhere."""

from __future__ import annotations

from aggregators.keys import KeyFileError, load_or_create, public_hex, sign

__all__ = ["KeyFileError", "load_or_create", "public_hex", "sign"]
