"""The trained networks of a run folder. A run keeps its tickets, not what training made of them: here they are trained again.

The run's own hyperparameters, data and seeds give the same networks to the last bit on the machine of the run, and the same up
to rounding elsewhere; every one is compared with what the run recorded of it (`Networks.differences`). They are kept in
`RUN/analysis/networks/` as tickets whose `initial` are the trained weights, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from .. import analysis
from ..masks import Mask
from ..nn.convert import sparsify
from ..ops import dispatch
from ..tickets.controls import derived_seed
from ..tickets.driver import digest, seeded
from ..tickets.pool import run_all
from ..tickets.store import Job, Store, to_json
from ..tickets.ticket import Ticket, TicketError, write_atomic
from ..training.history import History, parse_step
from .hparams import Training
from .runs import Fit


@dataclass(frozen=True, order=True)
class Network:
    """One trained network: that of a seed and level (0: dense), or a child of it: the same start on another order of the data."""

    seed: int
    level: int
    child: int | None = None

    @property
    def name(self) -> str:
        return f"seed{self.seed}-level{self.level:02d}" + ("" if self.child is None else f"-child{self.child}")


class Networks:
    """Reads a run folder of `imp`, `one-shot`, or any driver that keeps hyperparameters and tickets as they do; for those that
    keep them in another way, `networks_of` (run_kinds.py) takes another class.

    Args:
        run: the folder. data_root: see `data.load`.

    Attributes:
        hparams: what decides the trainings. seeds, levels: of the tickets there. rewind: "init", "lr" or a step.
        trained: whether tickets are trained, so that they can have children.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: it is no finished run that can be trained again.
    """

    trained = True

    def __init__(self, run: str | os.PathLike, data_root: str | os.PathLike | None = None):
        self.run = Path(run)
        if not self.run.is_dir():
            raise FileNotFoundError(f"{run}: no such run folder")
        self.store = Store(self.run, create=False)
        config = self.store.read("config.json")
        if config is None:
            raise ValueError(f"{run}: expected a run folder, it has no config.json")
        given = config.get("hparams")
        if not isinstance(given, dict) or "data" not in given:
            raise ValueError(
                f"{self.run / 'config.json'}: expected the hyperparameters of a command-line run to train its networks again, "
                "found none; call the functions of sparselottery.analysis with networks of your own"
            )
        try:
            names = {f.name for f in fields(Training)}
            known = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
            self.hparams = Training(**known)
            self.config, self.rewind = config, config.get("rewind", "init")
            if self.rewind not in ("init", "lr"):
                parse_step(self.rewind, steps_per_epoch=1, name="rewind")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.run / 'config.json'}: damaged ({error})") from None
        self.fit = Fit(self.hparams, data_root)
        kept = self._tickets()
        self.seeds = sorted({seed for seed, _ in kept})
        levels = {level for _, level in kept if all((seed, level) in kept for seed in self.seeds)}
        self.levels = sorted(
            levels | ({0} if self.rewind == "init" else set())
        )  # what a network begins with needs no file
        if not self.seeds or 0 not in self.levels or len(self.levels) < 2:
            raise ValueError(
                f"{self.run / 'tickets'}: expected tickets by level, as finished runs of imp and one-shot keep them, found none"
            )

    def _tickets(self) -> set[tuple[int, int]]:
        """(seed, level) of every ticket; level 0 stands for the dense network."""
        return {
            tuple(int(part) for part in path.stem.removeprefix("seed").split("-level"))
            for path in (self.run / "tickets").glob("seed*-level*.safetensors")
        }

    def place(self, seed: int, level: int) -> Path:
        """The file that says what a network starts from."""
        return self.store.ticket(seed, level)

    def level(self, asked: int | None = None) -> int:
        """A level with tickets: `asked`, or the one the run has found, or the sparsest where it found none.

        Raises:
            ValueError: there is no such level, or it is the dense network.
        """
        if asked is None:
            result = self.store.read("result.json") or {}
            found = result.get("found") if isinstance(result.get("found"), dict) else {}
            asked = found.get("level") or self.levels[-1]
        if asked not in self.levels or asked == 0:
            raise ValueError(f"level: expected one of {self.levels[1:]}, got {asked}")
        return asked

    def ticket(self, seed: int, level: int) -> Ticket:
        """The ticket as the run left it.

        Raises:
            TicketError: its file is damaged.
        """
        if self._has_no_file(seed, level):
            return Ticket.of(self.initial(seed), self.initial(seed))
        return Ticket.load(self.place(seed, level))

    def _has_no_file(self, seed: int, level: int) -> bool:
        return level == 0 and not self.place(seed, level).exists()

    def _bytes(self, seed: int, level: int) -> bytes:
        """What tells this ticket from others."""
        if self._has_no_file(seed, level):
            return digest(self.ticket(seed, level)).encode()
        return self.place(seed, level).read_bytes()

    def masks(self, seed: int, level: int) -> dict[str, Mask]:
        """layer -> which weights of the dense network the ticket keeps."""
        return self.ticket(seed, level).masks

    def density(self, level: int) -> float:
        """The fraction of the weights that the tickets of a level keep, mean over the seeds."""
        masks = [mask for seed in self.seeds for mask in self.masks(seed, level).values()]
        return sum(mask.count for mask in masks) / sum(mask.numel for mask in masks)

    def digest(self, level: int) -> str:
        """Of the tickets an analysis of this level depends on: another run, or other tickets, have another one."""
        found = hashlib.sha256(repr(self.hparams).encode())
        for seed in self.seeds:
            for one in (0, level):
                found.update(self._bytes(seed, one))
        return found.hexdigest()[:16]

    def initial(self, seed: int) -> nn.Module:
        """The dense network as it was before any training."""
        with seeded(seed):
            return sparsify(self.fit.make_model()(seed=seed))

    # ---- trained networks ----

    def path(self, network: Network) -> Path:
        return self.run / analysis.FOLDER / "networks" / f"{network.name}.safetensors"

    def missing(self, wanted: Sequence[Network]) -> list[Network]:
        """Those of `wanted` that are not kept, are damaged, or come from other tickets than those of the run."""
        return [network for network in dict.fromkeys(wanted) if self._kept(network) is None]

    def seconds(self, wanted: Sequence[Network]) -> float | None:
        """How long the run took over trainings like these on one core; None where it does not say."""
        found = [(self._outcome(network) or {}).get("seconds") for network in wanted]
        return sum(found) if all(isinstance(s, int | float) for s in found) else None

    def train(
        self, wanted: Sequence[Network], workers: int = 1, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Train those of `wanted` that are not kept, `workers` at the same time, one thread each.

        progress: called with (done, total) after each.
        """
        todo = self.missing(wanted)
        self.path(Network(0, 0)).parent.mkdir(parents=True, exist_ok=True)
        total, done = len(todo), set()
        for _ in run_all(todo, lambda network: None, done, _train, (self.run, self.fit.data_root), workers, threads=1):
            if progress is not None:
                progress(len(done), total)

    def load(self, network: Network) -> nn.Module:
        """A trained network, in evaluation mode.

        Raises:
            ValueError: it was not trained (`train`).
        """
        kept = self._kept(network)
        if kept is None:
            raise ValueError(f"network: {network.name} is not kept in {self.path(network).parent}; train it first")
        return kept.apply(self.initial(network.seed)).eval()

    def differences(self, wanted: Sequence[Network]) -> int:
        """How many of `wanted` (children aside) did not repeat what the run recorded of them."""
        return sum(not self._about(network).get("as_recorded", True) for network in dict.fromkeys(wanted))

    def _kept(self, network: Network) -> Ticket | None:
        try:
            if self._about(network).get("start") != self._start_digest(network):
                return None
            return Ticket.load(self.path(network))
        except (FileNotFoundError, TicketError):
            return None

    def _about(self, network: Network) -> dict:
        try:
            return self.store.read(f"{analysis.FOLDER}/networks/{network.name}.json") or {}
        except ValueError:  # damaged: as good as none
            return {}

    def _start_digest(self, network: Network) -> str:
        found = hashlib.sha256(repr((self.hparams, self.rewind)).encode())
        found.update(self._bytes(network.seed, network.level))
        return found.hexdigest()

    def _outcome(self, network: Network) -> dict | None:
        return self.store.job(Job(network.seed, network.level))

    def _train(self, network: Network) -> None:
        with dispatch.reproducible(), seeded(network.seed):
            model, history = self._trained(network)
        about = {"start": self._start_digest(network)}
        if network.child is None:
            about["as_recorded"] = self._repeats(network, history)
        Ticket.of(model, model).save(self.path(network))
        write_atomic(self.path(network).with_suffix(".json"), to_json(about))

    def _trained(self, network: Network) -> tuple[nn.Module, History]:
        """The network, with masked layers, after its training."""
        start = {} if self.rewind in ("init", "lr") else {"start_at": self.rewind}
        model = self.initial(network.seed)
        if network.level or network.child is not None:
            self.ticket(network.seed, network.level).apply(model)
        else:
            start = {}  # the dense network itself begins at the beginning
        return model, self.fit(model, seed=order_of(network), **start)

    def _repeats(self, network: Network, history: History) -> bool:
        """Whether that is what the run recorded of this network."""
        outcome = self._outcome(network)
        return outcome is not None and outcome["history"] == history.to_json()


def order_of(network: Network) -> int:
    """The seed of the order of the data: a child's is its own."""
    return network.seed if network.child is None else derived_seed("stability", network.seed, network.child)


def _train(run: Path, data_root, network: Network) -> None:
    """One training in a worker process."""
    from .run_kinds import networks_of

    networks_of(run, data_root)._train(network)
