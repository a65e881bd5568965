"""Defines for each supported layer how it runs and which per-sample gradients its parameters get.

A layer runs on weights that autograd does not see, so that its backward pass ends with the gradient of its
input. The gradients of its weights follow from tensors that the layer saves and the gradient of its output.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.ghost import sample_sums
from .per_sample_grads import ConvGrad, DenseGrad, EmbeddingGrad, OuterProductGrad, PerSampleGrad

Saved = tuple[Tensor, ...]
Grads = dict[str, PerSampleGrad]


class UnsupportedLayer(ValueError):
    """Error for a layer that cannot be covered; the message says why."""


class CoveredLayer:
    """A layer whose per-sample gradients are known (base class).

    Args:
        module: The layer. The first dimension of all tensors passed to methods is that of samples.
    """

    names: tuple[str, ...] = ("weight", "bias")

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Returns the output, which is no view, and tensors that `per_sample_grads` needs.

        No parameter is part of the graph of the output.
        """
        with self._frozen():
            out = type(self.module).forward(self.module, x)
        return (out.clone() if out._is_view() else out), (x,)

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns per-sample gradients of the parameters in `needed`, by name.

        They follow from the tensors that `run` returned and the gradient of the output.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def _frozen(self, **values: Tensor) -> Iterator[None]:
        """Replaces parameters of the module by detached ones, or by these values, within the block."""
        parameters = self.module._parameters
        originals = dict(parameters)
        parameters.update({name: None if p is None else p.detach() for name, p in originals.items()} | values)
        try:
            yield
        finally:
            parameters.update(originals)

    def _parameter(self, name: str) -> Tensor | None:
        parameter = self.module._parameters[name]
        return None if parameter is None else parameter.detach()

    def _cast(self, *tensors: Tensor | None) -> list[Any]:
        """Casts tensors as autocast does for a matrix product."""
        kind = next(t for t in tensors if t is not None).device.type
        if not torch.is_autocast_enabled(kind):
            return list(tensors)
        dtype = torch.get_autocast_dtype(kind)
        return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


class CoveredLinear(CoveredLayer):
    """`nn.Linear` with inputs of any number of dimensions."""

    transposed = True  # weight: [outputs, inputs]

    def run(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Multiplies matrices, because `F.linear` may return a view."""
        x, weight, bias = self._cast(x, self._parameter("weight"), self._parameter("bias"))
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        weight = weight.t() if self.transposed else weight
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])), (x,)

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns outer products for the weight, sums over positions for the bias."""
        x, grad = (_positions(t) for t in (saved[0], grad))
        outer = OuterProductGrad(*((grad, x) if self.transposed else (x, grad)))
        return _weight_and_bias(outer, grad, needed)


class CoveredConv1D(CoveredLinear):
    """transformers' `Conv1D`, a linear layer with a weight `[inputs, outputs]`."""

    transposed = False


class CoveredEmbedding(CoveredLayer):
    """`nn.Embedding`, whose padding row gets no gradient."""

    names = ("weight",)

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise UnsupportedLayer(f"{option} is not supported: build the embedding without it")

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns gradients of rows of the matrix."""
        ids, padding = saved[0], self.module.padding_idx
        ids = ids.reshape(len(ids), math.prod(ids.shape[1:]))
        grad = grad.reshape(*ids.shape, grad.shape[-1])
        if padding is not None:
            grad = torch.where((ids == padding).unsqueeze(-1), 0.0, grad)
        return {"weight": EmbeddingGrad(ids, grad, self.module.num_embeddings)}


class CoveredScaledEmbedding(CoveredEmbedding):
    """transformers' `...ScaledWordEmbedding`, an embedding times a number `embed_scale`.

    Raises:
        UnsupportedLayer: If a trial shows another output.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device).unsqueeze(0)
        with torch.no_grad():
            actual = type(module).forward(module, ids)
            expected = F.embedding(ids, module.weight) * self._scale
        if not torch.equal(actual, expected):
            raise UnsupportedLayer("its output is not that of an embedding times embed_scale")

    @property
    def _scale(self) -> Any:
        scale = self.module.embed_scale
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else scale

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns gradients of rows of the matrix."""
        return super().per_sample_grads(saved, grad * self._scale, needed)


class CoveredNorm(CoveredLayer):
    """Any norm with output = weight · (x - mean) · deviation + bias over the last dimensions (base class)."""

    def normalized(self, x: Tensor) -> Tensor:
        """Returns what is multiplied with the weight; or x, if means and inverse deviations are saved."""
        raise NotImplementedError

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns sums over positions for weight and bias."""
        (x, *statistics), shape = saved, self.module._parameters[needed[0]].shape
        flat = len(grad), math.prod(grad.shape[1 : grad.dim() - len(shape)]), math.prod(shape)
        value = self.normalized(x).reshape(flat) if "weight" in needed else None
        sums = sample_sums(grad.reshape(flat), value, *(t.reshape(flat[:2]) for t in statistics))
        named = zip(("weight", "bias"), sums, strict=True)
        return {n: DenseGrad(t.view(len(grad), *shape)) for n, t in named if n in needed and t is not None}


class CoveredLayerNorm(CoveredNorm):
    """`nn.LayerNorm` over the last dimensions."""

    def run(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Returns the normalized input; means and inverse deviations are saved."""
        module, kind = self.module, x.device.type
        weight, bias = self._parameter("weight"), self._parameter("bias")
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            weight, bias = (None if t is None else t.float() for t in (weight, bias))
            x = x.float()
        out, mean, deviation = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return out, (x, mean.detach(), deviation.detach())

    def normalized(self, x: Tensor) -> Tensor:
        """Returns the input, which is normalized where it is summed."""
        return x


class CoveredChannelNorm(CoveredNorm):
    """`nn.GroupNorm`, and instance norms without running statistics."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if getattr(module, "track_running_stats", False):
            raise UnsupportedLayer("running statistics mix samples: build it with track_running_stats=False")

    def normalized(self, x: Tensor) -> Tensor:
        """Returns the input as normalized by group or by instance, channels last."""
        if isinstance(self.module, nn.GroupNorm):
            return _channels_last(F.group_norm(x, self.module.num_groups, None, None, self.module.eps))
        return _channels_last(F.instance_norm(x, eps=self.module.eps))

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns sums over all dimensions but channels."""
        return super().per_sample_grads(saved, _channels_last(grad), needed)


class CoveredRMSNorm(CoveredNorm):
    """Any class named `...RMSNorm` that is linear in a weight over the last dimensions, such as Llama's.

    Raises:
        UnsupportedLayer: If a trial shows another gradient.
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
            grads = self.per_sample_grads((x,), grad.to(out.dtype), ("weight",))
            actual = grads["weight"].per_sample(0, 2).sum(0)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UnsupportedLayer(f"it could not be tried out as a norm: {error}") from error
        off = (actual - expected).abs().amax() / expected.abs().amax()
        if not off <= 16 * torch.finfo(weight.dtype).eps * math.sqrt(size):
            raise UnsupportedLayer(
                f"its output is not linear in its weight: gradients are off by {float(off):.1e}"
            )

    @torch.no_grad()
    def _with(self, x: Tensor, weight: Any) -> Tensor:
        with self._frozen(weight=weight(self.module._parameters["weight"])):
            return type(self.module).forward(self.module, x)

    def normalized(self, x: Tensor) -> Tensor:
        """Returns how much the output changes from a weight of zeros to one of ones."""
        ones = self._with(x, torch.ones_like)
        return ones - self._with(x, torch.zeros_like) if self._offset else ones


class CoveredConv(CoveredLayer):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with batched input."""

    def run(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Runs the convolution of the module."""
        if x.dim() != self.module.weight.dim():
            raise ValueError(
                f"a batch of {self.module.weight.dim()} dimensions is needed, got {tuple(x.shape)}"
            )
        x, weight, bias = self._cast(x, self._parameter("weight"), self._parameter("bias"))
        return self.module._conv_forward(x, weight, bias), (x,)

    def per_sample_grads(self, saved: Saved, grad: Tensor, needed: Sequence[str]) -> Grads:
        """Returns gradients of the weight, and sums over positions for the bias."""
        return _weight_and_bias(ConvGrad(self.module, saved[0], grad), _channels_last(grad), needed)


def _positions(x: Tensor) -> Tensor:
    """`[samples, ..., features]` to `[samples, positions, features]`."""
    return x if x.dim() == 3 else x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def _channels_last(x: Tensor) -> Tensor:
    """`[samples, channels, ...]` to `[samples, positions, channels]`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def _weight_and_bias(weight: PerSampleGrad, grad: Tensor, needed: Sequence[str]) -> Grads:
    """Returns gradients of a weight, and sums over positions of the output's gradient, if they are needed."""
    grads = {"weight": weight} if "weight" in needed else {}
    return grads | ({"bias": DenseGrad(sample_sums(grad)[1])} if "bias" in needed else {})


KINDS: dict[type[nn.Module], type[CoveredLayer]] = {
    nn.Linear: CoveredLinear,
    nn.Embedding: CoveredEmbedding,
    nn.LayerNorm: CoveredLayerNorm,
    nn.RMSNorm: CoveredRMSNorm,
    nn.GroupNorm: CoveredChannelNorm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), CoveredChannelNorm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), CoveredConv),
}

HINTS = {
    "BatchNorm": "its statistics mix samples: use GroupNorm or LayerNorm",
    "MultiheadAttention": "it uses its weights by itself: use opacus.layers.DPMultiheadAttention",
    "LSTM": "use opacus.layers.DPLSTM",
    "GRU": "use opacus.layers.DPGRU",
    "RNN": "use opacus.layers.DPRNN",
}


def cover_layer(module: nn.Module) -> CoveredLayer:
    """Returns how a module is covered.

    Raises:
        UnsupportedLayer: If it cannot be; the message says why and what to do.
    """
    cls = type(module)
    patched: Any = vars(module).get("forward")  # in copies of attached models this is the ordinary method
    if patched is not None and not (
        getattr(patched, "__self__", None) is module and patched.__func__ is cls.forward
    ):
        raise UnsupportedLayer("its forward method was replaced: attach before whatever replaces it")
    kind: type[CoveredLayer] | None = None
    for known, candidate in KINDS.items():
        # A subclass may compute anything; one that leaves `forward` alone computes the same.
        if isinstance(module, known) and cls.forward is known.forward:
            kind = candidate
    if isinstance(module, nn.Embedding) and cls.__name__.endswith("ScaledWordEmbedding"):
        kind = CoveredScaledEmbedding
    elif kind is None and (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        kind = CoveredConv1D
    elif kind is None and re.search("(RMS|Layer)Norm$", cls.__name__) and [*module._parameters] == ["weight"]:
        kind = CoveredRMSNorm
    if kind is None:
        hint = next((hint for name, hint in HINTS.items() if name in cls.__name__), None)
        raise UnsupportedLayer(hint or "freeze it, or build it of the layers that are known")
    if unknown := [n for n, p in module._parameters.items() if p is not None and n not in kind.names]:
        raise UnsupportedLayer(f"its parameter {unknown[0]!r} is not known")
    if missing := [n for n in kind.names if n not in module._parameters]:
        raise UnsupportedLayer(f"its {missing[0]} is made of other parameters: remove the parametrization")
    return kind(module)
