"""Recipes in a Trainer."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fastreg
from fastreg.common.unwrap import find_optimizer
from fastreg.hf import FastregTrainer
from fastreg.losses.r_drop import r_drop_loss
from fastreg.optim.fused_optimizer import FusedOptimizer

EVERYTHING: dict[str, Any] = {
    "optimizer": {"name": "adamw", "eps": 1e-5},
    "weight_decay": 0.1,
    "lr_decay": 0.9,
    "dropout": {"rate": 0.2, "annealing": {"schedule": "linear", "steps": 0.5}},
    "clip": {"max_norm": 1.0, "value": 0.5},
    "gradient_noise": {"std": 0.01, "relative": True},
    "embedding_noise": {"alpha": 1.0, "annealing": "linear"},
    "activation_noise": 0.01,
    "token_noise": 0.05,
    "weight_noise": {"std": 0.001, "annealing": "cosine"},
    "adversarial": {"epsilon": 0.01},
    "r_drop": 0.5,
    "sam": {"rho": 0.02, "start_step": 1},
    "lookahead": 3,
    "ema": [{"decay": 0.8}, {"decay": 0.5, "name": "fast"}],
    "swa": 0.5,
    "l1": 1e-5,
    "l2sp": 1e-3,
}
ALONE = [name for name in EVERYTHING if name not in ("optimizer", "lr_decay")]
FAST = {"max_steps": 25, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}


def falls(losses: list[float]) -> bool:
    return sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("name", [*ALONE, "msam"])
def test_each_alone_trains(runs, tools, name) -> None:
    recipe = {"optimizer": {"eps": 1e-5}, name: EVERYTHING.get(name, 0.3)}
    trainer = runs.train(recipe=recipe, arguments=FAST)
    assert falls(tools.logged(trainer, "loss"))


def test_everything_together_trains(runs, tools) -> None:
    trainer = runs.train(recipe=EVERYTHING, arguments=FAST)
    assert falls(tools.logged(trainer, "loss"))
    assert find_optimizer(trainer.optimizer, fastreg.SAM) is not None
    kinds = {type(component) for component in find_optimizer(trainer.optimizer, FusedOptimizer).components}
    assert kinds >= {
        fastreg.ClipNorm, fastreg.ClipValue, fastreg.GradientNoise, fastreg.EMA, fastreg.SWA,
        fastreg.SlowWeights, fastreg.L1, fastreg.L2SP,
    }  # fmt: skip
    assert all(tools.logged(trainer, "grad_norm"))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def rates(model: nn.Module) -> list[float]:
    return [float(block.mlp.dropout.p) for block in model.transformer.h]


def test_the_model_is_left_as_it_was_and_trained_again_all_the_same(runs, tools) -> None:
    recipe = {name: EVERYTHING[name] for name in ("dropout", "embedding_noise", "weight_noise", "ema")}
    trainer = runs.trainer(recipe=recipe)
    before, seen = (hooks(trainer.model), rates(trainer.model)), []

    class Seeing(hf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any):
            seen.append((hooks(model), max(rates(model))))

    trainer.add_callback(Seeing())
    trainer.train()
    assert (hooks(trainer.model), rates(trainer.model)) == before
    optimizer = trainer.optimizer
    trainer.train()
    assert trainer.optimizer is optimizer
    assert (hooks(trainer.model), rates(trainer.model)) == before
    assert seen[:6] == seen[6:]
    assert [rate for _, rate in seen[:6]] == pytest.approx([0.2, 0.2 * 2 / 3, 0.2 / 3, 0, 0, 0])
    assert {number for number, _ in seen} == {before[0] + 1}


class Stopped(Exception):
    pass


class Stopping(hf.TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise Stopped


def test_a_run_that_failed_can_be_begun_again(runs, tools) -> None:
    recipe = {"embedding_noise": 1.0, "weight_noise": 1e-3, "sam": 0.1, "ema": 0.9}
    trainer = runs.trainer(recipe=recipe, callbacks=[Stopping()])
    before = hooks(trainer.model)
    with pytest.raises(Stopped):
        trainer.train()
    trainer.remove_callback(Stopping)
    trainer.train()
    assert hooks(trainer.model) == before


def test_a_recipe_from_a_dictionary_a_file_or_itself(runs, tools, tmp_path) -> None:
    settings = {"ema": 0.5, "weight_decay": 0.1, "dropout": 0.3}
    recipe = fastreg.Regularization(**settings)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    forms = [settings, recipe, tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml")]
    first, *others = (tools.weights(runs.train(recipe=each).model) for each in forms)
    assert all(tools.distance(other, first) == 0 for other in others)


def test_is_what_a_loop_by_hand_does(runs, tools) -> None:
    settings = {"weight_decay": 0.1, "lr_decay": 0.8, "ema": 0.5, "optimizer": {"eps": 1e-5}, "clip": 1.0}
    arguments = {
        "max_steps": 3, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = runs.train(recipe=settings, arguments=arguments, dropout=0.0)
    model = tools.tiny(0.0)
    optimizer, callbacks = fastreg.Regularization(**settings).apply(model, lr=1e-2, steps=3)
    for start in (0, 4, 8):
        batch = hf.default_data_collator(runs.data[start : start + 4])
        callbacks.training_step(lambda batch=batch: model(**batch).loss, optimizer)
        callbacks.step()
    optimizer.eval()
    assert tools.distance(tools.weights(trainer.model), tools.weights(model)) < 1e-6


def test_layers_learn_at_rates_of_their_own_and_frozen_ones_can_be_thawed(runs, tools) -> None:
    model = tools.tiny()
    for p in model.transformer.h[0].parameters():
        p.requires_grad_(False)
    before = tools.weights(model)

    class Thawing(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.frozen = tools.weights(model)
                for p in model.parameters():
                    p.requires_grad_(True)

    thawing = Thawing()
    recipe = {"weight_decay": 0.1, "lr_decay": 0.5}
    trainer = runs.train(model=model, recipe=recipe, callbacks=[thawing])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(thawing.frozen[name], before[name])
    assert not torch.equal(tools.weights(model)[name], before[name])
    groups = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert groups["block 1"] == pytest.approx(0.25e-2) and groups["block 2"] == pytest.approx(0.5e-2)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_r_drop_is_scaled_as_the_loss(runs, tools, accumulated) -> None:
    """Without dropout both passes agree, and the loss is the model's."""
    arguments = {
        "gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated,
        "max_steps": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    plain = runs.train(recipe={}, arguments=arguments, dropout=0.0)
    agreed = runs.train(recipe={"r_drop": 2.0}, arguments=arguments, dropout=0.0)
    assert tools.logged(agreed, "loss") == pytest.approx(tools.logged(plain, "loss"), rel=1e-5)
    assert tools.logged(agreed, "grad_norm") == pytest.approx(tools.logged(plain, "grad_norm"), rel=1e-4)


def test_r_drop_counts_how_far_both_passes_are_apart(runs, tools) -> None:
    arguments = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    model, seen = tools.tiny(0.5), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    trainer = runs.train(recipe={"r_drop": 2.0}, arguments=arguments, model=model)
    batch = hf.default_data_collator(runs.data[:4])
    (both,) = seen
    shifted = (*(half[:, :-1] for half in both.split(4)), batch["labels"][:, 1:])
    assert tools.logged(trainer, "loss") == pytest.approx([r_drop_loss(*shifted, alpha=2.0).item()], rel=1e-5)
    assert r_drop_loss(*shifted, alpha=2.0) > r_drop_loss(*shifted, alpha=0.0) + 1e-3


def test_r_drop_reaches_a_loss_that_is_overridden(runs, tools) -> None:
    class Overridden(FastregTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss, outputs) if return_outputs else loss

    options = {"recipe": {"r_drop": 2.0}, "arguments": {"max_steps": 2, "eval_strategy": "steps"}}
    plain, overridden = runs.train(**options), runs.train(Overridden, **options)
    for what in ("loss", "eval_loss"):
        assert tools.logged(overridden, what) == tools.logged(plain, what)


# Refusals -----------------------------------------------------------------------------------------------


def test_a_loss_that_leaves_r_drop_out_is_refused(runs) -> None:
    class Overridden(FastregTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss

    with pytest.raises(RuntimeError, match="which Overridden.compute_loss has not called"):
        runs.train(Overridden, recipe={"r_drop": 1.0})


@pytest.mark.parametrize("kind", ["optimizers", "optimizer_cls_and_kwargs", "scheduler"])
def test_an_optimizer_besides_the_recipe_is_refused(runs, tools, kind) -> None:
    model = tools.tiny()
    optimizer = fastreg.AdamW(model.parameters())
    options: dict[str, Any] = {
        "optimizers": {"optimizers": (optimizer, None)},
        "optimizer_cls_and_kwargs": tools.adamw(),
        "scheduler": {"optimizers": (None, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))},
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match="the recipe makes the optimizer"):
        runs.trainer(model=model, recipe={"ema": 0.9}, **options)


@pytest.mark.parametrize(
    "argument", [{"weight_decay": 0.1}, {"adam_beta2": 0.95}, {"optim": "adafactor"}], ids=str
)
def test_arguments_of_another_optimizer_are_refused(runs, argument) -> None:
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name}=.*say it in the recipe"):
        runs.trainer(recipe={"ema": 0.9}, arguments=argument)


def test_noise_on_embeddings_twice_is_refused(runs) -> None:
    with pytest.raises(ValueError, match="noise twice.*neftune_noise_alpha=5"):
        runs.trainer(recipe={"embedding_noise": 5.0}, arguments={"neftune_noise_alpha": 5})


def test_r_drop_of_another_loss_is_refused(runs) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        runs.trainer(recipe={"r_drop": 1.0}, arguments={"label_smoothing_factor": 0.1})


def test_clipping_twice_is_refused(runs) -> None:
    trainer = runs.trainer(recipe={"clip": 0.5}, arguments={"max_grad_norm": 2.0})
    with pytest.raises(ValueError, match="contradict"):
        trainer.train()


@pytest.mark.parametrize("recipe", [3, ["ema"]])
def test_no_recipe(runs, recipe) -> None:
    with pytest.raises(TypeError, match="recipe must be a fastreg.Regularization"):
        runs.trainer(recipe=recipe)


def test_deepspeed_is_refused(runs, tools) -> None:
    class WithDeepSpeed(FastregTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="a recipe cannot work with DeepSpeed.*FSDP2"):
        runs.trainer(WithDeepSpeed, recipe={"ema": 0.9})
    trainer = runs.trainer(WithDeepSpeed, **tools.sam())
    with pytest.raises(ValueError, match=r"fastreg.SAM cannot work with DeepSpeed"):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", ["weight_noise", "adversarial"])
def test_what_fsdp_would_hide_is_refused(runs, name) -> None:
    class Sharded(FastregTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match=f"{name} holds the parameters.*FSDP"):
        runs.trainer(Sharded, recipe={name: True})
    runs.trainer(Sharded, recipe={"sam": True})


def test_a_checkpoint_of_another_recipe_is_refused(runs) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = runs.train(recipe={"weight_noise": 1e-3}, arguments=arguments)
    folder = f"{trainer.args.output_dir}/checkpoint-1"
    with pytest.raises(ValueError, match="weight_noise.*apply the recipe that it was saved with"):
        runs.train(recipe={"dropout": 0.1}, arguments=arguments, resume=folder)
