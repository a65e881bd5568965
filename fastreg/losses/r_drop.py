"""Computes R-Drop losses: two passes over the same inputs with different dropout masks should agree."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..common.batches import get_output, map_items
from ..common.unwrap import unwrap_model
from ..common.validation import check_choice, check_range


class RDrop(NamedTuple):
    """The loss of `r_drop` and its parts.

    Args:
        loss: cross_entropy + alpha · kl, 0-d.
        logits: Of the first pass.
        logits2: Of the second pass.
        cross_entropy: The mean of the losses of both passes, 0-d.
        kl: The symmetric KL divergence of both passes, ≥ 0, 0-d.
    """

    loss: Tensor
    logits: Tensor
    logits2: Tensor
    cross_entropy: Tensor
    kl: Tensor


def r_drop_loss(
    logits: Tensor, logits2: Tensor, labels: Tensor, alpha: float = 1.0, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, weight: Tensor | None = None, reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:  # fmt: skip
    """Returns the R-Drop loss of two passes over the same inputs with different dropout masks.

    ½(CE₁ + CE₂) + α · ½(KL(P₁‖P₂) + KL(P₂‖P₁)), as in the authors' code.  Equation 4 of the paper adds both
    cross-entropies instead, which is twice this loss with half the α.  Softmax and sums are in float32, or
    float64 for float64 logits.  Equal logits give exactly the cross-entropy; KL is never negative.

    Args:
        logits: `[..., classes]`, of the first pass.
        logits2: `[..., classes]`, of the second pass.
        labels: `[...]` int64, or probabilities `[..., classes]`.
        alpha: Weight of the KL divergence, ≥ 0; 1 to 5 in the paper.
        ignore_index: Label of ignored positions, such as padding.
        label_smoothing: Label smoothing of the cross-entropy, see `torch.nn.functional.cross_entropy`.
        weight: Class weights of the cross-entropy, `[classes]`.
        reduction: `"mean"` over the positions that are not ignored (with `weight`, the mean of torch's
            cross-entropy), or `"sum"`.

    Returns:
        The loss, 0-d; NaN as in torch if all positions are ignored.

    Raises:
        ValueError: For shapes that do not fit, for a single class, and for values out of range.

    Reference:
        Liang et al. 2021, "R-Drop: regularized dropout for neural networks".
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    _check(logits, logits2, alpha)
    soft = labels.shape == logits.shape and labels.is_floating_point()
    if not soft and (labels.shape != logits.shape[:-1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be integers of shape {tuple(logits.shape[:-1])} or probabilities of shape "
            f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    options: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    first, second = (_cross_entropy(each, labels, weight=weight, **options) for each in (logits, logits2))
    counted = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if soft else labels != ignore_index
    items = None if reduction == "mean" else 1
    return combine_passes((first + second) * 0.5, logits, logits2, counted, alpha, items).loss


def r_drop(
    model: nn.Module, batch: Any, alpha: float = 1.0, *, passes: Literal["together", "apart"] = "together",
    loss_fn: Callable[[Tensor, Any], Tensor] | None = None, ignore_index: int = -100,
    shift: bool | None = None, num_items_in_batch: int | Tensor | None = None,
) -> RDrop:  # fmt: skip
    """Computes R-Drop for any model with dropout and labels.

    ```python
    r_drop(model, batch, alpha=1.0).loss.backward()
    ```

    Each input passes twice, with different dropout masks.  The cross-entropy is the loss that the model
    returns, including shifted labels, class weights and auxiliary losses; or it is `loss_fn`.

    Args:
        model: A Hugging Face model, or any that returns logits `[..., classes]`; for a mapping as batch, a
            mapping or an object of `loss` and `logits`, or a tuple that begins with both.
        batch: A mapping with `labels`, passed to the model as keyword arguments; or (inputs, labels).
        alpha: Weight of the KL divergence, ≥ 0; 1 to 5 in the paper.
        passes: `"together"`: one pass over a batch of twice the size, so that BatchNorm sees both at once.
            `"apart"`: two passes, with half the memory for inputs and no arithmetic on their shapes.
        loss_fn: `loss_fn(logits, labels)`; by default the loss in the model's output, for (inputs, labels)
            the mean cross-entropy over the last dimension.
        ignore_index: Label of ignored positions.
        shift: Whether logits at position t are for the label at t + 1; by default for causal language models,
            by the name of their class.
        num_items_in_batch: The argument of Hugging Face's Trainer: losses are sums divided by it.

    Returns:
        The loss, the logits of both passes, and the parts of the loss.

    Raises:
        TypeError: For other batches.
        ValueError: Without labels or logits, for tensors that cannot be doubled with the batch, for
            regression and several labels at a time, and for values out of range.

    Reference:
        Liang et al. 2021, "R-Drop: regularized dropout for neural networks".
    """
    check_choice("passes", passes, ("together", "apart"))
    labels = _labels(batch)
    if loss_fn is None and not isinstance(batch, Mapping):
        loss_fn = functools.partial(_cross_entropy, ignore_index=ignore_index)
    if passes == "apart":
        first, second = (_pass(model, batch, loss_fn, num_items_in_batch) for _ in range(2))
        logits, logits2, cross_entropy = first[0], second[0], (first[1] + second[1]) * 0.5
    else:
        items = None if num_items_in_batch is None else 2 * num_items_in_batch
        twice = map_items(batch, functools.partial(_doubled, len(labels)))
        both, cross_entropy = _pass(model, twice, loss_fn, items)
        logits, logits2 = both.split(len(both) // 2)
    _check(logits, logits2, alpha)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be of shape {tuple(logits.shape[:-1])} as the logits have it, got "
            f"{tuple(labels.shape)}; use r_drop_loss(logits, logits2, labels)"
        )
    counted = labels != ignore_index
    if (shifts(model) and labels.dim() > 1) if shift is None else shift:
        counted = shifted(counted)
    return combine_passes(cross_entropy, logits, logits2, counted, alpha, num_items_in_batch)


def combine_passes(
    cross_entropy: Tensor, logits: Tensor, logits2: Tensor, counted: Tensor, alpha: float,
    items: int | Tensor | None = None,
) -> RDrop:  # fmt: skip
    """Adds the weighted divergence of two passes to their cross-entropy, see `RDrop`.

    `counted`, bool `[...]`, has the positions that are not ignored.  The sum over them is divided by `items`,
    by default by their number.
    """
    logs = (F.log_softmax(_wide(each), dim=-1) for each in (logits, logits2))
    total = torch.where(counted, _SymmetricKL.apply(*logs), 0).sum()
    kl = total / (counted.sum() if items is None else items)
    return RDrop(cross_entropy + alpha * kl, logits, logits2, cross_entropy, kl)


def shifted(counted: Tensor) -> Tensor:
    """Returns the positions whose logits predict a counted label at the next position."""
    return torch.cat((counted[:, 1:], torch.zeros_like(counted[:, :1])), dim=1)


def _check(logits: Tensor, logits2: Tensor, alpha: float) -> None:
    check_range("alpha", alpha, 0)
    if logits.shape != logits2.shape or not logits.dim():
        shapes = tuple(logits.shape), tuple(logits2.shape)
        raise ValueError(f"logits of both passes must be [..., classes] of one shape, got {shapes}")
    if logits.shape[-1] < 2:
        raise ValueError(
            f"R-Drop compares distributions over classes, of which there must be two or more, got "
            f"{tuple(logits.shape)=}; two logits stand for a binary label"
        )


def _cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    classes = logits.shape[-1]
    flat = targets.reshape(-1, classes) if targets.is_floating_point() else targets.reshape(-1)
    return F.cross_entropy(_wide(logits).reshape(-1, classes), flat, **options)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _SymmetricKL(torch.autograd.Function):
    """Computes ½ Σ (p - q)(log p - log q) from log p and log q, `[..., classes]`; no summand is negative.

    Only log p and log q are saved, as by log_softmax. Classes with p = q = 0 contribute 0.
    """

    @staticmethod
    def forward(log_p: Tensor, log_q: Tensor) -> Tensor:
        return _apart(log_p, log_q).mul_(log_p.exp() - log_q.exp()).sum(-1) * 0.5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        log_p, log_q = ctx.saved_tensors
        half, apart = 0.5 * gradient[..., None], _apart(log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        return half * (p * apart + (p - q)), half * ((q - p) - q * apart)


def _apart(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p - log_q).masked_fill(log_p == log_q, 0)  # also for two infinities


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    else:
        raise TypeError(
            f"batch must be a mapping with labels or (inputs, labels), got {type(batch).__name__}"
        )
    if not isinstance(labels, Tensor) or not labels.dim():
        raise ValueError(f"batch must have labels, a tensor [batch, ...], got {labels!r}")
    if labels.is_floating_point():
        raise ValueError(
            f"labels must be classes, integers, got {labels.dtype}; for probabilities use "
            "r_drop_loss(logits, logits2, labels)"
        )
    return labels


def _doubled(size: int, value: Any) -> Any:
    """Returns a tensor repeated; one without a batch dimension, and anything else, stays."""
    if not isinstance(value, Tensor) or not value.dim() or (len(value) == 1 != size):
        return value
    if len(value) != size:
        raise ValueError(
            f"cannot tell how to double a tensor of shape {tuple(value.shape)} with a batch of {size}: "
            "give passes='apart'"
        )
    return torch.cat((value, value))


def _pass(model: nn.Module, batch: Any, loss_fn: Any, items: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        inputs, labels = batch
        logits = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        named = get_output(logits, "logits")
        logits = logits if named is None else named
        return logits, loss_fn(logits, labels)
    outputs = model(**batch, **({} if items is None else {"num_items_in_batch": items}))
    if type(outputs) is tuple:
        outputs = dict(zip(("loss", "logits"), outputs, strict=False))
    logits, loss = get_output(outputs, "logits"), get_output(outputs, "loss")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the output of {type(unwrap_model(model)).__name__} has no logits; run it twice yourself and "
            "use r_drop_loss(logits, logits2, labels)"
        )
    if loss_fn is not None:
        loss = loss_fn(logits, batch["labels"])
    if loss is None:
        raise ValueError(
            f"{type(unwrap_model(model)).__name__} returned no loss for its labels: give loss_fn="
        )
    return logits, loss


def shifts(model: nn.Module) -> bool:
    """Returns whether a Hugging Face model predicts the next token at each position."""
    inner = unwrap_model(model, peft=True)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    name = type(inner).__name__
    return re.search("ForCausalLM|(?<!With)LMHeadModel|ForConditionalGeneration", name) is not None
