"""Loops of accelerate: those of the documentation, as they are printed there."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.amp import GradScaler
from torch.utils.data import DataLoader

import fastreg
import fastreg.hf

AVERAGED, SHARPNESS_AWARE = (
    textwrap.dedent(block) for block in re.findall("```python\n(.*?)```", fastreg.hf.__doc__, re.S)[1:]
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """And as if nobody had used accelerate before."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def batches(runs: Any) -> DataLoader:
    return DataLoader(runs.data, batch_size=4, collate_fn=hf.default_data_collator)


def run(text: str, runs: Any, tools: Any, folder: Path, **names: Any) -> dict[str, Any]:
    seen: list[Any] = []
    defaults = {
        "Accelerator": Accelerator, "fastreg": fastreg, "model": tools.tiny(0.0), "loader": batches(runs),
        "folder": str(folder), "evaluate": lambda model: seen.append(tools.weights(model)),
    }  # fmt: skip
    names = {**defaults, **names}
    exec(text, names)
    return {**names, "seen": seen}


def test_a_loop_that_clips_averages_and_saves(runs, tools, tmp_path) -> None:
    done = run(AVERAGED, runs, tools, tmp_path)
    model = tools.tiny(0.0)
    optimizer = fastreg.AdamW(
        model.parameters(), lr=1e-3, regularizers=[fastreg.ClipNorm(1.0), fastreg.EMA(0.999)]
    )
    for index, batch in enumerate(batches(runs)):
        (model(**batch).loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert tools.distance(tools.weights(done["model"]), tools.weights(model)) == 0
    assert done["optimizer"].optimizer.grad_norm == optimizer.grad_norm
    with optimizer.averaged():
        assert tools.distance(done["seen"][0], tools.weights(model)) == 0
        assert tools.distance(done["seen"][0], tools.weights(tools.tiny(0.0))) > 0


def test_a_loop_goes_on_from_what_it_saved(runs, tools, tmp_path) -> None:
    done = run(AVERAGED, runs, tools, tmp_path / "first")
    load = "accelerator.load_state(folder)\noptimizer.train()\n"
    text = AVERAGED.replace("for batch", f"{load}for batch").replace("state(folder)", "state(other)")
    text = text.replace("load_state(other)", "load_state(folder)")
    again = run(text, runs, tools, tmp_path / "first", other=tmp_path / "other")
    whole = AVERAGED.replace("in loader:", "in [*loader, *loader]:")
    expected = run(whole, runs, tools, tmp_path / "whole")
    assert tools.distance(tools.weights(again["model"]), tools.weights(expected["model"])) == 0
    assert tools.distance(again["seen"][0], expected["seen"][0]) == 0
    assert tools.distance(again["seen"][0], done["seen"][0]) > 0


def test_a_loop_with_sam(runs, tools, tmp_path) -> None:
    done = run(SHARPNESS_AWARE, runs, tools, tmp_path)
    model = tools.tiny(0.0)
    optimizer = fastreg.SAM(
        model.parameters(), fastreg.AdamW, rho=0.05, lr=1e-3, regularizers=[fastreg.ClipNorm(1.0)]
    )
    for batch in batches(runs):
        model(**batch).loss.backward()
        optimizer.first_step(zero_grad=True)
        model(**batch).loss.backward()
        optimizer.second_step(zero_grad=True)
    assert tools.distance(tools.weights(done["model"]), tools.weights(model)) == 0


@pytest.mark.parametrize("kind", ["adamw", "sam", "lookahead", "sam around torch"])
def test_preparing_loses_nothing_that_is_in_the_state(tools, kind) -> None:
    """accelerate saves and loads what it prepares."""
    model = tools.tiny(0.0)
    settings: dict[str, Any] = {"lr": 1e-2, "regularizers": [fastreg.EMA(0.5), fastreg.ClipNorm(1.0)]}
    optimizer = {
        "adamw": lambda p: fastreg.AdamW(p, **settings),
        "sam": lambda p: fastreg.SAM(p, fastreg.AdamW, **settings),
        "lookahead": lambda p: fastreg.Lookahead(fastreg.AdamW(p, **settings), k=1),
        "sam around torch": lambda p: fastreg.SAM(p, torch.optim.AdamW, lr=1e-2),
    }[kind](model.parameters())  # fmt: skip
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}

    def step(stepped: Any) -> None:
        model(**batch).loss.backward()
        if "sam" in kind:
            optimizer.first_step(zero_grad=True)
            model(**batch).loss.backward()
        stepped.step()
        stepped.zero_grad()

    step(optimizer)
    before = optimizer.state_dict()
    pointers = [p.data_ptr() for p in model.parameters()]
    prepared = Accelerator().prepare_optimizer(optimizer)
    after = prepared.state_dict()
    assert before["param_groups"] == after["param_groups"] and before["state"].keys() == after["state"].keys()
    for index, buffers in before["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in buffers.items())
    step(prepared)
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("base", [fastreg.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("overflow", [None, 0, 1])
def test_sam_under_a_scaler_that_sees_nothing_of_it(tools, base, overflow) -> None:
    """A scaler that does not hand itself over tells the scale and what it found."""
    model, plain = tools.tiny(0.0), tools.tiny(0.0)
    Accelerator()
    scaler = GradScaler("cpu", init_scale=2.0**8)
    settings = {"rho": 0.3, "lr": 1e-2, "eps": 1e-5}
    optimizer = AcceleratedOptimizer(fastreg.SAM(model.parameters(), base, **settings), scaler=scaler)
    reference = fastreg.SAM(plain.parameters(), base, **settings)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    for index in range(2):
        loss = scaler.scale(model(**batch).loss)
        (loss * float("inf") if index == overflow else loss).backward()
        if index == 0:
            optimizer.optimizer.first_step(zero_grad=True)
    optimizer.step()
    if overflow is None:
        plain(**batch).loss.backward()
        reference.first_step(zero_grad=True)
        plain(**batch).loss.backward()
        reference.second_step()
    bound = 1e-5 if overflow is None else 0
    assert tools.distance(tools.weights(model), tools.weights(plain)) <= bound
