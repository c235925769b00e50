"""Data sets: shapes, ranges, the fixed split, and one clear sentence for everything that can go wrong."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_node_fast import data, training

FOLDERS = {"mnist": "MNIST/raw", "fashionmnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}


def write_idx(root: Path, n_train: int = 3, n_test: int = 2) -> None:
    """A tiny MNIST in the published format: pixel value = number of the image, label = number of the image."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = b"".join(bytes([50 * i]) * 28 * 28 for i in range(n))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(range(n)))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)


def test_digits_are_whole_scaled_and_split_alike_every_time() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert first.test_images.shape == (360, 1, 8, 8)
    assert first.train_images.dtype == torch.float32
    assert first.train_labels.dtype == torch.int64
    assert first.train_images.min() == 0.0
    assert first.train_images.max() == 1.0
    counts = torch.bincount(first.test_labels, minlength=10)
    assert counts.sum() == 360
    assert counts.min() >= 34
    assert counts.max() <= 37
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    together = torch.cat([first.train_images, first.test_images]).sum()
    from sklearn.datasets import load_digits

    assert float(together) == pytest.approx(load_digits().data.sum() / 16.0)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name='imagenet' is unknown, expected one of 'digits'"):
        data.load("imagenet")


def test_points_in_the_plane() -> None:
    for name, classes in data.PLANE.items():
        dataset = data.load(name)
        assert (dataset.train_images.shape, dataset.test_images.shape) == ((512, 2), (1000, 2))
        assert dataset.train_labels.unique().tolist() == list(range(classes)) == list(range(data.num_classes(name)))
        assert dataset.train_images.std() == pytest.approx(1.0, abs=0.02)
        assert torch.equal(dataset.train_images, data.points(name, 512, seed=0)[0])
        assert not torch.equal(dataset.train_images, data.points(name, 512, seed=1)[0])


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        content = {"data": images, "fine_labels": [0, 99, 5, 7, 1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))


def write_svhn(root: Path) -> None:
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [3], [9], [10]])})


@pytest.mark.parametrize(("name", "write"), [("cifar100", write_cifar100), ("svhn", write_svhn)])
def test_a_zubov_net_trains_on_stubs_of_the_files_format(
    name: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    write(tmp_path)
    for source in (datasets.CIFAR100, datasets.SVHN):  # the stub's checksums are its own
        monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    dataset = data.load(name, tmp_path)
    assert dataset.train_images.shape[1:] == (3, 32, 32)
    assert (dataset.train_images.dtype, dataset.test_images.dtype) == (torch.uint8, torch.float32)
    assert 0.0 <= dataset.test_images.min() < dataset.test_images.max() <= 1.0
    assert dataset.train_labels.tolist()[:2] == ([0, 99] if name == "cifar100" else [0, 1])
    config = training.TrainConfig.recipe(name, "zubov", steps=2, batch_size=4)
    training.prepare(config, tmp_path / "run")
    assert training.fit(tmp_path / "run", dataset).steps == 2


def test_mnist_files_are_read_without_download(tmp_path: Path, no_network: None) -> None:
    write_idx(tmp_path)
    loaded = data.load("mnist", tmp_path)
    assert loaded.train_images.shape == (3, 1, 28, 28)
    assert loaded.test_images.shape == (2, 1, 28, 28)
    assert loaded.train_labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(loaded.train_images[:, 0, 5, 7], torch.tensor([0.0, 50 / 255, 100 / 255]))


def test_root_is_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    write_idx(tmp_path / "environment", n_train=2)
    write_idx(tmp_path / "argument", n_train=3)
    monkeypatch.setenv("RNF_DATA_ROOT", str(tmp_path / "environment"))
    assert len(data.load("mnist").train_labels) == 2
    assert len(data.load("mnist", tmp_path / "argument").train_labels) == 3


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "cifar10"])
def test_missing_files_without_network(name: str, tmp_path: Path, no_network: None) -> None:
    with pytest.raises(data.DataError) as error:
        data.load(name, tmp_path / "nowhere")
    assert str(error.value).startswith(f"{name} can be neither read from nor downloaded to {tmp_path / 'nowhere'}")
    assert "RNF_DATA_ROOT" in str(error.value)
    assert "\n" not in str(error.value)


def test_root_that_cannot_be_made(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(data.DataError, match=r"mnist can be neither read from nor downloaded to .*file/below"):
        data.load("mnist", tmp_path / "file" / "below")


@pytest.mark.parametrize("broken", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_truncated_files(broken: str, tmp_path: Path, no_network: None) -> None:
    write_idx(tmp_path)
    path = tmp_path / "MNIST" / "raw" / broken
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="mnist can be neither read") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value)


def test_images_and_labels_that_do_not_belong_together(tmp_path: Path, no_network: None) -> None:
    write_idx(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(data.DataError, match="3 images but 2 labels"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("length", [-1, None])
def test_cifar_files_that_are_truncated_or_corrupt(
    length: int | None, tmp_path: Path, no_network: None, data_root: Path
) -> None:
    whole = data_root / FOLDERS["cifar10"]
    if not whole.is_dir():
        pytest.skip("cifar-10-batches-py is not in the folder with the real data")
    folder = tmp_path / FOLDERS["cifar10"]
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    broken = folder / "data_batch_3"
    content = bytearray(broken.read_bytes())
    content[1_000_000] ^= 1
    broken.unlink()
    broken.write_bytes(content[:length])
    with pytest.raises(data.DataError, match="cifar10 can be neither read from nor downloaded to") as error:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "n_train"),
    [("mnist", (1, 28, 28), 60_000), ("fashionmnist", (1, 28, 28), 60_000), ("cifar10", (3, 32, 32), 50_000)],
)
def test_real_data(name: str, shape: tuple[int, ...], n_train: int, no_network: None, data_root: Path) -> None:
    if not (data_root / FOLDERS[name]).is_dir():
        pytest.skip(f"{FOLDERS[name]} is not in the folder with the real data")
    loaded = data.load(name, data_root)
    assert loaded.train_images.shape == (n_train, *shape)
    assert loaded.test_images.shape == (10_000, *shape)
    assert loaded.train_images.dtype == (torch.uint8 if name == "cifar10" else torch.float32)
    for images in (data.to_float(loaded.train_images), loaded.test_images):
        assert images.dtype == torch.float32
        assert images.min() == 0.0
        assert images.max() == 1.0
    assert torch.equal(loaded.test_labels.unique(), torch.arange(10))
    if name == "cifar10":  # published channel means: the axes are where they should be
        means = data.to_float(loaded.train_images).mean((0, 2, 3))
        torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-4, rtol=0)
    if name == "mnist":
        assert float(loaded.train_images.mean()) == pytest.approx(0.1307, abs=1e-4)
