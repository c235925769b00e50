"""The data sets of training and evaluation, whole in memory: images in [0, 1], not normalised, int64 labels.

Images are float32, but for training images in colour: these stay bytes, a quarter of 600 MB, until ``to_float``.
``digits`` comes with scikit-learn and needs no network; the others are read, and where they are missing downloaded, by
torchvision. Points in the plane, for Zubov-Nets whose regions are to be drawn, are scikit-learn's too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["IMAGES", "NAMES", "PLANE", "DataError", "Dataset", "check", "load", "num_classes", "points", "to_float"]

# Name -> (channels, image size).
IMAGES = {
    "digits": (1, 8),
    "mnist": (1, 28),
    "fashionmnist": (1, 28),
    "cifar10": (3, 32),
    "cifar100": (3, 32),
    "svhn": (3, 32),
}
# Points in the plane: name -> number of classes.
PLANE = {"moons": 2, "rings": 2, "blobs": 2, "blobs3": 3}
NAMES = (*IMAGES, *PLANE)
_TORCHVISION = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
_DEFAULT_ROOT = Path("~/.cache/robust_node_fast")


class DataError(RuntimeError):
    """A data set cannot be had; the message is one sentence that says why."""


@dataclass(frozen=True)
class Dataset:
    """Images ``(n, channels, size, size)`` float32 in [0, 1] and labels ``(n,)`` int64, to train and to test with.

    Training images may be uint8 instead: ``to_float`` of a batch of them is what a network takes. Of ``PLANE`` the
    "images" are points ``(n, 2)``.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; others as they are."""
    return images.float().div_(255.0) if images.dtype == torch.uint8 else images


def num_classes(name: str) -> int:
    """Of a data set of ``NAMES``."""
    return PLANE.get(name, 100 if name == "cifar100" else 10)


def check(dataset: Dataset) -> None:
    """Of a data set that did not come from ``load``.

    Raises:
        TypeError: labels are not int64, or images neither float32 nor, to train with, uint8.
        ValueError: no images, more or fewer labels than images, a label that is no class, images out of [0, 1].
    """
    for which, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if labels.dtype != torch.int64:
            raise TypeError(f"{which}_labels are {labels.dtype}, expected int64")
        if images.dtype != torch.float32 and not (which == "train" and images.dtype == torch.uint8):
            raise TypeError(f"{which}_images are {images.dtype}, expected float32")
        if not len(images):
            raise ValueError(f"{which}_images is empty, expected at least one")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{which}_images has {len(images)} and {which}_labels {tuple(labels.shape)}, expected (n,)"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes(dataset.name):
            raise ValueError(
                f"{which}_labels has labels from {lowest} to {highest}, expected 0 to {num_classes(dataset.name) - 1}"
            )
        if dataset.name in IMAGES and images.dtype == torch.float32:
            least, most = float(images.min()), float(images.max())
            if not (least >= 0.0 and most <= 1.0):  # false for NaN as well
                raise ValueError(f"{which}_images has values from {least} to {most}, expected [0, 1]")


def load(name: str, data_root: str | Path | None = None) -> Dataset:
    """Read a data set, downloading it first where its files are missing.

    Args:
        name: ``"digits"`` (1,797 images 8x8; a fixed stratified split into 1,437 and 360), another one of ``IMAGES``,
            or one of ``PLANE`` (512 points to train with, 1,000 to test with).
        data_root: torchvision's root folder; default ``$RNF_DATA_ROOT``, else ``~/.cache/robust_node_fast``.

    Raises:
        ValueError: unknown name.
        DataError: a package, the folder, the download or the files are at fault; one sentence says which.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is unknown, expected one of {', '.join(map(repr, NAMES))}")
    if name == "digits":
        return _digits()
    if name in PLANE:
        return Dataset(name, *points(name, 512, seed=0), *points(name, 1000, seed=1))
    root = Path(data_root or os.environ.get("RNF_DATA_ROOT") or _DEFAULT_ROOT).expanduser()
    with _one_sentence(name, root):
        train_images, train_labels = _torchvision(name, root, train=True)
        test_images, test_labels = _torchvision(name, root, train=False)
    if IMAGES[name][0] == 1:
        train_images = to_float(train_images)
    return Dataset(name, train_images, train_labels, to_float(test_images), test_labels)


def points(name: str, samples: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``(samples, 2)`` float32 of one of ``PLANE``, with mean 0 and standard deviation 1, and their classes.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"{name} needs scikit-learn, which is not installed ({error})") from error
    if name == "moons":
        found, labels = datasets.make_moons(samples, noise=0.08, random_state=seed)
    elif name == "rings":
        found, labels = datasets.make_circles(samples, noise=0.05, factor=0.4, random_state=seed)
    else:
        angles = 2.0 * np.pi * np.arange(PLANE[name]) / PLANE[name]
        centres = 3.0 * np.stack([np.cos(angles), np.sin(angles)], 1)
        found, labels = datasets.make_blobs(samples, centers=centres, cluster_std=0.7, random_state=seed)
    found = (found - found.mean(0)) / found.std()
    return torch.from_numpy(found).float(), torch.from_numpy(labels).long()


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f"digits needs scikit-learn, which is not installed ({error})") from error
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    as_images = [part.float().div_(16.0).reshape(-1, 1, 8, 8) for part in (train, test)]
    return Dataset("digits", as_images[0], train_labels.long(), as_images[1], test_labels.long())


def _torchvision(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    reader = getattr(datasets, _TORCHVISION[name])
    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        source = reader(root, **part, download=False)
    except RuntimeError:  # torchvision's word for missing or incomplete files
        root.mkdir(parents=True, exist_ok=True)
        source = reader(root, **part, download=True)
    images = torch.as_tensor(source.data)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif name != "svhn":  # which has the channels first
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(source.labels if name == "svhn" else source.targets)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    return images.contiguous(), labels.long()


@contextmanager
def _one_sentence(name: str, root: Path) -> Iterator[None]:
    """Whatever torchvision throws (missing package, folder, network, broken files) as a ``DataError``."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{name} needs torchvision, which is not installed ({error})") from error
    except Exception as error:
        # torchvision reports broken files as ValueError, AssertionError, EOFError, UnpicklingError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} can be neither read from nor downloaded to {root} ({reason}); "
            f"set RNF_DATA_ROOT to a folder that holds it"
        ) from error
