"""R-Drop: two passes over the same inputs, with different dropout masks, are to agree."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..common.batches import get_output
from ..layerwise.knobs import unwrapped


class RDrop(NamedTuple):
    """What `r_drop` gives.

    Args:
        loss: cross_entropy + alpha · kl, 0-d.
        logits: Of the first pass.
        logits2: Of the second one.
        cross_entropy: The mean of the losses of both passes, 0-d.
        kl: How far both passes disagree, ≥ 0, 0-d.
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
    """R-Drop of two passes over the same inputs with different dropout masks.

    ½(CE₁ + CE₂) + α · ½(KL(P₁‖P₂) + KL(P₂‖P₁)), as in the authors' code.  The paper's equation 4 adds up
    both cross-entropies instead: it is twice this with half the α.  Softmax and sums are in float32, or
    float64 for such logits.  Equal logits give the cross-entropy to the last bit, and none a negative KL.

    Args:
        logits: `[..., classes]`, of the first pass.
        logits2: Likewise, of the second one.
        labels: `[...]` int64, or probabilities `[..., classes]`.
        alpha: Weight of the KL divergence, ≥ 0; the paper takes 1 to 5.
        ignore_index: Label of positions that count nowhere, such as padding.
        label_smoothing: Of the cross-entropy, see `torch.nn.functional.cross_entropy`.
        weight: `[classes]`, of the cross-entropy, likewise.
        reduction: `"mean"` over the positions that count (with `weight`, cross-entropy's own mean), `"sum"`.

    Returns:
        0-d; NaN as with torch where no position counts.

    Raises:
        ValueError: For shapes that do not fit, for a single class, and for values out of range.

    Reference:
        Liang et al. 2021, "R-Drop: regularized dropout for neural networks".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    _check(logits, logits2, alpha)
    soft = labels.shape == logits.shape and labels.is_floating_point()
    if not soft and (labels.shape != logits.shape[:-1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be integers of shape {tuple(logits.shape[:-1])} or probabilities of shape "
            f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    options: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    losses = [_cross_entropy(each, labels, weight=weight, **options) for each in (logits, logits2)]
    counts = (
        torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        if soft
        else labels != ignore_index
    )
    return _mean(*losses) + alpha * divergence(logits, logits2, counts, reduction)


def r_drop(
    model: nn.Module, batch: Any, alpha: float = 1.0, *, passes: Literal["together", "apart"] = "together",
    loss_fn: Callable[[Tensor, Any], Tensor] | None = None, ignore_index: int = -100,
    shift: bool | None = None, num_items_in_batch: int | Tensor | None = None,
) -> RDrop:  # fmt: skip
    """R-Drop in one line, for any model with dropout and labels.

    ```python
    r_drop(model, batch, alpha=1.0).loss.backward()
    ```

    Each input passes twice, with dropout masks of its own.  The cross-entropy is the model's own loss, so
    that its shifting of labels, class weights and auxiliary losses stay as they are; or it is `loss_fn`.

    Args:
        model: A Hugging Face model, or any that returns logits `[..., classes]`; for a mapping as batch, a
            mapping or an object of `loss` and `logits`, or a tuple that begins with both.
        batch: A mapping with `labels`, all of it given to the model; or (inputs, labels).
        alpha: Weight of the KL divergence, ≥ 0; the paper takes 1 to 5.
        passes: `"together"`: one pass over a batch of twice the size, so that BatchNorm sees both at once.
            `"apart"`: two passes, with half the memory for inputs and no arithmetic on their shapes.
        loss_fn: `loss_fn(logits, labels)`; by default the loss in the model's output, for (inputs, labels)
            the mean cross-entropy over the last dimension.
        ignore_index: Label of positions that count nowhere.
        shift: Whether logits at position t are for the label at t + 1; by default for decoders that model
            language, by the name of their class.
        num_items_in_batch: As Hugging Face's Trainer gives it: losses are sums divided by this.

    Returns:
        `loss`, `logits` of the first pass, and its parts.

    Raises:
        TypeError: For other batches.
        ValueError: Without labels or logits, for tensors that cannot be doubled with the batch, for
            regression and several labels at a time, and for values out of range.

    Reference:
        Liang et al. 2021, "R-Drop: regularized dropout for neural networks".
    """
    if passes not in ("together", "apart"):
        raise ValueError(f"passes must be 'together' or 'apart', got {passes!r}")
    labels = _labels(batch)
    if loss_fn is None and not isinstance(batch, Mapping):
        loss_fn = functools.partial(_cross_entropy, ignore_index=ignore_index)
    if passes == "apart":
        first, second = (_pass(model, batch, loss_fn, num_items_in_batch) for _ in range(2))
        logits, logits2, cross_entropy = first[0], second[0], _mean(first[1], second[1])
    else:
        items = None if num_items_in_batch is None else 2 * num_items_in_batch
        both, cross_entropy = _pass(model, _doubled(batch, len(labels)), loss_fn, items)
        logits, logits2 = both.split(len(both) // 2)
    _check(logits, logits2, alpha)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be of shape {tuple(logits.shape[:-1])} as the logits have it, got "
            f"{tuple(labels.shape)}; use r_drop_loss(logits, logits2, labels)"
        )
    if (shifts(model) and labels.dim() > 1) if shift is None else shift:
        labels, a, b = labels[:, 1:], logits[:, :-1], logits2[:, :-1]
    else:
        a, b = logits, logits2
    counts = labels != ignore_index
    if num_items_in_batch is None:
        kl = divergence(a, b, counts, "mean")
    else:
        kl = divergence(a, b, counts, "sum") / num_items_in_batch
    return RDrop(cross_entropy + alpha * kl, logits, logits2, cross_entropy, kl)


def _check(logits: Tensor, logits2: Tensor, alpha: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and >= 0, got {alpha=}")
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


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) * 0.5


def divergence(logits: Tensor, logits2: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """½(KL(P₁‖P₂) + KL(P₂‖P₁)), the mean or the sum over the positions that count."""
    logs = (F.log_softmax(_wide(each), dim=-1) for each in (logits, logits2))
    each = torch.where(counts, _SymmetricKL.apply(*logs), 0)
    return each.sum() / counts.sum() if reduction == "mean" else each.sum()


class _SymmetricKL(torch.autograd.Function):
    """½ Σ (p - q)(log p - log q) from log p and log q, `[..., classes]`: no summand is ever negative.

    Nothing is kept but the two, which log_softmax keeps as well; classes that neither has count nothing.
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
    return (log_p - log_q).masked_fill(log_p == log_q, 0)  # of two infinities, too


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


def _doubled(value: Any, size: int) -> Any:
    """With each tensor of a batch twice; what belongs to no sample stays."""
    if isinstance(value, Mapping):
        return {key: _doubled(item, size) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_doubled(item, size) for item in value)
    if not isinstance(value, Tensor) or not value.dim() or (len(value) == 1 != size):
        return value
    if len(value) != size:
        raise ValueError(
            f"cannot tell how to double a tensor of shape {tuple(value.shape)} with a batch of {size}: "
            "give passes='apart'"
        )
    return torch.cat((value, value))


def _pass(model: nn.Module, batch: Any, loss_fn: Any, items: Any) -> tuple[Tensor, Tensor]:
    """Logits and loss."""
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
            f"the output of {type(unwrapped(model)).__name__} has no logits; run it twice yourself and use "
            "r_drop_loss(logits, logits2, labels)"
        )
    if loss_fn is not None:
        loss = loss_fn(logits, batch["labels"])
    if loss is None:
        raise ValueError(f"{type(unwrapped(model)).__name__} returned no loss for its labels: give loss_fn=")
    return logits, loss


def shifts(model: nn.Module) -> bool:
    """Whether a model of Hugging Face predicts the token behind each."""
    inner = unwrapped(model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    name = type(inner).__name__
    return re.search("ForCausalLM|(?<!With)LMHeadModel|ForConditionalGeneration", name) is not None
