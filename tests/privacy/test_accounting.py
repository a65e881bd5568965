"""Accounting is handed over: the numbers are those of the libraries, and say so."""

import copy
import importlib
import math
import pickle
import sys

import numpy as np
import pytest
from opacus.accountants import GaussianAccountant, RDPAccountant

import fastreg
from fastreg.privacy import Accounted, epsilon, noise_multiplier_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log"),
]

# σ, q, steps, δ; then ε: Opacus RDP, dp_accounting RDP, PLD, Opacus PRV. Where several code bases agree, and
# RDP bounds what the tighter ones find.
KNOWN = [
    ((1.5, 0.04, 2250, 1e-5), (7.3291, 7.3293, 6.7688, 6.7791)),
    ((4.0, 0.01, 10000, 1e-5), (1.0355, 1.0355, 0.9470, 0.9569)),
    ((1.1, 256 / 60000, 14062, 1e-5), (2.5966, 2.5966, 2.3817, 2.3917)),
    ((1.3, 250 / 60000, 3600, 1e-5), (0.9422, 0.9422, 0.8530, 0.8630)),
    ((0.7, 0.01, 1000, 1e-5), (5.4214, 5.4233, 4.6183, 4.6287)),
    ((1.0, 0.01, 10000, 1e-5), (6.7127, 6.7128, 6.1877, 6.1980)),
    ((0.8, 0.001, 1000, 1e-6), (1.4619, 1.4619, 0.4677, 0.4778)),
    ((2.0, 0.2, 100, 1e-6), (6.1228, 6.1250, 5.6618, 5.6721)),
    ((1.0, 1.0, 1, 1e-5), (4.7285, 4.7285, 4.3772, 4.3874)),
    ((10.0, 1.0, 100, 1e-5), (4.7285, 4.7285, 4.3772, 4.3874)),
    ((5.0, 1.0, 10, 1e-6), (3.1311, 3.1311, 2.9216, 2.9317)),
]
WHO = [("opacus", "rdp"), ("dp_accounting", "rdp"), ("dp_accounting", "pld"), ("opacus", "prv")]
SLOW = {"pld": KNOWN[5:6] + KNOWN[8:9], "prv": KNOWN[5:7] + KNOWN[8:9]}
"""These take seconds."""


@pytest.mark.parametrize("column, backend, accountant", [(i, *who) for i, who in enumerate(WHO)], ids=str)
def test_known_values(column, backend, accountant):
    for (sigma, rate, steps, delta), expected in SLOW.get(accountant, KNOWN):
        result = epsilon(
            noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta, accountant=accountant,
            backend=backend,
        )  # fmt: skip
        assert math.isclose(result, expected[column], abs_tol=1.5e-4), (sigma, rate, steps)
        assert backend in result.source and accountant.upper() in result.source and result.delta == delta


@pytest.mark.parametrize(
    "target, rate, steps, expected", [(8, 0.04, 2250, 1.41602), (3, 0.01, 10000, 1.66504)]
)
def test_known_noise_multipliers(target, rate, steps, expected):
    """Found by bisection: up to what the library stops at, never below."""
    result = noise_multiplier_for(target, sample_rate=rate, steps=steps, delta=1e-5)
    assert math.isclose(result, expected, abs_tol=1e-5)
    assert epsilon(noise_multiplier=result, sample_rate=rate, steps=steps, delta=1e-5) <= target
    assert epsilon(noise_multiplier=result, sample_rate=rate, steps=steps, delta=np.float64(1e-5)) <= target
    other = noise_multiplier_for(target, sample_rate=rate, steps=steps, delta=1e-5, backend="dp_accounting")
    assert abs(other - result) < 0.01 and "dp_accounting" in other.source


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_full_batches_have_a_closed_form(mu):
    """δ(ε) = Φ(-ε/μ + μ/2) - exp(ε) Φ(-ε/μ - μ/2) with μ = √T/σ  (Balle & Wang 2018)."""

    def normal(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    result = epsilon(
        noise_multiplier=1 / mu,
        sample_rate=1.0,
        steps=1,
        delta=1e-5,
        accountant="pld",
        backend="dp_accounting",
    )
    delta = normal(-result / mu + mu / 2) - math.exp(result) * normal(-result / mu - mu / 2)
    assert math.isclose(delta, 1e-5, rel_tol=1e-2)


def test_ends():
    options = {"sample_rate": 0.1, "delta": 1e-5}
    assert epsilon(noise_multiplier=1.0, steps=0, **options) == 0
    assert epsilon(noise_multiplier=0.0, steps=1, **options) == math.inf


def test_says_where_it_is_from():
    result = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=10000, delta=1e-5)
    assert str(result).startswith("6.713 (delta=1e-05, opacus") and "RDP" in str(result)
    assert f"{result:.2f}" == "6.71" and result + 1 > 7
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert isinstance(other, Accounted) and (other, str(other)) == (result, str(result))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"accountant": "gdp"}, "reports up to two times too little.*'rdp', 'prv'"),
        ({"accountant": "moments"}, "'rdp', 'prv'.*'moments'"),
        ({"accountant": "pld"}, "backend='opacus'"),
        ({"backend": "own"}, "'opacus', 'dp_accounting'.*'own'"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.1}, "sample_rate"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps must be a whole number >= 0, got steps=1.5"),
        ({"steps": True}, "steps must be a whole number >= 0, got steps=True"),
    ],
    ids=str,
)
def test_refuses(wrong, match):
    options = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=match):
        epsilon(**{**options, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [{"target_epsilon": 0.0}, {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"accountant": "gdp"}],
    ids=str,
)
def test_refuses_to_find(wrong):
    options = {"target_epsilon": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        noise_multiplier_for(**{**options, **wrong})


def test_accountants_that_report_too_little_are_refused():
    with pytest.raises(ValueError, match="too little"):
        fastreg.privacy.accounting.accountant_of(GaussianAccountant())
    with pytest.raises(TypeError, match="get_epsilon"):
        fastreg.privacy.accounting.accountant_of(object())
    accountant = RDPAccountant()
    assert fastreg.privacy.accounting.accountant_of(accountant) is accountant


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match="pip install opacus, or use backend='dp_accounting'"):
        epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=1, delta=1e-5)
    assert importlib.import_module("fastreg.privacy").DPOptimizer is fastreg.DPOptimizer
