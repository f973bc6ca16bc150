"""Which weights matter to a network that need not be trained: criteria that ask gradients, at initialization or later.

    snip      |dL/dw * w|        how much the loss would change (Lee et al. 2019, arXiv 1810.02340, equation 5)
    grasp     w * (H dL/dw)      how much of the gradient's norm would be lost; H is the Hessian of L (Wang et al. 2020, arXiv
                                 2002.07376, equation 8, with the opposite sign: there the largest are removed)
    synflow   |dR/dw * w|        the flow through the weight; R is the sum of the outputs of the network with all parameters
                                 made positive, on an input of ones, so no data are looked at (Tanaka et al. 2020, arXiv
                                 2006.05467, equation 2 and algorithm 1)

SNIP divides the scores by their sum, which changes no rank. Products of many layers soon leave the range of float32, so
SynFlow computes in float64. GraSP's loss, where none is given, is the cross-entropy of the outputs divided by 200, as in its
authors' code: far from saturation, where the gradient is large. Without that it is no better than its opposite (LeNet-300-100
on digits, 10 % of the weights: 91 % test accuracy with it, 70 to 82 % without, 52 to 71 % for the smallest scores).
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask
from ..nn.convert import densify, masked_modules, sparsify

NAMES = ("snip", "grasp", "synflow")
ROUNDS = {"synflow": 100}  # in how many rounds the authors prune; the others at once
TEMPERATURE = 200  # of GraSP's cross-entropy


class Sensitivity:
    """Scores of the weights of a network under masks that only ever lose weights.

    Args:
        criterion: of `NAMES`.
        model: any network; it is copied, and left as it is. SNIP and GraSP see it as in training (BatchNorm normalizes by
            the batch), but without dropout, SynFlow as in evaluation.
        layers: names of the layers whose weights are scored.
        batch: (x `[N, *]`, y `[N]`). SynFlow looks at the shape of x alone, and takes y = None.
        loss: `loss(output, y) -> scalar`; None is cross-entropy, with grasp of the outputs divided by `TEMPERATURE`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(self, criterion: str, model: nn.Module, layers: Sequence[str], batch, loss: Callable | None = None):
        if criterion not in NAMES:
            raise ValueError(f"criterion: expected one of {', '.join(NAMES)}, got {criterion!r}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a callable (output, y) -> scalar, got {type(loss).__name__}")
        x, y = _check_batch(criterion, batch)
        if loss is None:
            loss = _tempered if criterion == "grasp" else F.cross_entropy
        self.criterion, self.loss = criterion, loss
        device = next(model.parameters()).device
        self.x, self.y = x.to(device), None if y is None else y.to(device)
        scratch = densify(copy.deepcopy(model))
        scratch.zero_grad(set_to_none=True)
        if criterion == "synflow":
            scratch = scratch.double().eval()
            with torch.no_grad():
                for parameter in scratch.parameters():
                    parameter.abs_()
            self.x = torch.ones((1, *x.shape[1:]), dtype=torch.float64, device=device)
        else:
            scratch.train()
            for module in scratch.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
        self.model = scratch
        self.weights = {name: scratch.get_submodule(name).weight for name in layers}
        for weight in self.weights.values():
            weight.requires_grad_()

    def __call__(self, masks: dict[str, Mask]) -> dict[str, Tensor]:
        """The scores of the network with these masks: {layer name: tensor of the weight's shape}, 0 at pruned weights.

        Raises:
            ValueError: a gradient that is not finite.
        """
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.masked_fill_(~masks[name].to_dense(), 0)
        weights = list(self.weights.values())
        with torch.enable_grad():
            value = self._value()
            gradients = _gradients(value, weights, create_graph=self.criterion == "grasp")
            if self.criterion == "grasp":
                gradients = _gradients(sum((g * g.detach()).sum() for g in gradients), weights)
        found = {}
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            if not bool(gradient.isfinite().all()):
                raise ValueError(
                    f"criterion: {self.criterion} found a gradient of {name or 'the model'} that is not finite; expected "
                    "finite weights, inputs and losses"
                )
            score = (gradient * weight).detach()
            found[name] = score if self.criterion == "grasp" else score.abs()
        return found

    def _value(self) -> Tensor:
        """What is differentiated: the loss, or SynFlow's flow."""
        output = self.model(self.x)
        if self.criterion == "synflow":
            if not isinstance(output, Tensor):
                raise TypeError(f"model: expected it to return a tensor for synflow, got {type(output).__name__}")
            return output.sum()
        value = self.loss(output, self.y)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise TypeError(f"loss: expected it to return a scalar tensor, got {type(value).__name__}")
        return value


def _tempered(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output / TEMPERATURE, y)


def _gradients(value, weights, create_graph=False) -> list[Tensor]:
    """What `value` does not depend on has a gradient of 0."""
    if not value.requires_grad:
        return [torch.zeros_like(w) for w in weights]
    found = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def sensitivity_scores(criterion: str, model: nn.Module, batch, *, loss: Callable | None = None) -> dict[str, Tensor]:
    """The scores of a network's weights, as `sl.prune(criterion=...)` would rank them in its first round.

    Args: those of `Sensitivity`. `model` may have masked layers or plain ones and is left as it is.

    Returns:
        {layer name: scores of the weight's shape}; the largest matter most. float64 for "synflow", else the weight's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; a gradient is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    with warnings.catch_warnings():  # about layers that cannot be masked, of a copy that nobody sees
        warnings.simplefilter("ignore")
        masked = sparsify(copy.deepcopy(model))
    masks = {name: layer.mask for name, layer in masked_modules(masked)}
    if not masks:
        raise ValueError("model: expected a linear or convolutional layer, found none")
    return Sensitivity(criterion, masked, tuple(masks), batch, loss)(masks)


def _check_batch(criterion, batch) -> tuple[Tensor, Tensor | None]:
    expected = "(x, y), tensors of examples [N, *] and labels [N]"
    if batch is None:
        raise ValueError(
            f"batch: expected {expected}, which criterion {criterion!r} puts through the network, got None"
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise TypeError(f"batch: expected {expected}, got {type(batch).__name__}")
    x, y = batch
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"batch: expected at least one example, got x {list(x.shape)}")
    if criterion == "synflow":
        if not x.is_floating_point():
            raise TypeError(
                f"batch: expected floating-point x for synflow, which puts ones in their place, got {x.dtype}"
            )
        return x, None
    if not isinstance(y, Tensor):
        raise TypeError(f"batch: expected {expected}, got a y of {type(y).__name__}")
    if len(y) != len(x):
        raise ValueError(f"batch: expected as many labels as examples, got {len(y)} and {len(x)}")
    return x, y
