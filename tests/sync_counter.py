"""Counts what would make the host wait for a device: on CPU tensors these operations are as visible as on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}


class SyncCounter(TorchDispatchMode):
    """`names`: the operations of WAITING that ran inside the `with` block, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {func._schema.name, func.name()} & WAITING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
