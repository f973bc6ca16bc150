"""A lottery ticket from a plain PyTorch loop: no trainer, no framework.

    python examples/plain_loop.py --rounds 8 --seeds 3 --out digits.safetensors

`sl.imp` asks two things of you: a new model, and a function that trains one and says how good it is. What stands in between
is yours; here it is the loop that everybody has written once, with torch's own optimizer.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sparselottery as sl


def make_model():
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def data():
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[part], y[part]) for part in order.split([1200, 597])]


def fit(model, *, seed, budget):
    """Train a model in place for `budget` steps; the seed decides the minibatches."""
    (x, y), (test_x, test_y) = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)
    for _ in range(budget):
        batch = torch.randint(len(x), (60,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()  # pruned weights stay exactly zero, with any optimizer
    with torch.no_grad():
        return {"test_accuracy": (model(test_x).argmax(1) == test_y).float().mean().item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of pruning 20 %% of the weights that are left")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="ticket.safetensors", help="where the sparsest ticket goes")
    arguments = parser.parse_args()

    result = sl.imp(
        make_model, fit, rounds=arguments.rounds, seeds=arguments.seeds, budget=arguments.steps, controls=("reinit",)
    )
    for level in result.levels:
        accuracy = {
            kind: f"{100 * level[kind]['test_accuracy']['mean']:.1f} %"
            for kind in level
            if kind in ("ticket", "reinit")
        }
        print(f"{100 * level['density']:6.2f} % of the weights: {accuracy}")
    ticket = result.ticket(level=arguments.rounds)
    print(f"{ticket.count} of {ticket.total} weights: {ticket.save(arguments.out)}")

    model = ticket.apply(make_model())  # from here on an ordinary model again
    print(f"trained once more: {fit(model, seed=0, budget=arguments.steps)}")


if __name__ == "__main__":
    main()
