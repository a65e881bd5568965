"""Recipes at work, field by field and all together, and what a model has no place for."""

import re

import pytest
import torch

import fastreg
from fastreg import Regularization


@pytest.fixture(scope="module")
def plain(tools):
    return tools.trained({})


ALONE = {
    "optimizer": "sgd",
    "weight_decay": 0.5,
    "lr_decay": 0.5,
    "dropout": 0.5,
    "clip": 0.1,
    "gradient_noise": 0.1,
    "embedding_noise": 5,
    "activation_noise": 0.2,
    "token_noise": 0.5,
    "weight_noise": 0.1,
    "adversarial": True,
    "sam": 0.5,
    "msam": 0.5,
    "lookahead": {"k": 2},
    "l1": 0.5,
    "l2sp": 0.5,
}


@pytest.mark.parametrize("name", ALONE)
def test_each_field_alone_takes_effect(name, plain, tools):
    after, *_ = tools.trained({name: ALONE[name]})
    assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(after, plain[0], strict=True))


def test_nothing_on_is_plain_adamw(plain, tools):
    model = tools.gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = tools.loss_of(model)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert plain[1] == pytest.approx(losses, rel=1e-6)
    assert plain[3] == []


@pytest.mark.parametrize("name, of", [("ema", {"decay": 0.5}), ("swa", {"start": 2}), ("swa", 0.5)])
def test_averages_are_evaluated_and_leave_training_alone(name, of, plain, tools):
    after, losses, optimizer, _ = tools.trained({name: of})
    assert losses == plain[1] and all(map(torch.equal, after, plain[0]))
    with optimizer.averaged():
        shown = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    assert not all(map(torch.equal, shown, after))


def test_of_several_averages_ema_is_evaluated_first(tools):
    _, _, optimizer, _ = tools.trained(
        {"lookahead": 2, "swa": 1, "ema": [{"decay": 0.5, "name": "a"}, {"name": "b"}]}
    )
    optimizer.eval()
    assert optimizer.param_groups[0]["averaged"] == "a"
    optimizer.train()


def test_groups_decay_weights_only_and_layers_learn_at_their_pace(tools):
    _, _, optimizer, _ = tools.trained({"weight_decay": 0.1})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.dim() < 2 for p in optimizer.param_groups[1]["params"])
    _, _, optimizer, _ = tools.trained({"weight_decay": {"rate": 0.1, "exclude": False}, "lr_decay": 0.5})
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.00125, 0.0025, 0.005, 0.01]
    _, _, optimizer, _ = tools.trained({"sam": {"perturb": "norms", "rho": 0.1}})
    assert {group["rho"] for group in optimizer.param_groups} == {0.0, 0.1}
    _, _, optimizer, _ = tools.trained({"sam": {"adaptive": "weights", "rho": 0.1}})
    assert [group["adaptive"] for group in optimizer.param_groups] == [True, False]


@pytest.mark.parametrize("clip, kinds", [
    ({"norm_type": torch.inf}, {fastreg.ClipNorm}), ({"value": 0.5}, {fastreg.ClipValue}),
    (
        {"value": 0.5, "adaptive": 0.1, "max_norm": 2},
        {fastreg.ClipValue, fastreg.AdaptiveClip, fastreg.ClipNorm},
    ),
])  # fmt: skip
def test_clipping_is_by_what_is_set_and_else_by_the_norm(clip, kinds):
    optimizer, _ = Regularization(clip=clip).apply(torch.nn.Linear(2, 2))
    clips = [component for component in optimizer.components if "Clip" in type(component).__name__]
    assert {type(component) for component in clips} == kinds
    norms = [component for component in clips if isinstance(component, fastreg.ClipNorm)]
    assert [(norm.max_norm, norm.norm_type) for norm in norms] == (
        [(clip.get("max_norm", 1.0), clip.get("norm_type", 2.0))] if fastreg.ClipNorm in kinds else []
    )


def test_options_reach_the_optimizer(tools):
    recipe = {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "state_dtype": "bfloat16"}}
    _, _, optimizer, _ = tools.trained(recipe | {"weight_decay": {"rate": 0.1, "kind": "cautious"}})
    assert isinstance(optimizer, fastreg.SGD) and optimizer.param_groups[0]["nesterov"]
    state = next(iter(optimizer.state.values()))
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert optimizer._decay_kind == "cautious"


def test_all_together_train_and_are_taken_away_again(tools):
    model = tools.gpt2(0.1)
    before = tools.snapshot(model)
    recipe = Regularization.from_dict(tools.FULL | {"weight_decay": 0.01, "l1": 1e-6, "token_noise": 0.01})
    optimizer, callbacks = recipe.apply(model, lr=0.1, steps=8, seed=3)
    assert [callback.name for callback in callbacks] == [
        "dropout", "embedding_noise", "activation_noise", "token_noise", "r_drop", "weight_noise",
        "adversarial", "sam",
    ]  # fmt: skip
    tools.train(model, optimizer, callbacks, 8)
    model.eval()
    assert tools.loss_of(model)().item() < tools.loss_of(tools.gpt2().eval())().item() - 0.1
    model.train()
    callbacks.remove()
    callbacks.remove()
    assert tools.snapshot(model)[:2] == before[:2]


@pytest.mark.parametrize("recipe", [None, {"msam": 0.3, "ema": 0.9, "weight_noise": 0.01, "dropout": 0.3}])
def test_a_resumed_run_goes_on_bit_for_bit(recipe, tmp_path, tools):
    recipe = Regularization.from_dict(tools.FULL if recipe is None else recipe)

    def begun():
        model = tools.gpt2(0.1)
        return model, *recipe.apply(model, lr=0.01, steps=6, seed=3)

    model, optimizer, callbacks = begun()
    tools.train(model, optimizer, callbacks, 3)
    parts = (model, optimizer, callbacks)
    torch.save([part.state_dict() for part in parts], tmp_path / "x.pt")
    random = torch.get_rng_state()
    expected = tools.train(model, optimizer, callbacks, 3)
    again = begun()
    for part, state in zip(again, torch.load(tmp_path / "x.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    assert tools.train(*again, 3) == expected
    assert all(map(torch.equal, tools.weights(model), tools.weights(again[0])))


def test_the_seed_decides(tools):
    recipe = Regularization(gradient_noise=0.1, weight_noise=0.1)
    results = []
    for seed in (1, 1, 2):
        model = tools.gpt2()
        optimizer, callbacks = recipe.apply(model, lr=0.01, seed=seed)
        tools.train(model, optimizer, callbacks, 2)
        results.append(tools.weights(model))
    assert all(map(torch.equal, results[0], results[1])) and not all(map(torch.equal, results[0], results[2]))


SHARE = "is 1 of the run: give apply() the number of its steps="
REFUSED = [
    ({"dropout": {"annealing": {"start": 0.1}}}, {}, ValueError, f"dropout.annealing.steps {SHARE}"),
    ({"swa": 0.5}, {}, ValueError, "swa.start is 0.5 of the run: give apply() the number of its steps="),
    ({"weight_noise": {"annealing": "cosine"}}, {}, ValueError, f"weight_noise.annealing.steps {SHARE}"),
    ({"ema": [{"start": 0.5}]}, {}, ValueError, "ema[0].start is 0.5 of the run"),
    ({"lr_decay": 0.9}, {"lr": None}, ValueError, "lr_decay needs the learning rate"),
    ({"clip": 1}, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"clip": 1}, {"steps": float("nan")}, ValueError, "steps must be a whole number >= 1, got steps=nan"),
    ({"clip": 1}, {"steps": True}, ValueError, "steps must be a whole number >= 1, got steps=True"),
    ({"clip": 1}, {"steps": 0}, ValueError, "steps must be a whole number >= 1, got steps=0"),
    ({"dropout": {"rate": 0.1, "roles": ["hidden", "path"]}}, {}, ValueError, "has no 'path' dropout"),
    ({"dropout": [{"rate": 0.1}, {"roles": "adapter"}]}, {}, ValueError, "has no 'adapter' dropout"),
    ({"dropout": {"layers": [0.1]}}, {}, ValueError, "dropout: got 1 rates for 2 layers"),
    ({"dropout": {"layers": "linear", "increase": 0.95}}, {}, ValueError, "rates must be in [0, 1]"),
    (
        {"dropout": 0.1, "embedding_noise": 5, "activation_noise": {"pattern": "nothing"}},
        {}, ValueError, "matches no module",
    ),
    (
        {"dropout": 0.1, "token_noise": 0.1, "r_drop": 1, "adversarial": {"modules": "nothing"}},
        {}, ValueError, "adversarial: no parameter has 'nothing' in its name",
    ),
    ({"dropout": 0.1, "token_noise": {"special_tokens": [99]}}, {}, ValueError, "token_noise: "),
]  # fmt: skip


@pytest.mark.parametrize("recipe, arguments, error, said", REFUSED, ids=lambda value: str(value)[:50])
def test_settings_that_do_not_fit_leave_the_model_as_it_was(recipe, arguments, error, said, tools):
    model = tools.gpt2(0.1)
    before = tools.snapshot(model)
    with pytest.raises(error, match=re.escape(said)):
        Regularization.from_dict(recipe).apply(model, **{"lr": 0.01} | arguments)
    assert tools.snapshot(model) == before


def test_errors_on_missing_norms_and_embeddings_name_the_field():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"sam.perturb is 'norms', and Sequential has none: choose 'all'"):
        Regularization(sam={"perturb": "norms"}).apply(model)
    with pytest.raises(TypeError, match="token_noise: Sequential does not tell its embeddings"):
        Regularization(token_noise=0.1).apply(model)


def test_apply_refuses_parameters():
    with pytest.raises(TypeError, match="apply\\(\\) takes a model, got list"):
        Regularization().apply([torch.nn.Parameter(torch.ones(1))])


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["token_noise", "r_drop", None], ids=str)
def test_a_wrapped_model_is_trained_as_the_model_itself(name, one_process, tools):
    recipe = tools.FULL if name is None else {name: tools.FULL[name]}
    plain, model = tools.trained(recipe, model=tools.gpt2(0.1)), tools.gpt2(0.1)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    after, losses, _, callbacks = tools.trained(recipe, model=wrapped)
    assert losses == plain[1]
    assert all(map(torch.equal, after, plain[0]))
    callbacks.remove()
