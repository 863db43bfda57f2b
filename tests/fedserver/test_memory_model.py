"""The memory that a plan is said to take against what a process that carries it out grows by."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Of the growth to the model's: a model of a few terms, and an allocator that rounds up.
SMALLEST, LARGEST = 0.6, 1.7

NODES = (
    {"name": "lora", "strand": "lora"},
    {"name": "lora on nf4", "strand": "lora", "base_format": "nf4"},
    {"name": "zeroth-order", "strand": "zeroth-order"},
    {"name": "zeroth-order on nf4", "strand": "zeroth-order", "base_format": "nf4"},
    {"name": "projected", "strand": "projected"},
)


@pytest.fixture
def model_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Large enough that its tensors are most of what a step takes: 8 million weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    given = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
             "vocab_size": 4096, "num_attention_heads": 6, "num_key_value_heads": 6}  # fmt: skip
    given = {k: v for k, v in given.items() if k != "head_dim"} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(2)
        LlamaForCausalLM(LlamaConfig(**given)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets a peak back")
def test_growth_is_near_the_model(model_folder: Path, tiny_data_file: Path, tmp_path: Path) -> None:
    values = {
        "base_model": str(model_folder), "preset": "mixed", "threads": 1, "local_steps": 1,
        "micro_batch_size": 8, "max_length": 64, "nodes": NODES,
        "zeroth_order": {"local_steps": 1, "pool_size": 64},
        "data": {"source": str(tiny_data_file), "held_out_max": 16},
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(grown_and_modelled, values, str(tmp_path / "cache")).result()
    ratios = {name: grown / modelled for name, (grown, modelled) in found.items()}
    assert all(SMALLEST <= ratio <= LARGEST for ratio in ratios.values()), (ratios, found)
    assert found["zeroth-order on nf4"][0] < found["lora on nf4"][0] < found["projected"][0]


def grown_and_modelled(values: dict[str, Any], cache: str) -> dict[str, tuple[int, int]]:
    """By node: the growth of this process while it works on a plan, and what the model says of it."""
    import os

    os.environ["FEDBRAID_CACHE"] = cache
    from aggregators.messages import Capabilities, encode_plan
    from aggregators.view import View
    from fedclient.memory import PeakMemory
    from fedclient.quantised_base import load
    from fedclient.worker import NodeSettings, Worker
    from fedserver.configuration import parse
    from fedserver.device_cost import memory_of
    from fedserver.global_model import first_basis
    from fedserver.planner import make_plan

    configuration = parse(values)
    base = load(configuration.base_model, "float32", "full")
    found = {}
    for node in configuration.nodes:
        device = Capabilities(
            node=node.name, examples=1, held_out=1, rank_limit=64, base_digest=base.digest,
            layout_json=base.layout.to_json(), threads=1, memory_bytes=1, device="cpu", versions={},
        )  # fmt: skip
        plan = make_plan(
            configuration, device, round_number=1, layout=base.layout, base_digest=base.digest
        )
        basis = first_basis(configuration, base.layout) if node.name == "projected" else None
        payload = encode_plan(plan, View(basis=basis), None)
        # The first time modules are imported, and the base is quantised.
        Worker().work(payload, NodeSettings(index=0))
        memory = PeakMemory(collect=True)
        Worker().work(payload, NodeSettings(index=0))
        modelled = memory_of(plan, base.layout)
        # There is no view yet, so whole weights are copied from the base instead of rebuilt from it.
        found[node.name] = (memory.read().grown, modelled.view + modelled.work)
    return found
