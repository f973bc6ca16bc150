"""Which cases there are. What a case runs: setups.py, found by the name of its op."""

import dataclasses

OPS = ("topk", "linear", "conv", "step", "optim", "bitmask", "packed", "replicas", "resident")
CPU_ONLY = ("resident",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark before anything is allocated.

    Attributes:
        op: one of OPS.
        sizes: what setups.py needs: linear (in, out); conv (cin, cout, kernel, height); topk and optim the lengths of
            the tensors; step the widths of the layers; bitmask and packed (what, rows, columns); replicas (how many,
            steps, side of the images); resident ("mlp", widths...) or ("conv", layers, channels, kernel, side).
        density: fraction of the weights that is kept.
        batch: rows or images per call; 0 where there is none.
        dtype: a torch dtype's name.
        direction: "forward", "forward+backward" or "" where there is only one.
        device: "cpu" or "cuda".
        quick: part of the short run.
        structure: "" for survivors at random places; "block:RxC" and "N:M" as `prune` takes them (linear, conv); "CUDA
            graph" for a step that is captured and replayed.
    """

    op: str
    sizes: tuple
    density: float
    batch: int = 0
    dtype: str = "float32"
    direction: str = ""
    device: str = "cpu"
    quick: bool = False
    structure: str = ""

    @property
    def name(self) -> str:
        """Without the density, which has a column of its own."""
        if self.op == "linear":
            text = "{}x{}".format(*self.sizes)
        elif self.op == "conv":
            text = "{0}->{1} {2}x{2} on {3}x{3}".format(*self.sizes)
        elif self.op == "step":
            text = "MLP " + "-".join(map(str, self.sizes))
        elif self.op in ("bitmask", "packed"):
            text = "{} {}x{}".format(*self.sizes)
        elif self.op == "resident" and self.sizes[0] == "mlp":
            text = "MLP " + "-".join(map(str, self.sizes[1:]))
        elif self.op == "resident":
            text = "{0} conv {1}->{1} {2}x{2} on {3}x{3}".format(*self.sizes[1:])
        elif self.op == "replicas":
            text = "{0} LeNet-300-100, {1} steps, {2}x{2}".format(*self.sizes)
        else:
            text = f"{sum(self.sizes):,} weights in {len(self.sizes)} tensor{'s' if len(self.sizes) > 1 else ''}"
        text += f" {self.structure}" if self.structure else ""
        text += f" batch {self.batch}" if self.batch else ""
        text += f" {self.dtype}" if self.dtype != "float32" else ""
        return text + (f" {self.direction}" if self.direction else "")

    def prepare(self, seed: int = 0):
        """Allocates the inputs from `seed` and returns a setups_common.Work."""
        from sparselottery.bench import setups

        return setups.SETUPS[self.op](self, seed)


BOTH = "forward+backward"
GRID = (0.5, 0.2, 0.1, 0.05, 0.02)
LENET = (784 * 300, 300, 300 * 100, 100, 100 * 10, 10)


def cpu_cases() -> list[Case]:
    """The shapes of small research networks and of single large layers, fp32."""
    cases = []
    for sizes, quick in [((1_000_000,), True), ((25_000_000,), False), ((25_000,) * 1000, False)]:
        cases.append(Case("topk", sizes, 0.2, quick=quick))
    cases.append(Case("topk", (1_000_000,), 0.2, dtype="bfloat16"))
    for sizes, batches in [((784, 300), (1, 16, 60)), ((1024, 1024), (1, 16, 128))]:
        for batch in batches:
            for density in GRID:
                for direction in ("forward", BOTH):
                    quick = batch > 16 and density in (0.1, 0.02)
                    cases.append(Case("linear", sizes, density, batch, direction=direction, quick=quick))
    cases += [Case("linear", (4096, 4096), 0.1, 128, direction=direction) for direction in ("forward", BOTH)]
    cases += [Case("linear", (4096, 4096), d, 1, direction="forward", quick=d == 0.1) for d in (0.5, 0.2, 0.1, 0.02)]
    cases += [Case("linear", (1024, 1024), d, 128, "bfloat16", BOTH) for d in (0.2, 0.1, 0.02)]
    for sizes, batch in [((64, 64, 3, 32), 60), ((128, 128, 3, 16), 60), ((32, 32, 3, 16), 128)]:
        for density in (0.5, 0.2, 0.1, 0.02):
            for direction in ("forward", BOTH):
                quick = sizes[0] == 32 and direction == BOTH and density < 0.2
                cases.append(Case("conv", sizes, density, batch, direction=direction, quick=quick))
    for density in (*GRID, 0.01):
        cases.append(Case("step", (784, 300, 100, 10), density, 60, quick=density in (0.2, 0.02)))
    for density in (0.2, 0.1, 0.05, 0.02):
        cases.append(Case("optim", LENET, density, quick=density in (0.2, 0.02)))
    cases += [Case("optim", (4_000_000,) * 4, density) for density in (0.2, 0.1, 0.02)]
    cases.append(Case("replicas", (8, 50, 8), 0.2, 60))
    cases += [Case("replicas", (4, 10, 8), 0.2, 60, quick=True)]
    lenet = ("mlp", 784, 300, 100, 10)
    for density in (0.1, 0.05):
        cases += [Case("resident", lenet, density, batch, direction="forward", quick=batch == 60) for batch in (60, 1)]
    for density in (0.1, 0.02):
        cases.append(Case("resident", lenet, density, 60, direction=BOTH, quick=density == 0.1))
        cases.append(Case("resident", ("mlp", 1024, 1024), density, 128, direction=BOTH))
        for layers, channels, side in [(1, 64, 32), (3, 64, 32), (1, 128, 16), (3, 128, 16)]:
            cases.append(Case("resident", ("conv", layers, channels, 3, side), density, 60, direction=BOTH))
    for what in ("pack", "unpack", "count", "hamming", "apply"):
        cases.append(Case("bitmask", (what, 4096, 4096), 0.1, quick=True))
    for what in ("expand", "gather"):
        cases += [Case("packed", (what, 4096, 4096), density, quick=density == 0.1) for density in (0.5, 0.1, 0.02)]
    for density in (0.2, 0.1, 0.02):
        cases.append(Case("packed", ("layer", 1024, 1024), density, 128, direction=BOTH, quick=density == 0.1))
    return cases


def cuda_cases() -> list[Case]:
    """Every regime of a large GPU: decode, training, fp32, convolutions, thresholds over 1e8 weights, optimizers."""
    cases = [
        Case("topk", (100_000_000,), 0.2, quick=True),
        Case("topk", (100_000_000,), 0.2, dtype="bfloat16"),
        Case("topk", (25_000,) * 1000, 0.2),
        Case("topk", (1_000_000_000,), 0.1),
    ]
    for density in (0.5, 0.2, 0.1, 0.05, 0.02):
        for batch in (1, 16, 128):
            quick = batch == 1 and density == 0.1
            cases.append(Case("linear", (4096, 4096), density, batch, "bfloat16", "forward", quick=quick))
    cases += [Case("linear", (4096, 4096), 0.2, batch, "bfloat16", "forward") for batch in (4, 8, 32, 64)]
    cases += [Case("linear", (4096, 14336), density, 1, "float16", "forward") for density in (0.3, 0.1)]
    for density in (0.1, 0.05, 0.02):
        cases.append(Case("linear", (4096, 4096), density, 4096, "bfloat16", BOTH, quick=density == 0.1))
        cases.append(Case("linear", (4096, 4096), density, 4096, "float32", BOTH))
        cases.append(Case("conv", (256, 256, 3, 28), density, 128, "bfloat16", BOTH, quick=density == 0.1))
        cases.append(Case("optim", (25_000_000,) * 4, density, quick=density == 0.1))
        cases.append(Case("optim", (25_000_000,) * 4, density, dtype="bfloat16"))
        cases.append(Case("step", (784, 300, 100, 10), density, 60, quick=density == 0.1))
    cases += [Case("optim", (25_000_000,) * 4, density) for density in (0.5, 0.2)]
    cases += [Case("step", (4096,) * 4, density, 4096, "bfloat16") for density in (0.5, 0.2, 0.1)]
    cases.append(Case("step", (784, 300, 100, 10), 0.2, 60, structure="CUDA graph"))
    cases += [Case("replicas", (count, 100, 28), 0.2, 60, quick=count == 20) for count in (5, 20)]
    for side in (16, 32, 64, 128):
        for density in (0.3, 0.1, 0.05):
            for direction in ("forward", BOTH):
                quick = side == 64 and density == 0.1 and direction == BOTH
                structure = f"block:{side}x{side}"
                cases.append(
                    Case("linear", (4096, 4096), density, 4096, "bfloat16", direction, quick=quick, structure=structure)
                )
        cases.append(Case("linear", (4096, 4096), 0.1, 16, "bfloat16", "forward", structure=f"block:{side}x{side}"))
        cases.append(Case("conv", (256, 256, 3, 28), 0.1, 128, "bfloat16", BOTH, structure=f"block:{side}x{side}"))
    for batch in (128, 4096):
        cases.append(
            Case("linear", (4096, 4096), 0.5, batch, "bfloat16", "forward", quick=batch > 128, structure="2:4")
        )
    for what in ("pack", "unpack", "count", "hamming", "apply"):
        cases.append(Case("bitmask", (what, 8192, 8192), 0.1, quick=what == "apply"))
    for dtype in ("float32", "bfloat16"):
        for what in ("expand", "gather"):
            cases.append(Case("packed", (what, 8192, 8192), 0.1, dtype=dtype, quick=dtype == "float32"))
        cases.append(Case("packed", ("layer", 4096, 4096), 0.1, 4096, dtype, BOTH, quick=dtype == "bfloat16"))
    return [dataclasses.replace(case, device="cuda") for case in sorted(cases, key=urgency)]


# What is to be learnt first on a GPU, in this order: the bandwidth of the pass that selects; the masked optimizer at 90, 95
# and 98 %; decode; float32 through bf16x6 beside the library's; blocks of 64; the tensor cores at high sparsity; a whole step.
FIRST = (
    lambda c: c.op == "topk" and c.sizes == (100_000_000,),
    lambda c: c.op == "optim" and c.density <= 0.1 and c.dtype == "float32",
    lambda c: c.op == "linear" and c.batch == 1 and c.density <= 0.1 and c.dtype == "bfloat16",
    lambda c: c.op == "linear" and c.dtype == "float32" and c.density == 0.1,
    lambda c: c.op == "linear" and c.structure == "block:64x64" and c.batch > 16,
    lambda c: c.op == "linear" and not c.structure and c.batch == 4096 and c.dtype == "bfloat16",
    lambda c: c.op == "step" and c.dtype == "bfloat16",
)


def urgency(case: Case) -> int:
    """The place of a case of a GPU among FIRST; len(FIRST) for the short run's others, one more for the rest."""
    place = next((i for i, asked in enumerate(FIRST) if asked(case)), len(FIRST))
    return place if place < len(FIRST) else place + (not case.quick)


def small_cases() -> list[Case]:
    """One tiny case of everything, with odd sizes: for tests, and for checkers under which all is slow."""
    cases = [
        Case("topk", (700, 300), 0.2),
        Case("linear", (70, 33), 0.1, 5, direction=BOTH),
        Case("linear", (70, 33), 0.1, 5, direction="forward"),
        Case("linear", (200, 70), 0.3, 3, "bfloat16", "forward"),
        Case("linear", (1200, 40), 0.1, 20, "float16", "forward"),
        Case("conv", (5, 7, 3, 8), 0.2, 3, direction=BOTH),
        Case("step", (20, 15, 10), 0.2, 6),
        Case("step", (40, 40, 40), 0.5, 16, "bfloat16"),
        Case("replicas", (2, 2, 8), 0.2, 5),
        Case("optim", (1500, 3), 0.1),
        Case("optim", (1500, 3), 0.1, dtype="bfloat16"),
        Case("linear", (150, 140), 0.3, 70, direction=BOTH, structure="block:16x16"),
        Case("linear", (150, 140), 0.3, 5, direction="forward", structure="block:64x64"),
        Case("linear", (128, 64), 0.5, 16, direction="forward", structure="2:4"),
        Case("conv", (70, 66, 3, 6), 0.3, 2, direction=BOTH, structure="block:32x32"),
    ]
    cases += [Case("packed", (what, 6, 70), 0.3) for what in ("expand", "gather")]
    cases.append(Case("packed", ("layer", 6, 70), 0.3, 5, direction=BOTH))
    cases += [Case("resident", ("conv", 2, 5, 3, 6), 0.3, 3, direction=d) for d in ("forward", BOTH)]
    cases += [Case("resident", ("mlp", 20, 15, 10), 0.2, 6, direction=d) for d in ("forward", BOTH)]
    return cases + [Case("bitmask", (what, 6, 64), 0.3) for what in ("pack", "unpack", "count", "hamming", "apply")]


def select(ops=(), *, device: str = "cpu", full: bool = False, match: str = "") -> list[Case]:
    """The cases of `ops` (all where empty) on a device whose names contain `match`; without `full` only the short run's.

    Raises:
        ValueError: an op or a device that is not known.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {unknown[0]!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    cases = cpu_cases() if device == "cpu" else cuda_cases()
    chosen = [case for case in cases if (not ops or case.op in ops) and (full or case.quick)]
    return [case for case in chosen if match in case.name]
