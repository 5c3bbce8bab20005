"""Train a small Transformer built from fastattn's drop-in modules: it learns to reverse a sequence.

Run it: python examples/train_modules.py --steps 300
"""

import argparse

import torch
from torch.nn import functional as F

import fastattn.nn

SYMBOLS, LENGTH, WIDTH = 16, 12, 64


class Reverser(torch.nn.Module):
    """The constructor and the arguments are torch.nn's; so are the weights' names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(SYMBOLS, WIDTH)
        self.position = torch.nn.Parameter(torch.randn(LENGTH, WIDTH) / 8)
        layer = fastattn.nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = fastattn.nn.TransformerEncoder(
            layer, 2, norm=fastattn.nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = torch.nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(symbols) + self.position))


def main(steps: int = 300) -> list[float]:
    torch.manual_seed(0)
    model = Reverser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        symbols = torch.randint(SYMBOLS, (64, LENGTH))
        logits = model(symbols)
        loss = F.cross_entropy(logits.flatten(0, 1), symbols.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
