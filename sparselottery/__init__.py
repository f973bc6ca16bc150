"""Find lottery tickets and make them fast."""

try:
    from . import optim
    from .masks import Mask
    from .nn import (
        MaskedConv2d,
        MaskedLinear,
        PackedConv2d,
        PackedLinear,
        Resident,
        compress,
        densify,
        explain,
        from_torch_prune,
        pack,
        resident,
        sparsify,
        unpack,
    )
    from .ops.fp32_linear import allow_fp32_emulation
    from .ops.global_topk import global_topk
    from .pruning import Gradual, prune, prune_neurons, refill, regroup
    from .tickets.channels import shrink
    from .tickets.early_bird import EarlyBird
    from .tickets.early_bird_driver import early_bird
    from .tickets.imp import imp
    from .tickets.mutual_information import mutual_information
    from .tickets.one_shot import one_shot
    from .tickets.supermask_driver import supermask
    from .tickets.ticket import Ticket, TicketError
    from .training.history import History
    from .training.trainer import Trainer
except KeyboardInterrupt:  # torch takes seconds to come, and of a command a user may think better in them
    import os
    import sys

    command = os.path.basename(sys.argv[0]) if sys.argv else ""
    if command != "sparselottery" and sys.orig_argv[1:3] != ["-m", "sparselottery"]:
        raise
    print("sparselottery: interrupted", file=sys.stderr)
    raise SystemExit(130) from None

__all__ = [
    "EarlyBird",
    "Gradual",
    "History",
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedConv2d",
    "PackedLinear",
    "Resident",
    "Ticket",
    "TicketError",
    "Trainer",
    "allow_fp32_emulation",
    "compress",
    "densify",
    "early_bird",
    "explain",
    "from_torch_prune",
    "global_topk",
    "imp",
    "mutual_information",
    "one_shot",
    "optim",
    "pack",
    "prune",
    "prune_neurons",
    "refill",
    "regroup",
    "resident",
    "shrink",
    "sparsify",
    "supermask",
    "unpack",
]
