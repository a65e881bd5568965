"""SAM in a Trainer: its second pass over all micro-batches of a step."""

import contextlib
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fastreg
from fastreg.hf import FastregTrainer


def test_accumulated_steps_are_those_of_the_whole_batch(runs, tools) -> None:
    """Rows count different numbers of labels, and the loss is their mean over the whole batch."""
    results = [
        runs.train(
            dropout=0.0, arguments={"per_device_train_batch_size": 8 // n, "gradient_accumulation_steps": n},
            **tools.sam(rho=0.5),
        )
        for n in (1, 2, 4)
    ]  # fmt: skip
    whole, *others = (tools.weights(trainer.model) for trainer in results)
    for other in others:
        assert tools.distance(other, whole) < 1e-4
    losses = [tools.logged(trainer, "loss") for trainer in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_steps_are_those_of_a_loop_by_hand(runs, tools) -> None:
    arguments = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = runs.train(dropout=0.0, arguments=arguments, **tools.sam(rho=0.5))
    model = tools.tiny(0.0)
    optimizer = fastreg.SAM(
        model.parameters(), fastreg.AdamW, rho=0.5, lr=1e-2, eps=1e-5, weight_decay=0,
        regularizers=[fastreg.ClipNorm(1.0)],
    )  # fmt: skip
    losses = []
    for start in (0, 8, 16):
        batch = hf.default_data_collator(runs.data[start : start + 8])
        batch["num_items_in_batch"] = trainer._get_num_items_in_batch([batch], trainer.args.device)
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.first_step(zero_grad=True)
        model(**batch).loss.backward()
        optimizer.second_step(zero_grad=True)
    assert tools.logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    assert tools.distance(tools.weights(trainer.model), tools.weights(model)) < 1e-5


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_radius_of_zero_is_trainer_without_sam_bit_for_bit(runs, tools, accumulated) -> None:
    arguments = {"gradient_accumulation_steps": accumulated}
    plain = runs.train(
        hf.Trainer, arguments={**arguments, "max_grad_norm": 0},
        **tools.adamw(regularizers=[fastreg.ClipNorm(1.0)]),
    )  # fmt: skip
    ours = runs.train(arguments=arguments, **tools.sam(rho=0.0))
    assert tools.distance(tools.weights(ours.model), tools.weights(plain.model)) == 0
    assert tools.logged(ours, "loss") == tools.logged(plain, "loss")
    assert tools.logged(ours, "grad_norm") == pytest.approx(tools.logged(plain, "grad_norm"), rel=1e-6)


def test_a_radius_changes_weights_but_not_the_first_loss(runs, tools) -> None:
    plain, ours = runs.train(**tools.adamw()), runs.train(**tools.sam(rho=0.5))
    assert tools.logged(ours, "loss")[0] == tools.logged(plain, "loss")[0]
    assert tools.logged(ours, "grad_norm")[0] != pytest.approx(tools.logged(plain, "grad_norm")[0], rel=1e-3)
    assert tools.distance(tools.weights(ours.model), tools.weights(plain.model)) > 1e-3


@pytest.mark.parametrize("same", [True, False])
def test_masks_of_both_passes(runs, tools, same) -> None:
    model, masks = tools.tiny(0.5), []
    model.transformer.drop.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    runs.train(
        model=model,
        same_masks=same,
        arguments={"max_steps": 1, "gradient_accumulation_steps": 2},
        **tools.sam(),
    )
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[2]) is same and torch.equal(masks[1], masks[3]) is same
    assert not torch.equal(masks[0], masks[1])


def test_perturbs_where_it_is_due(runs, tools) -> None:
    model, passes = tools.tiny(), []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    runs.train(model=model, arguments={"max_steps": 6}, **tools.sam(start_step=1, interval=2))
    assert len(passes) == 6 + 3  # the steps 1, 3, 5 of 0 to 5


def test_gradients_are_shared_between_processes_once_in_each_pass(runs, tools) -> None:
    alone = []

    class Local(FastregTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            @contextlib.contextmanager
            def no_sync(model: nn.Module):
                alone.append(None)
                yield

            self.accelerator.no_sync = no_sync
            return super().training_step(*args, **kwargs)

    runs.train(Local, arguments={"max_steps": 1, "gradient_accumulation_steps": 4}, **tools.sam())
    # The last of each pass; the first one is made before there is the double.
    assert len(alone) == 2 + 3


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_around_an_optimizer_of_torch_trainer_clips(runs, tools, base) -> None:
    arguments = {"max_grad_norm": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = runs.train(dropout=0.0, arguments=arguments, **tools.sam(base, rho=0.5))
    reference = runs.train(dropout=0.0, arguments=arguments, **tools.sam(
        {torch.optim.AdamW: fastreg.AdamW, torch.optim.SGD: fastreg.SGD}[base], rho=0.5
    ))  # fmt: skip
    assert tools.distance(tools.weights(trainer.model), tools.weights(reference.model)) < 1e-5
    norms = [tools.logged(t, "grad_norm") for t in (trainer, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class Normed(nn.Module):
    """A model with BatchNorm, in Trainer's terms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(10), nn.Linear(10, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.norm(input_ids.float())).square().mean()}


def test_running_statistics_see_the_first_pass_only(runs, tools) -> None:
    trainer = runs.train(model=Normed(), arguments={"max_steps": 3}, **tools.sam())
    assert int(trainer.model.norm.num_batches_tracked) == 3


def test_a_checkpoint_between_both_passes_resumes_before_them(runs, tools) -> None:
    """As Trainer saves one when it is told to end (`enable_jit_checkpoint`)."""

    class Saving(hf.TrainerCallback):
        trainer: Any = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                assert Saving.trainer.optimizer.optimizer.perturbed
                Saving.trainer._save_checkpoint(Saving.trainer.model, trial=None)

    options = tools.sam(rho=0.5, regularizers=[fastreg.EMA(0.5)])
    # Random numbers of the step that is made again have been drawn already.
    whole = Saving.trainer = runs.trainer(dropout=0.0, callbacks=[Saving()], **options)
    whole.train()
    resumed = runs.train(dropout=0.0, resume=f"{whole.args.output_dir}/checkpoint-3", **options)
    assert tools.distance(tools.weights(resumed.model), tools.weights(whole.model)) == 0
    assert tools.logged(resumed, "loss") == tools.logged(whole, "loss")
