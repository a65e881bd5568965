"""What a run has spent, as other people's accountants say: fastreg has none of its own.

Accountants are told the noise multiplier, the sampling rate and the number of steps of a Poisson-subsampled
Gaussian mechanism.  What they return says who has worked it out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import warnings
from typing import Any

ACCOUNTANTS = {"opacus": ("rdp", "prv"), "dp_accounting": ("rdp", "pld")}
"""What may be asked, by library."""
GDP = (
    "accountant 'gdp' is a central limit approximation that reports up to two times too little, which is no "
    "guarantee"
)


class Accounted(float):
    """A number of an accountant, which is a float and says where it is from.

    Attributes:
        source: Library, version and accountant.
        delta: The δ that it goes with.
    """

    source: str
    delta: float

    def __new__(cls, value: float, source: str, delta: float) -> Accounted:
        """The number and where it is from."""
        made = super().__new__(cls, value)
        made.source, made.delta = source, delta
        return made

    def __getnewargs__(self) -> Any:
        """For copies and pickles."""
        return float(self), self.source, self.delta

    def __repr__(self) -> str:
        """Number, δ and source."""
        return f"{float(self):.4g} (delta={self.delta:g}, {self.source})"

    __str__ = __repr__


def epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "rdp",
    backend: str = "opacus",
) -> Accounted:  # fmt: skip
    """The ε of (ε, δ)-differential privacy that steps of DP-SGD on Poisson-sampled batches spend.

    One sample more or less.  Batches that are shuffled instead of Poisson-sampled are another mechanism.

    Args:
        noise_multiplier: σ of `DPOptimizer`.
        sample_rate: The probability with which a sample is in a batch, in (0, 1].
        steps: How many steps, empty batches included; ≥ 0.
        delta: δ, in (0, 1).
        accountant: `"rdp"`, an upper bound by Rényi differential privacy, or a tighter one that takes longer:
            `"prv"` of Opacus, `"pld"` of dp_accounting.
        backend: `"opacus"` or `"dp_accounting"`, which must be installed.

    Raises:
        ImportError: If the library is not installed.
        ValueError: For values out of range, and for the accountant `"gdp"`.
    """
    _check(delta, sample_rate, accountant, backend)
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier=}")
    if int(steps) != steps or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps=}")
    source = _source(backend, accountant)
    if not steps or not noise_multiplier:
        return Accounted(0.0 if not steps else math.inf, source, delta)
    if backend == "opacus":
        made = accountant_of(accountant)
        made.history = [(float(noise_multiplier), float(sample_rate), int(steps))]
        return Accounted(made.get_epsilon(delta), source, delta)
    made = _dp_accountant(accountant)
    made.compose(_event(noise_multiplier, sample_rate), int(steps))
    return Accounted(made.get_epsilon(delta), source, delta)


def noise_multiplier_for(
    target_epsilon: float, *, sample_rate: float, steps: int, delta: float, accountant: str = "rdp",
    backend: str = "opacus",
) -> Accounted:  # fmt: skip
    """The σ with which steps of DP-SGD on Poisson-sampled batches spend no more than a given ε.

    Args:
        target_epsilon: ε, > 0.
        sample_rate: As for `epsilon`, like all that follow.
        steps: How many steps, ≥ 1.
        delta: δ.
        accountant: Which accountant.
        backend: Whose.

    Raises:
        ImportError: If the library is not installed.
        ValueError: For values out of range, and for the accountant `"gdp"`.
    """
    _check(delta, sample_rate, accountant, backend)
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon must be finite and > 0, got {target_epsilon=}")
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps=}")
    source = _source(backend, accountant)
    if backend == "opacus":
        utils = importlib.import_module("opacus.accountants.utils")
        with warnings.catch_warnings():  # of what is only tried
            warnings.filterwarnings("ignore", message="Optimal order is the")
            found = utils.get_noise_multiplier(
                target_epsilon=target_epsilon, target_delta=delta, sample_rate=sample_rate, steps=int(steps),
                accountant=accountant,
            )  # fmt: skip
        return Accounted(found, source, delta)
    dp = importlib.import_module("dp_accounting")
    found = dp.calibrate_dp_mechanism(
        lambda: _dp_accountant(accountant),
        lambda sigma: dp.SelfComposedDpEvent(_event(sigma, sample_rate), int(steps)),
        target_epsilon,
        delta,
        dp.LowerEndpointAndGuess(0.0, 1.0),
    )
    return Accounted(found, source, delta)


def accountant_of(accountant: Any) -> Any:
    """An accountant of Opacus by its name, or what has been given, if it counts steps.

    Raises:
        ImportError: If Opacus is not installed.
        TypeError: For what has no `step` and `get_epsilon`.
        ValueError: For unknown names, and for those that report too little.
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
    """What an accountant says of the steps that it was told.

    Args:
        accountant: The accountant.
        delta: δ, in (0, 1).

    Raises:
        ValueError: For a delta out of range.
    """
    _check_delta(delta)
    package = type(accountant).__module__.partition(".")[0]
    mechanism = getattr(type(accountant), "mechanism", type(accountant).__name__.lower)()
    history = getattr(accountant, "history", None)
    if history is not None and not all(sigma for sigma, *_ in history):
        return Accounted(math.inf, _source(package, mechanism), delta)
    return Accounted(accountant.get_epsilon(delta), _source(package, mechanism), delta)


def _check(delta: float, sample_rate: float, accountant: str, backend: str) -> None:
    _check_delta(delta)
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate=}")
    if backend not in ACCOUNTANTS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ACCOUNTANTS))}, got {backend!r}")
    _check_name(accountant, backend)
    _library(backend)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
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
            f"accounting is that of {package}, which is not installed: pip install {package}, or give the "
            f"other backend={' or '.join(repr(name) for name in ACCOUNTANTS if name != backend)}"
        ) from error


def _source(package: str, mechanism: str) -> str:
    try:
        version = importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return " ".join(filter(None, (package, version, mechanism.upper())))


def _dp_accountant(accountant: str) -> Any:
    module = importlib.import_module(f"dp_accounting.{accountant}")
    return module.RdpAccountant() if accountant == "rdp" else module.PLDAccountant()


def _event(sigma: float, sample_rate: float) -> Any:
    dp = importlib.import_module("dp_accounting")
    return dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(sigma))
