"""The layers whose per-sample gradients are known: how each runs, and what it gives to its parameters.

A layer runs on weights that autograd does not see, so that its backward pass ends with the gradient of its
input; what the weights would have got follows from what the layer keeps and the gradient of its output.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.ghost import sample_sums
from .parts import Convolution, Dense, Outer, Part, Rows

Kept = tuple[Tensor, ...]
Parts = dict[str, Part]


class Refused(ValueError):
    """A layer that cannot be covered; the message says why."""


class Layer:
    """How one kind of layer runs and what its parameters get.

    Args:
        module: The layer; samples come first in what is passed to the methods.
    """

    names: tuple[str, ...] = ("weight", "bias")

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The output, which is no view, and what `parts` needs; no parameter is part of the graph."""
        with self._frozen():
            out = type(self.module).forward(self.module, x)
        return (out.clone() if out._is_view() else out), (x,)

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """What the parameters in `needed` get from the gradient of the output.

        Args:
            kept: As `run` has it.
            grad: Of the output.
            needed: Names of parameters.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def _frozen(self, **values: Tensor) -> Iterator[None]:
        """Within the block the module sees its parameters detached, or these values instead."""
        parameters = self.module._parameters
        own = dict(parameters)
        parameters.update({name: None if p is None else p.detach() for name, p in own.items()} | values)
        try:
            yield
        finally:
            parameters.update(own)

    def _parameter(self, name: str) -> Tensor | None:
        parameter = self.module._parameters[name]
        return None if parameter is None else parameter.detach()

    def _cast(self, *tensors: Tensor | None) -> list[Any]:
        """As autocast would have them for a product of matrices."""
        kind = next(t for t in tensors if t is not None).device.type
        if not torch.is_autocast_enabled(kind):
            return list(tensors)
        dtype = torch.get_autocast_dtype(kind)
        return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


class Linear(Layer):
    """`nn.Linear` over any number of dimensions."""

    def run(self, x: Tensor) -> tuple[Tensor, Kept]:
        """A product of matrices: `F.linear` may return a view."""
        x, weight, bias = self._cast(x, self._parameter("weight"), self._parameter("bias"))
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        weight = self._matrix(weight)
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])), (x,)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """The product of both; the bias gets the sum over positions."""
        x, grad = (_positions(t) for t in (kept[0], grad))
        found: Parts = {}
        if "weight" in needed:
            found["weight"] = self._outer(x, grad)
        if "bias" in needed:
            found["bias"] = _summed(grad)
        return found

    def _outer(self, x: Tensor, grad: Tensor) -> Outer:
        return Outer(grad, x)


class Conv1D(Linear):
    """transformers' `Conv1D`: a linear layer whose weight is transposed."""

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _outer(self, x: Tensor, grad: Tensor) -> Outer:
        return Outer(x, grad)


class Embedding(Layer):
    """`nn.Embedding`; the row of padding gets nothing."""

    names = ("weight",)

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise Refused(f"{option} is not supported: build the embedding without it")

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """Rows of the matrix."""
        ids, padding = kept[0], self.module.padding_idx
        ids = ids.reshape(len(ids), math.prod(ids.shape[1:]))
        grad = grad.reshape(*ids.shape, grad.shape[-1])
        if padding is not None:
            grad = torch.where((ids == padding).unsqueeze(-1), 0.0, grad)
        return {"weight": Rows(ids, grad, self.module.num_embeddings)}


class ScaledEmbedding(Embedding):
    """transformers' `...ScaledWordEmbedding`: an embedding times a number, `embed_scale`.

    Raises:
        Refused: If its output, tried out, is another.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device).unsqueeze(0)
        with torch.no_grad():
            found, expected = type(module).forward(module, ids), F.embedding(ids, module.weight) * self._scale
        if not torch.equal(found, expected):
            raise Refused("its output is not that of an embedding times embed_scale")

    @property
    def _scale(self) -> Any:
        scale = self.module.embed_scale
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else scale

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """Rows of the matrix."""
        return super().parts(kept, grad * self._scale, needed)


class LayerNorm(Layer):
    """`nn.LayerNorm`."""

    def run(self, x: Tensor) -> tuple[Tensor, Kept]:
        """Means and deviations are kept."""
        module, kind = self.module, x.device.type
        weight, bias = self._parameter("weight"), self._parameter("bias")
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            weight, bias = (None if t is None else t.float() for t in (weight, bias))
            x = x.float()
        out, mean, deviation = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return out, (x, mean.detach(), deviation.detach())

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """Sums over positions."""
        x, mean, deviation = kept
        return _scaled(grad, needed, self.module.weight.shape, lambda: x, mean, deviation)


class Normalized(Layer):
    """Norms of channels that do not mix samples: `nn.GroupNorm`, and instance norms without statistics."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if getattr(module, "track_running_stats", False):
            raise Refused("running statistics mix samples: build it with track_running_stats=False")

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """Sums over all but channels."""
        (x,) = kept

        def normalized() -> Tensor:
            if isinstance(self.module, nn.GroupNorm):
                values = F.group_norm(x, self.module.num_groups, None, None, self.module.eps)
            else:
                values = F.instance_norm(x, eps=self.module.eps)
            return _channels_last(values)

        return _scaled(_channels_last(grad), needed, grad.shape[1:2], normalized)


class RMSNorm(Layer):
    """Whatever is named `...RMSNorm` and is linear in a weight over the last dimensions, such as Llama's.

    Raises:
        Refused: If its gradient, tried out, is another.
    """

    names = ("weight",)

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        weight = module.weight
        size = weight.numel()
        x = torch.linspace(-1, 2, 6 * size, dtype=torch.float64).sin().view(2, 3, *weight.shape)
        x, grad = (t.to(weight.device, weight.dtype) for t in (x, x.flip(-1).cos()))
        self._offset = False
        try:
            with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
                probe = (weight.detach() + 0.5).requires_grad_()
                with self._frozen(weight=probe):
                    out = type(module).forward(module, x)
                (expected,) = torch.autograd.grad(out, probe, grad)
            self._offset = bool(self._with(x, torch.zeros_like).any())
            found = self.parts((x,), grad.to(out.dtype), ("weight",))["weight"].per_sample(0, 2).sum(0)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"it could not be tried out as a norm: {error}") from error
        off = (found - expected).abs().amax() / expected.abs().amax()
        if not off <= 16 * torch.finfo(weight.dtype).eps * math.sqrt(size):
            raise Refused(f"its output is not linear in its weight: gradients are off by {float(off):.1e}")

    @torch.no_grad()
    def _with(self, x: Tensor, weight: Any) -> Tensor:
        with self._frozen(weight=weight(self.module._parameters["weight"])):
            return type(self.module).forward(self.module, x)

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """Sums over positions of what the weight multiplies."""
        (x,) = kept

        def normalized() -> Tensor:
            ones = self._with(x, torch.ones_like)
            return ones - self._with(x, torch.zeros_like) if self._offset else ones

        return _scaled(grad, needed, self.module.weight.shape, normalized)


class Conv(Layer):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

    def run(self, x: Tensor) -> tuple[Tensor, Kept]:
        """As the module would."""
        if x.dim() != self.module.weight.dim():
            raise ValueError(
                f"a batch of {self.module.weight.dim()} dimensions is needed, got {tuple(x.shape)}"
            )
        x, weight, bias = self._cast(x, self._parameter("weight"), self._parameter("bias"))
        return self.module._conv_forward(x, weight, bias), (x,)

    def parts(self, kept: Kept, grad: Tensor, needed: Sequence[str]) -> Parts:
        """The bias gets the sum over positions."""
        found: Parts = {}
        if "weight" in needed:
            found["weight"] = Convolution(self.module, kept[0], grad)
        if "bias" in needed:
            found["bias"] = _summed(_channels_last(grad))
        return found


def _positions(x: Tensor) -> Tensor:
    """`[samples, ..., features]` to `[samples, positions, features]`."""
    return x if x.dim() == 3 else x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def _channels_last(x: Tensor) -> Tensor:
    """`[samples, channels, ...]` to `[samples, positions, channels]`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def _summed(grad: Tensor) -> Dense:
    return Dense(sample_sums(grad)[1])


def _scaled(
    grad: Tensor, needed: Sequence[str], shape: torch.Size, x: Callable[[], Tensor],
    mean: Tensor | None = None, deviation: Tensor | None = None,
) -> Parts:  # fmt: skip
    """Of output = weight · (x - mean) · deviation + bias, both of `shape`."""
    positions = math.prod(grad.shape[1 : grad.dim() - len(shape)])
    places = len(grad), positions, math.prod(shape)
    value = x().reshape(places) if "weight" in needed else None
    means = (None if t is None else t.reshape(places[:2]) for t in (mean, deviation))
    sums = sample_sums(grad.reshape(places), value, *means)
    named = zip(("weight", "bias"), sums, strict=True)
    return {name: Dense(t.view(len(grad), *shape)) for name, t in named if name in needed and t is not None}


KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: Normalized,
    nn.InstanceNorm1d: Normalized,
    nn.InstanceNorm2d: Normalized,
    nn.InstanceNorm3d: Normalized,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
}

HINTS = {
    "BatchNorm": "its statistics mix samples: use GroupNorm or LayerNorm",
    "MultiheadAttention": "it uses its weights by itself: use opacus.layers.DPMultiheadAttention",
    "LSTM": "use opacus.layers.DPLSTM",
    "GRU": "use opacus.layers.DPGRU",
    "RNN": "use opacus.layers.DPRNN",
}


def layer_of(module: nn.Module) -> Layer:
    """How a module is covered.

    Raises:
        Refused: If it is not; the message says why and what to do.
    """
    cls = type(module)
    own = vars(module).get("forward")  # copies of models that were attached have their own method there
    if own is not None and not (getattr(own, "__self__", None) is module and own.__func__ is cls.forward):
        raise Refused("its forward method was replaced: attach before whatever replaces it")
    kind: type[Layer] | None = None
    for known, candidate in KINDS.items():
        # A subclass may compute anything; one that leaves `forward` alone computes the same.
        if isinstance(module, known) and cls.forward is known.forward:
            kind = candidate
    if isinstance(module, nn.Embedding) and cls.__name__.endswith("ScaledWordEmbedding"):
        kind = ScaledEmbedding
    if kind is None and cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        kind = Conv1D
    if (
        kind is None
        and re.search("RMSNorm$|LayerNorm$", cls.__name__)
        and set(module._parameters) == {"weight"}
    ):
        kind = RMSNorm
    if kind is None:
        hint = next((hint for name, hint in HINTS.items() if name in cls.__name__), None)
        raise Refused(hint or "freeze it, or build it of the layers that are known")
    if unknown := [n for n, p in module._parameters.items() if p is not None and n not in kind.names]:
        raise Refused(f"its parameter {unknown[0]!r} is not known")
    if missing := [n for n in kind.names if n not in module._parameters]:
        raise Refused(f"its {missing[0]} is made of other parameters: remove the parametrization")
    return kind(module)
