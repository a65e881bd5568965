"""Ready-made training loops for any model and dataloader, each with the regularizers in its name.

```python
history = fastreg.loops.train_with_weight_decay(model, dataloader, lr=3e-4, weight_decay=0.1)
history = fastreg.loops.train_with_weight_decay(model, dataloader, lr=3e-4, recipe={"sam": 0.05})
```

Each is a recipe, see `fastreg.Regularization`, for the loop in `fastreg.training.loop`. All take the fields
of `Settings` as keyword arguments: epochs, mixed precision, accumulation, schedules, validation, progress.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common.unwrap import unwrap_model
from .common.validation import check_range, check_rate
from .layerwise.write_rates import ORIGINAL
from .optim import Component
from .optim.fused_optimizer import FusedOptimizer
from .recipe import Regularization, build
from .recipe.model_callbacks import DropoutRates
from .recipe.regularization import Recipe, read_recipe
from .schedules import Linear
from .training.history import DivergedError, History
from .training.loop import train
from .training.settings import Settings

__all__ = [
    "DivergedError", "History", "Settings", "fine_tune_with_adaptive_regularization",
    "train_with_grad_clip_and_noise", "train_with_weight_decay",
]  # fmt: skip

MakeOptimizer = Callable[..., torch.optim.Optimizer]


def train_with_weight_decay(
    model: nn.Module, dataloader: Iterable[Any], *, lr: float, weight_decay: float = 0.01,
    recipe: Recipe | None = None, optimizer: MakeOptimizer | None = None,
    regularizers: Iterable[Component] = (), **settings: Any,
) -> History:  # fmt: skip
    """Trains with weight decay on weights, but not on biases, norms and parameters with one dimension.

    Args:
        model: Any model.
        dataloader: Mappings with `labels`, (inputs, labels), or tensors; see `Settings.loss_fn`.
        lr: Learning rate.
        weight_decay: The rate λ; decoupled with the default optimizer.
        recipe: What else regularizes: a `fastreg.Regularization`, a dictionary of its fields, or a YAML file.
            Its fields replace those of this loop, such as `weight_decay`; `False` in a dictionary turns one
            off.
        optimizer: Makes the optimizer, by default the recipe's: a class such as `fastreg.Lion` or
            `torch.optim.SGD`, or a function of parameter groups and `lr`, such as
            `functools.partial(fastreg.SGD, momentum=0.9)`; also of `regularizers` if there are any.
        regularizers: Components for fastreg's optimizers besides those of the recipe, such as `EMA`.
        settings: See `Settings`.

    Returns:
        Losses, rates and times; also the optimizer, for its averages and to continue with.

    Raises:
        TypeError: For unknown settings, batches of an unknown kind, and optimizers of another kind.
        ValueError: For values out of range, and for data without batches, labels or loss.
        DivergedError: At a loss that is NaN or infinite.
    """
    fields = {"weight_decay": {"rate": weight_decay}}
    checked = Settings.from_options(settings)
    return _train(model, dataloader, lr, fields, recipe, optimizer, regularizers, checked)


def train_with_grad_clip_and_noise(
    model: nn.Module, dataloader: Iterable[Any], *, lr: float, max_norm: float = 1.0,
    noise_factor: float = 0.01, weight_decay: float = 0.0, recipe: Recipe | None = None,
    optimizer: MakeOptimizer | None = None, regularizers: Iterable[Component] = (), **settings: Any,
) -> History:  # fmt: skip
    """Trains with clipped gradients and with noise on the input embeddings.

    Noise is added to the output of the embedding layer, in training only. It is removed afterwards, also when
    training fails. For noise on gradients give `recipe={"gradient_noise": std}`.

    Args:
        model: Any model; with noise, one that has input embeddings.
        dataloader: See `train_with_weight_decay`, like all other arguments that are not listed here.
        lr: Learning rate.
        max_norm: Norm of all gradients together above which they are scaled down to it.
        noise_factor: Standard deviation of the noise, see `fastreg.nn.attach_embedding_noise`; 0: none.
        weight_decay: The rate λ.
        recipe: What else regularizes.
        optimizer: Makes the optimizer, one of fastreg's.
        regularizers: Components besides those of the recipe.
        settings: See `Settings`.

    Returns:
        Losses, gradient norms, rates and times.

    Raises:
        TypeError: As `train_with_weight_decay`.
        ValueError: As `train_with_weight_decay`, and for a model without embeddings.
        DivergedError: At a loss that is NaN or infinite.

    Reference:
        Pascanu et al. 2013, "On the difficulty of training recurrent neural networks"; Jain et al. 2024,
        "NEFTune: noisy embeddings improve instruction finetuning".
    """
    noise = {"std": noise_factor} if check_range("noise_factor", noise_factor, 0) else None
    fields = {
        "clip": {"max_norm": max_norm}, "embedding_noise": noise, "weight_decay": {"rate": weight_decay}
    }  # fmt: skip
    checked = Settings.from_options(settings)
    return _train(model, dataloader, lr, fields, recipe, optimizer, regularizers, checked)


@dataclass(frozen=True)
class _FineTuningSettings(Settings):
    epochs: int | None = 3
    auto_class: str = "AutoModelForCausalLM"
    inputs: Any = None


def fine_tune_with_adaptive_regularization(
    model_or_name: nn.Module | str, dataloader: Iterable[Any], *, lr: float = 2e-5,
    dropout: tuple[float, float] = (0.05, 0.15), anneal: bool = True, l2_sp: float = 0.01,
    lr_decay: float = 0.9, weight_decay: float = 0.01, max_norm: float = 1.0,
    recipe: Recipe | None = None, optimizer: MakeOptimizer | None = None,
    regularizers: Iterable[Component] = (), **settings: Any,
) -> History:  # fmt: skip
    """Adapts a pre-trained transformer to a task, with regularizers that follow layer and time.

    - Hidden dropout grows from layer to layer, and falls to 0 over the training, in a straight line.
    - Weights are pulled towards where they started (L2-SP) and decay, and gradients are clipped.
    - Layers learn the slower the nearer they are to the input.
    - Learning rates warm up over 6 % of the steps and fall to 0, if neither `warmup` nor `schedule` is given.

    Afterwards the model drops as before. A training that continues another (`history=`) counts the steps of
    both in all of these; its `epochs` and `max_steps` are additional.

    Args:
        model_or_name: A model with repeated layers, or a name or folder for `from_pretrained`.
        dataloader: See `train_with_weight_decay`, like all other arguments that are not listed here.
        lr: Learning rate of the last layers.
        dropout: Rates of the first and the last layer at the start, each in [0, 1].
        anneal: Whether rates fall to 0.
        l2_sp: Strength α of the pull α/2 · ‖p - p₀‖²; 0: none.
        lr_decay: Factor of the learning rate for each layer further from the output, in (0, 1].
        weight_decay: The rate λ.
        max_norm: Norm of all gradients together above which they are scaled down to it.
        recipe: What else regularizes.
        optimizer: Makes the optimizer, one of fastreg's.
        regularizers: Components besides those of the recipe.
        settings: See `Settings`; `epochs` is 3 by default. Also `auto_class`, the class of transformers that
            loads a model by name ("AutoModelForCausalLM"), and `inputs` for the forward pass that finds the
            dropout, see `fastreg.layerwise.audit`.

    Returns:
        Losses, gradient norms, rates and times, and the model.

    Raises:
        ImportError: For a name, where transformers is not installed.
        TypeError: As `train_with_weight_decay`.
        ValueError: As `train_with_weight_decay`; for models without repeated layers; where rates are set by
            `fastreg.layerwise` already; and for data without length, if the number of steps is not given.
        DivergedError: At a loss that is NaN or infinite.

    Reference:
        Rennie et al. 2014, "Annealed dropout training of deep networks"; Li et al. 2018, "Explicit inductive
        bias for transfer learning with convolutional networks"; Howard & Ruder 2018, "Universal language
        model fine-tuning for text classification".
    """
    ends = tuple(dropout) if isinstance(dropout, Iterable) and not isinstance(dropout, str) else ()
    if len(ends) != 2:
        raise ValueError(
            "dropout must be two rates, of the first and the last layer, such as (0.05, 0.15), "
            f"got {dropout!r}"
        )
    first, last = (check_rate("dropout", rate) for rate in ends)
    checked = _FineTuningSettings.from_options(settings)
    planned = checked.steps(dataloader)
    if planned is None:
        raise ValueError("dataloader has no length: give epochs=None and max_steps= to say when it ends")
    if not planned:
        raise ValueError("dataloader has no batches: it is empty")
    steps = checked.done + planned
    fall = Linear(1.0, 0.0, steps)
    if not {"warmup", "schedule"} & settings.keys():
        checked = dataclasses.replace(checked, warmup=round(0.06 * steps), schedule=fall)
    model = _load(model_or_name, checked.auto_class) if isinstance(model_or_name, str) else model_or_name
    if ORIGINAL in vars(unwrap_model(model)):
        raise ValueError(
            f"rates of this {type(model).__name__} are set by fastreg.layerwise already: call "
            "fastreg.layerwise.remove(model) first, or train it with train_with_weight_decay"
        )
    fields = {
        "clip": {"max_norm": max_norm}, "l2sp": {"strength": l2_sp} if l2_sp else None,
        "weight_decay": {"rate": weight_decay}, "lr_decay": {"rate": lr_decay},
    }  # fmt: skip
    rates = {
        "schedule": fall if anneal else 1.0, "inject": True, "inputs": checked.inputs,
        "layers": lambda layer, layers: first + (last - first) * layer / max(layers - 1, 1),
    }  # fmt: skip
    return _train(model, dataloader, lr, fields, recipe, optimizer, regularizers, checked, rates)


def _load(name: str, auto_class: str) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(
            f"loading {name!r} needs transformers: pip install 'fastreg[hf]', or give a model"
        ) from None
    if not hasattr(transformers, auto_class):
        raise ValueError(f"transformers has no {auto_class!r}: give one such as 'AutoModelForCausalLM'")
    return getattr(transformers, auto_class).from_pretrained(name)


def _train(
    model: nn.Module, dataloader: Iterable[Any], lr: float, fields: dict[str, Any], recipe: Recipe | None,
    factory: MakeOptimizer | None, regularizers: Iterable[Component], settings: Settings,
    rates: dict[str, Any] | None = None,
) -> History:  # fmt: skip
    """Trains with the fields of a loop, which the user's recipe replaces, and annealed dropout rates."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    added = recipe or {} if recipe is None or isinstance(recipe, Mapping) else read_recipe(recipe).to_dict()
    merged = Regularization.from_dict({**fields, **added})
    kind = build.weight_decay(merged).kind
    if factory is not None and (merged.optimizer != {"name": "adamw"} or merged.sam or kind):
        raise ValueError(
            "optimizer= makes the optimizer, and so does a recipe with optimizer, sam or weight_decay.kind: "
            "leave one out"
        )
    planned = settings.steps(dataloader)
    steps = None if planned is None else settings.done + planned
    if settings.device is not None:
        model.to(settings.device)
    history = History() if settings.history is None else settings.history
    optimizer = history.optimizer
    if optimizer is not None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if trained.isdisjoint(map(id, model.parameters())):
            raise ValueError(
                "history= is of another model, and its optimizer would leave this one as it is: give the "
                "model that it was for, history.model"
            )
    else:
        groups = build.make_groups(merged, unwrap_model(model), lr)
        if factory is None:
            optimizer = build.make_optimizer(merged, groups, lr, steps, None, regularizers)
        else:
            if isinstance(groups[0], Tensor):  # a group, lest the factory's default decay
                groups = [{"params": groups, "weight_decay": build.weight_decay(merged).rate}]
            components = [*build.make_components(merged, steps), *regularizers]
            optimizer = _call(factory, groups, lr, components)
    callbacks = build.make_callbacks(merged, model, optimizer, steps, None)
    if rates is not None and "dropout" not in added:
        try:
            callbacks.append(DropoutRates(model, [rates]))
        except BaseException:
            callbacks.remove()
            raise
    history.optimizer = optimizer
    return train(model, dataloader, history, callbacks, settings)


def _call(
    factory: MakeOptimizer, groups: list[Any], lr: float, components: list[Component]
) -> torch.optim.Optimizer:
    """Calls the user's factory of an optimizer, and refuses what is none."""
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise TypeError(
            f"optimizer must be a class such as fastreg.AdamW, got {type(factory).__name__}; to continue a "
            "training, give its history="
        )
    fused = isinstance(factory, type) and issubclass(factory, FusedOptimizer)
    if components and not fused and "regularizers" not in inspect.signature(factory).parameters:
        names = ", ".join(type(component).__name__ for component in components)
        label = getattr(factory, "__name__", repr(factory))
        raise TypeError(f"{label} takes no regularizers, here {names}: give one of fastreg's optimizers")
    options: dict[str, Any] = {"regularizers": components} if components else {}
    optimizer = factory(groups, lr=lr, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer
