"""How fast a ticket trains and answers here, against the dense network: same shapes, same batch, same machine, same minutes."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import optim
from ..nn.compress import compress
from ..nn.invariant import unmasked_gradients
from ..tickets.result import Result
from ..tickets.ticket import Ticket
from ..training.trainer import Trainer
from ..training.whole_step import WholeStep
from .hparams import Training
from .runs import Fit

PARITY_STEPS = 5
LOSS_TOLERANCE = 1e-4  # relative, of fp32 losses after a few steps that sum in different orders
OUTPUT_TOLERANCE = 1e-4  # of outputs, relative to the largest


def measure_speed(
    ticket: Ticket,
    make_model: Callable[[], nn.Module],
    batch: tuple[Tensor, Tensor],
    *,
    lr: float = 1.2e-3,
    rounds: int = 15,
    burst: float = 0.01,
    threads: int = 1,
) -> dict:
    """Dense time / ticket time of a training step and of inference.

    Dense is a plain network with `torch.optim.Adam(fused=True)`. The ticket is the same network, masked: trained with Adam as
    `sl.Trainer` does it (in C++ where that applies, else through its modules and `sl.optim.Adam`), and for inference in the
    form that `sl.compress` finds fastest. Both take turns for `rounds` rounds of at least `burst` seconds each, and medians are
    compared. Before that both must give the same outputs and, trained for a few steps, the same losses.

    Args:
        make_model: a new plain network that the ticket fits. batch: x [N, *], y int64 [N].
        threads: CPU threads for both.

    Returns:
        {"train_step": ratio, "inference": ratio, "train_step_us": {"dense": .., "ticket": ..}, "inference_us": {...},
        "density": .., "batch_size": N, "threads": ..}; microseconds are medians.

    Raises:
        RuntimeError: the ticket computes something else than the dense network with its weights: no speed is worth that.
    """
    x, y = batch
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check_parity(ticket, make_model, x, y, lr)
        dense, masked = make_model(), ticket.apply(make_model())
        training = {
            "dense": _step(dense, torch.optim.Adam(dense.parameters(), lr=lr, fused=True), x, y),
            "ticket": _compiled_step(masked, x, y, lr) or _step(masked, optim.Adam(masked.parameters(), lr=lr), x, y),
        }
        train_us = _interleaved(training, rounds, burst)
        answers = {"dense": _answer(dense.eval(), x), "ticket": _answer(compress(masked, x), x)}
        inference_us = _interleaved(answers, rounds, burst)
    finally:
        torch.set_num_threads(before)
    return {
        "train_step": train_us["dense"] / train_us["ticket"],
        "inference": inference_us["dense"] / inference_us["ticket"],
        "train_step_us": train_us,
        "inference_us": inference_us,
        "density": ticket.density,
        "batch_size": len(x),
        "threads": threads,
    }


def speed_of_run(result: Result, hparams: Training, data_root=None) -> dict | None:
    """`measure_speed` of the ticket a run found, on a minibatch of its training data; kept in the run's result.json.

    None where no sparse ticket was found.
    """
    if result.found["level"] == 0:
        return None
    fit = Fit(hparams, data_root)
    x, y = fit.trainer.data["train"]
    batch = x[: hparams.batch_size], y[: hparams.batch_size]
    speed = measure_speed(result.ticket(), fit.make_model(), batch)  # Adam at its own rate, whatever trained the ticket
    result.extend(speed=speed)
    return speed


def _step(model, optimizer, x, y) -> Callable[[], Tensor]:
    model.train()

    def step():  # as sl.Trainer takes it
        optimizer.zero_grad(set_to_none=True)
        with unmasked_gradients():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _compiled_step(model, x, y, lr) -> Callable[[], float] | None:
    """A step in C++ that returns its loss, None where `sl.Trainer` would go through the modules. The model stays as it is."""
    trainer = Trainer((x, y), batch_size=len(x), lr=lr)
    if trainer.why_not_whole_step(model) is not None:
        return None
    whole = WholeStep(model, optim.Adam(model.parameters(), lr=lr), trainer.data)
    order = torch.arange(len(x))

    def step():
        whole.run(order, [1.0])
        return whole.take_loss()

    return step


def _answer(model, x) -> Callable[[], Tensor]:
    def answer():
        with torch.inference_mode():
            return model(x)

    return answer


def _interleaved(functions: dict[str, Callable], rounds: int, burst: float) -> dict[str, float]:
    """Microseconds per call of each, medians over rounds in which they take turns."""
    repeats = {}
    for name, function in functions.items():
        for _ in range(10):  # the first calls choose backends and fill caches
            function()
        begin = time.perf_counter()
        function()
        repeats[name] = max(1, round(burst / (time.perf_counter() - begin)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - begin) / repeats[name] * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def _check_parity(ticket, make_model, x, y, lr) -> None:
    """The masked network against a plain one that holds the ticket's weights and whose gradients are masked by hand."""
    masked = ticket.apply(make_model())
    plain = make_model()
    plain.load_state_dict({key: value for key, value in masked.state_dict().items() if key in plain.state_dict()})
    for model in (masked, plain):
        model.eval()  # dropout would differ
    masks = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    ours, theirs = _answer(masked, x)(), _answer(plain, x)()
    difference = (ours - theirs).abs().max().item()
    if not difference <= OUTPUT_TOLERANCE * theirs.abs().max().item():
        raise RuntimeError(
            f"the ticket's outputs differ from the dense network's with the same weights by {difference:.3g}"
        )

    compiled = _compiled_step(masked, x, y, lr)
    ours = optim.Adam(masked.parameters(), lr=lr)
    theirs = torch.optim.Adam(plain.parameters(), lr=lr)
    for step in range(PARITY_STEPS):
        losses = []
        for model, optimizer in ((masked, ours), (plain, theirs)):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if model is plain:
                for name, mask in masks.items():
                    plain.get_submodule(name).weight.grad.mul_(mask)
            optimizer.step()
            losses.append(loss.item())
        *tickets, dense = ([compiled()] if compiled else []) + losses
        for loss in tickets:
            if not abs(loss - dense) <= LOSS_TOLERANCE * abs(dense):
                raise RuntimeError(f"training the ticket gives loss {loss} at step {step}, the dense network {dense}")
