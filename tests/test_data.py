"""Loading the data sets, and what is said about damaged ones."""

import gzip
import os
import struct
import warnings

import numpy as np
import pytest
import torch

from sparselottery.experiments import data


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A data root with a tiny MNIST: training files gzipped, test files not."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for stem, count in (("train", 7), ("t10k", 3)):
        images = generator.integers(0, 256, (count, 28, 28))
        images[0, 0, 0] = 255
        labels = np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            if stem == "train":
                (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{stem}-{kind}-ubyte").write_bytes(content)
    return tmp_path


def test_digits_are_split_the_same_way_everywhere():
    digits = data.load("digits")
    assert digits.train[0].shape == (1257, 1, 8, 8) and digits.test[0].shape == (540, 1, 8, 8)
    assert digits.train[0].dtype == torch.float32 and digits.train[1].dtype == torch.int64
    assert digits.train[0].min() == 0 and digits.train[0].max() == 1
    assert digits.test[1].bincount().tolist() == [54, 55, 53, 55, 54, 55, 54, 54, 52, 54]
    assert digits.test[1][:12].tolist() == [
        3,
        5,
        7,
        3,
        6,
        9,
        2,
        6,
        5,
        0,
        8,
        7,
    ]  # frozen: results elsewhere depend on it
    together = torch.cat([digits.train[0], digits.test[0]]).flatten(1)
    assert len(together.unique(dim=0)) == 1797  # nothing is in both


def test_split_holds_out_by_seed():
    digits = data.load("digits")
    train, validation = digits.split(200, seed=1)
    again, other = digits.split(200, seed=1)[1], digits.split(200, seed=2)[1]
    assert len(train[0]) == len(train[1]) == 1057 and len(validation[0]) == 200
    assert torch.equal(validation[0], again[0]) and not torch.equal(validation[0], other[0])
    assert len(torch.cat([train[0], validation[0]]).flatten(1).unique(dim=0)) == 1257
    with pytest.raises(ValueError, match=r"validation: expected 0 to 1256 .* got 1257"):
        digits.split(1257)


def test_idx_files_gzipped_or_not(mnist):
    loaded = data.load("mnist", mnist)
    assert loaded.train[0].shape == (7, 1, 28, 28) and loaded.test[0].shape == (3, 1, 28, 28)
    assert loaded.train[0].max() == 1 and loaded.train[1].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_data_root_from_the_environment(mnist, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_DATA", str(mnist))
    assert len(data.load("mnist").train[1]) == 7
    monkeypatch.delenv("SPARSELOTTERY_DATA")
    with pytest.raises(ValueError, match="data root: expected a folder holding mnist/"):
        data.load("mnist")


def truncate(content):
    return content[:-9]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("train-images-idx3-ubyte.gz", truncate, "expected a whole gzip file"),
        ("train-images-idx3-ubyte.gz", flip, "expected a whole gzip file"),  # found by the CRC or before it
        ("train-images-idx3-ubyte.gz", lambda _: b"no gzip at all", "expected a whole gzip file"),
        ("t10k-images-idx3-ubyte", truncate, "expected 2368 bytes for 3 entries"),
        ("t10k-images-idx3-ubyte", lambda c: c + b"\0", "expected 2368 bytes for 3 entries"),
        ("t10k-images-idx3-ubyte", lambda c: b"\0\0\x08\x01" + c[4:], "beginning with 0x00000803"),
        ("t10k-images-idx3-ubyte", lambda _: b"", "beginning with 0x00000803"),
        (
            "t10k-labels-idx1-ubyte",
            lambda _: idx(np.arange(4)),
            "expected 3 labels as t10k-images-idx3-ubyte has images, got 4",
        ),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.array([1, 2, 77])), "expected labels 0 to 9, got 77"),
    ],
)
def test_damaged_idx_file_is_named(mnist, name, damage, message):
    path = mnist / "mnist" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("mnist", mnist)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged(mnist, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*train-images-idx3-ubyte.gz'"):
        data.load("mnist", mnist)


def test_missing_idx_file_is_named(mnist):
    path = mnist / "mnist" / "t10k-labels-idx1-ubyte"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file; expected the IDX file") as caught:
        data.load("mnist", mnist)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="expected the data root to hold fashion-mnist/"):
        data.load("fashion-mnist", mnist)


def test_unknown_data_set():
    with pytest.raises(
        ValueError, match="data: expected one of digits, mnist, fashion-mnist, cifar-10, got 'imagenet'"
    ):
        data.load("imagenet")


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        records.tofile(folder / f"{name}.bin")
    return tmp_path


def test_cifar(cifar):
    loaded = data.load("cifar-10", cifar)
    assert loaded.train[0].shape == (50_000, 3, 32, 32) and loaded.test[0].shape == (10_000, 3, 32, 32)
    raw = np.fromfile(cifar / "cifar-10-batches-bin" / "test_batch.bin", np.uint8)
    third_pixel_of_green = (raw[3073 + 1 + 1024 + 2] / 255 - 0.4822) / 0.2435
    assert loaded.test[0][1, 1, 0, 2].item() == pytest.approx(third_pixel_of_green, abs=1e-6)
    assert loaded.test[1][:3].tolist() == [0, 1, 2]


def test_damaged_cifar_file_is_named(cifar):
    path = cifar / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected 30730000 bytes") as caught:
        data.load("cifar-10", cifar)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff" + content[1:])
    with pytest.raises(ValueError, match="expected labels 0 to 9, got 255"):
        data.load("cifar-10", cifar)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="expected a file of CIFAR-10's binary version"):
        data.load("cifar-10", cifar)


REAL = {
    "mnist": (60_000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    "fashion-mnist": (60_000, [6000] * 10),
    "cifar-10": (50_000, [5000] * 10),
}


def test_the_real_files():
    """Every real data set found under SPARSELOTTERY_DATA is what was published."""
    root = os.environ.get("SPARSELOTTERY_DATA")
    if not root:
        warnings.warn("SPARSELOTTERY_DATA is unset: only made-up data sets were read", stacklevel=1)
        return
    read = 0
    for name, (count, classes) in REAL.items():
        if os.path.isdir(os.path.join(root, data._FOLDERS[name])):
            loaded = data.load(name, root)
            assert len(loaded.train[1]) == count and len(loaded.test[1]) == 10_000
            assert loaded.train[1].bincount().tolist() == classes
            read += 1
    assert read, f"SPARSELOTTERY_DATA={root} holds none of {sorted(REAL)}"


@pytest.mark.skipif(
    not os.environ.get("SPARSELOTTERY_DATA"), reason="SPARSELOTTERY_DATA is not set: no MNIST, no CIFAR-10"
)
@pytest.mark.parametrize(
    "name, shape, train, test",
    [
        ("mnist", (1, 28, 28), 60000, 10000),
        ("fashion-mnist", (1, 28, 28), 60000, 10000),
        ("cifar-10", (3, 32, 32), 50000, 10000),
    ],
)
def test_the_published_files_load(name, shape, train, test):
    found = data.load(name, os.environ["SPARSELOTTERY_DATA"])
    assert found.input_shape == shape and found.classes == 10
    for (x, y), count in ((found.train, train), (found.test, test)):
        assert x.shape == (count, *shape) and x.isfinite().all() and y.shape == (count,)
        assert y.bincount().numel() == 10 and y.bincount().min() > 0.08 * count, "every class is there"
    assert abs(float(found.train[0].mean())) < 1.5 and 0.1 < float(found.train[0].std()) < 2
