"""Trainer with regularization in the optimizer's step: one pass over gradients and weights."""

import contextlib
import functools
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..recipe.regularization import Recipe, read_recipe
from .optimizer import OptimizerInTrainer, SecondPass
from .recipe import AppliedRecipe, RDropModel


class FastregTrainerMixin:
    """The parts of `FastregTrainer` for any subclass of `Trainer`, in front of which it is written.

    ```python
    class MyTrainer(FastregTrainerMixin, Seq2SeqTrainer): ...
    ```

    Other optimizers than fastreg's are used as without it.  With one of fastreg's:

    - The step clips by `max_grad_norm`, unless the optimizer has a `ClipNorm`, and the norm that it measures
      is logged as `grad_norm`: before clipping, with SAM that of the second gradients.
    - `SAM` makes its second pass over all micro-batches of a step.  The loss that is logged is that of the
      first.
    - Evaluations, checkpoints and the model that training leaves hold the averaged weights, where there are
      any.  Training resumes from a checkpoint as if it had not been interrupted.

    Args:
        args: For the Trainer.
        recipe: Makes the optimizer and all other regularizers: a `Regularization`, a dictionary of its
            fields, or a YAML file of them.  Learning rate, seed and number of steps are those of the
            `TrainingArguments`; so is `max_grad_norm` where the recipe does not clip.
        same_masks: Whether SAM's second pass draws the random numbers of its first, such as dropout masks.
        kwargs: For the Trainer.

    Raises:
        ValueError: If there is an optimizer besides the recipe, or arguments of one; if embeddings would get
            noise twice; with DeepSpeed, which steps by itself; where training begins, if `max_grad_norm` and
            a `ClipNorm` contradict each other.
    """

    def __init__(
        self, *args: Any, recipe: Recipe | None = None, same_masks: bool = True, **kwargs: Any
    ) -> None:
        regularization = None if recipe is None else read_recipe(recipe)
        self._second_pass = SecondPass(same_masks)
        self._applied: AppliedRecipe | None = None
        self._fastreg_optimizer: OptimizerInTrainer | None = None
        self._r_drop_called = False
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if regularization is not None:
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
            self._applied = AppliedRecipe(regularization, trainer)
        # First, so that other callbacks that store the model at the end of training store the averages.
        trainer.callback_handler.callbacks.insert(0, _Events(trainer))

    # The optimizer --------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Returns Trainer's optimizer, or the recipe's; one of fastreg's clips by `max_grad_norm`."""
        trainer: Any = self
        if self._applied is not None:
            model = args[0] if args else kwargs.get("model")
            model = trainer.model if model is None else model
            steps = trainer.state.max_steps or max(trainer.args.max_steps, 0)  # 0: not known yet
            if trainer.optimizer is None:
                trainer.optimizer = self._applied.optimizer(model, steps or None)
            else:
                self._applied.reapply(model, steps)
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        optimizer = OptimizerInTrainer.find(trainer.optimizer, self._fastreg_optimizer)
        if optimizer is not None:
            if trainer.is_deepspeed_enabled:
                _refuse_deepspeed(f"fastreg.{type(optimizer.optimizer).__name__}")
            optimizer.clip_by(trainer.args.max_grad_norm)
        self._fastreg_optimizer = optimizer
        return trainer.optimizer

    # Clipping -------------------------------------------------------------------------------------------

    @property
    def _fused(self) -> Any:
        return None if self._fastreg_optimizer is None else self._fastreg_optimizer.fused

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(model) if self._fused is None else None  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._fastreg_optimizer is not None and self._fused is not None:
            return self._fastreg_optimizer.norm_of_next_step(self._fused)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    # Passes ---------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """Makes the passes of Trainer over a micro-batch, and those that regularizers add.

        Raises:
            RuntimeError: If a `compute_loss` of a subclass leaves out the recipe's R-Drop.
        """
        trainer: Any = self
        stock = super().training_step  # type: ignore[misc]
        optimizer, applied = self._fastreg_optimizer, self._applied
        if optimizer is not None:  # Trainer does so within a pass, when noise is on the weights already
            optimizer.swap_out()

        def backward(model: nn.Module, inputs: Any, items: Any) -> Tensor:
            gradients: Any = functools.partial(stock, model, inputs, items, **kwargs)
            for callback in () if applied is None else applied.passes:
                gradients = functools.partial(callback.make_passes, gradients, contextlib.nullcontext())
            self._r_drop_called = applied is None or applied.r_drop_alpha is None
            loss = gradients()
            if not self._r_drop_called:
                raise RuntimeError(
                    f"r_drop is computed by FastregTrainerMixin.compute_loss, which {type(self).__name__}."
                    "compute_loss has not called: take the loss of super().compute_loss, or leave r_drop out"
                )
            return loss

        if optimizer is None or optimizer.sam is None:
            return backward(model, inputs, num_items_in_batch)
        return self._second_pass.step(
            optimizer.sam, backward, trainer.accelerator, model, inputs, num_items_in_batch
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Computes the loss as Trainer does, or that of R-Drop."""
        alpha = None if self._applied is None else self._applied.r_drop_alpha
        if alpha is not None and model.training:
            model, self._r_drop_called = RDropModel(model, alpha), True  # type: ignore[assignment]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)  # type: ignore[misc]

    # Checkpoints ----------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        optimizer = self._fastreg_optimizer
        with contextlib.nullcontext() if optimizer is None else optimizer.averaged():
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
        if self._fastreg_optimizer is not None:
            self._fastreg_optimizer.swap_in()
        super()._load_best_model()  # type: ignore[misc]
        if self._fastreg_optimizer is not None:
            self._fastreg_optimizer.continue_from_averages()


def _refuse_deepspeed(what: str) -> None:
    raise ValueError(
        f"{what} cannot work with DeepSpeed, which clips and steps by itself, on flat copies of the "
        "parameters: train with FSDP2 or DistributedDataParallel, or with another optimizer"
    )


class _Events(TrainerCallback):
    """Passes the events of the loop on to the parts of the mixin."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._second_pass.clear()
        if trainer._fastreg_optimizer is not None:
            trainer._fastreg_optimizer.begin(trainer.optimizer)
        if trainer._applied is not None:
            trainer._applied.begin(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._fastreg_optimizer is not None:
            self._trainer._fastreg_optimizer.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in () if self._trainer._applied is None else self._trainer._applied.callbacks:
            callback.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._fastreg_optimizer is not None:
            self._trainer._fastreg_optimizer.swap_in()
        if self._trainer._applied is not None:
            self._trainer._applied.remove()


class FastregTrainer(FastregTrainerMixin, Trainer):
    """`Trainer` that needs one line for all regularizers: `FastregTrainer(..., recipe={"ema": 0.999})`.

    Or with an optimizer of fastreg's, where Trainer takes one: `optimizers=(optimizer, None)`, or
    `optimizer_cls_and_kwargs=(fastreg.AdamW, {"lr": 1e-3, "regularizers": [fastreg.EMA(0.999)]})`.

    See `FastregTrainerMixin`.
    """
