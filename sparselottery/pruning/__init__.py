"""Which weights survive: criteria (scores), structures (what is pruned at once), scope (who competes), and prune."""

from ..nn.convert import masked_modules
from .criteria import NAMES as CRITERIA
from .neurons import NeuronReport, prune_neurons
from .prune import LayerReport, PruneReport, prune
from .regroup import StructureReport, refill, regroup
from .schedules import Gradual, rate_for, round_densities
from .sensitivity import sensitivity_scores

__all__ = [
    "CRITERIA",
    "Gradual",
    "LayerReport",
    "NeuronReport",
    "PruneReport",
    "StructureReport",
    "masked_modules",
    "prune",
    "prune_neurons",
    "rate_for",
    "refill",
    "regroup",
    "round_densities",
    "sensitivity_scores",
]
