"""What a recipe may say: its sections and their settings."""

from __future__ import annotations

from typing import Any

from .fields import (  # fmt: skip
    Key,
    Section,
    duration,
    either,
    flag,
    ids,
    names,
    number,
    numbers,
    one_of,
    pair,
    text,
    whole,
)

ANNEALING = Section(
    "How the rate changes with the step: a factor of it, or the rate itself where none is given.",
    {
        "schedule": Key(one_of("linear", "cosine", "early", "late"), "linear",
                        "linear, cosine: from start to end; early: only before, late: only after"),
        "start": Key(number, 1.0, "at the first step, and all along for early and late"),
        "end": Key(number, 0.0, "from the last of the steps on"),
        "steps": Key(duration, 1.0, "how long: steps, or as 0.5 a share of the run"),
    },
    "schedule",
)  # fmt: skip


def annealing(name: str, value: Any) -> Any:
    """A nested section."""
    read = ANNEALING.read(name, value)
    if not isinstance(read, dict):
        raise ValueError(f"{name} must be settings such as {{schedule: linear, end: 0.0}}, got {value!r}")
    return read


FALLING = {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 1.0}

OPTIMIZERS = ("adamw", "adam", "sgd", "lion")

SECTIONS: dict[str, Section] = {
    "optimizer": Section(
        "The update rule, with options of its own.",
        {
            "name": Key(one_of(*OPTIMIZERS), "adamw", "adamw, adam, sgd or lion"),
            "betas": Key(pair, [0.9, 0.999], "of adamw, adam and lion"),
            "eps": Key(number, 1e-8, "of adamw and adam"),
            "amsgrad": Key(flag, False, "of adamw and adam"),
            "momentum": Key(number, 0.9, "of sgd"),
            "dampening": Key(number, 0.0, "of sgd"),
            "nesterov": Key(flag, False, "of sgd"),
            "bf16": Key(one_of("stochastic", "remainder", "nearest"), "stochastic",
                        "how 16-bit weights are rounded: stochastic, remainder or nearest"),
            "state_dtype": Key(one_of("float32", "bfloat16", "float16"), "float32",
                               "of the state; default: that of the weights"),
            "nonfinite": Key(one_of("propagate", "skip", "raise"), "propagate",
                             "what becomes of steps with NaN or Inf: propagate, skip or raise"),
            "capturable": Key(flag, False, "for CUDA graphs"),
            "fused": Key(flag, False, "leaves unscaling to the step under a GradScaler"),
        },
        "name",
    ),
    "weight_decay": Section(
        "Weights decay towards zero.",
        {
            "rate": Key(number, 0.01, ">= 0"),
            "kind": Key(one_of("decoupled", "l2", "independent", "cautious"), "decoupled",
                        "decoupled, l2, independent (of the learning rate) or cautious"),
            "exclude": Key(flag, True, "biases, norms and all with one dimension do not decay"),
        },
        "rate",
    ),
    "lr_decay": Section(
        "Earlier layers learn slower.",
        {"rate": Key(number, 0.9, "of the learning rate, from each layer to the one before, in (0, 1]")},
        "rate",
    ),
    "dropout": Section(
        "Dropout by layer, role and step; a list of such sets several roles.",
        {
            "rate": Key(number, 0.1, "in [0, 1]; with layers: path, that of the last"),
            "layers": Key(either(one_of("linear", "path"), numbers), "linear",
                          "linear: base + layer * increase; path: from 0 to rate; or a list, one for each"),
            "base": Key(number, 0.1, "of the first layer"),
            "increase": Key(number, 0.02, "from layer to layer"),
            "annealing": Key(annealing, FALLING, "a factor that changes with the step, or the rate itself"),
            "roles": Key(names, ["hidden"],
                         "hidden, attention, activation, embedding, head, path, layerdrop, adapter"),
            "inject": Key(flag, True, "adds it behind attention and MLP of models that have none"),
            "levels": Key(whole, 7, "of annealed rates that are Python floats in the model"),
        },
        "rate",
        many=True,
    ),
    "clip": Section(
        "Gradients are clipped.",
        {
            "max_norm": Key(number, 1.0, "largest norm of all gradients together"),
            "norm_type": Key(number, 2.0, "2 or .inf"),
            "value": Key(number, 0.1, "largest absolute value of an element"),
            "adaptive": Key(number, 0.01, "largest share of the norm of the weights, by rows"),
        },
        "max_norm",
    ),
    "gradient_noise": Section(
        "Gaussian noise on gradients.",
        {
            "std": Key(number, 1e-3, "standard deviation, or a share of the gradient norm"),
            "gamma": Key(number, 0.55, "how fast it falls: std**2 / (1 + step)**gamma"),
            "relative": Key(flag, True, "whether std is a share"),
        },
        "std",
    ),
    "embedding_noise": Section(
        "Noise on token embeddings (NEFTune).",
        {
            "alpha": Key(number, 5.0, "size of the uniform noise; 5, 10 or 15"),
            "std": Key(number, 0.01, "standard deviation of Gaussian noise instead"),
            "length": Key(one_of("padded", "true"), "padded", "padded, as transformers; or true"),
            "annealing": Key(annealing, FALLING, "a factor that changes with the step"),
        },
        "alpha",
    ),
    "activation_noise": Section(
        "Gaussian noise on activations.",
        {
            "std": Key(number, 0.05, "standard deviation, or a share of the activation"),
            "pattern": Key(text, "'*.mlp'", "names of modules; default: attention and MLP of every layer"),
            "kind": Key(one_of("additive", "multiplicative"), "additive", "additive or multiplicative"),
            "annealing": Key(annealing, FALLING, "a factor that changes with the step"),
        },
        "std",
    ),
    "token_noise": Section(
        "Input tokens are replaced by random ones; labels stay.",
        {
            "rate": Key(number, 0.05, "in [0, 1]"),
            "special_tokens": Key(ids, [0], "that stay; default: those of the model's configuration"),
            "annealing": Key(annealing, FALLING, "a factor that changes with the step"),
        },
        "rate",
    ),
    "weight_noise": Section(
        "Gaussian noise on weights while gradients are computed.",
        {
            "std": Key(number, 0.01, "standard deviation, or a share of the weight"),
            "relative": Key(flag, True, "whether std is a share"),
            "annealing": Key(annealing, FALLING, "a factor that changes with the step"),
        },
        "std",
    ),
    "adversarial": Section(
        "A second pass with embeddings moved to raise the loss.",
        {
            "method": Key(one_of("fgm"), "fgm", "fgm"),
            "epsilon": Key(number, 1.0, "how far, in the L2 norm"),
            "modules": Key(text, "wte", "a pattern in names of parameters; default: the input embeddings"),
        },
        "method",
    ),
    "r_drop": Section(
        "Two passes with different dropout that should agree.",
        {"alpha": Key(number, 1.0, "weight of their divergence; 1 to 5")},
        "alpha",
    ),
    "sam": Section(
        "Sharpness-aware minimization: a second backward pass, uphill.",
        {
            "rho": Key(number, 0.05, "radius"),
            "adaptive": Key(one_of(False, True, "weights"), False,
                            "true: in units of the weights (ASAM; rho 10 times as large); "
                            "weights: without biases"),
            "eta": Key(number, 0.01, "of adaptive"),
            "interval": Key(whole, 1, "perturbs every so many steps"),
            "start_step": Key(duration, 0, "steps before the first, or as 0.1 a share of the run"),
            "perturb": Key(one_of("all", "norms"), "all", "all, or norms only"),
            "rounding": Key(one_of("stochastic", "nearest"), "stochastic", "of perturbed 16-bit weights"),
        },
        "rho",
    ),
    "msam": Section(
        "Sharpness-aware minimization along the momentum: one backward pass.",
        {"rho": Key(number, 0.3, "radius")},
        "rho",
    ),
    "lookahead": Section(
        "Every k steps, weights go part of the way back.",
        {
            "k": Key(whole, 5, "steps between"),
            "alpha": Key(number, 0.5, "share of the way that stays, in [0, 1]"),
            "pullback_momentum": Key(one_of("none", "reset", "pullback"), "none",
                                     "what becomes of the momentum: none, reset or pullback"),
        },
        "k",
    ),
    "ema": Section(
        "Evaluates a moving average of the weights; a list of such, with names, keeps several.",
        {
            "decay": Key(number, 0.999, "in [0, 1)"),
            "name": Key(text, "ema", "tells several apart"),
            "start": Key(duration, 0, "step of the first weights, or as 0.1 a share of the run"),
            "every": Key(whole, 1, "steps between"),
            "warmup": Key(one_of("ratio", "power"), "ratio", "how the decay grows: ratio or power"),
        },
        "decay",
        many=True,
    ),
    "swa": Section(
        "Evaluates the mean of the weights late in the run.",
        {
            "start": Key(duration, 0.75, "step of the first weights, or as 0.75 a share of the run"),
            "every": Key(whole, 1, "steps between"),
        },
        "start",
    ),
    "l1": Section("Weights are drawn to exact zeros.", {"strength": Key(number, 1e-4, ">= 0")}, "strength"),
    "l2sp": Section(
        "Weights are drawn to where they started.", {"strength": Key(number, 1e-3, ">= 0")}, "strength"
    ),
}  # fmt: skip
