"""A plain transformer language model, as an example of the modules of this package."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dropout import Dropout
from .fused import BiasActDropout, BiasDropoutAdd


class TransformerWithDropout(nn.Module):
    """A causal transformer with fused dropout that scores the next token.

    The layers are pre-norm, as in GPT-2, whose size is the default: 163 million parameters, of which 39
    million are the output head.  Bias, activation and dropout are one pass over memory, and so are bias,
    dropout and residual.

    ```python
    model = fastreg.nn.TransformerWithDropout(dropout=0.1)
    logits = model(tokens)  # [batch, length] → [batch, length, vocab_size]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    ```

    Args:
        vocab_size: Number of tokens.
        d_model: Width.
        nhead: Attention heads; they divide the width.
        num_layers: Layers.
        dim_feedforward: Width between the two linear maps of a layer; 4 times the width by default.
        dropout: Rate in [0, 1] of embeddings, attention probabilities, activations and residual branches.
        activation: Such as `"gelu"`, see `BiasActDropout`.
        max_length: Number of positions.

    Raises:
        ValueError: If the heads do not divide the width.

    Shape:
        Tokens `[batch, length]`, int64; logits `[batch, length, vocab_size]`.

    Reference:
        Vaswani et al. 2017, "Attention is all you need"; Radford et al. 2019 for the size and the norms.
    """

    def __init__(
        self, vocab_size: int = 50_257, d_model: int = 768, nhead: int = 12, num_layers: int = 12,
        dim_feedforward: int | None = None, dropout: float = 0.1, activation: str = "gelu",
        max_length: int = 1024,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_length, d_model)
        self.dropout = Dropout(dropout)
        width = 4 * d_model if dim_feedforward is None else dim_feedforward
        self.layers = nn.ModuleList(
            EncoderLayer(d_model, nhead, width, dropout, activation) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns scores of the next token at every position.

        Raises:
            ValueError: If there are more positions than `max_length`.
        """
        length = tokens.shape[-1]
        if length > self.positions.num_embeddings:
            raise ValueError(f"got {length} tokens in a row, max_length is {self.positions.num_embeddings}")
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class EncoderLayer(nn.Module):
    """A pre-norm layer: causal self-attention and two linear maps, each with a residual."""

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, nhead, dropout)
        self.dropout1 = BiasDropoutAdd(d_model, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=False)
        self.activation = BiasActDropout(dim_feedforward, dropout, activation)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=False)
        self.dropout2 = BiasDropoutAdd(d_model, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the output of an input `[batch, length, d_model]`, in its shape."""
        x = self.dropout1(self.attention(self.norm1(x)), x)
        return self.dropout2(self.linear2(self.activation(self.linear1(self.norm2(x)))), x)


class CausalSelfAttention(nn.Module):
    """Causal self-attention; the bias of its output is added by the module after it.

    Its rate, that of the attention probabilities, is a plain number, as torch's own attention takes it.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"nhead must divide d_model, got {nhead=} and {d_model=}")
        self.nhead, self.dropout = nhead, dropout
        self.inputs = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the output of an input `[batch, length, d_model]`, in its shape."""
        # [batch, length, 3 · d_model] → three times [batch, nhead, length, d_model / nhead]
        query, key, value = self.inputs(x).unflatten(-1, (3, self.nhead, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(-2))
