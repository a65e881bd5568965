"""Counts the files, functions and record types of fastreg that a call passes through.

    python -m fastreg_benchmarks.journeys

The counts say how much code a reader of this call has to follow.  They hold the files of `fastreg` and
`fastreg_kernels`, and the functions in them, that `sys.setprofile` sees in one call after a few of the same
to warm up; comprehensions and generator expressions belong to the function around them.  Record types are
dataclasses and named tuples of both packages that are among the variables and results of functions of
`fastreg`, or in lists, tuples and dictionaries of them.  Files of kernels are seen only in Triton's
interpreter, where kernels are Python.  They are counted apart, because the journey on a GPU ends at the
launch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fastreg

WARM_UP = 3


class Journey(NamedTuple):
    """The functions that one call passes through.

    Attributes:
        host: How often each (file, function) of `fastreg` was called.
        kernels: The same of `fastreg_kernels`.
        records: Names of the record types.
    """

    host: dict[tuple[str, str], int]
    kernels: dict[tuple[str, str], int]
    records: set[str]

    @property
    def files(self) -> set[str]:
        """The files of `fastreg` that the call passes through."""
        return {file for file, _ in self.host}

    def __str__(self) -> str:
        """Shows files, functions, calls and record types in one line."""
        parts = []
        for name, functions in (("fastreg", self.host), ("kernels", self.kernels)):
            files = {file for file, _ in functions}
            count = f"{len(files):3} files {len(functions):4} functions {sum(functions.values()):5} calls"
            parts.append(f"{name} {count}")
        return "   ".join([*parts, f"{len(self.records)} record types"])


def start() -> Journey:
    """Starts to record a journey, until `sys.setprofile(None)` is called; returns it."""
    journey = Journey(collections.Counter(), collections.Counter(), set())

    def see(frame: types.FrameType, event: str, result: object) -> None:
        path = frame.f_code.co_filename
        counts = {"fastreg": journey.host, "fastreg_kernels": journey.kernels}.get(_package(path))
        if event == "call" and counts is not None:
            counts[path, _function(frame.f_code)] += 1  # type: ignore[index]
        if event == "return" and counts is journey.host:
            journey.records.update(_records([*frame.f_locals.values(), result]))

    sys.setprofile(see)
    return journey


def follow(call: Callable[[], object]) -> Journey:
    """Returns the journey of a call."""
    journey = start()
    try:
        call()
    finally:
        sys.setprofile(None)
    return journey


@functools.cache
def _package(path: str) -> str:
    return next((part for part in reversed(Path(path).parts[:-1]) if part.startswith("fastreg")), "")


def _records(value: object) -> Iterator[str]:
    kind = type(value)
    if kind.__module__.startswith("fastreg") and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        yield f"{kind.__module__}.{kind.__name__}"
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _records(item)
    elif type(value) is dict:
        for item in value.values():
            yield from _records(item)


def _function(code: types.CodeType) -> str:
    """Returns the name of a function; for a comprehension, that of the function around it."""
    parts = getattr(code, "co_qualname", code.co_name).split(".<locals>.")  # Python 3.10 lacks co_qualname
    while len(parts) > 1 and parts[-1] in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"):
        parts.pop()
    return ".".join(parts)


def step(backend: str) -> Journey:
    """Returns the journey of a warm step of AdamW with clipping, noise and an average."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    regularizers = [fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.01), fastreg.EMA(0.9)]
    optimizer = fastreg.AdamW(model.parameters(), regularizers=regularizers)
    with fastreg.use_backend(backend):
        for _ in range(WARM_UP):
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
        return follow(optimizer.step)


def dropout() -> Journey:
    """Returns the journey of a forward pass through `fastreg.nn.Dropout`."""
    module, x = fastreg.nn.Dropout(0.5), torch.ones(4, 4, requires_grad=True)
    for _ in range(WARM_UP):
        module(x)
    return follow(lambda: module(x))


def trainer() -> Journey:
    """Returns the journey of a warm step of `FastregTrainer` with a recipe of four fields."""
    import transformers

    from fastreg.hf import FastregTrainer

    journeys: list[Journey] = []

    class Follow(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            journeys.append(start())

        def on_step_end(self, *_: object, **__: object) -> None:
            sys.setprofile(None)

    tokens = torch.arange(8)
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=WARM_UP + 1,
            dataloader_pin_memory=False, save_strategy="no", log_level="error",
        )  # fmt: skip
        FastregTrainer(
            transformers.GPT2LMHeadModel(config), arguments,
            train_dataset=[{"input_ids": tokens, "labels": tokens}] * 64, callbacks=[Follow()],
            recipe={"dropout": 0.1, "weight_decay": 0.1, "embedding_noise": 0.1, "ema": 0.9},
        ).train()  # fmt: skip
    return journeys[-1]


def journeys() -> dict[str, Callable[[], Journey]]:
    """Returns functions that follow each journey, by name; one of them needs `TRITON_INTERPRET=1`."""
    return {
        "warm step, reference": lambda: step("reference"),
        "warm step, triton": lambda: step("triton"),
        "nn.Dropout forward": dropout,
        "Trainer, one step": trainer,
    }


def main() -> None:
    """Prints a line for each journey."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name, journey in journeys().items():
        print(f"{name:24}{journey()}")


if __name__ == "__main__":
    main()
