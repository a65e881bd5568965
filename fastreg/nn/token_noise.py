"""Attaches token noise to the input embeddings of a model, by a hook."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..common.unwrap import unwrap_model
from .attached import Attached, attached_level
from .embedding_noise import input_embeddings
from .noise import TokenNoise


class AttachedTokenNoise(Attached):
    """Token noise on the ids that an embedding sees, which `attach_token_noise` returns."""

    rate = attached_level("rate")

    def __init__(self, embedding: nn.Module, noise: TokenNoise) -> None:
        super().__init__([noise])
        self._hooks = [embedding.register_forward_pre_hook(self._replace)]

    def _replace(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._noises[0](args[0]), *args[1:]) if embedding.training else None


def attach_token_noise(
    model: nn.Module, rate: float = 0.05, special_tokens: Sequence[int] | None = None
) -> AttachedTokenNoise:
    """Replaces tokens by random ones before the embeddings of a model while it trains; labels stay.

    Args:
        model: A model with `get_input_embeddings()`.
        rate: Share of the tokens that are replaced, in [0, 1].
        special_tokens: Ids that are neither replaced nor drawn; by default those that the configuration
            names, such as `pad_token_id`.

    Returns:
        The attached noise, whose `remove()` takes it away.

    Raises:
        TypeError: If the model has no `get_input_embeddings()`.
        ValueError: For values out of range.
    """
    embedding: Any = input_embeddings(model)
    if special_tokens is None:
        config: Any = getattr(unwrap_model(model, peft=True), "config", None)
        named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        ids = {i for item in named for i in (item if isinstance(item, list) else [item])}
        special_tokens = sorted(i for i in ids if i is not None and 0 <= i < embedding.num_embeddings)
    noise = TokenNoise(rate, embedding.num_embeddings, special_tokens).to(embedding.weight.device)
    return AttachedTokenNoise(embedding, noise)
