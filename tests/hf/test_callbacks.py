"""Callbacks for any Trainer."""

import pytest
import transformers as hf

from fastreg.hf import EmbeddingNoiseCallback, ScheduleCallback
from fastreg.layerwise import DropoutScheduler
from fastreg.schedules import Linear


def test_schedulers_follow_the_steps(runs, tools) -> None:
    model, seen = tools.tiny(), []
    annealed = DropoutScheduler(model, Linear(0.3, steps=3))
    model.register_forward_pre_hook(lambda *_: seen.append(model.transformer.h[1].mlp.dropout.p))
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 4}
    runs.train(hf.Trainer, model=model, callbacks=[ScheduleCallback(annealed)], arguments=arguments)
    assert [float(rate) for rate in seen] == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0, 0])


def test_only_schedulers_are_scheduled() -> None:
    with pytest.raises(TypeError, match=r"must have step\(n\)"):
        ScheduleCallback(0.1)


def test_noise_on_embeddings_is_trainers_bit_for_bit(runs, tools) -> None:
    theirs = runs.train(hf.Trainer, arguments={"neftune_noise_alpha": 5.0})
    ours = runs.train(hf.Trainer, callbacks=[EmbeddingNoiseCallback()])
    without = runs.train(hf.Trainer)
    assert tools.distance(tools.weights(ours.model), tools.weights(theirs.model)) == 0
    assert tools.distance(tools.weights(ours.model), tools.weights(without.model)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"std": 0.1}, {"length": "true", "factor": Linear(1.0, steps=4)}])
def test_noise_ends_with_training(runs, tools, options) -> None:
    model = tools.tiny()
    embedding = model.get_input_embeddings()
    noise = EmbeddingNoiseCallback(**options)
    trainer = runs.trainer(hf.Trainer, model=model, callbacks=[noise], arguments={"max_steps": 2})
    for _ in range(2):
        trainer.train()
        assert not embedding._forward_hooks


def test_noise_falls_with_the_steps(runs, tools) -> None:
    noise, seen = EmbeddingNoiseCallback(6.0, factor=Linear(1.0, steps=3)), []

    class Seeing(hf.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs) -> None:
            seen.append(noise._noise._attached.alpha)

    runs.train(hf.Trainer, callbacks=[noise, Seeing()], arguments={"max_steps": 4})
    assert seen == pytest.approx([6, 4, 2, 0])


def test_noise_after_a_run_that_failed(runs, tools) -> None:
    class Failing(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            raise KeyboardInterrupt

    trainer = runs.trainer(hf.Trainer, callbacks=[EmbeddingNoiseCallback(), Failing()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Failing)
    trainer.train()
    assert not trainer.model.get_input_embeddings()._forward_hooks


def test_noise_twice_is_refused(runs) -> None:
    trainer = runs.trainer(
        hf.Trainer, callbacks=[EmbeddingNoiseCallback()], arguments={"neftune_noise_alpha": 5.0}
    )
    with pytest.raises(ValueError, match="noise twice.*neftune_noise_alpha=5"):
        trainer.train()


def test_noise_out_of_range_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="alpha"):
        EmbeddingNoiseCallback(-1.0)
