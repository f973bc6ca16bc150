"""A lottery ticket of a small GPT that reads a text file letter by letter.

    python examples/transformer_ticket.py README.md --rounds 5 --steps 300

Rounds of training, pruning the smallest 20 % of all weights together, and rewinding to the weights after `--rewind` steps: what
larger networks need instead of their initial values (Frankle et al., arXiv 1912.05671). Everything is written out.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, letters, context, width=64, depth=2, heads=4):
        super().__init__()
        self.letter, self.position = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, x):
        """int64 [N, T] -> logits [N, T, letters]"""
        x = self.letter(x) + self.position.weight[: x.shape[1]]
        return self.output(self.norm(self.blocks(x)))


def batch(text, context, size, generator):
    start = torch.randint(len(text) - context, (size, 1), generator=generator)
    windows = text[start + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, text, arguments, begin=0, end=None):
    """Steps `begin` to `end`; minibatches are a function of the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    for step in range(begin, arguments.steps if end is None else end):
        x, y = batch(text, arguments.context, 32, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file; its last tenth is held out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rewind", type=int, default=30)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", default="gpt.safetensors")
    arguments = parser.parse_args()

    content = arguments.text.read_text(errors="replace")
    letters = sorted(set(content))
    index = {letter: i for i, letter in enumerate(letters)}
    encoded = torch.tensor([index[letter] for letter in content])
    text, held_out = encoded.split([len(encoded) * 9 // 10, len(encoded) - len(encoded) * 9 // 10])
    if len(held_out) <= arguments.context + 1:
        parser.error(f"text: expected more than {10 * (arguments.context + 2)} letters, got {len(content)}")
    probe = batch(held_out, arguments.context, 256, torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    model = sl.sparsify(GPT(len(letters), arguments.context))
    train(model, text, arguments, end=arguments.rewind)
    ticket = sl.Ticket.of(model, model)  # nothing pruned yet: the weights to rewind to
    for level in range(arguments.rounds + 1):
        train(model, text, arguments, begin=arguments.rewind)
        with torch.no_grad():
            print(
                f"{100 * ticket.density:6.2f} % of the weights: validation loss {loss_of(model, *probe):.3f}",
                flush=True,
            )
        if level < arguments.rounds:
            sl.prune(model, rate=arguments.rate, exclude="output")  # embeddings and norms never count
            ticket = sl.Ticket.of(model, ticket.initial)
            ticket.apply(model)
    print(f"{ticket.count} of {ticket.total} weights: {ticket.save(arguments.out)}")


if __name__ == "__main__":
    main()
