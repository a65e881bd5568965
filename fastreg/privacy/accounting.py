"""Computes the privacy spent by a run with the accountants of other libraries; fastreg has none of its own.

Accountants get the noise multiplier, the sampling rate and the number of steps of a Poisson-subsampled
Gaussian mechanism. Results name the accountant.
"""

from __future__ import annotations

import importlib
import math
import numbers
import warnings
from typing import Any

from ..common.validation import check_choice, check_int, check_range
from ..common.versions import installed_version

ACCOUNTANTS = {"opacus": ("rdp", "prv"), "dp_accounting": ("rdp", "pld")}
"""The accountants of each library."""
GDP = (
    "accountant 'gdp' is a central limit approximation that reports up to two times too little, which is no "
    "guarantee"
)


class Accounted(float):
    """A number computed by an accountant: a float that names its source.

    Attributes:
        source: Library, version and accountant.
        delta: The δ of the result.
    """

    source: str
    delta: float

    def __new__(cls, value: float, source: str, delta: float) -> Accounted:
        """Creates a float with a source."""
        result = super().__new__(cls, value)
        result.source, result.delta = source, delta
        return result

    def __getnewargs__(self) -> Any:
        return float(self), self.source, self.delta

    def __repr__(self) -> str:
        return f"{float(self):.4g} (delta={self.delta:g}, {self.source})"

    __str__ = __repr__


def epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "rdp",
    backend: str = "opacus",
) -> Accounted:  # fmt: skip
    """Returns the ε of (ε, δ)-differential privacy that steps of DP-SGD on Poisson-sampled batches spend.

    Neighbouring data sets differ by one sample more or less. Shuffled batches are another mechanism.

    Args:
        noise_multiplier: σ of `DPOptimizer`.
        sample_rate: The probability with which a sample is in a batch, in (0, 1].
        steps: Number of steps, including those of empty batches; ≥ 0.
        delta: δ, in (0, 1).
        accountant: `"rdp"`, an upper bound by Rényi differential privacy, or a tighter and slower one:
            `"prv"` of Opacus, `"pld"` of dp_accounting.
        backend: `"opacus"` or `"dp_accounting"`, which must be installed.

    Raises:
        ImportError: If the library is not installed.
        ValueError: For values out of range, and for the accountant `"gdp"`.
    """
    source = _check(delta, sample_rate, accountant, backend)
    noise_multiplier = check_range("noise_multiplier", noise_multiplier, 0)
    steps = check_int("steps", steps, 0)
    if not steps or not noise_multiplier:
        return Accounted(0.0 if not steps else math.inf, source, delta)
    if backend == "opacus":
        counter = accountant_of(accountant)
        counter.history = [(noise_multiplier, float(sample_rate), steps)]
    else:
        counter = _dp_accountant(accountant)
        counter.compose(_event(noise_multiplier, sample_rate), steps)
    return Accounted(counter.get_epsilon(delta), source, delta)


def noise_multiplier_for(
    target_epsilon: float, *, sample_rate: float, steps: int, delta: float, accountant: str = "rdp",
    backend: str = "opacus",
) -> Accounted:  # fmt: skip
    """Returns the σ with which steps of DP-SGD on Poisson-sampled batches spend at most ε.

    Args:
        target_epsilon: ε, > 0.
        sample_rate: The probability with which a sample is in a batch, in (0, 1].
        steps: Number of steps, ≥ 1.
        delta: δ, in (0, 1).
        accountant: See `epsilon`.
        backend: See `epsilon`.

    Raises:
        ImportError: If the library is not installed.
        ValueError: For values out of range, and for the accountant `"gdp"`.
    """
    source = _check(delta, sample_rate, accountant, backend)
    check_range("target_epsilon", target_epsilon, 0, above=True)
    steps = check_int("steps", steps)
    if backend == "opacus":
        utils = importlib.import_module("opacus.accountants.utils")
        with warnings.catch_warnings():  # about values that are only tried
            warnings.filterwarnings("ignore", message="Optimal order is the")
            sigma = utils.get_noise_multiplier(
                target_epsilon=target_epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps,
                accountant=accountant,
            )  # fmt: skip
        return Accounted(sigma, source, delta)
    dp = importlib.import_module("dp_accounting")
    sigma = dp.calibrate_dp_mechanism(
        lambda: _dp_accountant(accountant),
        lambda sigma: dp.SelfComposedDpEvent(_event(sigma, sample_rate), steps),
        target_epsilon, delta, dp.LowerEndpointAndGuess(0.0, 1.0),
    )  # fmt: skip
    return Accounted(sigma, source, delta)


def accountant_of(accountant: Any) -> Any:
    """Returns an accountant of Opacus by its name, or the argument itself if it is an accountant.

    Raises:
        ImportError: If Opacus is not installed.
        TypeError: For objects without `step` and `get_epsilon`.
        ValueError: For unknown accountants, and for those that report too little.
    """
    if isinstance(accountant, str):
        _check_name(accountant, "opacus")
        _library("opacus")
        return importlib.import_module("opacus.accountants").create_accountant(mechanism=accountant)
    if not all(callable(getattr(accountant, name, None)) for name in ("step", "get_epsilon")):
        raise TypeError(
            f"accountant must be 'rdp', 'prv' or have step(noise_multiplier=, sample_rate=) and "
            f"get_epsilon(delta), got {accountant!r:.60}"
        )
    if getattr(type(accountant), "mechanism", str)() == "gdp":
        raise ValueError(f"{GDP}: use an RDPAccountant or PRVAccountant")
    return accountant


def spent(accountant: Any, delta: float) -> Accounted:
    """Returns the ε of all steps that an accountant has counted, for a δ in (0, 1).

    Raises:
        ValueError: For a delta out of range.
    """
    _check_delta(delta)
    package = type(accountant).__module__.partition(".")[0]
    mechanism = getattr(type(accountant), "mechanism", type(accountant).__name__.lower)()
    noised = all(sigma for sigma, *_ in getattr(accountant, "history", None) or ())
    result = accountant.get_epsilon(delta) if noised else math.inf
    return Accounted(result, _source(package, mechanism), delta)


def _check(delta: float, sample_rate: float, accountant: str, backend: str) -> str:
    """Checks arguments, and returns the source of the result."""
    _check_delta(delta)
    check_range("sample_rate", sample_rate, 0, 1, above=True)
    check_choice("backend", backend, ACCOUNTANTS)
    _check_name(accountant, backend)
    _library(backend)
    return _source(backend, accountant)


def _check_delta(delta: float) -> None:
    if not isinstance(delta, numbers.Real) or not 0 < delta < 1:
        raise ValueError(
            f"delta must be in (0, 1), such as less than one by the number of samples, got {delta=}"
        )


def _check_name(accountant: str, backend: str) -> None:
    known = ", ".join(map(repr, ACCOUNTANTS[backend]))
    if accountant == "gdp":
        raise ValueError(f"{GDP}: use one of {known}")
    if accountant not in ACCOUNTANTS[backend]:
        raise ValueError(f"accountant must be one of {known} with backend={backend!r}, got {accountant!r}")


def _library(backend: str) -> None:
    try:
        importlib.import_module(backend)
    except ImportError as error:
        package = backend.replace("_", "-")
        raise ImportError(
            f"privacy accounting needs {package}, which is not installed: pip install {package}, or use "
            f"backend={' or '.join(repr(name) for name in ACCOUNTANTS if name != backend)}"
        ) from error


def _source(package: str, mechanism: str) -> str:
    version = installed_version(package.replace("_", "-"))
    return " ".join(filter(None, (package, version, mechanism.upper())))


def _dp_accountant(accountant: str) -> Any:
    module = importlib.import_module(f"dp_accounting.{accountant}")
    return module.RdpAccountant() if accountant == "rdp" else module.PLDAccountant()


def _event(sigma: float, sample_rate: float) -> Any:
    dp = importlib.import_module("dp_accounting")
    return dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(sigma))
