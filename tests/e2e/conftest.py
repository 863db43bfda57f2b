"""A scenario that a test can run in seconds: two unlike nodes, a tiny real architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

SCENARIO = """
name = "tiny"
base_model = "{model}"
rounds = 3
seed = 3
threads = 1
local_steps = 3
learning_rate = 5e-3
view_rank = 6
max_length = 64
deadline_seconds = 60.0

[data]
source = "{data}"
partition = "iid"
held_out_max = 4
limit_per_node = 30

[[nodes]]
name = "strong"
lora_r = 8

[[nodes]]
name = "weak"
lora_r = 2
"""


@pytest.fixture
def tiny_scenario(tmp_path: Path, tiny_model_folder: Path, tiny_data_file: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    return path
