"""Trainer with regularization in the optimizer's step.

create_optimizer    the recipe's, or the one that was given; it clips by `max_grad_norm` (clipping.py)
training_step       SAM's second pass after the last micro-batch of a step (second_pass.py)
optimizer.step      one pass over gradients and weights; Trainer makes none of its own
checkpoints         hold averages, and so does the model at the end (averages.py)
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..recipe.regularization import Recipe, read_recipe
from . import averages
from .agreement import Agreeing
from .clipping import Clipping
from .recipe import AppliedRecipe
from .scaling import Scaling
from .second_pass import SecondPass
from .unwrap import engine_of, is_ours, sam_of, unwrapped


class FastregTrainerMixin:
    """What `FastregTrainer` adds to `Trainer`, for any subclass of it: write it in front.

    ```python
    class MyTrainer(FastregTrainerMixin, Seq2SeqTrainer): ...
    ```

    With another optimizer than fastreg's, all is as without it.  With one of fastreg's:

    - The step clips by `max_grad_norm`, unless the optimizer has a `ClipNorm`, and the norm that it measures
      is logged as `grad_norm`: before clipping, with SAM that of the second gradients.
    - `SAM` makes its second pass over all micro-batches of a step.  The loss that is logged is that of the
      first.
    - Evaluations, checkpoints and the model that training leaves hold the averaged weights, where there are
      any.  Training resumes from a checkpoint as if it had not been interrupted.

    Args:
        args: For the Trainer.
        recipe: Makes the optimizer and all else that regularizes: a `Regularization`, a dictionary of its
            fields, or a YAML file of them.  Learning rate, seed and number of steps are those of the
            `TrainingArguments`; so is `max_grad_norm` where the recipe does not clip.
        same_masks: Whether SAM's second pass draws the random numbers of its first, such as dropout masks.
        kwargs: For the Trainer.

    Raises:
        ValueError: If there is an optimizer besides the recipe, or arguments of one; if embeddings would get
            noise twice; with DeepSpeed, which steps by itself.
    """

    def __init__(
        self, *args: Any, recipe: Recipe | None = None, same_masks: bool = True, **kwargs: Any
    ) -> None:
        given = None if recipe is None else read_recipe(recipe)
        self._second_pass, self._clipping = SecondPass(same_masks), Clipping()
        self._applied: AppliedRecipe | None = None
        self._agreed = False
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if given is not None:
            if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
                raise ValueError(
                    "the recipe makes the optimizer: leave out recipe, or optimizers and "
                    "optimizer_cls_and_kwargs"
                )
            if trainer.lr_scheduler is not None:
                raise ValueError(
                    "the recipe makes the optimizer, which a scheduler must be made for: leave optimizers "
                    "out and choose lr_scheduler_type in TrainingArguments"
                )
            if trainer.is_deepspeed_enabled:
                _refuse_deepspeed("a recipe")
            self._applied = AppliedRecipe(given, trainer)
        # First, so that whoever stores the model at the end of training finds the averages in it.
        trainer.callback_handler.callbacks.insert(0, _Events(trainer))

    # The optimizer --------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, or the recipe's; if it is fastreg's, it clips by `max_grad_norm`.

        Raises:
            ValueError: If optimizer and `max_grad_norm` contradict each other; with DeepSpeed.
        """
        trainer: Any = self
        if self._applied is not None:
            given = args[0] if args else kwargs.get("model")
            model, steps = trainer.model if given is None else given, self._steps()
            if trainer.optimizer is None:
                trainer.optimizer = self._applied.optimizer(model, steps or None)
            else:
                self._applied.again(model, steps)
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if is_ours(trainer.optimizer) and trainer.is_deepspeed_enabled:
            _refuse_deepspeed(f"fastreg.{type(unwrapped(trainer.optimizer)).__name__}")
        if (engine := engine_of(trainer.optimizer)) is not None:
            self._clipping.fit(engine, trainer.args.max_grad_norm)
        return trainer.optimizer

    def _steps(self) -> int:
        """Of the whole run; 0 where nobody knows yet."""
        trainer: Any = self
        return trainer.state.max_steps or max(trainer.args.max_steps, 0)

    # Clipping -------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        if engine_of(self.optimizer) is not None:  # type: ignore[attr-defined]
            return None
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        engine = engine_of(self.optimizer)  # type: ignore[attr-defined]
        if engine is not None:
            return self._clipping.announced(engine)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    # Passes ---------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """As in Trainer, and what the regularizers need besides: other passes, SAM's second one.

        Raises:
            RuntimeError: If a `compute_loss` of a subclass leaves out the recipe's R-Drop.
        """
        trainer: Any = self
        stock = super().training_step  # type: ignore[misc]
        if is_ours(trainer.optimizer):  # Trainer does so within a pass, when noise is on the weights already
            averages.hide(unwrapped(trainer.optimizer))

        def backward(model: nn.Module, inputs: Any, items: Any) -> Tensor:
            gradients = _bound(stock, model, inputs, items, **kwargs)
            for callback in self._applied.callbacks if self._applied is not None else ():
                gradients = callback.around_gradients(gradients, contextlib.nullcontext())
            self._agreed = self._applied is None or self._applied.agreement is None
            loss = gradients()
            if not self._agreed:
                raise RuntimeError(
                    f"r_drop is computed by FastregTrainerMixin.compute_loss, which {type(self).__name__}."
                    "compute_loss has not called: take the loss of super().compute_loss, or leave r_drop out"
                )
            return loss

        if (sam := sam_of(trainer.optimizer)) is None:
            return backward(model, inputs, num_items_in_batch)
        return self._second_pass.step(sam, backward, trainer.accelerator, model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As in Trainer, or R-Drop's."""
        stock: Any = super().compute_loss  # type: ignore[misc]
        alpha = None if self._applied is None else self._applied.agreement
        called: Any = model
        if alpha is not None and model.training:
            called, self._agreed = Agreeing(model, alpha), True
        return stock(called, inputs, return_outputs, num_items_in_batch, **kwargs)

    # Checkpoints ----------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        optimizer = self.optimizer  # type: ignore[attr-defined]
        with averages.averaged(optimizer) if is_ours(optimizer) else contextlib.nullcontext():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._applied is not None and self.args.should_save:  # type: ignore[attr-defined]
            self._applied.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._applied is not None and checkpoint is not None:
            self._applied.load(checkpoint)

    def _load_best_model(self) -> None:
        optimizer = self.optimizer  # type: ignore[attr-defined]
        if is_ours(optimizer):
            averages.show(unwrapped(optimizer))
        super()._load_best_model()  # type: ignore[misc]
        if is_ours(optimizer):
            averages.continue_from_shown(optimizer)


def _refuse_deepspeed(what: str) -> None:
    raise ValueError(
        f"{what} cannot work with DeepSpeed, which clips and steps by itself, on flat copies of the "
        "parameters: train with FSDP2 or DistributedDataParallel, or with another optimizer"
    )


def _bound(function: Any, *args: Any, **kwargs: Any) -> Any:
    return lambda: function(*args, **kwargs)


class _Events(TrainerCallback):
    """What the loop tells, for the mixin."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._scaling = Scaling(None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._second_pass.clear()
        self._scaling = Scaling(trainer.optimizer if is_ours(trainer.optimizer) else None)
        if trainer._applied is not None:
            trainer._applied.begin(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._scaling.stepped()
        if (engine := engine_of(self._trainer.optimizer)) is not None:
            self._trainer._clipping.measured(engine)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._applied is not None:
            self._trainer._applied.callbacks.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_ours(self._trainer.optimizer):
            averages.show(unwrapped(self._trainer.optimizer))
        if self._trainer._applied is not None:
            self._trainer._applied.remove()


class FastregTrainer(FastregTrainerMixin, Trainer):
    """`Trainer` that needs one line for all regularizers: `FastregTrainer(..., recipe={"ema": 0.999})`.

    Or with an optimizer of fastreg's, where Trainer takes one: `optimizers=(optimizer, None)`, or
    `optimizer_cls_and_kwargs=(fastreg.AdamW, {"lr": 1e-3, "regularizers": [fastreg.EMA(0.999)]})`.

    See `FastregTrainerMixin`.
    """
