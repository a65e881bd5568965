"""Runs `fastreg private`: trains a small network with and without differential privacy."""

import argparse
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ..optim import AdamW
from ..privacy import DPOptimizer, noise_multiplier_for, poisson_loader
from .usage import UsageError, count, positive, require, whole

DESCRIPTION = """\
Train a small network on scikit-learn's breast-cancer data twice, without and with differential privacy:
the gradient of each sample is clipped, Gaussian noise is added to their sum, batches are Poisson-sampled.
Prints the accuracy of both on held-back samples, the epsilon of the private one and its accountant. Takes
seconds."""

# Typical magnitudes of the features, which are public: mean, standard error and worst value of each image.
# Scaling by statistics of the data would release them.
MAGNITUDES = (
    (14, 19, 92, 650, 0.1, 0.1, 0.09, 0.05, 0.18, 0.06),
    (0.4, 1.2, 2.9, 40, 0.007, 0.025, 0.03, 0.012, 0.02, 0.004),
    (16, 25, 107, 880, 0.13, 0.25, 0.27, 0.11, 0.29, 0.08),
)
HIDDEN, HELD_BACK = 32, 114


def add_parser(commands: Any) -> None:
    """Adds the subcommand `private` to the command line."""
    summary = "train with and without differential privacy: what does it cost"
    parser = commands.add_parser("private", help=summary, description=DESCRIPTION)
    for flag, kind, default, text in (
        ("--epsilon", positive, 3.0, "largest epsilon"),
        ("--delta", positive, 1e-4, "less than one by the number of samples"),
        ("--max-grad-norm", positive, 1.0, "largest norm of a gradient"),
        ("--sample-rate", positive, 0.1, "probability to be in a batch"),
        ("--steps", count, 300, "training steps"),
        ("--lr", positive, 0.01, "learning rate"),
        ("--seed", whole, 0, "seed of weights, never of the noise"),
    ):
        metavar = "X" if kind is positive else "N"
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--accountant", choices=("rdp", "prv"), default="rdp", help="of Opacus (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains without and with privacy; raises `UsageError` for input that cannot be used."""
    require("private", "privacy", "opacus", "sklearn")
    train, test = _data()
    samples = len(train.tensors[0])
    if args.sample_rate > 1 or args.delta >= 1:
        raise UsageError(
            f"--sample-rate and --delta are probabilities, got {args.sample_rate:g} and {args.delta:g}"
        )
    expected = args.sample_rate * samples
    try:
        sigma = noise_multiplier_for(
            args.epsilon, sample_rate=args.sample_rate, steps=args.steps, delta=args.delta,
            accountant=args.accountant,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--epsilon {args.epsilon:g}: {error}") from None
    print(
        f"scikit-learn's breast-cancer data: {samples} samples to train, {len(test.tensors[0])} held back\n"
        f"{args.steps} steps of Poisson-sampled batches of {expected:.0f} on average, lr {args.lr:g}\n"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, with so little to do
    try:
        for label in ("not private", "private"):
            begin, batches = time.perf_counter(), poisson_loader(train, args.sample_rate, args.steps)
            torch.manual_seed(args.seed)
            inputs = len(MAGNITUDES) * len(MAGNITUDES[0])
            model = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
            optimizer: Any = AdamW(model.parameters(), lr=args.lr)
            if label == "private":
                optimizer = DPOptimizer(
                    optimizer, model=model, noise_multiplier=sigma, max_grad_norm=args.max_grad_norm,
                    expected_batch_size=expected, accountant=args.accountant, sample_rate=args.sample_rate,
                )  # fmt: skip
            accuracy, seconds = _train(model, optimizer, batches, test), time.perf_counter() - begin
            line = f"{label:<13}{accuracy:6.1%} of samples held back right, {seconds:.1f} s"
            if label == "private":
                line += f"; epsilon {optimizer.epsilon(args.delta)}, noise multiplier {float(sigma):.3g}"
            print(line)
    finally:
        torch.set_num_threads(threads)
    print(
        "\nThe epsilon is that of real arithmetic. Not defended against: attacks on floating-point\n"
        "arithmetic and the prediction of random numbers. The accuracies themselves are not private."
    )
    return 0


def _data() -> tuple[Any, Any]:
    """Returns the shares to train and to test, which are always the same."""
    from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped]

    features, labels = load_breast_cancer(return_X_y=True)
    x = torch.as_tensor(features).float() / torch.tensor(MAGNITUDES).flatten() - 1
    x, y = x.clamp(-3, 3), torch.as_tensor(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[HELD_BACK:], order[:HELD_BACK]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, test: Any) -> float:
    """Trains a model, and returns its accuracy on the share to test."""
    for batch in batches:
        if batch is not None:  # an empty batch is a private step as well
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = test.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())
