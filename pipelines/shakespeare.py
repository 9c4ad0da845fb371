"""A character GPT on Shakespeare: attention, LayerNorm, AdamW with warm-up."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hydra_pipe import Pipeline


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al., "Attention is All You Need", 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_projection, self.out_projection = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = (
            self.in_projection(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out_projection(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_one, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_two = nn.LayerNorm(width)
        self.forward_part = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_one(x))
        return x + self.forward_part(self.norm_two(x))


class Gpt(nn.Module):
    """GPT over characters: 4 layers of width 128 on 64 characters have 818,000 parameters."""

    def __init__(
        self, symbols: int, context: int, layers: int = 4, width: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.layers(self.symbol(tokens) + self.position(places))))


def pipeline(
    data: Path = Path("data/text"),
    n_train: int = 2000,
    n_test: int = 100,
    epochs: int = 5,
    lr: float = 1e-3,
    layers: int = 4,
    width: int = 128,
    context: int = 64,
    warm_up: int = 50,
    batch_size: int = 32,
    seed: int = 0,
) -> Pipeline:
    """The next character, from passages of `context` characters; the loss of a passage is the mean
    over its characters.

    Args:
        data: directory of tinyshakespeare.txt.
        n_train: training passages, from the first nine tenths of the text.
        n_test: test passages, from the last tenth.
        epochs: passes over the training passages.
        lr: learning rate after the warm-up.
        layers: of the network.
        width: of the network.
        context: characters a passage.
        warm_up: steps in which the learning rate rises to `lr`.
        batch_size: passages a step.
        seed: of the weights, the passages and the order.
    """
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    symbols = sorted(set(text))
    code = {symbol: i for i, symbol in enumerate(symbols)}
    tokens = torch.tensor([code[symbol] for symbol in text])
    split = len(tokens) * 9 // 10
    generator = torch.Generator().manual_seed(seed)

    def passages(first: int, last: int, count: int) -> TensorDataset:
        starts = torch.randint(first, last - context - 1, (count,), generator=generator)
        windows = tokens[starts[:, None] + torch.arange(context + 1)]
        return TensorDataset(windows[:, :-1], windows[:, 1:])

    model = Gpt(len(symbols), context, layers, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    return Pipeline(
        model=model,
        optimizer=optimizer,
        loss=lambda output, target: F.cross_entropy(
            output.transpose(1, 2), target, reduction="none"
        ).mean(1),
        train=passages(0, split, n_train),
        test=passages(split, len(tokens), n_test),
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        scheduler=torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warm_up)
        ),
        max_grad_norm=1.0,
        render=lambda tokens: "".join(symbols[token] for token in tokens),
    )
