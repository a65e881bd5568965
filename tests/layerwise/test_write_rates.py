"""Rates survive saving, copying and checkpointing, and can be taken back."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg.nn
from fastreg.layerwise import assert_dropout, audit, dropout_sites, remove, restore, set_dropout
from fastreg.schedules import LinearLayers

SAVED = ("bart", "gpt2", "llama", "swin", "t5", "wav2vec2", "whisper")


def set_all(model):
    """Something in every role, by layer where there are layers."""
    roles = {site.role for site in audit(model).sites if site.uses != 0} | {"hidden"}
    wanted = {role: LinearLayers(0.1, 0.05) for role in sorted(roles - {"layerdrop"})}
    return set_dropout(model, wanted | dict.fromkeys(roles & {"layerdrop"}, 0.2), inject=True)


@pytest.mark.parametrize("name", SAVED)
def test_saving_and_loading(make, run, tmp_path, name):
    model = make(name)
    keys = list(model.state_dict())
    table = set_all(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(AssertionError, match="dropout rates differ|not there"):
        assert_dropout(loaded, table)
    again = restore(loaded)
    assert {row[:2] for row in again} >= {row[:2] for row in table if row.how == "injected"}
    assert_dropout(loaded, table)
    assert restore(loaded) == again
    assert all(map(torch.equal, run(loaded, training=True), run(model, training=True)))
    assert loaded.config.fastreg == model.config.fastreg


def test_loading_another_head(make, tmp_path):
    import transformers as hf

    model = make("llama")
    table = set_dropout(model, 0.2, inject=True)
    model.save_pretrained(tmp_path)
    body = hf.LlamaModel.from_pretrained(tmp_path)
    assert [row.path for row in restore(body)] == [row.path.removeprefix("model.") for row in table]
    # ... and back
    body.save_pretrained(tmp_path)
    whole = hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(tmp_path))
    assert restore(whole).rates == table.rates
    assert_dropout(whole, table)


def test_loading_what_has_no_place_is_an_error(make):
    model, other = make("gpt2"), make("bert")
    set_dropout(model, 0.2)
    other.config.fastreg = model.config.fastreg
    with pytest.raises(
        ValueError, match="BertForSequenceClassification has no dropout site for the saved rates of transform"
    ):
        restore(other)
    assert list(restore(other, strict=False)) == []
    assert list(restore(make("gpt2"))) == []
    assert list(restore(torch.nn.Linear(2, 2))) == []


def test_removing_restores_the_model(family, run):
    _, model = family
    expected, evaluated = run(model, training=True), run(model, training=False)
    before = [(name, type(module)) for name, module in model.named_modules()]
    rates = {site.path: site.rate for site in dropout_sites(model)}
    config = model.config.to_json_string()
    if any(
        "attn" in type(m).__name__.lower() or "attention" in type(m).__name__.lower() for m in model.modules()
    ):
        set_all(model)
    else:
        set_dropout(model, 0.3, "path")
    assert not all(map(torch.equal, run(model, training=True), expected))
    assert all(map(torch.equal, run(model, training=False), evaluated))
    assert model.config.to_json_string() != config
    remove(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert {site.path: site.rate for site in dropout_sites(model)} == rates
    assert model.config.to_json_string() == config
    assert all(map(torch.equal, run(model, training=True), expected))
    remove(model)


def test_setting_twice_and_removing_goes_back_to_the_start(make, run):
    model = make("gpt2")
    expected = run(model, training=True)
    set_dropout(model, {"hidden": 0.3, "attention": 0.3})
    set_dropout(model, {"hidden": 0.4, "embedding": 0.3})
    remove(model)
    assert all(map(torch.equal, run(model, training=True), expected))


@pytest.mark.parametrize("name", ("gpt2", "llama", "swin"))
@pytest.mark.parametrize("how", ("deepcopy", "pickle", "torch.save"))
def test_copies_have_rates_of_their_own(make, run, name, how):
    model = make(name)
    table = set_dropout(model, {"hidden": LinearLayers(0.1, 0.1)}, inject=True)
    expected = run(model, training=True)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert_dropout(copied, table)
    assert all(map(torch.equal, run(copied, training=True), expected))
    set_dropout(copied, 0.0)
    assert all(map(torch.equal, run(model, training=True), expected))
    remove(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in make(name).modules()]


@pytest.mark.parametrize("name", ("gpt2", "llama", "bart", "t5", "vit"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_changes_nothing(make, close, name, reentrant):
    from fastreg.layerwise.inputs import candidates

    results = []
    for checkpointing in (False, True):
        model = make(name).double()
        set_dropout(model, {"hidden": 0.3, "attention": 0.2}, inject=True)
        if checkpointing:
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
        _, kwargs = next(candidates(model))
        torch.manual_seed(0)
        output = model.train()(**kwargs, **({} if name == "vit" else {"use_cache": False}))
        output.logits.square().mean().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits, gradients))
    (logits, gradients), (again, recomputed) = results
    assert torch.equal(logits, again) and gradients.keys() == recomputed.keys() and gradients
    # Sums may be taken in another order; alone, those that are 0 but for roundings would be all rounding.
    recomputed, gradients = ([each[key].flatten() for key in gradients] for each in (recomputed, gradients))
    close(torch.cat(recomputed), torch.cat(gradients))


def test_new_modules_are_where_the_model_is(make):
    model = make("llama").to(torch.bfloat16)
    set_dropout(model, 0.25, inject=True)
    dropout = model.model.layers[0].mlp.fastreg_dropout
    assert isinstance(dropout, fastreg.nn.Dropout) and not dropout.training
    assert model.train().model.layers[0].mlp.fastreg_dropout.training
    model.to("meta")
    assert dropout.drop_thresholds.is_meta
