"""What tests of recipes share: two tiny models, a loop, and a recipe with everything."""

import types

import pytest
import torch

from fastreg import Regularization

FULL = {
    "optimizer": {"name": "adamw", "betas": [0.8, 0.9], "bf16": "nearest"},
    "weight_decay": {"rate": 0.1, "kind": "independent", "exclude": True},
    "lr_decay": {"rate": 0.8},
    "dropout": [
        {"layers": "linear", "base": 0.1, "increase": 0.1, "annealing": {"schedule": "cosine", "steps": 0.5}},
        {"roles": ["attention"], "rate": 0.2},
    ],
    "clip": {"max_norm": 1.0, "value": 0.5, "adaptive": 0.1},
    "gradient_noise": {"std": 0.01, "gamma": 0.55, "relative": True},
    "embedding_noise": {"alpha": 5.0, "annealing": {"schedule": "linear", "end": 0.5, "steps": 3}},
    "activation_noise": {"std": 0.05, "kind": "multiplicative"},
    "token_noise": {"rate": 0.1, "special_tokens": [0, 1]},
    "weight_noise": {"std": 0.01, "relative": True},
    "adversarial": {"method": "fgm", "epsilon": 0.5},
    "r_drop": {"alpha": 1.0},
    "sam": {"rho": 0.05, "adaptive": "weights", "eta": 0.01, "interval": 2},
    "lookahead": {"k": 2, "alpha": 0.5},
    "ema": [{"decay": 0.9, "name": "fast"}, {"decay": 0.99, "name": "slow_ema", "start": 0.5}],
    "swa": {"start": 0.5, "every": 1},
    "l1": {"strength": 1e-4},
    "l2sp": {"strength": 1e-3},
}
TOKENS = torch.arange(24).view(3, 8) % 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds here where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2(rate=0.0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, resid_pdrop=rate, embd_pdrop=rate,
        attn_pdrop=rate, bos_token_id=None, eos_token_id=None, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=16,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def loss_of(model):
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss


def train(model, optimizer, callbacks, steps):
    losses = []
    for _ in range(steps):
        losses.append(callbacks.training_step(loss_of(model), optimizer).item())
        callbacks.step()
    return losses


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def trained(recipe, steps=3, model=None, evaluate=False):
    """Weights and losses of a few steps, and what made them; with averages where `evaluate` says so."""
    model = gpt2() if model is None else model
    optimizer, callbacks = Regularization.from_dict(recipe).apply(model, lr=0.01, steps=steps, seed=1)
    torch.manual_seed(2)
    losses = train(model, optimizer, callbacks, steps)
    if evaluate:
        optimizer.eval()
    return weights(model), losses, optimizer, callbacks


def snapshot(model):
    """All of a model that a recipe might change."""
    inside = {
        name: (
            type(module), id(module), module.training, len(module._forward_hooks),
            len(module._forward_pre_hooks), getattr(module, "p", None),
        )
        for name, module in model.named_modules()
    }  # fmt: skip
    return inside, model.config.to_dict(), [p.tolist() for p in model.parameters()]


@pytest.fixture(scope="session")
def tools():
    """Functions and constants, as attributes."""
    shared = (gpt2, llama, loss_of, train, weights, trained, snapshot)
    return types.SimpleNamespace(FULL=FULL, TOKENS=TOKENS, **{tool.__name__: tool for tool in shared})
