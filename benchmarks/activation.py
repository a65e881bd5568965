"""Measures the memory that a training step keeps for its backward pass, with and without stored masks.

python -m fastreg_benchmarks.activation --json benchmarks/results/activation.json
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastreg.nn
from fastreg.cli import document


@dataclass
class Saved:
    """Storages of tensors that autograd has saved, each counted once, without known ones."""

    storages: dict[int, Tensor] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for k, t in self.storages.items() if k not in self.known)


@contextmanager
def saved_bytes(known: Any = ()) -> Iterator[Saved]:
    """Counts the bytes that the block keeps for its backward pass, except those of known tensors."""
    saved = Saved(known={t.untyped_storage().data_ptr() for t in known})

    def pack(tensor: Tensor) -> Tensor:
        saved.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def activation_memory(rows: int = 1, columns: int = 256, layers: int = 12) -> list[dict[str, Any]]:
    """Measures the bytes that GPT-2 keeps for its backward pass, with the dropout of torch and of fastreg.

    The masks of `nn.Dropout` have the dtype of the activations on a CPU, and a byte per element on CUDA.
    """
    transformers: Any = importlib.import_module("transformers")
    results = []
    for name in ("torch.nn.Dropout", "fastreg.nn.Dropout"):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=layers, vocab_size=8192, bos_token_id=0, eos_token_id=0, use_cache=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).train()
        if name.startswith("fastreg"):
            fastreg.nn.replace_dropout(model)
        elements = rows * columns * config.n_embd * (2 * layers + 1)
        batch = torch.randint(config.vocab_size, (rows, columns))
        with saved_bytes(model.parameters()) as saved:
            model(input_ids=batch, labels=batch).loss.backward()
        results.append(
            {"dropout": name, "layers": layers, "tokens": rows * columns, "dropped": elements}
            | {"bytes": saved.bytes}
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints the results, and writes them to a file if one is named; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.activation", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    results = {"torch": torch.__version__, "gpt2": activation_memory()}
    for row in results["gpt2"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        document.write(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
