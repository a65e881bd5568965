"""The task of `fastreg compare`: a causal language model of transformers, and text cut into tokens."""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..usage import UsageError

WIDTH, LAYERS, HEADS = 128, 2, 4


@dataclass(frozen=True)
class Task:
    """A model before training, and the two shares of the text as windows of tokens."""

    model: torch.nn.Module
    model_name: str
    text_name: str
    train: Tensor  # tokens
    validation: Tensor  # windows x block size
    block_size: int
    build: Callable[[int], torch.nn.Module] | None = None  # with weights of a seed; none if pre-trained

    def build_model(self, seed: int) -> torch.nn.Module:
        """Returns a fresh model, the same for all contenders."""
        return copy.deepcopy(self.model) if self.build is None else self.build(seed)

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def train_windows(self) -> Tensor:
        """The training share cut into windows for evaluation."""
        return _windows(self.train, self.block_size)

    def batches(self, steps: int, batch_size: int, seed: int) -> Tensor:
        """Returns the start of every training window, steps x batch size, the same for every contender."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.train) - self.block_size + 1, (steps, batch_size), generator=generator)


def load(args: argparse.Namespace) -> Task:
    """Loads model and text; raises `UsageError` if they cannot be read, or do not go together."""
    text, name = _read(args.text) if args.text else (_embedded(), "Python's language reference")
    if args.model is None:
        tokens = torch.tensor(list(text.encode()), dtype=torch.long)
        build = partial(_small_gpt2, args.block_size)
        model = build(args.seed)
        model_name = f"GPT-2, {LAYERS} layers of width {WIDTH}, from scratch"
    else:
        build = None
        model, tokens = _pretrained(args.model, text)
        model_name = args.model
        _check(model, tokens, args)
    train, validation = _split(tokens, args)
    windows = _windows(validation, args.block_size)
    return Task(model, model_name, name, train, windows, args.block_size, build)


def loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Returns the mean cross entropy of all tokens but the first of each window, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _embedded() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python comes without pydoc_data, the default text; pass --text FILE") from None
    return "\n".join(topics[name] for name in sorted(topics))


def _read(paths: Sequence[str]) -> tuple[str, str]:
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--text {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from None
    return "\n".join(texts), ", ".join(paths)


def _small_gpt2(block_size: int, seed: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    # 1/sqrt(width): with transformers' 0.02, meant for a width of 768, this one learns nothing for 100 steps.
    # No dropout, so that nothing but the contender regularizes.
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=block_size, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            initializer_range=WIDTH**-0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def _pretrained(name: str, text: str) -> tuple[torch.nn.Module, Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        AutoConfig.from_pretrained(name)  # without a network this fails soonest
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever a broken file or a missing network makes of it
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"--model {name}: {first} (expected a causal language model of transformers with its tokenizer: "
            "a name on the Hugging Face hub, or a folder written by save_pretrained)"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"--model {name}: the checkpoint is no causal language model, it lacks {', '.join(missing[:3])}"
        )
    return model, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0].long()


def _check(model: torch.nn.Module, tokens: Tensor, args: argparse.Namespace) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and args.block_size > positions:
        raise UsageError(f"--block-size {args.block_size} exceeds the {positions} positions of {args.model}")
    entries = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokens) and int(tokens.max()) >= entries:
        highest = int(tokens.max())
        raise UsageError(f"--model {args.model}: its tokenizer gives token {highest}, it has {entries}")


def _split(tokens: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns the beginning of the text for training, and what follows it for validation."""
    train = args.train_tokens or (8_000 if not args.text else len(tokens) * 9 // 10)
    validation = args.val_tokens or (12_000 if not args.text else max(len(tokens) - train, 0))
    if train + validation > len(tokens):
        raise UsageError(
            f"the text has {len(tokens)} tokens, fewer than {train} to train and {validation} to validate; "
            "lower --train-tokens or --val-tokens, or give more --text"
        )
    for share, size in (("training", train), ("validation", validation)):
        if size < args.block_size:
            raise UsageError(
                f"the {share} share has {size} of the text's {len(tokens)} tokens, too few for --block-size "
                f"{args.block_size}; give more --text or a smaller --block-size"
            )
    return tokens[:train], tokens[train : train + validation]


def _windows(tokens: Tensor, block_size: int) -> Tensor:
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
