"""Rates are what was asked for, in every family, by what really runs; what cannot be is an error."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastreg.nn
from fastreg.layerwise import assert_dropout, audit, dropout_sites, set_dropout
from fastreg.layerwise.inject import attach
from fastreg.schedules import DropPathLayers, Linear, LinearLayers

DECODERS = ("llama", "qwen2", "mistral", "gemma", "gemma2", "mixtral")


@pytest.fixture
def dropped(run):
    """The rates of all that drops in one pass, counted by watching the functions themselves."""

    def dropped(model, training=True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            counts = watch_all(monkeypatch)
            run(model, training)
        return +counts

    return dropped


def watch_all(monkeypatch):
    counts = Counter()

    def watch(owner, name, rate_of):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            rate = rate_of(*args, **kwargs)
            counts[rate] += rate > 0
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(F, "dropout", lambda x, p=0.5, training=True, inplace=False: p * training)
    watch(F, "scaled_dot_product_attention", lambda *args, dropout_p=0.0, **kwargs: dropout_p)
    for kind in (fastreg.nn.Dropout, fastreg.nn.DropPath):
        watch(kind, "forward", lambda module, x: module.p * module.training)
    return counts


def test_rates_are_those_asked_for(case, dropped):
    family, model = case
    roles = dict.fromkeys(site.role for site in audit(model).sites if site.uses != 0)
    roles.pop("layerdrop", None)
    # No two roles and layers share a rate: each use tells where it was.
    wanted = {role: LinearLayers(0.04 * (i + 1), 0.01) for i, role in enumerate(roles)}
    table = set_dropout(model, wanted)
    if "l" in family.roles:
        set_dropout(model, 0.0, "layerdrop")
    assert_dropout(model, wanted)
    assert_dropout(model, table)
    last = max(family.layers) - 1
    for row in table:
        layer = row.layer if row.layer is not None else last if row.role == "head" else 0
        assert row.rate == wanted[row.role].base + layer * 0.01
    expected = Counter()
    for site in audit(model).sites:
        expected[site.rate] += (site.uses or 0) * (site.rate > 0)
    assert dropped(model) == +expected
    assert not dropped(model, training=False)


def test_rates_are_written_where_the_rows_say(family):
    _, model = family
    roles = dict.fromkeys(site.role for site in audit(model).sites if site.uses != 0)
    for row in set_dropout(model, dict.fromkeys(roles, 0.3)):
        owner, _, name = row.path.rpartition(".")
        if row.how == "module":
            module = model.get_submodule(row.path)
            assert module.p == 0.3 and type(module).__module__.startswith("fastreg.nn")
        elif row.how == "config":
            assert getattr(model.config, name) == 0.3
        elif row.how == "float":
            value = getattr(model.get_submodule(owner), name)
            assert (value.p if isinstance(value, nn.Module) else value) == 0.3
        assert (
            row.layer is None or f".{row.layer}." in row.path or "blocks" in row.path or "stages" in row.path
        )


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_family_lacks_is_an_error_that_changes_nothing(make, run, name):
    model = make(name)
    before = {site.path: site.rate for site in dropout_sites(model)}
    message = "has no 'hidden' dropout in model.layers: give inject=True to add it behind attention and MLP"
    with pytest.raises(ValueError, match=message):
        set_dropout(model, {"attention": 0.3, "hidden": 0.1})
    assert {site.path: site.rate for site in dropout_sites(model)} == before
    assert not hasattr(model.config, "fastreg")


@pytest.mark.parametrize("name", (*DECODERS, "clip"))
def test_injection(make, run, dropped, name):
    model = make(name)
    keys, expected = list(model.state_dict()), run(model, training=False)
    table = set_dropout(model, LinearLayers(0.1, 0.1), inject=True)
    blocks = 6 if name == "clip" else 3
    assert [row.how for row in table] == ["injected"] * 2 * blocks
    assert [row.rate for row in table] == [0.1, 0.1, 0.2, 0.2, 0.1 + 2 * 0.1, 0.1 + 2 * 0.1] * (blocks // 3)
    assert dropped(model) == Counter(row.rate for row in table)
    assert not all(map(torch.equal, run(model, training=True), expected))
    assert all(map(torch.equal, run(model, training=False), expected))
    assert list(model.state_dict()) == keys
    # Again: rates are set, nothing is added.
    again = set_dropout(model, 0.0, inject=True)
    assert [row.path for row in again] == [row.path for row in table]
    assert all(map(torch.equal, run(model, training=True), expected))
    assert sum(len(module._forward_hooks) for module in model.modules()) == 2 * blocks


def test_injection_drops_the_output_and_scales_it(make):
    model = make("llama")
    set_dropout(model, 0.5, inject=True)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 4, 32)
    plain, dropped = mlp.eval()(x), mlp.train()(x)
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * plain[kept])
    assert 60 < kept.sum() < 196  # of 256, at 5 standard deviations about half


class Both(NamedTuple):
    first: torch.Tensor
    second: str


@pytest.mark.parametrize("make", [lambda x: x, lambda x: [x, "text"], lambda x: Both(x, "text")])
def test_injection_keeps_the_kind_of_an_output(make):
    class Returns(nn.Linear):
        def forward(self, x):
            return make(super().forward(x))

    module, x = Returns(8, 8), torch.randn(20, 8)
    attach(module, 0.5)
    output, expected = module(x), make(nn.functional.linear(x, module.weight, module.bias))
    assert type(output) is type(expected)
    dropped, plain = (o if isinstance(o, torch.Tensor) else o[0] for o in (output, expected))
    kept = dropped != 0
    assert 40 < kept.sum() < 120 and torch.equal(dropped[kept], 2 * plain[kept])  # of 160, at p = 0.5
    assert isinstance(output, torch.Tensor) or output[1] == "text"


def test_injection_only_where_there_is_none(make):
    table = set_dropout(make("gpt2"), 0.1, inject=True)
    assert {row.how for row in table} == {"module"} and len(table) == 6


def test_path_places_are_filled(make, run):
    """Models put an `nn.Identity` where the rate of a path is 0."""
    model = make("swin")
    table = set_dropout(model, DropPathLayers(0.4), "path")
    assert [row.rate for row in table] == [0, 0.2, 0.4]
    for row in table:
        assert isinstance(model.get_submodule(row.path), fastreg.nn.DropPath)
    assert not all(map(torch.equal, run(model, training=True), run(model, training=False)))


def test_forms_of_a_schedule(make):
    expected = [0.1, 0.2, 0.3]
    functions = (lambda layer: expected[layer], lambda layer, layers: expected[layer % layers])
    for schedule in (expected, tuple(expected), *functions):
        model = make("gpt2")
        set_dropout(model, schedule)
        assert [block.mlp.dropout.p for block in model.transformer.h] == expected
    table = set_dropout(model, {"attention": 0.25, "hidden": expected, "embedding": 0.05})
    assert {row.role for row in table} == {"attention", "hidden", "embedding"}
    assert model.transformer.drop.p == 0.05 and model.transformer.h[2].attn.attn_dropout.p == 0.25


def test_stacks_have_layers_of_their_own(make):
    model = make("t5")
    set_dropout(model, 0.0)
    table = set_dropout(model, [0.1, 0.2, 0.3], stacks="encoder")
    assert {row.stack for row in table} == {"encoder.block"} and len(table) == 6
    set_dropout(model, [0.4, 0.5], stacks=("decoder",))
    assert [block.layer[0].dropout.p for block in model.encoder.block] == [0.1, 0.2, 0.3]
    assert [block.layer[0].dropout.p for block in model.decoder.block] == [0.4, 0.5]
    with pytest.raises(ValueError, match="got 3 rates for 2 layers"):
        set_dropout(model, [0.1, 0.2, 0.3])


def test_a_module_in_two_places_stays_one():
    shared = nn.Dropout(0.1)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    set_dropout(model, 0.2, inputs=torch.ones(2, 4))
    assert model[1] is model[3] and isinstance(model[1], fastreg.nn.Dropout) and model[1].p == 0.2


def test_hooks_and_flags_go_over_to_the_new_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1, inplace=True).eval())
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(module))
    set_dropout(model, 0.2, inputs=torch.ones(2, 4))
    model[1](torch.ones(2))
    assert seen[-1] is model[1] and model[1].inplace and not model[1].training


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_torchs_own_transformer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3)
    set_dropout(model, {"hidden": LinearLayers(0.1, 0.1), "attention": 0.4, "activation": 0.0})
    for i, layer in enumerate(model.layers):
        assert layer.dropout1.p == layer.dropout2.p == 0.1 + i * 0.1
        assert layer.self_attn.dropout == 0.4 and layer.dropout.p == 0


def test_layerdrop(make):
    for name, path in (("opt", "model.decoder.layerdrop"), ("wav2vec2", "config.layerdrop")):
        model = make(name)
        (row,) = set_dropout(model, 0.3, roles="layerdrop")
        assert (row.path, row.rate) == (path, 0.3)
        with pytest.raises(ValueError, match=f"layerdrop is one rate for all layers: give {path} a number"):
            set_dropout(model, LinearLayers(0.1), roles="layerdrop")
    assert model.config.layerdrop == 0.3


def test_the_table_is_readable(make):
    table = set_dropout(make("phi"), LinearLayers(0.1, 0.05))
    lines = [f"{'path':29}  role    layer  rate  how"]
    lines += [
        f"model.layers.{i}.resid_dropout  hidden  {i}      {rate}  module"
        for i, rate in enumerate((0.1, 0.15, 0.2))
    ]
    assert [line.split() for line in str(table).splitlines()] == [line.split() for line in lines]
    assert table[1].layer == 1 and table[1:].rates == {row.path: row.rate for row in list(table)[1:]}
    assert eval(repr(table), vars(fastreg.layerwise)) == table


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"schedule": 1.5}, r"rate must be in \[0, 1\], got rate=1.5"),
        ({"schedule": LinearLayers(0.9, 0.1)}, "give 1.1 at layer 2; with 3 layers use an increase between"),
        ({"schedule": [0.1, 0.2]}, "got 2 rates for 3 layers"),
        ({"schedule": 0.1, "roles": "mlp"}, "roles must be among 'hidden', .* got .'mlp',."),
        ({"schedule": {}}, "roles must be among"),
        ({"schedule": 0.1, "roles": "path"}, "has no 'path' dropout .roles it has: 'embedding', 'att"),
        ({"schedule": "a"}, "rate of layer 0 must be a number, got 'a'"),
        ({"schedule": 0.1, "stacks": "encoder"}, "GPT2LMHeadModel has no 'hidden' dropout"),
    ),
)  # fmt: skip
def test_errors_change_nothing(make, options, message):
    model = make("gpt2")
    before = [(site.path, site.rate, type(site.owner)) for site in dropout_sites(model)]
    with pytest.raises((TypeError, ValueError), match=message):
        set_dropout(model, **options)
    assert [(site.path, site.rate, type(site.owner)) for site in dropout_sites(model)] == before
    assert not hasattr(model.config, "fastreg")


def test_sites_of_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 3"):
        dropout_sites(3)


def test_a_schedule_over_steps_is_no_schedule_over_layers(make):
    with pytest.raises(TypeError, match="give it to DropoutScheduler"):
        set_dropout(make("gpt2"), Linear(0.1, steps=10))


def test_models_without_layers(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    (row,) = set_dropout(model, 0.2, inputs=torch.ones(2, 4))
    assert row == ("1", "hidden", None, 0.2, "module", "")
    with pytest.raises(ValueError, match="found no repeated layers around 1: give a number"):
        set_dropout(model, LinearLayers(0.1), inputs=torch.ones(2, 4))
    with pytest.raises(ValueError, match="no attention or MLP in repeated layers to add it behind"):
        set_dropout(nn.Linear(4, 4), 0.1, inject=True)


def test_rates_that_attention_ignores_are_an_error(make):
    model = make("llama")
    model.config._attn_implementation_internal = "flash_attention_3"
    with pytest.raises(
        ValueError, match="had no effect in a forward pass; rates are used by eager, sdpa and"
    ):
        ignoring(model)


def ignoring(model):
    import transformers

    mapping = transformers.AttentionInterface._global_mapping
    before = mapping["flash_attention_3"]
    mapping["flash_attention_3"] = lambda module, query, *args, **kwargs: (query.transpose(1, 2), None)
    try:
        set_dropout(model, 0.1, roles="attention")
    finally:
        mapping["flash_attention_3"] = before


def test_assert_dropout_lists_what_differs(make):
    model = make("gpt2")
    table = set_dropout(model, LinearLayers(0.1, 0.1))
    model.transformer.h[1].mlp.dropout.p = 0.7
    message = "1 of 6 dropout rates differ:\n  transformer.h.1.mlp.dropout: 0.7, expected 0.2"
    for expected in (table, LinearLayers(0.1, 0.1), {"hidden": [0.1, 0.2, 0.1 + 2 * 0.1]}):
        with pytest.raises(AssertionError) as caught:
            assert_dropout(model, expected)
        assert str(caught.value) == message
    with pytest.raises(AssertionError, match="LlamaForCausalLM has no 'hidden' dropout in model.layers"):
        assert_dropout(make("llama"), 0.1)
    with pytest.raises(AssertionError, match="transformer.h.0.attn.resid_dropout: not there"):
        assert_dropout(make("llama"), table)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got rate=2"):
        assert_dropout(model, 2)
