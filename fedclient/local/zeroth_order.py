"""To come."""

from typing import Any

train: Any = None
send: Any = None
