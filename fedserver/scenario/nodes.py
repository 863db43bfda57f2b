"""One node of a scenario: how it trains, what it holds, what device it stands for."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from aggregators.methods import BaseFormat
from aggregators.presets import Strand
from fedhost.node_names import NAME, NAME_LENGTH
from fedserver.scenario.table import Several, Table

Fault = Literal["nan", "shape", "layout", "twice", "late", "never", "crash"]
FAULTS: tuple[str, ...] = get_args(Fault)


class NodeConfiguration(Table):
    """What is asked of one node; unset values come from the run's."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH, pattern=NAME)
    strand: Strand | Literal["auto"] | None = Field(
        default=None,
        description="lora, zeroth-order, projected, or auto: what the device can afford",
    )
    trains: bool = Field(default=True, description="false: the node only evaluates")
    base_format: BaseFormat | None = Field(
        default=None, description="what the node holds of the base: full, int8, int4 or nf4"
    )
    lora_r: int | None = Field(default=None, ge=1, description="LoRA rank of this node")
    lora_alpha: float | None = Field(default=None, gt=0)
    categories: Several[str] | None = Field(
        default=None, description="data categories that this node holds"
    )
    local_steps: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    micro_batch_size: int | None = Field(default=None, ge=1)
    speed: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="of the device, the simulating machine being 1",
    )
    link_mbps: float | None = Field(
        default=None, gt=0, description="megabits a second of the device's link; unset: no delay"
    )
    memory_limit_mb: float | None = Field(
        default=None, gt=0, description="megabytes that the device has for its part of a round"
    )
    upload_limit_kb: float | None = Field(
        default=None, gt=0, description="kilobytes that the device may send in a round"
    )
    backpropagates: bool = Field(default=True, description="false: forward passes alone")
    description: str = ""
    fault: Fault | None = Field(default=None, description="simulate a misbehaving node")
    away: Several[Annotated[int, Field(ge=1)]] = Field(
        default=(), description="rounds in which the simulated node does not answer"
    )
