"""Adds noise to token embeddings: NEFTune, as Hugging Face adds it, and as the paper does."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..common.unwrap import unwrap_model
from ..common.validation import check_choice
from ..ops.noise import add_noise
from .attached import Attached, attached_level
from .noise import _NoiseBase, level_property

LENGTHS = ("padded", "true")
GENERATORS = ("torch", "counter")


class EmbeddingNoise(_NoiseBase):
    """Adds noise to embeddings while training: x + alpha / √(L d) · U(-1, 1) for L tokens of d features.

    With `length="padded"`, as in the Trainer of transformers, L is the length of the batch, and padding gets
    noise as well.  With `length="true"`, as in the paper, L is the number of tokens of each sample, and
    padding gets none.  With `std`, the noise is Gaussian and of that size instead.

    There are two generators, both seeded by `torch.manual_seed`.  `"torch"` draws as the Trainer's own hook
    does, `torch.zeros_like(x).uniform_(-m, m)`, with the same bits for one seed (in eager mode: compiled,
    torch draws from another stream, for both).  `"counter"` is one fused pass, which is faster and has the
    same numbers on every device.

    Args:
        alpha: Size of the noise, >= 0; 5, 10 and 15 in the paper.
        std: Standard deviation of Gaussian noise instead, >= 0.
        length: `"padded"` or `"true"`.
        generator: `"torch"` or `"counter"`; by default torch's for padded lengths without `std`, as in the
            Trainer, else the counter.

    Raises:
        ValueError: If alpha or std is out of range, or for another length or generator.

    Shape:
        `[batch, length, d]` or `[length, d]`; the output has the same.

    Reference:
        Jain et al. 2024, "NEFTune: Noisy embeddings improve instruction finetuning".
    """

    alpha, std = level_property("alpha"), level_property("std")

    def __init__(
        self, alpha: float = 5.0, *, std: float | None = None, length: str = "padded",
        generator: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("length", length, LENGTHS)
        if generator is not None:
            check_choice("generator", generator, GENERATORS)
        as_trainer = length == "padded" and std is None
        if generator == "torch" and not as_trainer:
            raise ValueError(
                "generator='torch' is for what the Trainer draws: length='padded' and no std, got "
                f"{length=}, {std=}; leave generator out"
            )
        self.length, self.gaussian = length, std is not None
        self.generator = generator or ("torch" if as_trainer else "counter")
        self.level_name = "alpha" if std is None else "std"
        self._set(alpha if std is None else std, self.level_name)

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Adds noise to the embeddings while training.

        Args:
            input: Embeddings.
            attention_mask: `[batch, length]`, 0 for padding; `None` for no padding.  Only `length="true"`
                uses it.

        Raises:
            TypeError: If the input is not of a floating dtype.
            ValueError: If the mask has another shape, or the input fewer than 2 dimensions.
        """
        if self.idle:
            return input
        if not input.is_floating_point():
            raise TypeError(f"embeddings must be of a floating dtype, got {input.dtype}")
        if input.dim() < 2:
            raise ValueError(f"embeddings must have shape (batch, length, d), got {tuple(input.shape)}")
        if not input.numel():
            return input  # without tokens the noise would be infinite
        if self.generator == "torch":
            return self._as_trainer(input)
        kind = "additive" if self.gaussian else "uniform"
        level = self.level
        if self.length == "padded" or attention_mask is None:
            if not self.gaussian:
                level = level * (input.shape[-2] * input.shape[-1]) ** -0.5
            return add_noise(input, level, kind)
        if attention_mask.shape != input.shape[:-1]:
            raise ValueError(
                f"attention_mask must have shape {tuple(input.shape[:-1])}, as the embeddings "
                f"{tuple(input.shape)} have positions, got {tuple(attention_mask.shape)}; length='padded' "
                "needs no mask"
            )
        mask = (attention_mask != 0).to(level.dtype)
        if not self.gaussian:
            mask = mask * torch.rsqrt(mask.sum(-1, keepdim=True).clamp(min=1) * input.shape[-1])
        return add_noise(input, (level * mask).reshape(-1), kind, input.shape[-1])

    def _as_trainer(self, x: Tensor) -> Tensor:
        count = x.shape[-2] * x.shape[-1]
        if torch.compiler.is_compiling():  # a number would be compiled in
            noise = torch.rand(x.shape, dtype=torch.float32, device=x.device)
            return (x + (2 * noise - 1) * (self.level * count**-0.5)).to(x.dtype)
        magnitude = float(self._level / torch.sqrt(torch.tensor(count)))
        return x + torch.zeros_like(x).uniform_(-magnitude, magnitude)

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        return f"{self.level_name}={self._level}, length={self.length!r}, generator={self.generator!r}"


class AttachedEmbeddingNoise(Attached):
    """The noise that `attach_embedding_noise` has attached, to set and remove.

    Attributes:
        noise: The module that adds the noise, not registered in the model.
        embedding: The module whose output gets the noise.
    """

    alpha, std = attached_level("alpha"), attached_level("std")

    def __init__(self, model: nn.Module, embedding: nn.Module, noise: EmbeddingNoise) -> None:
        super().__init__([noise])
        self.noise, self.embedding = noise, embedding
        self._mask: Any = None
        self._names: list[str] = []
        self._alone = model is embedding
        self._hooks = [embedding.register_forward_hook(self._add)]
        if noise.length == "true" and not self._alone:
            self._names = _names_with_mask(model)
            self._hooks += [
                model.register_forward_pre_hook(self._take_mask, with_kwargs=True),
                model.register_forward_hook(self._drop_mask, always_call=True),
            ]

    def _take_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._mask = arguments.get("attention_mask")

    def _drop_mask(self, *_: Any) -> None:
        self._mask = None

    def _add(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not embedding.training:
            return output
        _refuse_twice(embedding)
        mask = self._mask
        if self._alone and self.noise.length == "true":
            mask = args[0] != embedding.padding_idx
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"length='true' needs attention_mask as a tensor [batch, length], got {type(mask).__name__}"
            )
        if not torch.compiler.is_compiling() and self.noise.level.device != output.device:
            self.noise.to(output.device)
        return self.noise(output, mask)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.noise.extra_repr()})"


def attach_embedding_noise(
    model: nn.Module, alpha: float = 5.0, *, std: float | None = None, length: str = "padded",
    generator: str | None = None,
) -> AttachedEmbeddingNoise:  # fmt: skip
    """Adds noise to the token embeddings of a model while it trains: NEFTune, by a hook.

    ```python
    noise = attach_embedding_noise(model)  # what TrainingArguments(neftune_noise_alpha=5) does, bit for bit
    noise = attach_embedding_noise(model, length="true")  # as in the paper
    ...
    noise.remove()  # or: with attach_embedding_noise(model):
    ```

    Evaluation does not change.  `length="true"` takes the padding from the `attention_mask` of the model's
    call; without one, all tokens count.  A call with `inputs_embeds` gets no noise.  Attach before the first
    call of a compiled model.

    Args:
        model: A model of transformers, or any with `get_input_embeddings()`, wrapped (see `unwrap_model`) or
            not; or an `nn.Embedding`, whose `padding_idx` is the padding of `length="true"`.
        alpha: Size of the noise, ≥ 0. See `EmbeddingNoise`.
        std: Standard deviation of Gaussian noise instead.
        length: `"padded"` or `"true"`.
        generator: See `EmbeddingNoise`.

    Returns:
        The attached noise; its `alpha` or `std` may be set between steps, and needs no compilation.

    Raises:
        RuntimeError: If the embeddings have noise already, ours or the Trainer's; the Trainer's also in the
            forward pass.
        TypeError: If the model has no `get_input_embeddings()`.
        ValueError: For values out of range, and if padding is unknown to `length="true"`.

    Reference:
        Jain et al. 2024, "NEFTune: Noisy embeddings improve instruction finetuning".
    """
    noise = EmbeddingNoise(alpha, std=std, length=length, generator=generator)
    embedding, model = input_embeddings(model), unwrap_model(model)
    _refuse_twice(embedding)
    for hook in embedding._forward_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, AttachedEmbeddingNoise):
            raise RuntimeError(f"the embeddings have noise already: {other!r}; call remove() on it first")
    if length == "true":
        if model is embedding and getattr(embedding, "padding_idx", None) is None:
            raise ValueError(
                "length='true' needs to know padding: give the model instead of its embedding, or an "
                "embedding with a padding_idx"
            )
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "length='true' is for models with one sequence, and this one has an encoder and a decoder; "
                "use length='padded'"
            )
    weight = next(embedding.parameters(), None)
    if weight is not None:
        noise.to(weight.device)
    return AttachedEmbeddingNoise(model, embedding, noise)


def input_embeddings(model: nn.Module) -> nn.Module:
    """Returns the token embeddings of a model, wrapped (see `unwrap_model`) or not.

    Raises:
        TypeError: If it has no `get_input_embeddings()`.
    """
    inner: Any = unwrap_model(model, peft=True)
    if isinstance(inner, nn.Embedding):
        return inner
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Module):
        raise TypeError(
            f"{type(inner).__name__} does not tell its embeddings by get_input_embeddings(); give the "
            "nn.Embedding itself"
        )
    return embedding


def _refuse_twice(embedding: nn.Module) -> None:
    if hasattr(embedding, "neftune_noise_alpha"):
        raise RuntimeError(
            f"the embeddings have the NEFTune noise of transformers, neftune_noise_alpha="
            f"{embedding.neftune_noise_alpha}: leave it out of TrainingArguments, or do not attach another"
        )


def _names_with_mask(model: nn.Module) -> list[str]:
    """Returns the names of the arguments of the model, none if no attention mask is among them."""
    for candidate in (model, unwrap_model(model, peft=True)):
        names = list(inspect.signature(candidate.forward).parameters)
        if "attention_mask" in names:
            return names
    return []
