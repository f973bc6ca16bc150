"""The training loop that ships: data in memory as tensors, evaluation by iterations, bit-equal when it is run again."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import optim
from ..nn.invariant import unmasked_gradients
from ..ops import dispatch
from . import replicas
from .augment import generator_of
from .history import History, Record, check_seed, parse_step
from .whole_step import WholeStep, why_not

OPTIMIZERS = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW}


class Trainer:
    """Trains a classifier: `trainer(model, seed=..., budget=...) -> History`.

    The minibatch at iteration t is a function of (seed, t) alone, every epoch is a fresh permutation, and an incomplete
    last batch is left out. The model is trained in place on the device it is on, and ends as the last iteration left it.
    Random numbers drawn by the model (dropout) come from `seed` as well; the caller's generators stay as they were.

    Args:
        train, validation, test: pairs (x: [N, *], y: int64 [N]). Validation gives the early stop; without it there is none.
        batch_size: examples in a minibatch.
        optimizer: "adam", "adamw" or "sgd" (sl.optim: survivors only), or a callable `parameters -> torch.optim.Optimizer`
            (`lr` and `optimizer_options` are then its own business).
        lr: learning rate. optimizer_options: further keyword arguments, such as {"momentum": 0.9}.
        budget: how long to train: iterations, "20ep", "15000it".
        evaluate_every: iterations between evaluations; the last iteration is evaluated in any case.
        warmup: iterations over which the rate rises linearly to `lr`.
        milestones, gamma: the rate is multiplied by `gamma` from each of these steps on.
        patience: stop for good after so many evaluations without a new minimum of validation loss; None trains to the end.
        evaluate_test: "always", or "improved": only where validation loss is a new minimum, and at the end. The latter
            saves most of the time that evaluation takes and leaves `test_accuracy` None elsewhere.
        loss: `loss(output, y) -> scalar`, a mean over examples. evaluation_batch: examples in a forward pass of evaluation.
        augment: `augment(x, generator) -> x` changes each training minibatch at random, such as `training.augment.flip_crop`;
            the generator (CPU) is a function of seed and iteration.
        whole_step: train Sequentials of linear layers, convolutions, pooling, BatchNorm and ReLU on a CPU in C++ where that is
            faster; `why_not_whole_step(model)` says where it is not. Losses are the same up to rounding. Faster the sparser and
            smaller the network is (a network like LeNet-300-100: several times). Which way is taken does not depend on the
            number of threads; a batch is shared by at most four of them (eight with BatchNorm), so that on many threads a
            mostly dense network may train faster through its modules: False does that.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None = None,
        test: tuple[Tensor, Tensor] | None = None,
        *,
        batch_size: int = 60,
        optimizer: str | Callable = "adam",
        lr: float = 1.2e-3,
        optimizer_options: dict | None = None,
        budget: int | str = 1000,
        evaluate_every: int = 100,
        warmup: int | str = 0,
        milestones: Sequence[int | str] = (),
        gamma: float = 0.1,
        patience: int | None = None,
        evaluate_test: str = "always",
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        evaluation_batch: int = 1000,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        whole_step: bool = True,
    ):
        self.data = {"train": _pair("train", train)}
        for name, pair in (("validation", validation), ("test", test)):
            if pair is not None:
                self.data[name] = _pair(name, pair, like=self.data["train"][0])
        for name, number in (
            ("batch_size", batch_size),
            ("evaluate_every", evaluate_every),
            ("evaluation_batch", evaluation_batch),
            ("patience", 1 if patience is None else patience),
        ):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        for name, (x, _) in self.data.items():
            if len(x) == 0:
                raise ValueError(f"{name}: expected at least one example, got none")
        if not callable(optimizer) and optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {sorted(OPTIMIZERS)} or a callable, got {optimizer!r}")
        if evaluate_test not in ("always", "improved"):
            raise ValueError(f'evaluate_test: expected "always" or "improved", got {evaluate_test!r}')
        if patience is not None and validation is None:
            raise ValueError("patience: expected validation data to watch, got none")
        if augment is not None and not callable(augment):
            raise TypeError(f"augment: expected a callable (x, generator) -> x, got {type(augment).__name__}")
        self.batch_size = min(batch_size, len(self.data["train"][0]))
        self.steps_per_epoch = len(self.data["train"][0]) // self.batch_size
        self.optimizer, self.lr, self.optimizer_options = optimizer, lr, dict(optimizer_options or {})
        self.budget = budget
        self.iterations = self.steps(budget, "budget")
        self.evaluate_every, self.evaluation_batch, self.evaluate_test = evaluate_every, evaluation_batch, evaluate_test
        self.warmup = self.steps(warmup, "warmup")
        self.milestones = sorted(self.steps(m, "milestones") for m in milestones)
        self.gamma, self.patience, self.loss, self.whole_step = gamma, patience, loss, bool(whole_step)
        self.augment = augment

    def steps(self, step: int | str, name: str = "step") -> int:
        """`"2ep"` and the like as iterations of this trainer."""
        return parse_step(step, self.steps_per_epoch, name)

    def epochs(self, budget: int | str | None = None) -> int:
        """How many whole epochs `fit` trains."""
        return (self.iterations if budget is None else self.steps(budget, "budget")) // self.steps_per_epoch

    def example(self, count: int = 2) -> Tensor:
        """The first training examples, `[count, *]`."""
        return self.data["train"][0][:count]

    def config(self) -> dict:
        """Everything that decides the outcome, as JSON; the data as a digest. Two trainers of one config train alike."""
        digest = hashlib.sha256()
        for name, (x, y) in self.data.items():
            digest.update(f"{name}{tuple(x.shape)}".encode())
            digest.update(x.contiguous().cpu().view(torch.uint8).numpy())
            digest.update(y.contiguous().cpu().view(torch.uint8).numpy())
        names = ("batch_size", "lr", "iterations", "evaluate_every", "warmup", "milestones", "gamma", "patience")
        return {
            "trainer": {name: getattr(self, name) for name in names},
            "optimizer": self.optimizer if isinstance(self.optimizer, str) else _name(self.optimizer),
            "optimizer_options": self.optimizer_options,
            "loss": _name(self.loss),
            **({"augment": _name(self.augment)} if self.augment else {}),
            "data": digest.hexdigest()[:16],
        }

    def rate(self, iteration: int) -> float:
        """The factor on the learning rate at this iteration (the first is 0)."""
        warm = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return warm * self.gamma ** sum(iteration >= m for m in self.milestones)

    def batch(self, seed: int, iteration: int) -> Tensor:
        """Indices into the training data of the minibatch at `iteration`: int64 [batch_size]."""
        epoch, step = divmod(iteration, self.steps_per_epoch)
        return self._order(seed, epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, seed: int, epoch: int) -> Tensor:
        mixed = hashlib.sha256(f"batches {seed} {epoch}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)
        return torch.randperm(len(self.data["train"][0]), generator=generator)

    def evaluate(self, model: nn.Module, part: str = "test") -> tuple[float, float]:
        """Mean loss and accuracy on "train", "validation" or "test"; the mode of every module is kept."""
        if part not in self.data:
            raise ValueError(f"part: expected one of {sorted(self.data)}, got {part!r}")
        return self._evaluate(model, *_on(_device(model), self.data[part]))

    def _evaluate(self, model, x, y) -> tuple[float, float]:
        training = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
            total = torch.zeros((), dtype=torch.float64, device=x.device)
            right = torch.zeros((), dtype=torch.int64, device=x.device)
            for xs, ys in zip(x.split(self.evaluation_batch), y.split(self.evaluation_batch), strict=True):
                output = model(xs)
                total += self.loss(output, ys).double() * len(ys)
                right += (output.argmax(-1) == ys).sum()
        for module, mode in training.items():
            module.training = mode
        return total.item() / len(y), right.item() / len(y)

    def __call__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        budget: int | str | None = None,
        snapshot_at: int | str | None = None,
        start_at: int | str = 0,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        on_epoch: Callable[[nn.Module, int], bool | None] | None = None,
        schedule: Callable | None = None,
    ) -> History:
        """Train `model` in place.

        Args:
            seed: of the batch order and of dropout.
            budget: until which iteration; None takes the trainer's own.
            snapshot_at: keep a copy of the state_dict as it was after so many iterations, in `History.snapshot`.
            start_at: the iteration to begin with: batches and learning rate go on as if the earlier ones had been run.
            penalty: `penalty(model) -> scalar`, added to the loss of every minibatch before its backward pass, such as
                `sl.EarlyBird.penalty`. The losses of the history are without it.
            on_epoch: `on_epoch(model, epochs done)`, called after every whole epoch; training ends there when it returns True.
                It may change the model's values.
            schedule: `schedule(model, iterations done, optimizer)`, called after every iteration, such as a `sl.Gradual` that
                prunes; one with a method `over(iterations)` is asked for itself over this training. With one of these three
                training goes through the modules.

        Raises:
            ValueError: a step is malformed, or `snapshot_at` lies outside of what is trained.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, function in (("penalty", penalty), ("on_epoch", on_epoch), ("schedule", schedule)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a callable or None, got {type(function).__name__}")
        check_seed(seed)
        start, end, keep = self._span(budget, snapshot_at, start_at)
        device = _device(model)
        data = {name: _on(device, pair) for name, pair in self.data.items()}
        with _random_numbers(seed, device), dispatch.reproducible():
            if hasattr(schedule, "over"):
                schedule = schedule.over(end)
            return self._train(model, seed, start, end, keep, data, penalty, on_epoch, schedule)

    fit = __call__

    def check(self, model: nn.Module, *, budget: int | str | None = None, snapshot_at: int | str | None = None) -> None:
        """See whether `fit` could begin, without training: a driver asks before it makes a run folder or starts a worker.

        Args: those of `fit`. `model` is left as it is.

        Raises:
            TypeError, ValueError: a step or an option of the optimizer is not as described, or the model does not fit the
                data: its forward or the loss fails on two examples (those of the lowest and highest label).
        """
        self._span(budget, snapshot_at, 0)
        device = _device(model)
        x, y = self.data["train"]
        chosen = torch.stack([y.argmin(), y.argmax()])
        modes = {module: module.training for module in model.modules()}
        with _random_numbers(0, device), dispatch.reproducible(), torch.no_grad():
            self._make_optimizer(model)
            model.eval()
            try:
                loss = self.loss(model(x[chosen].to(device)), y[chosen].to(device))
            except Exception as error:
                raise ValueError(
                    f"model: does not fit the data, x {[len(x), *x.shape[1:]]} with labels up to {y.max()}: {error}"
                ) from error
            finally:
                for module, mode in modes.items():
                    module.training = mode
        if not isinstance(loss, Tensor) or loss.ndim:
            raise TypeError(f"loss: expected it to return a scalar tensor, got {list(getattr(loss, 'shape', [loss]))}")

    def fit_many(
        self,
        models: Sequence[nn.Module],
        *,
        seeds: Sequence[int],
        budget: int | str | None = None,
        snapshot_at: int | str | None = None,
        start_at: int | str = 0,
    ) -> list[History]:
        """Train several models of one architecture at once, in place: the results of `fit`, one by one, up to rounding.

        The models become replicas along a batch axis: each has its own values, mask, batch order, optimizer state, history
        and early stop. Much faster than one by one where a model is too small to keep the device busy.

        Args:
            models: networks that differ in values and masks only, on one device. The code of the first runs for all.
            seeds: of each model's batch order.
            budget, snapshot_at, start_at: as for `fit`.

        Returns:
            A history for each model.

        Raises:
            TypeError, ValueError: an argument is not as described; a model that cannot be a replica: with dropout, packed
                layers, or a forward that torch.func.vmap cannot batch; an optimizer that is not elementwise.
        """
        if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
            raise TypeError(f"models: expected a sequence of torch.nn.Module, got {type(models).__name__}")
        if not isinstance(seeds, Sequence):
            raise TypeError(f"seeds: expected a sequence of ints, got {seeds!r}")
        for seed in seeds:
            check_seed(seed)
        if not models or len(models) != len(seeds):
            raise ValueError(f"seeds: expected one for each of at least one model, got {len(seeds)} for {len(models)}")
        if len({id(model) for model in models}) < len(models):
            raise ValueError("models: expected different objects, got one of them twice")
        start, end, keep = self._span(budget, snapshot_at, start_at)
        device = _device(models[0])
        data = {name: _on(device, pair) for name, pair in self.data.items()}
        with _random_numbers(seeds[0], device), dispatch.reproducible(), replicas.one_error_for_all():
            return replicas.train(self, models, seeds, start, end, keep, data, _copy)

    def why_not_many(self, model: nn.Module) -> str | None:
        """Why `fit_many` cannot train models like this one, None if it can."""
        return replicas.why_not(self, model)

    def _span(self, budget, snapshot_at, start_at) -> tuple[int, int, int | None]:
        """First and last iteration, and the one to keep a snapshot of."""
        end = self.iterations if budget is None else self.steps(budget, "budget")
        start = self.steps(start_at, "start_at")
        keep = None if snapshot_at is None else self.steps(snapshot_at, "snapshot_at")
        if keep is not None and not start <= keep <= end:
            raise ValueError(f"snapshot_at: expected a step from {start} to {end}, got {snapshot_at!r}")
        return start, end, keep

    def _train(self, model, seed, start, end, keep, data, penalty, on_epoch, schedule) -> History:
        runner = self._runner(model, data, seed, start, penalty, on_epoch, schedule)
        try:
            # Nobody but the optimizer sees the gradients here.
            with unmasked_gradients() if runner.masks_weights else contextlib.nullcontext():
                return self._loop(model, runner, seed, start, end, keep, data, on_epoch, schedule)
        finally:
            runner.store()

    def why_not_whole_step(self, model: nn.Module, *, penalty=None, on_epoch=None, schedule=None) -> str | None:
        """Why `fit` cannot train this model in C++ and goes through its modules instead, None if it can."""
        if not self.whole_step:
            return "whole_step=False"
        for name, function in (("penalty", penalty), ("on_epoch", on_epoch), ("schedule", schedule)):
            if function is not None:
                return f"{name} looks at the modules"
        if _device(model).type != "cpu":
            return f"a model on {_device(model)}"
        if self.augment is not None:
            return "minibatches are augmented"
        return why_not(model, self.data, self.optimizer, self.optimizer_options, self.loss, self.batch_size)

    def _runner(self, model, data, seed, start, penalty, on_epoch, schedule):
        optimizer = self._make_optimizer(model)
        if self.why_not_whole_step(model, penalty=penalty, on_epoch=on_epoch, schedule=schedule) is None:
            return WholeStep(model, optimizer, data)
        augment = self.augment and self._augmented(seed, start)
        return _Modules(model, optimizer, data["train"], self.loss, augment, penalty)

    def _augmented(self, seed, start):
        """A function that augments the minibatches in order, from the first iteration on."""
        iterations = itertools.count(start)
        return lambda x: self.augment(x, generator_of(seed, next(iterations)))

    def _loop(self, model, runner, seed, start, end, keep, data, on_epoch, schedule) -> History:
        history = History(snapshot=_copy(model) if keep == start else None)
        scheduled = bool(self.warmup or self.milestones)
        order = None
        since, best, waited = 0, float("inf"), 0
        model.train()
        done = start
        while done < end:
            epoch, step = divmod(done, self.steps_per_epoch)
            if order is None or step == 0:
                order = self._order(seed, epoch).to(data["train"][0].device)
            # As many steps as the runner takes at once, up to where something else is due.
            due = min(end, (done // self.evaluate_every + 1) * self.evaluate_every, done + self.steps_per_epoch - step)
            if keep is not None and done < keep:
                due = min(due, keep)
            steps = min(due - done, runner.longest)
            factors = [self.rate(i) for i in range(done, done + steps)] if scheduled else [1.0] * steps
            runner.run(order[step * self.batch_size : (step + steps) * self.batch_size], factors)
            since += steps
            done += steps
            if schedule is not None:
                schedule(model, done, runner.optimizer)
            if done == keep:
                runner.store()
                history.snapshot = _copy(model)
            whole = on_epoch is not None and done % self.steps_per_epoch == 0
            stop = whole and bool(on_epoch(model, done // self.steps_per_epoch))
            if done % self.evaluate_every == 0 or done == end or stop:
                last = done == end or stop
                record, improved = self._record(runner, model, data, done, runner.take_loss() / since, best, last)
                history.records.append(record)
                since = 0
                if improved:
                    best, waited = record.validation_loss, 0
                else:
                    waited += 1
                if stop or (self.patience is not None and waited >= self.patience):
                    break
        if not history.records:  # nothing to train: what is there is still measured
            history.records.append(self._record(runner, model, data, end, None, best, last=True)[0])
        return history

    def _record(self, runner, model, data, iteration, train_loss, best, last) -> tuple[Record, bool]:
        loss = accuracy = test = None
        improved = False
        if "validation" in data:
            loss, accuracy = runner.evaluate("validation") or self._evaluate(model, *data["validation"])
            improved = loss < best
        if "test" in data and (last or improved or self.evaluate_test == "always"):
            test = (runner.evaluate("test") or self._evaluate(model, *data["test"]))[1]
        return Record(iteration, train_loss, loss, accuracy, test), improved

    def _make_optimizer(self, model) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(self.optimizer, str):
            return OPTIMIZERS[self.optimizer](parameters, lr=self.lr, **self.optimizer_options)
        made = self.optimizer(parameters)
        if not hasattr(made, "param_groups"):
            raise TypeError(f"optimizer: expected it to return a torch optimizer, got {type(made).__name__}")
        return made


class _Modules:
    """Runs minibatches through the model's modules, autograd and the optimizer."""

    longest = 1  # steps in one call of `run`

    def __init__(self, model, optimizer, train, loss, augment=None, penalty=None):
        self.model, self.optimizer, self.loss, self.augment, self.penalty = model, optimizer, loss, augment, penalty
        self.x, self.y = train
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.masks_weights = getattr(optimizer, "masks_weights", False)
        self.factor = 1.0
        self.total = torch.zeros((), device=self.x.device)  # there: a .item() per step would wait for it each time

    def run(self, chosen, factors):
        if factors[0] != self.factor:
            self.factor = factors[0]
            for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = lr * self.factor
        x = self.x[chosen]
        if self.augment is not None:
            x = self.augment(x)
        loss = self.loss(self.model(x), self.y[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        (loss if self.penalty is None else loss + self.penalty(self.model)).backward()
        self.optimizer.step()
        self.total += loss.detach()

    def take_loss(self):
        """The sum of the losses since the last call."""
        total = self.total.item()
        self.total.zero_()
        return total

    def evaluate(self, part):
        """Nothing of its own: the trainer evaluates the model."""

    def store(self):
        """The weights are where they belong at all times."""


def _pair(name, pair, like=None) -> tuple[Tensor, Tensor]:
    """(x, y) checked: as many labels as examples; `like`: examples of the same shape."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
        raise TypeError(f"{name}: expected a pair of tensors (x, y), got {type(pair).__name__}")
    x, y = pair
    if x.ndim < 1 or y.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected x [N, *] and y [N], got {list(x.shape)} and {list(y.shape)}")
    if y.dtype != torch.int64:
        raise TypeError(f"{name}: expected labels of dtype torch.int64, got {y.dtype}")
    if like is not None and x.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"{name}: expected examples of shape {list(like.shape[1:])} as in train, got {list(x.shape[1:])}"
        )
    return x, y


def _device(model) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _on(device, pair):
    return pair[0].to(device), pair[1].to(device)


def _copy(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _name(function) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


@contextlib.contextmanager
def _random_numbers(seed, device):
    """Torch's generators seeded inside, restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
