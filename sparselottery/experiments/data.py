"""The data sets of the papers, read whole into memory as tensors.

| name          | examples        | shape     | pixels |
|---------------|-----------------|-----------|--------|
| digits        | 1,257 + 540     | 1, 8, 8   | grey 0..16 divided by 16; comes with scikit-learn, needs no files |
| mnist         | 60,000 + 10,000 | 1, 28, 28 | grey 0..255 divided by 255 |
| fashion-mnist | 60,000 + 10,000 | 1, 28, 28 | grey 0..255 divided by 255 |
| cifar-10      | 50,000 + 10,000 | 3, 32, 32 | divided by 255, then minus CIFAR_MEAN and divided by CIFAR_STD per channel |

The data root holds `mnist/` and `fashion-mnist/` (the four IDX files each, gzipped or not) and `cifar-10-batches-bin/` (the
binary version: data_batch_1.bin .. data_batch_5.bin, test_batch.bin).
"""

import gzip
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..training.history import check_seed

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, per channel
CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_RECORDS = 10_000  # in a file
IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801  # unsigned bytes in 3 and in 1 dimensions
ROOT_VARIABLE = "SPARSELOTTERY_DATA"


@dataclass(frozen=True)
class Dataset:
    """Images float32 [N, channels, height, width] and labels int64 [N], for training and for testing."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    licence: str
    citation: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train[0].shape[1:])

    def split(self, validation: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(train, validation): `validation` random examples of the training data held out, chosen by `seed`.

        Raises:
            TypeError, ValueError: nothing would be left to train on, or `seed` is out of range.
        """
        check_seed(seed)
        x, y = self.train
        if not 0 <= validation < len(y):
            raise ValueError(
                f"validation: expected 0 to {len(y) - 1} of {self.name}'s {len(y)} examples, got {validation}"
            )
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        held, kept = order[:validation].sort().values, order[validation:].sort().values
        return (x[kept], y[kept]), (x[held], y[held])

    def first_of_test(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` test examples, all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        x, y = self.test
        if not 0 <= count <= len(y):
            raise ValueError(f"test: expected 0 to {len(y)} of {self.name}'s test examples, got {count}")
        return (x[:count], y[:count]) if count else (x, y)


def load(name: str, root: str | os.PathLike | None = None) -> Dataset:
    """One of `DATASETS`. `root`: the data root; without it the environment variable SPARSELOTTERY_DATA names it.

    Raises:
        ValueError: unknown name, no data root, or a damaged file; FileNotFoundError: a file is missing. The message names the
            file and says what was expected.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](name, root)


def _digits(name, root) -> Dataset:
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target).long()
    test = _stratified(digits.target, 540)
    train = np.setdiff1d(np.arange(len(y)), test)
    return Dataset(
        name,
        (x[train], y[train]),
        (x[test], y[test]),
        10,
        "CC BY 4.0",
        "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (test set), UCI Machine Learning Repository, 1998",
    )


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of `count` examples, each class by its share (largest remainders first), the same on every machine."""
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    generator = np.random.RandomState(0)  # the one numpy generator whose numbers are frozen for good
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(chosen))


def _idx_pair(folder: Path, stem: str) -> tuple[Tensor, Tensor]:
    images, images_path = _idx(folder / f"{stem}-images-idx3-ubyte", IDX_IMAGES)
    labels, labels_path = _idx(folder / f"{stem}-labels-idx1-ubyte", IDX_LABELS)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: expected {len(images)} labels as {images_path.name} has images, got {len(labels)}"
        )
    if len(labels) and labels.max() > 9:
        raise ValueError(f"{labels_path}: expected labels 0 to 9, got {labels.max()}")
    return torch.from_numpy(images).float().div_(255).unsqueeze(1), torch.from_numpy(labels).long()


def _idx(path: Path, magic: int) -> tuple[np.ndarray, Path]:
    """An IDX file of unsigned bytes, `path` or `path`.gz, and which of them was read."""
    found = next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}[.gz]: no such file; expected the IDX file of {path.parent.name} there")
    content = found.read_bytes()
    try:
        content = gzip.decompress(content) if found.suffix == ".gz" else content
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{found}: expected a whole gzip file, got a damaged one ({error})") from None
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    if len(content) < header or struct.unpack_from(">I", content)[0] != magic:
        raise ValueError(
            f"{found}: expected an IDX file beginning with 0x{magic:08x}, got 0x{content[:4].hex() or '0'}"
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{found}: expected {expected} bytes for {shape[0]} entries as its header says, got {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy(), found


def _idx_dataset(name, root) -> Dataset:
    folder = _root(name, root) / name
    licence, citation = _IDX_SOURCES[name]
    return Dataset(name, _idx_pair(folder, "train"), _idx_pair(folder, "t10k"), 10, licence, citation)


def _cifar(name, root) -> Dataset:
    folder = _root(name, root) / "cifar-10-batches-bin"
    train = [_cifar_file(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    return Dataset(
        name,
        (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])),
        _cifar_file(folder / "test_batch.bin"),
        10,
        "none stated; offered for research",
        "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
    )


def _cifar_file(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a file of CIFAR-10's binary version there")
    content = np.fromfile(path, np.uint8)
    expected = CIFAR_RECORDS * CIFAR_RECORD
    if content.size != expected:
        raise ValueError(f"{path}: expected {expected} bytes ({CIFAR_RECORDS} of {CIFAR_RECORD}), got {content.size}")
    records = torch.from_numpy(content).view(CIFAR_RECORDS, CIFAR_RECORD)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(f"{path}: expected labels 0 to 9, got {labels.max().item()}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return records[:, 1:].reshape(-1, 3, 32, 32).float().div_(255).sub_(mean).div_(std), labels


def _root(name, root) -> Path:
    root = os.environ.get(ROOT_VARIABLE) if root is None else root
    if not root:
        raise ValueError(
            f"data root: expected a folder holding {_FOLDERS[name]}/ (--data-root, or {ROOT_VARIABLE}), got none"
        )
    folder = Path(root) / _FOLDERS[name]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the data root to hold {_FOLDERS[name]}/")
    return Path(root)


_FOLDERS = {"mnist": "mnist", "fashion-mnist": "fashion-mnist", "cifar-10": "cifar-10-batches-bin"}
_IDX_SOURCES = {
    "mnist": (
        "CC BY-SA 3.0",
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-based learning applied to document recognition, 1998",
    ),
    "fashion-mnist": (
        "MIT, Zalando SE",
        "H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST, arXiv 1708.07747, 2017",
    ),
}
DATASETS = {"digits": _digits, "mnist": _idx_dataset, "fashion-mnist": _idx_dataset, "cifar-10": _cifar}
