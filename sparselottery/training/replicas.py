"""Several networks of one architecture trained at once: a batch axis in front of every parameter.

Small networks are bound by launches, not arithmetic: R of them stacked cost a GPU little more than one. Each replica keeps
its own mask, data order, optimizer state, history and early stop; the arithmetic is that of one-by-one training up to the
order in which sums are taken (batched matrix products, grouped convolutions).
"""

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from .. import masks, optim
from ..nn.convert import densify, masked_modules
from ..nn.packed import PackedWeight, replace_data
from ..ops import bitmask
from .history import History, Record

# Optimizers that treat every element of a parameter alike, so that a stack of parameters is a parameter.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
)


def obstacle(model: nn.Module) -> str | None:
    """Why a network cannot be a replica, None if nothing is known to stand against it."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{where} draws random numbers, in an order that only training one by one keeps"
        if isinstance(module, PackedWeight):
            return f"{where} is packed; sl.unpack it first"
    if not any(p.requires_grad for p in model.parameters()):
        return "the model has no parameter to train"
    return None


class _Owner:
    """What the optimizers of the package ask for the mask of a stacked weight."""

    def __init__(self, words: Tensor):
        self.weight_mask = words


class Stack:
    """The parameters and buffers of R models as tensors `[R, ...]`, and one forward for all.

    Args:
        models: of one architecture and device, checked; they are read here and written by `write` only.

    Raises:
        ValueError: a model differs from the first in more than its values and masks, or cannot be a replica.
    """

    def __init__(self, models: Sequence[nn.Module]):
        self.skeleton = densify(copy.deepcopy(models[0]))
        first = _signature(models[0], self.skeleton)
        for i, model in enumerate(models):
            reason = obstacle(model)
            if reason is not None:
                raise ValueError(f"models[{i}]: {reason}")
            if i and _signature(model, densify(copy.deepcopy(model))) != first:
                raise ValueError(f"models[{i}]: expected the architecture, dtypes and device of models[0]")
        self.models = list(models)
        plain = dict(self.skeleton.named_buffers())
        with torch.no_grad():
            self.params, self.frozen = {}, {}
            for name, parameter in models[0].named_parameters():
                stacked = torch.stack([model.get_parameter(name).detach() for model in models])
                if parameter.requires_grad:
                    self.params[name] = nn.Parameter(stacked)
                else:
                    self.frozen[name] = stacked
            self.buffers = {
                name: torch.stack([model.get_buffer(name) for model in models])
                for name in plain
                if plain[name] is not None
            }
        self._owners = {}
        self._stack_masks()

    def _stack_masks(self) -> None:
        kept = [{id(layer.weight): layer.mask for _, layer in masked_modules(model)} for model in self.models]
        for name, stacked in [*self.params.items(), *self.frozen.items()]:
            own = [found.get(id(model.get_parameter(name))) for found, model in zip(kept, self.models, strict=True)]
            if all(mask is None or mask.count == mask.numel for mask in own):
                continue
            full = torch.ones(stacked.shape[1:], dtype=torch.bool, device=stacked.device)
            owner = _Owner(bitmask.pack(torch.stack([full if m is None else m.to_dense() for m in own])))
            bitmask.apply_(stacked.data, owner.weight_mask)
            self._owners[name] = owner
            if name in self.params:
                masks.attach(stacked, owner)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.params.values())

    def mask_weights(self) -> None:
        """Zero what the masks prune, for optimizers that do not."""
        for name, owner in self._owners.items():
            if name in self.params:
                bitmask.apply_(self.params[name].data, owner.weight_mask)

    def forward(self, x: Tensor, shared: bool) -> Tensor:
        """x `[R, N, *]`, or `[N, *]` if `shared` by all -> outputs `[R, N, ...]`."""

        def one(state, x):
            before = dict(state)
            output = functional_call(self.skeleton, state, (x,))
            # Buffers that the forward put another tensor in place of; what it wrote into the old one is there already.
            return output, {name: state[name] for name in self.buffers if state[name] is not before[name]}

        state = {**self.params, **self.frozen, **self.buffers}
        output, replaced = vmap(one, in_dims=(0, None if shared else 0))(state, x)
        self.buffers.update({name: buffer.detach() for name, buffer in replaced.items()})
        return output

    def write(self) -> None:
        """Copy every replica's values into its model."""
        with torch.no_grad():
            for i, model in enumerate(self.models):
                for name, stacked in self.params.items():
                    model.get_parameter(name).copy_(stacked[i])
                for name, stacked in self.buffers.items():
                    model.get_buffer(name).copy_(stacked[i])

    def keep(self, rows: Sequence[int], optimizer: torch.optim.Optimizer) -> None:
        """Go on with these replicas only; the others' models are written first."""
        self.write()
        index = torch.tensor(rows, device=next(iter(self.params.values())).device)
        with torch.no_grad():
            for name, stacked in self.params.items():
                state = optimizer.state.get(stacked, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == stacked.shape:
                        state[key] = value[index]
                replace_data(stacked, stacked.data[index])
                if name in self._owners:
                    self._owners[name].weight_mask = self._owners[name].weight_mask[index]
            for group in (self.frozen, self.buffers):
                for name in group:
                    group[name] = group[name][index]
        self.models = [self.models[row] for row in rows]


def why_not(trainer, model: nn.Module) -> str | None:
    """Why `Trainer.fit_many` cannot train models like this one, None if it can; finds out with one forward of two copies."""
    reason = obstacle(model) or _augmented(trainer)
    if reason is not None:
        return reason
    try:
        with one_error_for_all("the model"):
            stack = Stack([model, copy.deepcopy(model)])
            _make_optimizer(trainer, stack)
            stack.skeleton.train()
            device = next(iter(stack.params.values())).device
            x, y = (t[: trainer.batch_size].to(device) for t in trainer.data["train"])
            vmap(trainer.loss)(stack.forward(torch.stack([x, x]), shared=False), torch.stack([y, y]))
    except ValueError as error:
        return str(error)
    return None


def _augmented(trainer) -> str | None:
    return "minibatches are augmented, which replicas do not share" if trainer.augment is not None else None


def train(trainer, models, seeds, start: int, end: int, keep: int | None, data, copy_state: Callable) -> list[History]:
    """`Trainer._loop` for a stack: the same steps at the same iterations, for every replica. See `Trainer.fit_many`."""
    histories = [History(snapshot=copy_state(model) if keep == start else None) for model in models]
    if _augmented(trainer):
        raise ValueError(f"models: {_augmented(trainer)}")
    stack = Stack(models)
    optimizer = _make_optimizer(trainer, stack)
    for model in [*models, stack.skeleton]:
        model.train()
    return _Loop(trainer, stack, optimizer, list(seeds), histories, data, copy_state).run(start, end, keep)


def _make_optimizer(trainer, stack):
    optimizer = trainer._make_optimizer(stack)
    if type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} is not known to treat every element of a parameter by itself, so it cannot"
            " train several models at once"
        )
    return optimizer


class _Loop:
    def __init__(self, trainer, stack, optimizer, seeds, histories, data, copy_state):
        self.trainer, self.stack, self.optimizer = trainer, stack, optimizer
        self.data, self.copy_state = data, copy_state
        self.seeds, self.histories = seeds, list(histories)  # of those that still train, as the stack's rows
        self.all = histories
        self.best, self.waited = [float("inf")] * len(seeds), [0] * len(seeds)

    def run(self, start, end, keep):
        trainer, stack, optimizer = self.trainer, self.stack, self.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        x, y = self.data["train"]
        order = total = None
        since = 0
        for iteration in range(start, end):
            epoch, step = divmod(iteration, trainer.steps_per_epoch)
            if order is None or step == 0:
                order = torch.stack([trainer._order(seed, epoch) for seed in self.seeds]).to(x.device)
            chosen = order[:, step * trainer.batch_size : (step + 1) * trainer.batch_size]
            factor = trainer.rate(iteration)
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor
            losses = vmap(trainer.loss)(stack.forward(x[chosen], shared=False), y[chosen])
            if losses.ndim != 1:  # their sum would train
                raise TypeError(f"loss: expected it to return a scalar tensor, got {list(losses.shape[1:])}")
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # each replica's parameters see its own loss only
            optimizer.step()
            if not getattr(optimizer, "masks_weights", False):
                stack.mask_weights()
            total = losses.detach() if total is None else total + losses.detach()
            since += 1
            done = iteration + 1
            if done == keep:
                stack.write()
                for history, model in zip(self.histories, stack.models, strict=True):
                    history.snapshot = self.copy_state(model)
            if done % trainer.evaluate_every == 0 or done == end:
                alive = self._record(done, [t / since for t in total.tolist()], last=done == end)
                total, since = None, 0
                if not alive:
                    break
                if len(alive) < len(self.seeds):
                    self._go_on_with(alive)
                    order = order[alive]
        if not self.histories[0].records:  # nothing to train: what is there is still measured
            self._record(end, [None] * len(self.seeds), last=True)
        stack.write()
        return self.all

    def _record(self, iteration, train_losses, last) -> list[int]:
        """Evaluate all replicas; returns the rows of those that go on."""
        trainer, count = self.trainer, len(self.seeds)
        losses = accuracies = tests = [None] * count
        improved = [False] * count
        if "validation" in self.data:
            losses, accuracies = self._evaluate("validation")
            improved = [loss < best for loss, best in zip(losses, self.best, strict=True)]
        wanted = [last or better or trainer.evaluate_test == "always" for better in improved]
        if "test" in self.data and any(wanted):
            found = self._evaluate("test")[1]
            tests = [accuracy if asked else None for accuracy, asked in zip(found, wanted, strict=True)]
        alive = []
        for i in range(count):
            record = Record(iteration, train_losses[i], losses[i], accuracies[i], tests[i])
            self.histories[i].records.append(record)
            if improved[i]:
                self.best[i], self.waited[i] = losses[i], 0
            else:
                self.waited[i] += 1
            if trainer.patience is None or self.waited[i] < trainer.patience:
                alive.append(i)
        return alive

    def _go_on_with(self, rows):
        self.stack.keep(rows, self.optimizer)
        for name in ("seeds", "histories", "best", "waited"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

    def _evaluate(self, part) -> tuple[list[float], list[float]]:
        """Mean losses and accuracies of all replicas; `evaluation_batch` bounds the examples in a forward of all together."""
        x, y = self.data[part]
        size = max(1, self.trainer.evaluation_batch // len(self.seeds))
        training = {module: module.training for module in self.stack.skeleton.modules()}
        self.stack.skeleton.eval()
        with torch.no_grad():
            total = right = 0
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                output = self.stack.forward(xs, shared=True)
                total = total + vmap(self.trainer.loss, in_dims=(0, None))(output, ys).double() * len(ys)
                right = right + (output.argmax(-1) == ys).sum(-1)
        for module, mode in training.items():
            module.training = mode
        return [t / len(y) for t in total.tolist()], [r / len(y) for r in right.tolist()]


def _signature(model, plain):
    """What replicas must have in common."""
    state = [(k, tuple(v.shape), v.dtype, v.device) for k, v in plain.state_dict(keep_vars=True).items()]
    # A parametrized module has a class of its own.
    types = [parametrize.type_before_parametrizations(m) for m in plain.modules()]
    return str(plain), types, state, [p.requires_grad for p in model.parameters()]


@contextlib.contextmanager
def one_error_for_all(what="models"):
    """torch.func's own complaint about a network that draws random numbers or branches on data, as one about `models`."""
    try:
        yield
    except RuntimeError as error:
        if "vmap" not in str(error) and "atching rule" not in str(error):
            raise
        raise ValueError(
            f"{what}: cannot be trained as a batch ({str(error).splitlines()[0]}); train them one by one"
        ) from error
