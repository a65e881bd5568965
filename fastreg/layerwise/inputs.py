"""Makes small inputs for one forward pass of a model from its class and configuration."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
FRAMES = 24
"""Frames of audio: more than the spans that wav2vec2 masks in training."""


def candidates(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yields arguments that may fit the model, most likely ones first; none for unknown models."""
    like = next(model.parameters(), torch.empty(0))
    if getattr(model, "main_input_name", None) is not None and getattr(model, "config", None) is not None:
        for batch in (1, 2):
            yield (), _hugging_face(model, batch, like)
    elif isinstance(model, (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)):
        layer = next(m for m in model.modules() if hasattr(m, "self_attn"))
        attention: Any = layer.self_attn
        x = like.new_zeros(2, TOKENS, attention.embed_dim)
        yield ((x,) if isinstance(model, nn.TransformerEncoder) else (x, x)), {}
    elif isinstance(next((m for m in model.modules() if m._parameters), None), nn.Embedding):
        yield (torch.zeros(2, TOKENS, dtype=torch.int64, device=like.device),), {}


def _hugging_face(model: Any, batch: int, like: Tensor) -> dict[str, Any]:
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    names = {main}
    if getattr(config, "is_encoder_decoder", False):
        names.add("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and main == "pixel_values":
        names.add("input_ids")
    if hasattr(config, "text_config") and hasattr(config, "projection_dim"):  # two towers, as in CLIP
        names |= {"input_ids", "pixel_values", "input_features"}
    makers = {
        "input_ids": _ids, "decoder_input_ids": _ids, "pixel_values": _pixels, "input_values": _waves,
        "input_features": _features,
    }  # fmt: skip
    made = {name: makers[name](config, batch) for name in names if name in makers and name in accepted}
    return {
        name: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype) for name, x in made.items()
    }


def _of(config: Any, name: str, default: Any = None) -> Any:
    """Returns a value of a configuration, or of one inside it."""
    inner = (getattr(config, f"{part}_config", None) for part in ("text", "vision", "audio", "encoder"))
    values = (getattr(c, name, None) for c in (config, *inner) if c is not None)
    return next((value for value in values if value is not None), default)


def _ids(config: Any, batch: int) -> Tensor:
    size = int(_of(config, "vocab_size", 2))
    values = vars(config) | {f"text_{k}": v for k, v in vars(getattr(config, "text_config", config)).items()}
    special = {v for k, v in values.items() if "token_i" in k and isinstance(v, int)}
    plain = [i for i in range(min(size, 2 * TOKENS + len(special))) if i not in special] or [0]
    ids = torch.tensor([plain[i % len(plain)] for i in range(TOKENS)])
    end = _of(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end  # heads of BART and CLIP look for it
    return ids.expand(batch, -1).clone()


def _pixels(config: Any, batch: int) -> Tensor:
    size = _of(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = (_of(config, "num_frames"),) if _of(config, "num_frames") else ()
    return _noise((batch, *frames, _of(config, "num_channels", 3), height, width))


def _waves(config: Any, batch: int) -> Tensor:
    kernels, strides = _of(config, "conv_kernel"), _of(config, "conv_stride")
    if kernels and strides:
        length = FRAMES
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            length = (length - 1) * stride + kernel
        return _noise((batch, length))
    if _of(config, "max_length") and _of(config, "num_mel_bins"):  # spectrograms, as of AST
        return _noise((batch, _of(config, "max_length"), _of(config, "num_mel_bins")))
    return _noise((batch, 16_000))


def _features(config: Any, batch: int) -> Tensor:
    if _of(config, "num_mel_bins"):  # Whisper halves the length
        return _noise((batch, _of(config, "num_mel_bins"), 2 * _of(config, "max_source_positions", FRAMES)))
    width = _of(config, "input_feat_per_channel") or _of(config, "feature_projection_input_dim", 80)
    return _noise((batch, FRAMES, width))


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
