"""A tiny GPT-2 on tokens that follow a rule, and short runs of a Trainer on the CPU."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import fastreg
from fastreg.hf import FastregTrainer

LENGTH = 10
LIKE_ADAM = {"lr": 1e-2, "eps": 1e-5}
"""An eps above rounding errors: attention is indifferent to biases of keys, and Adam makes steps of the noise
in their gradients."""


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, and less for Trainer to look through where it collects garbage, as it does in each run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """No compiling, no interpreter: what runs the step is the concern of other tests."""
    with fastreg.use_backend("reference"):
        yield


def tiny(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else Trainer counts first labels, which are none
    return model


def rows(number: int = 32) -> list[dict[str, Tensor]]:
    """Sequences that count on from a random token; how many of the labels count differs from row to row."""
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(2, 24, (number,), generator=random)
    tokens = [(torch.arange(LENGTH) + start - 2) % 22 + 2 for start in starts]
    return [
        {"input_ids": t, "labels": torch.where(torch.arange(LENGTH) < i % 5, -100, t)}
        for i, t in enumerate(tokens)
    ]


class Runs:
    """Makes Trainers and runs of them, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        self.data = rows()

    def arguments(self, cls: type = hf.TrainingArguments, **changed: Any) -> Any:
        self._number += 1
        settings = {
            "output_dir": str(self.folder / str(self._number)), "use_cpu": True, "report_to": [],
            "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2, "max_steps": 6,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "logging_steps": 1,
            "save_strategy": "no", "log_level": "error",
        }  # fmt: skip
        return cls(**{**settings, **changed})

    def trainer(
        self, cls: type = FastregTrainer, model: nn.Module | None = None, dropout: float = 0.1,
        arguments: dict[str, Any] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        trainer = cls(
            tiny(dropout) if model is None else model, self.arguments(**arguments or {}),
            train_dataset=self.data, eval_dataset=self.data[:8], **options,
        )  # fmt: skip
        trainer.remove_callback(hf.PrinterCallback)
        return trainer

    def train(self, *args: Any, resume: Any = None, **options: Any) -> Any:
        trainer = self.trainer(*args, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved(trainer: Any, step: int) -> dict[str, Tensor]:
    return load_file(Path(trainer.args.output_dir) / f"checkpoint-{step}" / "model.safetensors")


def logged(trainer: Any, what: str) -> list[float]:
    return [row[what] for row in trainer.state.log_history if what in row]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, as a share of the largest weight of each tensor."""
    shared = a.keys() & b.keys()
    assert shared
    return max(
        float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in shared
    )


class Tools:
    """What tests compare with."""

    tiny, weights, saved = staticmethod(tiny), staticmethod(weights), staticmethod(saved)
    logged, distance = staticmethod(logged), staticmethod(distance)

    @staticmethod
    def adamw(**options: Any) -> dict[str, Any]:
        return {"optimizer_cls_and_kwargs": (fastreg.AdamW, {**LIKE_ADAM, **options})}

    @staticmethod
    def torch_adamw() -> dict[str, Any]:
        return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, LIKE_ADAM)}

    @staticmethod
    def sam(base: Callable[..., Any] = fastreg.AdamW, **options: Any) -> dict[str, Any]:
        settings = {"lr": 1e-2} if base in (torch.optim.SGD, fastreg.SGD) else LIKE_ADAM
        return {"optimizer_cls_and_kwargs": (fastreg.SAM, {"base_optimizer": base, **settings, **options})}


@pytest.fixture
def tools() -> type[Tools]:
    return Tools
