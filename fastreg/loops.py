"""Ready-made training loops: a model, a dataloader, and the regularizers that the name tells.

```python
history = fastreg.loops.train_with_weight_decay(model, dataloader, lr=3e-4, weight_decay=0.1)
```

All are the loop of `fastreg.training.loop` with another optimizer around it. They take its `Settings` as
keyword arguments: epochs, mixed precision, accumulation, schedules, validation, progress.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import layerwise
from . import nn as ours
from .layerwise.apply import FIELD, ORIGINAL
from .layerwise.knobs import unwrapped
from .optim import L2SP, SAM, AdamW, ClipNorm, Component, param_groups
from .schedules import Linear
from .training.loop import DivergedError, History, Settings, train

__all__ = [
    "DivergedError", "History", "Settings", "fine_tune_with_adaptive_regularization",
    "train_with_grad_clip_and_noise", "train_with_weight_decay",
]  # fmt: skip

MakeOptimizer = Callable[..., torch.optim.Optimizer]


def train_with_weight_decay(
    model: nn.Module, dataloader: Iterable[Any], *, lr: float, weight_decay: float = 0.01,
    optimizer: MakeOptimizer = AdamW, regularizers: Iterable[Component] = (), **settings: Any,
) -> History:  # fmt: skip
    """Train with weight decay on weights: not on biases, norms and all with less than two dimensions.

    Args:
        model: Any model.
        dataloader: Mappings with `labels`, (inputs, labels), or tensors; see `Settings.loss_fn`.
        lr: Learning rate.
        weight_decay: The rate λ; decoupled with the default optimizer.
        optimizer: A class such as `fastreg.Lion` or `torch.optim.SGD`, or what makes one from parameter
            groups and `lr`, such as `functools.partial(fastreg.SGD, momentum=0.9)`.
        regularizers: Components for fastreg's optimizers, such as `EMA`.
        settings: See `Settings`.

    Returns:
        Losses, rates and times; also the optimizer, for its averages and to go on with.

    Raises:
        TypeError: For unknown settings, for batches of an unknown kind, and for what is no optimizer class.
        ValueError: For values out of range, data without batches, labels or loss.
        DivergedError: At a loss that is NaN or infinite.
    """
    make = _maker(optimizer, lr, lambda: param_groups(model, weight_decay), tuple(regularizers))
    return train(model, dataloader, make, Settings(**settings))


def train_with_grad_clip_and_noise(
    model: nn.Module, dataloader: Iterable[Any], *, lr: float, max_norm: float = 1.0,
    noise_factor: float = 0.01, weight_decay: float = 0.0, optimizer: MakeOptimizer = AdamW,
    regularizers: Iterable[Component] = (), **settings: Any,
) -> History:  # fmt: skip
    """Train with clipped gradients and with noise on the input embeddings.

    The noise is added to what the embedding layer returns, in training only, and is gone afterwards, also
    where training fails.  Noise on gradients is another thing: `regularizers=[fastreg.GradientNoise(std)]`.

    Args:
        model: Any model; with noise, one that has input embeddings.
        dataloader: Mappings with `labels`, (inputs, labels), or tensors; see `Settings.loss_fn`.
        lr: Learning rate.
        max_norm: Norm of all gradients together above which they are scaled down to it.
        noise_factor: Standard deviation of the noise, see `fastreg.nn.attach_embedding_noise`; 0: none.
        weight_decay: As for `train_with_weight_decay`.
        optimizer: Likewise, of fastreg.
        regularizers: Components besides.
        settings: See `Settings`.

    Returns:
        Losses, gradient norms, rates and times.

    Raises:
        TypeError: As `train_with_weight_decay`.
        ValueError: Likewise, and for a model without embeddings.
        DivergedError: At a loss that is NaN or infinite.

    Reference:
        Pascanu et al. 2013, "On the difficulty of training recurrent neural networks"; Jain et al. 2024,
        "NEFTune: noisy embeddings improve instruction finetuning".
    """
    if not noise_factor >= 0:
        raise ValueError(f"noise_factor must be >= 0, got {noise_factor=}")
    checked, components = Settings(**settings), (ClipNorm(max_norm), *regularizers)
    make = _maker(optimizer, lr, lambda: param_groups(model, weight_decay), components)
    with contextlib.ExitStack() as stack:
        if noise_factor:
            stack.callback(ours.attach_embedding_noise(model, std=noise_factor).remove)
        return train(model, dataloader, make, checked)


def fine_tune_with_adaptive_regularization(
    model_or_name: nn.Module | str, dataloader: Iterable[Any], *, lr: float = 2e-5,
    dropout: tuple[float, float] = (0.05, 0.15), anneal: bool = True, l2_sp: float = 0.01,
    lr_decay: float = 0.9, weight_decay: float = 0.01, max_norm: float = 1.0, epochs: int | None = 3,
    optimizer: MakeOptimizer = AdamW, regularizers: Iterable[Component] = (),
    auto_class: str = "AutoModelForCausalLM", inputs: Any = None, **settings: Any,
) -> History:  # fmt: skip
    """Fine-tune a transformer with what adapts to layer and time.

    - Hidden dropout grows from layer to layer, and falls to 0 over the training, in a straight line.
    - Weights are pulled towards where they started (L2-SP), decayed, and gradients clipped.
    - Layers learn the slower the nearer they are to the input.
    - Learning rates warm up over 6 % of the steps and fall to 0, if neither `warmup` nor `schedule` is given.

    Afterwards the model drops as before.  A training to go on with (`history=`) counts its steps in all of
    these; its `epochs` and `max_steps` come on top.

    Args:
        model_or_name: A model with repeated layers, or what `from_pretrained` takes.
        dataloader: Mappings with `labels`, (inputs, labels), or tensors; see `Settings.loss_fn`.
        lr: Learning rate of the last layers.
        dropout: Rates of the first and the last layer at the start, each in [0, 1].
        anneal: Whether rates fall to 0; else they stay.
        l2_sp: Strength α of the pull α/2 · ‖p - p₀‖²; 0: none.
        lr_decay: Factor of the learning rate for each layer further from the output, in (0, 1].
        weight_decay: As for `train_with_weight_decay`.
        max_norm: As for `train_with_grad_clip_and_noise`.
        epochs: See `Settings`.
        optimizer: Likewise, of fastreg.
        regularizers: Components besides.
        auto_class: The class of transformers that loads a model by its name.
        inputs: For the forward pass that finds the dropout, see `fastreg.layerwise.audit`.
        settings: See `Settings`.

    Returns:
        Losses, gradient norms, rates and times, and the model.

    Raises:
        ImportError: For a name, where transformers is not installed.
        TypeError: As `train_with_weight_decay`.
        ValueError: Likewise; for models without repeated layers; where rates are set by `fastreg.layerwise`
            already; and where nobody knows the number of steps to fall over.
        DivergedError: At a loss that is NaN or infinite.

    Reference:
        Rennie et al. 2014, "Annealed dropout training of deep networks"; Li et al. 2018, "Explicit inductive
        bias for transfer learning with convolutional networks"; Howard & Ruder 2018, "Universal language
        model fine-tuning for text classification".
    """
    first, last = dropout
    checked = Settings(epochs=epochs, **settings)
    planned = checked.steps(dataloader)
    done = 0 if checked.history is None else checked.history.steps
    if planned is None:
        raise ValueError("dataloader has no length: give epochs=None and max_steps= to say when it ends")
    if not planned:
        raise ValueError("dataloader has no batches: it is empty")
    steps = done + planned
    if not {"warmup", "schedule"} & settings.keys():
        fading = Linear(1.0, 0.0, steps)
        checked = Settings(epochs=epochs, **settings, warmup=round(0.06 * steps), schedule=fading)
    model = _loaded(model_or_name, auto_class) if isinstance(model_or_name, str) else model_or_name
    if ORIGINAL in vars(unwrapped(model)):
        raise ValueError(
            f"rates of this {type(model).__name__} are set by fastreg.layerwise already: call "
            "fastreg.layerwise.remove(model) first, or train it with train_with_weight_decay"
        )
    components = (ClipNorm(max_norm), *([L2SP(l2_sp)] if l2_sp else []), *regularizers)
    make = _maker(optimizer, lr, lambda: param_groups(model, weight_decay, lr, lr_decay), components)
    if checked.device is not None:
        model.to(checked.device)
    with _annealed(model, (first, last), Linear(1.0, 0.0, steps) if anneal else 1.0, inputs) as scheduler:
        scheduler.step(done)
        return train(model, dataloader, make, checked, scheduler.step)


@contextlib.contextmanager
def _annealed(
    model: nn.Module, rates: tuple[float, float], schedule: Any, inputs: Any
) -> Iterator[layerwise.DropoutScheduler]:
    layers = functools.partial(_between, *rates)
    config = getattr(unwrapped(model), "config", None)
    kept = copy.deepcopy(getattr(config, FIELD, None))
    try:
        yield layerwise.DropoutScheduler(model, schedule, layers=layers, inject=True, inputs=inputs)
    finally:
        layerwise.remove(model)
        if kept is not None:  # what a checkpoint says of its rates
            setattr(config, FIELD, kept)


def _between(first: float, last: float, layer: int, layers: int) -> float:
    return first + (last - first) * layer / max(layers - 1, 1)


def _loaded(name: str, auto_class: str) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(
            f"loading {name!r} needs transformers: pip install 'fastreg[hf]', or give a model"
        ) from None
    if not hasattr(transformers, auto_class):
        raise ValueError(f"transformers has no {auto_class!r}: give one such as 'AutoModelForCausalLM'")
    return getattr(transformers, auto_class).from_pretrained(name)


def _maker(
    optimizer: MakeOptimizer,
    lr: float,
    groups: Callable[[], list[dict[str, Any]]],
    components: tuple[Component, ...],
) -> Callable[[], torch.optim.Optimizer]:
    """What makes the optimizer once the model is in its place."""
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer must be a class such as fastreg.AdamW, got {type(optimizer).__name__}; to go on with "
            "a training, give its history="
        )
    options: dict[str, Any] = {"lr": lr}
    if components:
        taken = inspect.signature(optimizer).parameters
        name = getattr(optimizer, "__name__", repr(optimizer))
        if "regularizers" not in taken:
            named = ", ".join(type(component).__name__ for component in components)
            raise TypeError(f"{name} takes no regularizers, here {named}: give one of fastreg's optimizers")
        options["regularizers"] = list(components)

    def make() -> torch.optim.Optimizer:
        made = optimizer(groups(), **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
        if isinstance(made, SAM):
            raise TypeError(
                "SAM needs two passes a step, and these loops make one: fastreg.Regularization(sam=...) "
                "comes with callbacks that make both"
            )
        return made

    return make
