"""The audit finds every site of every family with its role, and preserves the model."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastreg.nn
from fastreg.layerwise import ROLES, audit, dropout_sites, set_dropout

LETTERS = {
    "h": "hidden", "a": "attention", "x": "activation", "e": "embedding", "o": "head", "p": "path",
    "l": "layerdrop",
}  # fmt: skip


def tunable(model):
    """Returns the sites, after replacing each `nn.Identity` by a module."""
    places = [site.role for site in audit(model).sites if site.kind == "identity"]
    if places:
        set_dropout(model, dict.fromkeys(places, 0.0))
    return audit(model).sites


def set_all(sites, rate, only=None):
    for site in sites:
        setattr(site.owner, site.attribute, rate if only in (None, site) else 0.0)


def test_roles_and_layers(case):
    family, model = case
    audited = audit(model)
    used = [site for site in audited.sites if site.uses != 0]
    assert not audited.reason and not audited.unknown
    assert {site.role for site in used} == {LETTERS[letter] for letter in family.roles}
    sizes = dict.fromkeys((site.stack, site.layers) for site in used if site.layer is not None)
    assert tuple(layers for _, layers in sizes) == family.layers
    for stack, layers in sizes:
        assert {site.layer for site in used if site.stack == stack} == set(range(layers))


def test_at_rates_of_zero_nothing_is_random(case, run):
    """If a site were missed, training would differ from evaluation."""
    _, model = case
    set_all(audit(model).sites, 0.0)
    expected = run(model, training=False)
    for a, b in zip(run(model, training=True), expected, strict=True):
        assert torch.equal(a, b)


def test_each_site_alone_has_an_effect_where_it_is_used(case, run):
    _, model = case
    sites = tunable(model)
    expected = run(model, training=False)
    for site in sites:
        set_all(sites, 0.6, only=site)
        same = all(map(torch.equal, run(model, training=True), expected))
        assert same == (site.uses == 0), site.path


def test_the_model_is_as_before(family):
    _, model = family
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).eval()
    model.register_buffer("noted", torch.zeros(3))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rates = {site.path: site.rate for site in dropout_sites(model)}
    flags = [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    audit(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert [module.training for module in model.modules()] == flags
    assert {site.path: site.rate for site in dropout_sites(model)} == rates
    assert [vars(module).keys() for module in model.modules()] == [names.keys() for names in attributes]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_failing_forward_pass_leaves_no_trace(make):
    model = make("gpt2")
    before = {site.path: site.rate for site in dropout_sites(model)}
    with pytest.raises(IndexError):
        audit(model, {"input_ids": torch.tensor([[1000]])})
    assert {site.path: site.rate for site in dropout_sites(model)} == before and not model.training
    assert torch.nn.modules.module._global_forward_hooks == {}


def test_buffers_are_restored():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1))
    x = torch.randn(8, 4)
    audited = audit(model, x)
    assert [site.uses for site in audited.sites] == [1]
    assert model[0].num_batches_tracked == 0 and torch.equal(model[0].running_mean, torch.zeros(4))


def test_uses_are_counted(make):
    uses = {site.path: site.uses for site in audit(make("vit")).sites}
    assert uses["vit.layers.0.dropout"] == 2
    uses = {site.path: site.uses for site in audit(make("bart")).sites}
    assert uses["model.encoder.layers.0.dropout"] == 2 and uses["model.decoder.layers.0.dropout"] == 3


def test_unused_sites_are_reported(make):
    """OPT's decoder has a rate that nothing reads."""
    (unused,) = [site.path for site in audit(make("opt")).sites if site.uses == 0]
    assert unused == "model.decoder.dropout"


class FixedRate(nn.Module):
    """Drops at a rate that is written in its code."""

    def forward(self, x):
        return F.dropout(x, 0.25, self.training)


def test_rates_in_the_code_are_reported():
    audited = audit(nn.Sequential(nn.Dropout(0.1), FixedRate()), torch.ones(2, 2))
    assert audited.unknown == ((0.25, "1"),)
    assert "in the code" in str(audited)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_torchs_own_transformer():
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    roles = {site.path: (site.role, site.layer, site.uses) for site in audit(model).sites}
    assert roles["encoder.layers.1.self_attn.dropout"] == ("attention", 1, 1)
    assert roles["decoder.layers.1.multihead_attn.dropout"] == ("attention", 1, 1)
    assert roles["encoder.layers.0.dropout"] == ("activation", 0, 1)
    assert roles["decoder.layers.0.dropout3"] == ("hidden", 0, 1)
    assert len(roles) == 2 * 4 + 2 * 6


def test_fastregs_own_transformer():
    model = fastreg.nn.TransformerWithDropout(32, 16, 2, 2, max_length=16)
    roles = [site.role for site in audit(model).sites]
    assert roles == ["embedding"] + 2 * ["attention", "hidden", "activation", "hidden"]


class Block(nn.Module):
    """As timm has it."""

    def __init__(self, path):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.1)
        self.drop_path = path

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        p = self.attn_drop.p if self.training else 0.0
        x = x + self.drop_path(
            self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=p)))
        )
        return x + self.drop_path(self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x))))))


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        raise AssertionError("the audit takes its place")


def test_timms_blocks():
    model = nn.Sequential(*(Block(path) for path in (nn.Identity(), DropPath(0.1), DropPath(None))))
    audited = audit(model, torch.randn(2, 4, 8))
    for layer in range(3):
        roles = {site.path.split(".")[1]: site.role for site in audited.sites if site.layer == layer}
        assert roles == {
            "attn_drop": "attention", "proj_drop": "hidden", "drop1": "activation", "drop2": "hidden",
            "drop_path": "path",
        }  # fmt: skip
    assert [site.uses for site in audited.sites if site.role == "path"] == [2, 2, 2]


def test_without_inputs_roles_follow_from_names(make):
    audited = audit(nn.Sequential(*(Block(nn.Identity()) for _ in range(2))))
    assert "no inputs are known for Sequential: give inputs=" in audited.reason and audited.reason in str(
        audited
    )
    assert {site.path: site.uses for site in audited.sites}["0.proj_drop"] is None
    roles = {site.path: site.role for site in audited.sites}
    assert roles["0.attn_drop"] == "attention" and roles["0.drop_path"] == "path"
    assert set(roles.values()) < set(ROLES)


def test_inputs_that_do_not_fit_are_reported(make):
    model = make("gpt2")
    model.forward = lambda input_ids: 1 / 0
    assert "made-up inputs did not fit (ZeroDivisionError" in audit(model).reason


def test_compiled_models_are_audited(make):
    model = make("gpt2")
    compiled = torch.compile(model)
    assert [site.path for site in audit(compiled).sites] == [site.path for site in audit(model).sites]
    model.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    assert all(site.uses == 1 for site in audit(model).sites)


def test_flash_attention_counts_where_it_uses_rates(make, monkeypatch):
    """Version 3 takes a rate and ignores it."""
    import transformers

    def attend(module, query, key, value, mask, dropout=0.0, **kwargs):
        assert dropout == 0
        return query.transpose(1, 2), None

    for name, uses in (("flash_attention_2", 1), ("flash_attention_3", 0)):
        model = make("llama")
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, name, attend)
        model.config._attn_implementation_internal = name
        assert [site.uses for site in audit(model).sites] == [uses] * 3


def test_the_report_is_readable(make):
    assert str(audit(make("llama"))).splitlines() == [
        f"{'path':42}  role       layer  rate  uses",
        *(f"model.layers.{i}.self_attn.attention_dropout  attention  {i}      0     1" for i in range(3)),
    ]
