"""Adversarial training of language models: their embeddings move, for tokens cannot."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..common.validation import check_range
from ..optim.perturb import Ascent


class FGM:
    """The fast gradient method on the weights of a model's embeddings.

    ```python
    fgm = fastreg.FGM(model, epsilon=1.0)

    loss(model(ids), y).backward()
    with fgm.attacked():  # the embeddings are at w + ε g / ‖g‖
        loss(model(ids), y).backward()  # adds the adversarial gradients
    optimizer.step()
    ```

    What is tied to the embeddings, such as the weight of a head, moves with them. The norm is that of all of
    a weight's gradient, computed on the device without waiting for it. A gradient that is 0 or not finite
    moves nothing. Weights come back bit for bit. A loss that is scaled by a `torch.amp.GradScaler` moves them
    just as far: do not unscale before.

    Args:
        model: The model. Its `get_input_embeddings()` is perturbed by default.
        epsilon: ε ≥ 0, how far, in units of the weights; may be set between attacks.
        modules: What to perturb instead: modules, or a pattern that is searched in the names of parameters
            (`re.search`), such as `"word_embeddings"`. A norm is taken of each parameter.
        rounding: Of perturbed 16-bit weights, `"stochastic"` or `"nearest"`: see `SAM`.

    Raises:
        ValueError: If epsilon is out of range, or nothing is found to perturb.

    Reference:
        Miyato, Dai, Goodfellow 2017, "Adversarial training methods for semi-supervised text classification",
        whose perturbation is that of each word in a text; on weights, as here, it is widespread practice.
    """

    def __init__(
        self, model: nn.Module, epsilon: float = 1.0,
        modules: nn.Module | list[nn.Module] | str | None = None, rounding: str = "stochastic",
    ) -> None:  # fmt: skip
        self.parameters = _perturbed(model, modules)
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}")
        self.epsilon = epsilon
        # One for each: a pass takes one norm over all of its parameters.
        self._passes = [
            Ascent([{"params": [p], "rho": 0.0, "adaptive": False, "eta": 0.0}], rounding)
            for p in self.parameters
        ]
        self._attacked: list[tuple[Ascent, list[Tensor]]] = []

    @property
    def epsilon(self) -> float:
        """How far weights move, ≥ 0."""
        return self._epsilon

    @epsilon.setter
    def epsilon(self, value: float) -> None:
        self._epsilon = check_range("epsilon", value, 0)

    @torch.no_grad()
    def attack(self) -> None:
        """Move the embeddings by their gradients; from where they were, if they are moved already.

        Raises:
            RuntimeError: If there is no gradient.
        """
        self.restore()
        if all(p.grad is None for p in self.parameters):
            frozen = not any(p.requires_grad for p in self.parameters)
            fix = "they are frozen, set modules or requires_grad" if frozen else "call loss.backward() before"
            raise RuntimeError(f"attack() needs gradients of the embeddings: {fix}")
        for climber in self._passes if self.epsilon else ():
            climber.param_groups[0]["rho"] = self.epsilon
            self._attacked.append((climber, climber.climb()))

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the embeddings back; nothing happens if they are where they were."""
        for climber, moved in self._attacked:
            climber.restore(moved)
        self._attacked = []

    @contextlib.contextmanager
    def attacked(self) -> Iterator[None]:
        """Within the block the embeddings are moved."""
        self.attack()
        try:
            yield
        finally:
            self.restore()


def _perturbed(model: nn.Module, modules: nn.Module | list[nn.Module] | str | None) -> list[nn.Parameter]:
    """The parameters to perturb, each once.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(modules, str):
        found = [p for name, p in model.named_parameters() if re.search(modules, name)]
        if not found:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ValueError(f"no parameter has {modules!r} in its name; there are {names:.500}")
        return found
    if modules is None:
        find = getattr(model, "get_input_embeddings", None)
        try:
            modules = find() if find is not None else None
        except NotImplementedError:
            modules = None
        if modules is None:
            raise ValueError(
                f"{type(model).__name__} has no get_input_embeddings(): name what to perturb, such as "
                "FGM(model, modules=model.embedding)"
            )
    every = [modules] if isinstance(modules, nn.Module) else list(modules)
    found = list(dict.fromkeys(p for module in every for p in module.parameters()))
    if not found:
        raise ValueError(f"modules must have parameters to perturb, got {every!r:.200}")
    return found
