"""Which weights survive: criteria (scores), structures (what is pruned at once), scope (who competes), and prune."""

from ..nn.convert import masked_modules
from .neurons import NeuronReport, prune_neurons
from .prune import LayerReport, PruneReport, prune

__all__ = ["LayerReport", "NeuronReport", "PruneReport", "masked_modules", "prune", "prune_neurons"]
