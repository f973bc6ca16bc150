"""What masked_linear's cpu backend keeps between calls: an index of the survivors per mask, and memory for dW."""

import math
import threading
import weakref

import torch

from .. import _ext
from . import bitmask, dispatch


class Index:
    """What is known about one words tensor: its density and, once the cpu backend has run, the survivors' index.

    The index holds the surviving weights' values too, gathered again when the weight is another tensor or its version counter
    moved. Writes through `.data` move no counter: a sample of words and values is compared on each call, which finds an
    optimizer that works that way (it changes nearly everything), though not the change of a single element.
    """

    __slots__ = ("bucket", "gradient", "plan", "ref", "shape", "version", "weight")

    def __init__(self, words, shape):
        key = id(words)
        self.ref = weakref.ref(words, lambda _: INDEXES.pop(key, None))
        self.version = words._version
        self.shape = shape
        total = shape[0] * shape[1]
        self.bucket = dispatch.density_bucket(bitmask.count(words) / total) if total else 0
        self.plan = None
        self.weight = None
        self.gradient = Memory()

    def plan_for(self, words, weight):
        """The extension's plan, and what tells it the weight whose values it needs."""
        words = words.contiguous()
        same = self.weight is not None and self.weight() is weight
        if not same:
            self.weight = weakref.ref(weight)
        if self.plan is None or not self.plan.same_words(words.data_ptr()):
            self.plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *self.shape)
        return self.plan, (weight.data_ptr(), weight.dtype is torch.bfloat16, weight._version, same)


class Memory:
    """Memory for a weight's gradient, lent out again, with what it holds, once no tensor uses it.

    Fresh pages for a large gradient cost as much as a sparse backward (64 MiB: 16384 page faults), and so do the zeros off the
    mask. Whether the memory is still in use is told by the array that torch's storage keeps alive. `counter` shares the version
    counter, but not the storage, of the tensor that was lent: where it has not moved since a plan wrote the gradient, the zeros
    are still there. Writes through `.data` or numpy move no counter: the plan looks at a sample of the zeros, which finds what
    changes a large part of them, though not the change of a single one.
    """

    __slots__ = ("base", "counter", "lease", "lock", "plan", "version")
    SMALLEST = 2**16  # elements; below, zeros and malloc cost less than the questions asked here

    def __init__(self):
        self.base = self.counter = self.lease = self.plan = None
        self.version = 0
        self.lock = threading.Lock()

    def lend(self, shape, plan):
        """A tensor, and whether it is still as `plan` left it."""
        count = math.prod(shape)
        if count < self.SMALLEST or torch.is_inference_mode_enabled():
            return torch.empty(shape, dtype=torch.float32, device="cpu"), False
        with self.lock:
            if self.base is None or self.lease() is not None:
                import numpy  # here: on a GPU nobody needs it

                raw = numpy.empty(count + 16, numpy.float32)
                start = -raw.ctypes.data // 4 % 16  # on a cache line
                self.base = raw[start : start + count]
                self.plan = None
            same = self.plan is plan and self.counter._version == self.version
            self.plan = None  # until it is written
            view = self.base.reshape(shape)
            self.lease = weakref.ref(view)
            return torch.from_numpy(view), same

    def written(self, gradient, plan):
        """`plan` has written `gradient`, and whoever gets it will use it as a tensor of eager torch."""
        with self.lock:
            if self.base is not None and gradient.data_ptr() == self.base.ctypes.data:
                self.plan = plan
                self.counter = gradient.detach()
                self.counter.data = torch.empty(0)  # lets the storage go, keeps the counter
                self.version = self.counter._version


INDEXES: dict[int, Index] = {}  # by id(words): an entry goes with its tensor


def index_of(words, shape):
    """What is known about `words`, the mask of a weight of `shape`; made anew where the tensor was written to."""
    known = INDEXES.get(id(words))
    if known is None or known.ref() is not words or known.version != words._version or known.shape != shape:
        known = INDEXES[id(words)] = Index(words, shape)
    return known


def plan_of(words, weight, shape):
    """The extension's plan for this mask, and the arguments that name this contiguous weight, whose values it may keep."""
    if words.is_inference() or weight.is_inference():  # no version counter: nothing may outlive the call
        words = words.contiguous()
        plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *shape)
        return plan, (weight.data_ptr(), weight.dtype is torch.bfloat16, 0, False)
    return index_of(words, shape).plan_for(words, weight)
