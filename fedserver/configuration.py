"""The configuration of a run: one TOML file, strict keys, one canonical identity.

A scenario file is read here because both the simulator and a deployed Flower ServerApp need it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aggregators.messages import WireDtype
from aggregators.methods import Estimator, Objective, Optimiser, Probe, Subset
from aggregators.presets import PRESETS, Strand

SCENARIO_FOLDER = Path(__file__).resolve().parent.parent / "simulations" / "scenarios"

NON_LINEAR_VARIANTS = {
    "dora": "its magnitude rescales the whole column, so two nodes' changes do not add",
    "vera": "its change is not a free B @ A; frozen shared factors are the preset 'ffa-lora'",
    "adalora": "its singular values are pruned during training, so ranks differ from the plan's",
    "qalora": "it pools the input before A, so the change is not B @ A in the layout",
    "ia3": "it rescales activations instead of adding B @ A",
}
BASE_CHANGING_INITS = {
    "pissa": "it moves a part of the base into the adapter",
    "olora": "it moves a part of the base into the adapter",
    "corda": "it moves a part of the base into the adapter",
    "loftq": "it changes the quantised base",
    "eva": "it needs a pass over the node's activations that this version does not make",
    "previous": "the node's own last A would be lost with a node that restarts",
}
Fault = Literal["nan", "shape", "layout", "twice", "late", "never", "crash"]


class ConfigurationError(Exception):
    """What is wrong with a scenario, where, and what to do. Never needs a traceback."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodeConfiguration(_Strict):
    """What is asked of one node; unset values come from the run's."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    strand: Strand | None = Field(default=None, description="lora, zeroth-order or projected")
    trains: bool = Field(default=True, description="false: the node only evaluates")
    lora_r: int | None = Field(default=None, ge=1, description="LoRA rank of this node")
    lora_alpha: float | None = Field(default=None, gt=0)
    categories: tuple[str, ...] | None = Field(
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
    description: str = ""
    fault: Fault | None = Field(default=None, description="simulate a misbehaving node")


class ZerothOrderConfiguration(_Strict):
    """Nodes that run forward passes alone and send scalars along probes of one pool of seeds."""

    learning_rate: float = Field(default=1e-6, gt=0)
    probe: Probe = "rank1"
    pool_size: int = Field(default=4096, ge=1, le=1 << 24, description="seeds of the pool")
    estimator: Estimator = "spsa"
    objective: Objective = "loss"
    epsilon: float = Field(default=1e-3, gt=0, le=1, description="how far weights are perturbed")
    clip: float | None = Field(default=1000.0, gt=0, description="largest slope that counts whole")
    directions: int = Field(default=1, ge=1, le=64, description="probes of one step")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the estimator momentum")
    local_steps: int = Field(default=20, ge=1)
    wire_dtype: WireDtype = Field(default="int8", description="of scalars; int8 errs by about 1 %")


class ProjectedConfiguration(_Strict):
    """Nodes that train weights by backpropagation and send the change projected on probes."""

    learning_rate: float = Field(default=1e-4, gt=0)
    optimiser: Optimiser = "adamw"
    probe: Probe = "rademacher"
    coordinates: int = Field(default=4096, ge=1, le=1 << 24, description="K, over all tensors")
    allocation: Literal["norms", "sizes"] = Field(
        default="norms", description="of K: by the last aggregate's norms, or by the tensors' sizes"
    )
    seeds: Literal["shared", "per-node"] = Field(
        default="shared", description="random probes of a round: everybody's, or each node its own"
    )
    target_modules: tuple[str, ...] = Field(default=(), description="empty: all weights")
    scale: Literal["unbiased", "mmse"] = Field(
        default="mmse", description="of random probes: 1/K, or the least mean squared error"
    )
    basis: Literal["adaptive", "random"] = "adaptive"
    rank: int = Field(default=4, ge=1, le=1024, description="of the adaptive basis")
    oversampling: int = Field(default=4, ge=0, le=1024, description="more columns on its left side")
    subset: Subset = Field(default="all", description="which of the weights train in a round")
    subset_share: float = Field(default=0.5, gt=0, le=1)
    gradient_rank: int | None = Field(default=None, ge=1, le=4096, description="GaLore's rank")
    error_feedback: bool = Field(
        default=True, description="what a message leaves out is in the node's next one"
    )

    @model_validator(mode="after")
    def _possible(self) -> ProjectedConfiguration:
        if self.error_feedback and self.scale == "unbiased":
            raise ValueError(
                "scale 'unbiased' diverges with error feedback; error_feedback = false"
            )
        if self.gradient_rank is not None and self.optimiser != "adamw":
            raise ValueError("gradient_rank is of the optimiser 'adamw'")
        return self


class MixingConfiguration(_Strict):
    """How the families of a round come together."""

    rule: Literal["add", "mean"] = "add"
    weights: dict[Strand, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=dict, description="factor of each strand's mean, 1 where none is given"
    )


class DataConfiguration(_Strict):
    """Where the simulated nodes' data come from and how they are divided."""

    source: str = Field(default="chatterbot", description="chatterbot, a .jsonl file, or hf:NAME")
    partition: Literal["categories", "category", "dirichlet", "iid", "shards"] = "iid"
    key: str | None = Field(default=None, description="column to divide by")
    alpha: float = Field(default=0.5, gt=0, description="Dirichlet concentration")
    split: Literal["questions", "pairs", "rows"] = Field(
        default="questions",
        description="hold out whole questions, questions with one of their answers, or single rows",
    )
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share kept for evaluation")
    held_out_max: int = Field(default=64, ge=1, description="evaluation examples a node, at most")
    limit_per_node: int | None = Field(default=None, ge=1)


class RunConfiguration(_Strict):
    """Everything that decides the numbers of a run, and where they are written."""

    name: str = Field(default="run", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    base_model: str = Field(
        default="smollm2-135m-instruct",
        description="embedded default, a folder, a .gguf, or a hub id",
    )
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    preset: str = Field(default="braid", description="how updates are made and aggregated")
    rounds: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    output_dir: str | None = Field(default=None, description="run folder; default runs/NAME")

    lora_r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(
        default=16.0, gt=0, description="of rank lora_r; other ranks scale it"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    lora_rslora: bool = False
    lora_init: str | None = Field(default=None, description="random, carry, gaussian, orthogonal")
    lora_variant: str = "lora"

    micro_batch_size: int = Field(default=8, ge=1)
    local_steps: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=1, ge=0)
    max_length: int = Field(default=256, ge=8)

    view_rank: int | None = Field(default=32, ge=1, description="rank of the carry that nodes get")
    view_energy: float | None = Field(default=None, gt=0, le=1)
    view_dtype: WireDtype = "bfloat16"
    wire_dtype: WireDtype = "bfloat16"
    server_learning_rate: float = Field(default=1.0, gt=0)
    evaluate: bool = True
    contributions: bool = Field(
        default=False, description="at the end, evaluate the model without each family of updates"
    )

    quorum: int | None = Field(
        default=None, ge=1, description="accepted updates that a round needs"
    )
    deadline_seconds: float = Field(default=3600.0, gt=0)
    max_norm: float | None = Field(default=1e4, gt=0, description="of one update's change")
    max_update_bytes: int = Field(default=1 << 30, ge=1024)
    max_examples: int = Field(
        default=10_000_000, ge=1, description="weight that one node may claim"
    )
    threads: int = Field(default=2, ge=1, description="per node and server; part of the numbers")
    accelerate: bool = Field(
        default=True, description="nodes train with fused kernels; part of the numbers, by rounding"
    )

    data: DataConfiguration = DataConfiguration()
    zeroth_order: ZerothOrderConfiguration = ZerothOrderConfiguration()
    projected: ProjectedConfiguration = ProjectedConfiguration()
    mixing: MixingConfiguration = MixingConfiguration()
    nodes: tuple[NodeConfiguration, ...] = Field(min_length=1)

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}{_nearest(value, PRESETS)}")
        return value

    @field_validator("lora_variant")
    @classmethod
    def _linear_variant(cls, value: str) -> str:
        if value == "lora":
            return value
        reason = NON_LINEAR_VARIANTS.get(value, "its change is not known to be linear in B @ A")
        raise ValueError(f"{value!r} cannot be aggregated exactly: {reason}; use 'lora'")

    @field_validator("lora_init")
    @classmethod
    def _neutral_init(cls, value: str | None) -> str | None:
        known = ("random", "shared", "carry", "gaussian", "orthogonal")
        if value in BASE_CHANGING_INITS:
            raise ValueError(f"{value!r} is refused: {BASE_CHANGING_INITS[value]}")
        if value is not None and value not in known:
            raise ValueError(f"unknown initialisation {value!r}{_nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfiguration:
        names = [node.name for node in self.nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"nodes: name {twice[0]!r} is used twice")
        training = sum(node.trains for node in self.nodes)
        if training == 0:
            raise ValueError("nodes: none of them trains")
        if self.quorum is not None and self.quorum > training:
            raise ValueError(f"quorum {self.quorum} exceeds the {training} nodes that train")
        listed = [node.categories is not None for node in self.nodes]
        if self.data.partition == "categories" and not all(listed):
            missing = names[listed.index(False)]
            raise ValueError(f"data.partition is 'categories', but node {missing!r} lists none")
        if self.data.partition != "categories" and any(listed):
            raise ValueError("nodes list categories: set data.partition = 'categories'")
        if self.server_learning_rate != 1.0 and PRESETS[self.preset].server == "average_factors":
            raise ValueError(
                f"server_learning_rate: preset {self.preset!r} averages factors, and a multiple of"
                " both is no multiple of the change; leave it at 1"
            )
        strand = PRESETS[self.preset].strand
        for node in self.nodes:
            if strand is not None and node.strand not in (None, strand):
                raise ValueError(
                    f"node {node.name!r}: preset {self.preset!r} trains {strand!r} on all nodes; use"
                    " preset 'mixed'"
                )
        if self.lora_init == "carry" and not PRESETS[self.preset].train_a:
            raise ValueError(f"preset {self.preset!r} fixes A, so lora_init cannot be 'carry'")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but names, places and the number of rounds."""
        return self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "description": True,
                "output_dir": True,
                "rounds": True,
                # What a device would take is a view of a run, and changes none of its numbers.
                "nodes": {"__all__": {"speed", "link_mbps"}},
            },
        )

    def run_id(self) -> str:
        """128-bit hexadecimal id; equal scenarios have equal ids, whatever runs them."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def strand(self, name: str) -> Strand:
        """How a node trains: as the preset says, else as its entry says, else LoRA."""
        node = self.node(name)
        return PRESETS[self.preset].strand or (node.strand if node else None) or "lora"

    @property
    def basis(self) -> str:
        """What projected nodes see their change through: as the preset says, else the scenario."""
        return PRESETS[self.preset].basis or self.projected.basis

    def largest_rank(self) -> int:
        """The highest rank that any node trains."""
        return max(node.lora_r or self.lora_r for node in self.nodes)

    def minimum_updates(self) -> int:
        """The quorum, by default a majority of the nodes that train."""
        training = sum(node.trains for node in self.nodes)
        return self.quorum if self.quorum is not None else training // 2 + 1

    def node(self, name: str) -> NodeConfiguration | None:
        """The entry of one node, None for a node that the scenario does not name."""
        return next((node for node in self.nodes if node.name == name), None)


def scenario_names() -> list[str]:
    """Names of the scenarios that come with fedbraid."""
    return sorted(path.stem for path in SCENARIO_FOLDER.glob("*.toml"))


def scenario_path(reference: str) -> Path:
    """The file of a scenario given by path or by name."""
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    named = SCENARIO_FOLDER / f"{reference}.toml"
    if named.is_file():
        return named
    hint = _nearest(reference, scenario_names())
    raise ConfigurationError(
        f"no scenario {reference!r}: neither a file nor one of {', '.join(scenario_names())}{hint}"
    )


def load(reference: str, overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read a scenario and apply ``key=value`` overrides (dotted keys, TOML values)."""
    path = scenario_path(reference)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not a TOML file: {error}") from None
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    return parse(values, source=str(path))


def parse(values: Mapping[str, Any], source: str = "scenario") -> RunConfiguration:
    """Validate a mapping; every problem is listed at once, with the nearest known key."""
    try:
        return RunConfiguration.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ConfigurationError(f"{source}:\n{problems}") from None


def to_toml(configuration: RunConfiguration) -> str:
    """The resolved scenario as TOML: parsing it gives the same configuration."""
    values = configuration.model_dump(mode="json", exclude_none=True)
    nodes = values.pop("nodes")
    tables = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    for node in nodes:
        lines += ["", "[[nodes]]", *(f"{key} = {_toml(value)}" for key, value in node.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # An unescaped JSON string is a TOML basic string, except that TOML forbids a raw DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigurationError(f"--set {override!r}: write key=value, for example rounds=5")
    text = text.strip()
    target: Any = values
    where: list[int | str] = []
    *parents, last = key.strip().split(".")
    for parent in parents:
        step = _step(target, parent, override)
        target = target[step]
        where.append(step)
    if isinstance(target, list):
        raise ConfigurationError(
            f"--set {override!r}: name one entry, for example nodes.0.lora_r=4"
        )
    try:
        target[last] = value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        target[last] = text
        return
    # A word may look like TOML, as nan, 2024 or true do, where a text is wanted: what fits counts.
    if _refused(values, [*where, last]):
        target[last] = text
        if _refused(values, [*where, last]):
            target[last] = value


def _refused(values: Mapping[str, Any], where: Sequence[int | str]) -> bool:
    """Whether the value at a place of the scenario is not valid there."""
    try:
        RunConfiguration.model_validate(values)
    except ValidationError as error:
        return any(problem["loc"][: len(where)] == tuple(where) for problem in error.errors())
    return False


def _step(target: Any, part: str, override: str) -> int | str:
    """The index or key that ``part`` means in a list or table, made where a table is missing."""
    if isinstance(target, list):
        by_name = [index for index, entry in enumerate(target) if entry.get("name") == part]
        if by_name:
            return by_name[0]
        if part.isdigit() and int(part) < len(target):
            return int(part)
        raise ConfigurationError(f"--set {override!r}: there is no entry {part!r}")
    if not isinstance(target.setdefault(part, {}), (dict, list)):
        raise ConfigurationError(f"--set {override!r}: {part!r} is a value, not a table")
    return part


def _explain(problem: Mapping[str, Any]) -> str:
    location = problem["loc"]
    where = ".".join(str(part) for part in location) or "scenario"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(location)}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = problem.get("input")
    suffix = f" (got {shown!r})" if isinstance(shown, (int, float, str)) else ""
    return f"{where}: {message}{suffix if 'Value error' not in problem['msg'] else ''}"


TABLES: dict[str, type[BaseModel]] = {
    "data": DataConfiguration,
    "zeroth_order": ZerothOrderConfiguration,
    "projected": ProjectedConfiguration,
    "mixing": MixingConfiguration,
    "nodes": NodeConfiguration,
}


def _suggestion(location: Sequence[int | str]) -> str:
    """The nearest key of the same table, or the same key in the table where it belongs."""
    key = str(location[-1])
    for table, model in TABLES.items():
        if key in model.model_fields and key not in _keys_at(location):
            return f"; did you mean '{'nodes.NAME' if table == 'nodes' else table}.{key}'?"
    return _nearest(key, _keys_at(location))


def _keys_at(location: Sequence[int | str]) -> list[str]:
    table = TABLES.get(str(location[0])) if len(location) > 1 else None
    return list((table or RunConfiguration).model_fields)


def _nearest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


FAULTS: tuple[str, ...] = get_args(Fault)
