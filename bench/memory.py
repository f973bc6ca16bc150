"""Bytes that training keeps per dense weight: parameters, gradients, optimizer state and masks; dense, masked, packed.

    python bench/memory.py [--sparsity 0.5 0.8 0.9 0.95] [--optimizer adam|sgd] [--device cpu|cuda] [--json]

Counted from the tensors after one step; `predicted` is the arithmetic of a bit per weight and so many floats per stored
weight. On a GPU `peak` is what the allocator reached in that step beyond what stays, activations and transient dense
weights of 4096 x 4096 included.
"""

import argparse
import json
import sys

import torch
from torch import nn

FLOATS = {"adam": 4, "sgd": 3}  # parameter, gradient and state: exp_avg and exp_avg_sq, or the momentum


def measure(form: str, sparsity: float, optimizer: str = "adam", device: str = "cpu", size: int = 1024) -> dict:
    """One row: bytes per dense weight of a network of two size x size layers, trained for a step in float32."""
    import sparselottery as sl

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=False), nn.ReLU(), nn.Linear(size, size, bias=False)).to(device)
    weights = sum(p.numel() for p in model.parameters())
    if form != "dense":
        sl.prune(model, sparsity=sparsity)
    if form == "packed":
        sl.pack(model)
    make = torch.optim.Adam if optimizer == "adam" else lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)
    stepper = make(model.parameters())
    x = torch.randn(8, size, device=device)
    peak = None
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
            stays = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        stepper.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        stepper.step()
        if device == "cuda":
            peak = (torch.cuda.max_memory_allocated() - stays) / weights
    parts = {
        "parameters": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters()],
        "state": [
            v for state in stepper.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim
        ],
        "masks": list(model.buffers()),
    }
    row = {name: sum(t.numel() * t.element_size() for t in tensors) / weights for name, tensors in parts.items()}
    stored = 1 - sparsity if form == "packed" else 1.0
    predicted = 4 * FLOATS[optimizer] * stored + (0 if form == "dense" else 1 / 8)
    about = {"form": form, "sparsity": 0.0 if form == "dense" else sparsity, "optimizer": optimizer, "device": device}
    return about | row | {"total": sum(row.values()), "predicted": predicted} | ({} if peak is None else {"peak": peak})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--optimizer", choices=sorted(FLOATS), default="adam")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    if not all(0 <= s < 1 for s in arguments.sparsity):
        parser.error(f"--sparsity: expected fractions from 0 to below 1, got {arguments.sparsity}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device is there")
    size = 4096 if arguments.device == "cuda" else 1024
    forms = [("dense", 0.0), *((form, s) for s in arguments.sparsity for form in ("masked", "packed"))]
    rows = [measure(form, s, arguments.optimizer, arguments.device, size) for form, s in forms]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return 0
    names = [name for name in rows[0] if name not in ("optimizer", "device")]
    print(f"bytes per dense weight, float32, {arguments.optimizer}, {arguments.device}")
    print("  ".join(name.rjust(10) for name in names))
    for row in rows:
        cells = [row[name] if isinstance(row[name], str) else f"{row[name]:.4g}" for name in names]
        print("  ".join(cell.rjust(10) for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
