"""Analyses of a run folder: its networks trained again, the numbers computed, kept, and used again."""

from __future__ import annotations

import os
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import analysis
from ..analysis import class_damage, landscape, stability, weight_motion
from ..ops import dispatch
from ..tickets.controls import derived_seed
from .networks import Network, Networks
from .run_kinds import networks_of

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Settings:
    """What an analysis may be told.

    level: of the ticket; None is the one the run has found. The others are those of the landscape: the seed whose networks it
    shows (None: the run's first), how many training examples give the loss, points along each side, how far it goes, and the
    seed of the two directions.
    """

    level: int | None = None
    seed: int | None = None
    examples: int = 1000
    resolution: int = 21
    extent: float = 1.0
    directions: int = 0


class Inapplicable(ValueError):
    """A question that a run has no answer to: a population of one seed, children of what is not trained."""


def analyze(
    run: str | os.PathLike,
    names: Sequence[str] = (),
    settings: Settings | None = None,
    *,
    data_root: str | os.PathLike | None = None,
    workers: int = 1,
    again: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict:
    """Compute analyses of a finished run and keep their numbers in `RUN/analysis/`; what is there already is not computed again.

    Args:
        run: a run folder of imp, one-shot, early-bird, mutual-information or supermask, or of a driver that keeps
            hyperparameters and tickets as imp does.
        names: of `RUNNERS`; none asks for all that this run has an answer to.
        data_root: see `data.load`. workers: trainings at the same time. again: compute what is there already, too.
        tell: called with lines for people, among them what is going to be done and how long it will take.

    Returns:
        {"run", "level", "density", "analyses": {name: {"path", "command", "reused"}}, "skipped": {name: why},
        "as_recorded": whether every network trained again repeats the run's record of it}.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such run, unknown names, settings that do not fit, a network that diverged.
    """
    if isinstance(names, str):
        raise TypeError(f"names: expected a list of analyses, got {names!r}")
    for name in names:
        if name not in RUNNERS:
            raise ValueError(f"analysis: expected any of {', '.join(RUNNERS)}, got {name!r}")
    settings = Settings() if settings is None else settings
    networks = networks_of(run, data_root)
    level = networks.level(settings.level)
    if settings.seed is not None and settings.seed not in networks.seeds:
        raise ValueError(f"seed: expected one of {networks.seeds}, got {settings.seed}")
    found = {"run": str(run), "level": level, "density": networks.density(level), "analyses": {}, "skipped": {}}
    used: list[Network] = []
    for name in names or RUNNERS:
        runner = RUNNERS[name](networks, level, settings)
        try:
            wanted = runner.networks()
        except Inapplicable as error:
            if names:
                raise
            found["skipped"][name] = str(error)
            tell(f"{name}: left out ({error})")
            continue
        told = runner.settings() | {"level": level, "tickets": networks.digest(level)}
        command = _command(run, name, settings, data_root)
        before = None if again else _reusable(run, name, told)
        if before is None:
            _train(networks, wanted, workers, name, tell)
            begin = time.perf_counter()
            with dispatch.reproducible():
                numbers = runner.numbers({**_about(networks, level), "settings": told}, tell)
            path = analysis.save(run, name, numbers, command)
            tell(f"{name}: computed in {time.perf_counter() - begin:.1f} s")
        else:
            path = Path(run) / analysis.FOLDER / f"{name}.json"
            tell(f"{name}: there already")
        used += wanted
        found["analyses"][name] = {"path": str(path), "command": command, "reused": before is not None}
    differing = networks.differences(used)
    found["as_recorded"] = differing == 0
    if differing:
        tell(
            f"note: {differing} of the networks trained again differ from the run's records (another machine, or version?)"
        )
    return found


def _reusable(run, name, told) -> dict | None:
    """Saved numbers of the same settings and tickets. A damaged file is made again."""
    try:
        saved = analysis.read(run, name)
    except ValueError:
        return None
    return saved if saved is not None and saved["numbers"].get("settings") == told else None


def _train(networks: Networks, wanted: list[Network], workers: int, name: str, tell) -> None:
    missing = networks.missing(wanted)
    if not missing:
        return
    seconds = networks.seconds(missing)
    cost = "" if seconds is None else f", about {seconds / min(workers, len(missing)):.0f} s"
    tell(f"{name}: {len(missing)} networks to train again{cost}")
    networks.train(missing, workers, lambda done, total: tell(f"{name}: [{done}/{total}] trained"))


def _about(networks: Networks, level: int) -> dict:
    return {"level": level, "density": networks.density(level), "seeds": networks.seeds, "rewind": networks.rewind}


def _command(run, name, settings: Settings, data_root) -> str:
    words = ["sparselottery", "analyze", str(run), name]
    for key, value in asdict(settings).items():
        if value != getattr(Settings(), key) and (key == "level" or name == "landscape"):
            words += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words + (["--data-root", str(data_root)] if data_root is not None else []))


# ---- one class for each: which networks it needs, what its numbers depend on, the numbers ----


class _Runner(ABC):
    def __init__(self, networks: Networks, level: int, settings: Settings):
        self.run, self.level, self.asked = networks, level, settings

    @abstractmethod
    def networks(self) -> list[Network]:
        """Those to train. Raises Inapplicable where the run has not what it takes."""

    def settings(self) -> dict:
        """What the numbers depend on besides the tickets."""
        return {}

    @abstractmethod
    def numbers(self, about: dict, tell: Callable[[str], None]) -> dict:
        """What is kept, from networks that are trained by now."""


class _WeightMotion(_Runner):
    def networks(self):
        return [Network(seed, 0) for seed in self.run.seeds]

    def numbers(self, about, tell):
        found = []
        for seed in self.run.seeds:
            before, after = self.run.initial(seed).state_dict(), self.run.load(Network(seed, 0)).state_dict()
            found.append((before, after, self.run.masks(seed, self.level)))
        return weight_motion.numbers(found, about)


class _ClassDamage(_Runner):
    def networks(self):
        if len(self.run.seeds) < 2:
            raise Inapplicable(
                f"seeds: class damage compares populations and needs at least 2 seeds, {self.run.run} has 1"
            )
        return [Network(seed, level) for seed in self.run.seeds for level in (0, self.level)]

    def numbers(self, about, tell):
        x, y = self.run.fit.trainer.data["test"]
        found = []
        for level in (0, self.level):
            outputs = [probabilities(self.run.load(Network(seed, level)), x) for seed in self.run.seeds]
            found.append(torch.stack(outputs))
        damage = class_damage.class_damage(*found, y, self.run.fit.dataset.classes)
        shown = class_damage.pictures(x, damage["exemplars"]["indices"])
        return {**about, "examples": len(y), **damage, "pictures": shown}


class _Landscape(_Runner):
    def seed(self) -> int:
        return self.run.seeds[0] if self.asked.seed is None else self.asked.seed

    def networks(self):
        return [Network(self.seed(), level) for level in (0, self.level)]

    def settings(self):
        asked = self.asked
        return {
            "seed": self.seed(),
            "examples": asked.examples,
            "resolution": asked.resolution,
            "extent": asked.extent,
            "directions": asked.directions,
        }

    def numbers(self, about, tell):
        asked = self.asked
        x, y = self.run.fit.trainer.data["train"]
        if isinstance(asked.examples, bool) or not isinstance(asked.examples, int) or asked.examples < 1:
            raise ValueError(f"examples: expected a whole number of at least 1, got {asked.examples!r}")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derived_seed("landscape examples")))
        chosen = order[: asked.examples]
        planes = {}
        for name, level in (("dense", 0), ("ticket", self.level)):
            model = self.run.load(Network(self.seed(), level))
            check_outputs(model, x[chosen[:1]], f"seed {self.seed()}, {name}")
            planes[name] = landscape.Plane(
                model, x[chosen], y[chosen], seed=asked.directions, resolution=asked.resolution, extent=asked.extent
            )
        seconds = {name: plane.cost() for name, plane in planes.items()}
        count = len(planes["dense"].coordinates)
        at_once = " and ".join(f"{plane.points.at_once} at once" for plane in planes.values())
        tell(
            f"landscape: 2 networks, {count} points each on {len(chosen)} examples ({at_once}), about "
            f"{sum(seconds.values()):.1f} s (one chunk measured)"
        )
        losses = {name: plane.losses() for name, plane in planes.items()}
        return landscape.numbers(planes, losses, {**about, "seed": self.seed(), "expected_seconds": seconds})


class _Stability(_Runner):
    def networks(self):
        if not self.run.trained:
            raise Inapplicable(f"stability: expected tickets that are trained, those of {self.run.run} are masks alone")
        return [Network(seed, level, child) for seed in self.run.seeds for level in (0, self.level) for child in (1, 2)]

    def numbers(self, about, tell):
        x, y = self.run.fit.trainer.data["test"]
        inputs = self.run.fit.trainer.data["train"][0]
        lines: dict = {"dense": [], "ticket": []}
        for name, level in (("dense", 0), ("ticket", self.level)):
            for seed in self.run.seeds:
                children = [self.run.load(Network(seed, level, child)) for child in (1, 2)]
                for number, child in enumerate(children, 1):
                    check_outputs(child, x[:1], f"seed {seed}, {name}, child {number}")
                lines[name].append(stability.line(*children, x, y, statistics=inputs))
        masks = [self.run.masks(seed, self.level) for seed in self.run.seeds]
        normalizes = any(isinstance(module, _BatchNorm) for module in children[0].modules())
        return stability.numbers(lines, masks, {**about, "batchnorm": normalizes})


RUNNERS: dict[str, type[_Runner]] = {
    "weight-motion": _WeightMotion,
    "class-damage": _ClassDamage,
    "landscape": _Landscape,
    "stability": _Stability,
}


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Softmax of a network's outputs on x [N, *]: float32 [N, classes] on the CPU."""
    model.eval()
    device = next((p.device for p in model.parameters()), x.device)
    return torch.cat([F.softmax(model(b.to(device)).float(), -1).cpu() for b in x.split(EVALUATION_BATCH)])


@torch.no_grad()
def check_outputs(model: nn.Module, x: Tensor, which: str) -> None:
    """
    Raises:
        ValueError: the outputs are not finite.
    """
    if not bool(torch.isfinite(model(x)).all()):
        raise ValueError(f"{which}: its outputs are not finite: its training has diverged")
