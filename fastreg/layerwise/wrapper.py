"""Wraps a transformer and sets dropout rates that grow from layer to layer."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..common.unwrap import unwrap_model
from ..schedules import LinearLayers
from .set_rates import set_dropout
from .sites import block_positions

PREFIX = "base_model."


class LayerwiseAdaptiveRegularization(nn.Module):
    """Wraps a transformer of any family and sets the dropout of layer i to base + i · increase.

    ```python
    model = LayerwiseAdaptiveRegularization(AutoModelForCausalLM.from_pretrained(name))
    loss = model(**batch).loss
    ```

    The rates are set in the wrapped model itself: this is the same as `set_dropout` with `LinearLayers` and
    `inject=True`.  Names of parameters and keys of the `state_dict` are those of the wrapped model, and its
    other attributes (`config`, `generate`, `save_pretrained`, `gradient_checkpointing_enable`, ...) are
    available on the wrapper.

    Args:
        base_model: Any transformer.
        num_layers: The expected number of layers of its longest stack of blocks; checked if given.
        base_dropout: Rate of the first layer, in [0, 1].
        dropout_increase_per_layer: The increase of the rate from layer to layer.
        roles: The roles to set, see `set_dropout`.
        inputs: Inputs of the forward pass that finds the dropout, see `audit`.

    Attributes:
        table: The rates that were set.

    Raises:
        ValueError: If there are no layers or not as many, and for rates out of range.
    """

    _wraps = "base_model"

    def __init__(
        self, base_model: nn.Module, num_layers: int | None = None, base_dropout: float = 0.1,
        dropout_increase_per_layer: float = 0.02, *, roles: str | tuple[str, ...] = ("hidden",),
        inputs: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        count = max(
            (layers for _, _, layers in block_positions(unwrap_model(base_model)).values()), default=0
        )
        if not count:
            raise ValueError(f"found no repeated layers in {type(base_model).__name__}")
        if num_layers not in (None, count):
            raise ValueError(
                f"{type(base_model).__name__} has {count} layers, got {num_layers=}: give {count} or None"
            )
        schedule = LinearLayers(base_dropout, dropout_increase_per_layer)
        self.table = set_dropout(base_model, schedule, roles, inject=True, inputs=inputs)
        self.base_model = base_model
        self.train(base_model.training)
        self._register_state_dict_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped model with the same arguments."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_model"), name)

    def _named_members(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yields parameters or buffers with the names of the wrapped model."""
        for name, member in super()._named_members(*args, **kwargs):
            yield name.replace(PREFIX, "", 1), member


def _without_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    _rename(state_dict, prefix + PREFIX, prefix)


def _with_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    _rename(state_dict, prefix, prefix + PREFIX)


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
