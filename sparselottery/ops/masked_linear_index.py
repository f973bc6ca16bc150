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

    def fits(self, words, shape):
        """Whether it is still the mask that this was made for."""
        return self.version == words._version and self.shape == shape

    def plan_for(self, words, weight):
        """The extension's plan, and what tells it the weight whose values it needs."""
        same = self.weight is not None and self.weight() is weight
        if not same:
            self.weight = weakref.ref(weight)
        if not words.is_contiguous():
            words = words.contiguous()
        plan = self.plan
        if plan is None or not plan.same_words(words.data_ptr()):
            plan = self.plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *self.shape)
        return plan, (weight.data_ptr(), weight.dtype is torch.bfloat16, weight._version, same)


class Memory:
    """Memory for a weight's gradient, lent out again, with what it holds, once no tensor uses it.

    Fresh pages for a large gradient cost as much as a sparse backward (64 MiB: 16384 page faults), and so do the zeros off the
    mask. What is lent is a second tensor on the memory of `base`: a count of the storage's users tells whether it is still in
    use, and its version counter is `base`'s, so that one that has not moved since a plan wrote the gradient says that the zeros
    are still there. Writes through `.data` or numpy move no counter: the plan looks at a sample of the zeros, which finds what
    changes a large part of them, though not the change of a single one.
    """

    __slots__ = ("base", "lock", "plan", "storage", "users", "version")
    SMALLEST = 2**16  # elements; below, zeros and malloc cost less than the questions asked here

    def __init__(self):
        self.base = self.plan = self.storage = None
        self.version = self.users = 0
        self.lock = threading.Lock()

    def lend(self, shape, plan):
        """A tensor, and whether it is still as `plan` left it."""
        count = math.prod(shape)
        if count < self.SMALLEST or _users is None or torch.is_inference_mode_enabled():
            return torch.empty(shape, dtype=torch.float32, device="cpu"), False
        with self.lock:
            base = self.base
            if base is None or base.shape != shape or _users(self.storage._cdata) != self.users:
                base = self.base = torch.empty(shape, dtype=torch.float32, device="cpu")
                self.storage = base.untyped_storage()
                self.users = _users(self.storage._cdata)
                self.plan = None
            same = self.plan is plan and base._version == self.version
            self.plan = None  # until it is written
            return base.detach(), same

    def written(self, gradient, plan):
        """`plan` has written `gradient`, and whoever gets it will use it as a tensor of eager torch."""
        with self.lock:
            if self.base is not None and gradient.data_ptr() == self.base.data_ptr():
                self.plan = plan
                self.version = self.base._version


_users = getattr(torch._C, "_storage_Use_Count", None)  # without it every gradient has memory of its own

INDEXES: dict[int, Index] = {}  # by id(words): an entry goes with its tensor


def index_of(words, shape):
    """What is known about `words`, the mask of a weight of `shape`; made anew where the tensor was written to."""
    known = INDEXES.get(id(words))
    if known is None or known.ref() is not words or not known.fits(words, shape):
        known = INDEXES[id(words)] = Index(words, shape)
    return known


def plan_of(words, weight, shape):
    """The extension's plan for this mask, and the arguments that name this contiguous weight, whose values it may keep."""
    known = INDEXES.get(id(words))
    if known is not None and known.ref() is words and not weight.is_inference() and known.fits(words, shape):
        return known.plan_for(words, weight)  # the usual case in fewer steps
    if words.is_inference() or weight.is_inference():  # no version counter: nothing may outlive the call
        words = words.contiguous()
        plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *shape)
        return plan, (weight.data_ptr(), weight.dtype is torch.bfloat16, 0, False)
    return index_of(words, shape).plan_for(words, weight)
