"""What can be cut out of a decoder layer: attention heads with their rows and columns, and channels.

A head is `head_dim` rows of q_proj and as many columns of o_proj; a key-value head is rows of k_proj
and v_proj, shared by a group of neighbouring query heads; a channel is one row of gate_proj and of
up_proj and one column of down_proj. Layers of this form are those of Llama, Mistral, Qwen, Gemma,
SmolLM and others; what is not of this form is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

HEADS, KV_HEADS, CHANNELS = "heads", "kv_heads", "channels"

# Of each linear: the part that its pruned axis consists of, and whether that axis is the rows.
AXES: dict[str, tuple[str, bool]] = {
    "self_attn.q_proj": (HEADS, True),
    "self_attn.k_proj": (KV_HEADS, True),
    "self_attn.v_proj": (KV_HEADS, True),
    "self_attn.o_proj": (HEADS, False),
    "mlp.gate_proj": (CHANNELS, True),
    "mlp.up_proj": (CHANNELS, True),
    "mlp.down_proj": (CHANNELS, False),
}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    Attributes:
        name: of the module, e.g. "model.layers.0"; its parameters begin with it.
        hidden: width of what flows from layer to layer; never pruned.
        heads, kv_heads, head_dim: of the attention; heads is a multiple of kv_heads.
        channels: the feed-forward network's intermediate size.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def count(self, part: str) -> int:
        """How many heads, kv_heads or channels there are."""
        return {HEADS: self.heads, KV_HEADS: self.kv_heads, CHANNELS: self.channels}[part]

    def width(self, part: str) -> int:
        """Rows or columns that one head or channel takes."""
        return 1 if part == CHANNELS else self.head_dim

    def weight_shape(self, linear: str) -> tuple[int, int]:
        """[out, in] of one of `AXES`."""
        part, is_rows = AXES[linear]
        size = self.count(part) * self.width(part)
        return (size, self.hidden) if is_rows else (self.hidden, size)


def layer_shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    """Return the decoder layers of a Hugging Face model, in order.

    Raises:
        ValueError: the model has no layers of the known form, or one that differs from it, such as
            GPT-2's Conv1D, a mixture of experts, quantised linears or an attached adapter.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "self_attn") and hasattr(module, "mlp")
    ]
    if not layers:
        kinds = {type(module).__name__ for module in model.modules()}
        reason = "none of its modules has both a self_attn and an mlp"
        if "Conv1D" in kinds:
            reason = "its linear layers are Conv1D, whose weights are [in, out], as in GPT-2"
        raise ValueError(f"model {type(model).__name__} cannot be pruned by structure: {reason}")
    return tuple(_shape(name, module) for name, module in layers)


def layer_scores(
    model: nn.Module, score: Callable[[str, nn.Linear, str], Tensor]
) -> dict[str, Tensor]:
    """Return what `derive_plan` asks for: the scores of every prunable linear, by weight name.

    Args:
        model: with layers of the known form; else the ValueError of `layer_shapes`.
        score: called with a linear's full name, the linear, and which sums its pruned axis needs,
            "rows" or "columns", e.g. `lambda name, linear, sums: magnitude(linear.weight, sums)`.
    """
    found = {}
    for shape in layer_shapes(model):
        for path, (_, is_rows) in AXES.items():
            name = f"{shape.name}.{path}"
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found[f"{name}.weight"] = score(name, linear, "rows" if is_rows else "columns")
    return found


def _shape(name: str, layer: nn.Module) -> LayerShape:
    attention, feed_forward = layer.self_attn, layer.mlp
    assert isinstance(attention, nn.Module)
    assert isinstance(feed_forward, nn.Module)
    q, k, v, o = (_linear(f"{name}.self_attn", attention, part) for part in ATTENTION)
    gate, up, down = (_linear(f"{name}.mlp", feed_forward, part) for part in FEED_FORWARD)
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1 or q.out_features % head_dim:
        raise _refused(f"{name}.self_attn", f"head_dim {head_dim} does not divide its query rows")
    found = LayerShape(
        name=name,
        hidden=q.in_features,
        heads=q.out_features // head_dim,
        kv_heads=max(1, k.out_features // head_dim),
        head_dim=head_dim,
        channels=gate.out_features,
    )
    if found.heads % found.kv_heads:
        raise _refused(f"{name}.self_attn", f"{found.heads} heads, {found.kv_heads} kv heads")
    for path, linear in zip(AXES, (q, k, v, o, gate, up, down), strict=True):
        if tuple(linear.weight.shape) != found.weight_shape(path):
            sizes = f"{list(linear.weight.shape)}, not {list(found.weight_shape(path))}"
            raise _refused(f"{name}.{path}", f"its weight is {sizes}")
    _refuse_others(f"{name}.self_attn", attention, ATTENTION, head_dim)
    _refuse_others(f"{name}.mlp", feed_forward, FEED_FORWARD, None)
    return found


def _linear(path: str, parent: nn.Module, name: str) -> nn.Linear:
    module = getattr(parent, name, None)
    if module is None:
        raise _refused(path, f"it has no {name}")
    if hasattr(module, "base_layer"):
        raise _refused(f"{path}.{name}", "an adapter is attached to it; merge or unload it first")
    if type(module) is not nn.Linear:  # quantised linears are subclasses with other weights
        raise _refused(f"{path}.{name}", f"it is a {type(module).__name__}, not a plain nn.Linear")
    return module


def _refuse_others(
    path: str, module: nn.Module, known: tuple[str, ...], head_dim: int | None
) -> None:
    """Refuse parameters that may depend on the heads or channels; norms within a head do not."""
    for name, parameter in module.named_parameters():
        if name.split(".")[0] not in known and tuple(parameter.shape) != (head_dim,):
            raise _refused(f"{path}.{name}", "what it has to do with heads or channels is unknown")


def _refused(path: str, reason: str) -> ValueError:
    return ValueError(f"model cannot be pruned by structure: {path}: {reason}")
