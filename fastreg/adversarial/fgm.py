"""Moves the embeddings of language models by their gradients, for adversarial training."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..common.unwrap import unwrap_model
from ..common.validation import check_range
from ..optim.perturb import PerturbByGradient


class FGM:
    """The fast gradient method on the weights of a model's embeddings.

    ```python
    fgm = fastreg.FGM(model, epsilon=1.0)

    loss(model(ids), y).backward()
    with fgm.attacked():  # the embeddings are at w + ε g / ‖g‖
        loss(model(ids), y).backward()  # adds the adversarial gradients
    optimizer.step()
    ```

    Parameters tied to the embeddings, such as the weight of a head, move with them. The norm is that of the
    whole gradient of a weight, computed on the device without synchronization. A gradient that is 0 or not
    finite moves nothing. Weights are restored bit for bit. A loss scaled by a `torch.amp.GradScaler` moves
    them as far as an unscaled one: do not unscale before.

    Args:
        model: The model, which may be wrapped. Its `get_input_embeddings()` is perturbed by default.
        epsilon: ε ≥ 0, the distance in units of the weights. May be set between attacks.
        modules: Modules to perturb instead, or a pattern searched in the names of parameters (`re.search`),
            such as `"word_embeddings"`. Each parameter is moved by its own norm.
        rounding: Rounding of perturbed 16-bit weights, `"stochastic"` or `"nearest"`. See `SAM`.

    Raises:
        ValueError: If epsilon is out of range, or there are no parameters to perturb.

    Reference:
        Miyato, Dai, Goodfellow 2017, "Adversarial training methods for semi-supervised text classification",
        which perturbs each word in a text; perturbing the weights, as here, is widespread practice.
    """

    def __init__(
        self, model: nn.Module, epsilon: float = 1.0,
        modules: nn.Module | list[nn.Module] | str | None = None, rounding: str = "stochastic",
    ) -> None:  # fmt: skip
        self.parameters = _perturbed(model, modules)
        self.epsilon = epsilon
        # One pass for each parameter: a pass takes the norm over all of its parameters.
        self._passes = [
            PerturbByGradient([{"params": [p], "rho": 0.0, "adaptive": False, "eta": 0.0}], rounding)
            for p in self.parameters
        ]
        self._attacked: list[tuple[PerturbByGradient, list[Tensor]]] = []

    @property
    def epsilon(self) -> float:
        """The distance that weights move, ≥ 0."""
        return self._epsilon

    @epsilon.setter
    def epsilon(self, value: float) -> None:
        self._epsilon = check_range("epsilon", value, 0)

    @torch.no_grad()
    def attack(self) -> None:
        """Moves the embeddings by their gradients; embeddings moved before are restored first.

        Raises:
            RuntimeError: If there is no gradient.
        """
        self.restore()
        if all(p.grad is None for p in self.parameters):
            frozen = not any(p.requires_grad for p in self.parameters)
            fix = "they are frozen, set modules or requires_grad" if frozen else "call loss.backward() before"
            raise RuntimeError(f"attack() needs gradients of the embeddings: {fix}")
        for perturb in self._passes if self.epsilon else ():
            perturb.param_groups[0]["rho"] = self.epsilon
            self._attacked.append((perturb, perturb.perturb()))

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the embeddings, if they are moved."""
        for perturb, moved in self._attacked:
            perturb.restore(moved)
        self._attacked = []

    @contextlib.contextmanager
    def attacked(self) -> Iterator[None]:
        """Moves the embeddings for the block and restores them after it."""
        self.attack()
        try:
            yield
        finally:
            self.restore()


def _perturbed(model: nn.Module, modules: Any) -> list[nn.Parameter]:
    """Returns the parameters to perturb, each once.

    Raises:
        ValueError: If there are none.
    """
    model = unwrap_model(model)
    if isinstance(modules, str):
        named = dict(model.named_parameters())
        if not (parameters := [p for name, p in named.items() if re.search(modules, name)]):
            raise ValueError(f"no parameter has {modules!r} in its name; there are {', '.join(named):.500}")
        return parameters
    if modules is None:
        base: Any = unwrap_model(model, peft=True)
        with contextlib.suppress(NotImplementedError, AttributeError):
            modules = base.get_input_embeddings()
        if modules is None:
            raise ValueError(
                f"{type(model).__name__} has no get_input_embeddings(): name what to perturb, such as "
                "FGM(model, modules=model.embedding)"
            )
    chosen: list[nn.Module] = [modules] if isinstance(modules, nn.Module) else list(modules)
    if not (parameters := list(dict.fromkeys(p for module in chosen for p in module.parameters()))):
        raise ValueError(f"modules must have parameters to perturb, got {chosen!r:.200}")
    return parameters
