"""A linear layer with quantised weights, in the place of `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from fedkernels.quantized import linear, quantize
from fedkernels.quantized_tensor import PARTS, QuantizedTensor


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + bias with W frozen in one of the formats of `quantized_tensor`.

    The weights are buffers, named as the parts of a `QuantizedTensor`, so a state dict holds them;
    loading one needs a layer of the same format and shape. It is an `nn.Linear`, and has a `weight`
    to be read, because that is what peft looks for.
    """

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
        if not isinstance(tensor, QuantizedTensor):
            raise ValueError(f"tensor must be a QuantizedTensor, not {type(tensor).__name__}")
        if bias is not None and (bias.shape != tensor.shape[:1] or not bias.is_floating_point()):
            raise ValueError(
                f"bias must be floating point ({tensor.shape[0]},), and it is {bias.dtype}"
                f" {tuple(bias.shape)}"
            )
        nn.Module.__init__(self)
        self.out_features, self.in_features = tensor.shape
        self.fmt = tensor.fmt
        self.block = tensor.block
        self.nested_block = tensor.nested_block
        self._tensor = tensor
        for name, part in tensor.parts().items():
            self.register_buffer(name, part)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @classmethod
    def from_linear(cls, layer: nn.Linear, fmt: str) -> QuantizedLinear:
        """Return `layer` with its weight quantised and its bias frozen."""
        return cls(quantize(layer.weight, fmt), layer.bias)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight; it shares the buffers' memory."""
        parts = {name: getattr(self, name) for name in PARTS if name in self._buffers}
        # Made anew, hence checked, only when a buffer was replaced and not just written to.
        known = self._tensor.parts()
        if any(part is not known[name] for name, part in parts.items()):
            shape = (self.out_features, self.in_features)
            self._tensor = QuantizedTensor(
                self.fmt, shape, self.block, nested_block=self.nested_block, **parts
            )
        return self._tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantised weight, float32 [out_features, in_features], made anew each time.

        It has no `data`: writing there, to merge an adapter say, is an error and not a loss.
        """
        return self.quantized.dequantize().as_subclass(_ReadOnly)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product for x [..., in_features], in the type of `x`."""
        return linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, fmt={self.fmt}"

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantizedLinear:
        # model.to(torch.bfloat16) is about the type of activations; scales keep theirs.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class _ReadOnly(torch.Tensor):
    """A copy that whoever takes it for the weight itself cannot change; results are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        raise RuntimeError("a QuantizedLinear is frozen: nothing can be merged into its weight")

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError("a QuantizedLinear is frozen: nothing can be written to its weight")


def quantize_linears(model: nn.Module, fmt: str, skip: Collection[str] = ("lm_head",)) -> nn.Module:
    """Replace every `nn.Linear` inside `model` by a `QuantizedLinear`, in place; return `model`.

    Subclasses of `nn.Linear` are left alone, and so are layers whose weight is shared with another
    module (tied embeddings): quantising one would part the two.

    Args:
        model: any module; `model` itself is not replaced.
        fmt: a format of `fedkernels.quantize`.
        skip: modules to leave as they are, by qualified name or its last parts.

    Raises:
        ValueError: the format is unknown, or a weight is not finite.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            path = f"{parent_name}.{name}".lstrip(".")
            left_out = any(path == entry or path.endswith(f".{entry}") for entry in skip)
            if type(layer) is nn.Linear and not left_out and users[id(layer.weight)] == 1:
                setattr(parent, name, QuantizedLinear.from_linear(layer, fmt))
    return model
