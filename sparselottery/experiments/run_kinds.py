"""The networks of runs that keep their tickets otherwise than `imp`: by channel, by method, or untrained.

All of them are handed over in the shape of the dense network, with masks on its weights, so that one code analyses them.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..nn.convert import masked_modules, sparsify
from ..tickets import driver
from ..tickets.early_bird_driver import ticketed
from ..tickets.store import Job, Store
from ..tickets.ticket import Ticket
from ..training.history import History
from .networks import Networks, order_of


def networks_of(run: str | os.PathLike, data_root: str | os.PathLike | None = None) -> Networks:
    """The trained networks of a run folder of any command.

    Raises:
        FileNotFoundError, ValueError: as for `Networks`.
    """
    try:
        config = Store(run, create=False).read("config.json") if Path(run).is_dir() else None
    except ValueError:  # damaged: told there
        config = None
    kind = KINDS.get(config.get("driver"), Networks) if isinstance(config, dict) else Networks
    return kind(run, data_root)


class EarlyBirdNetworks(Networks):
    """Level 1 is the ticket. A ticket of channels was trained as the smaller network that it is; here its weights are put back
    to their places in the dense network: the outputs are the same."""

    def __init__(self, run, data_root=None):
        super().__init__(run, data_root)
        self.rewind = self.config.get("start", "init")
        self.by_channel = (self.config.get("bird") or {}).get("structure") == "channel"

    def _tickets(self):
        found = super()._tickets()
        return found | {(seed, 0) for seed, _ in found}

    def place(self, seed, level):
        return super().place(seed, 1)  # it has the values of all weights

    def masks(self, seed, level):
        if not self.by_channel:
            return super().masks(seed, level)
        whole = self.initial(seed)
        _embed({}, self._places(seed), whole)
        return {name: layer.mask for name, layer in masked_modules(whole)}

    def _trained(self, network):
        """As the driver trains: through the modules, layers unmasked where none of their weights is."""
        model = driver.build(self.fit.make_model(), network.seed)
        ticket = self.ticket(network.seed, 1)
        if network.level:
            model = self._small(ticket, model)
        elif network.child is not None:
            model.load_state_dict(ticket.initial)
        history = self.fit(model, seed=order_of(network), on_epoch=lambda model, epoch: None)
        if network.level and self.by_channel:
            small, model = model, self.initial(network.seed)
            _embed(small.state_dict(), self._places(network.seed), model)
        return sparsify(model), history

    def _small(self, ticket: Ticket, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # the run has told which channels cannot go
            warnings.simplefilter("ignore", UserWarning)
            return ticketed(ticket, model, self.fit.example() if self.by_channel else None)

    def _places(self, seed: int) -> dict[str, Tensor]:
        """Key of the small network -> where its values stand in the dense network's, int64 of its shape.

        Found by making small a network whose values are their own places, as fractions that float32 holds exactly.
        """
        ticket, model = self.ticket(seed, 1), driver.build(self.fit.make_model(), seed)
        numbered = {
            key: (torch.arange(1, v.numel() + 1, dtype=torch.float32) / _power_above(v)).view(v.shape) if v.ndim else v
            for key, v in ticket.initial.items()
        }
        small = self._small(Ticket(ticket.masks, numbered), model).state_dict()
        places = {}
        for key, value in small.items():
            if value.ndim:
                layer = key.rpartition(".")[0]  # γ and β are 0 where a channel that cannot go was dropped
                source = small.get(f"{layer}.running_var", value)
                places[key] = (source * _power_above(ticket.initial[key])).round().long() - 1
        return places


def _power_above(value: Tensor) -> float:
    return 2.0 ** math.ceil(math.log2(value.numel() + 1))


def _embed(small: dict[str, Tensor], places: dict[str, Tensor], model: nn.Module) -> None:
    """Masks, and the values of `small` where it has them, at their places in `model`; all else is 0 (variances are 1)."""
    layers = dict(masked_modules(model))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key not in places:
                continue
            flat = torch.full((value.numel(),), float(key.endswith("running_var")), dtype=value.dtype)
            kept = torch.zeros(value.numel(), dtype=torch.bool)
            kept[places[key].flatten()] = True
            if key in small:
                flat[places[key].flatten()] = small[key].flatten().to(flat)
                value.copy_(flat.view(value.shape))
            layer, _, what = key.rpartition(".")
            if what == "weight" and layer in layers:
                layers[layer].set_mask(Mask.from_dense(kept.view(value.shape)))


class MutualInformationNetworks(Networks):
    """Level i is the ticket of the i-th method; `level()` is that of mutual information."""

    def _tickets(self):
        self.methods = list(self.config["hparams"].get("methods") or ())
        seeds = {
            int(path.stem.removeprefix("seed").partition("-")[0])
            for path in (self.run / "tickets").glob("seed*-dense.safetensors")
        }
        levels = range(1 + len(self.methods))
        return {(seed, level) for seed in seeds for level in levels if self.place(seed, level).is_file()}

    def place(self, seed, level):
        name = self.methods[level - 1] if level else "dense"
        return self.run / "tickets" / f"seed{seed}-{name}.safetensors"

    def level(self, asked=None):
        if asked is None:
            asked = 1 + self.methods.index("mutual-information") if "mutual-information" in self.methods else 1
        return super().level(asked)

    def ticket(self, seed, level):
        """Level 0: the file holds what training left; the network starts from the initial values."""
        if level:
            return super().ticket(seed, level)
        model = self.initial(seed)
        return Ticket.of(model, model)

    def _outcome(self, network):
        kind = self.methods[network.level - 1] if network.level else "ticket"
        return self.store.job(Job(network.seed, min(network.level, 1), kind))


class SupermaskNetworks(Networks):
    """Level 1 has the learned masks, level 2 those by criterion, both over weights that are never trained."""

    trained = False

    def _trained(self, network):
        if not network.level:
            return super()._trained(network)
        model = self.ticket(network.seed, network.level).apply(self.initial(network.seed))
        return model, self.fit(model, seed=network.seed, budget=0)

    def _repeats(self, network, history):
        if not network.level:
            return super()._repeats(network, history)
        learned = self.store.job(Job(network.seed, 1))
        compared = self.store.job(Job(network.seed, 0))
        if learned is None or compared is None:
            return False
        if network.level == 1:
            recorded = History.from_json(learned["history"]).final_test_accuracy
        else:
            recorded = compared["criterion"]["tried"][compared["criterion"]["chosen"]]["test_accuracy"]
        return recorded == history.final_test_accuracy


KINDS: dict[str, type[Networks]] = {
    "early-bird": EarlyBirdNetworks,
    "mutual-information": MutualInformationNetworks,
    "supermask": SupermaskNetworks,
}
