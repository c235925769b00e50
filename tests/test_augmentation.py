"""Augmentation: what torchvision would do to each image, and the same for an image whatever is around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from robust_node_fast.training.augment import PADDING, augment, draw


def by_torchvision(image: Tensor, numbers: list[float], flip: bool, cutout: bool) -> Tensor:
    size = image.shape[-1]
    top, left = (int(9 * number) for number in numbers[:2])
    image = TF.crop(TF.pad(image, [PADDING] * 4), top, left, size, size)
    if flip and numbers[2] >= 0.5:
        image = TF.horizontal_flip(image)
    if cutout:
        first = [int(size * number) - size // 2 // 2 for number in numbers[3:]]
        (y, x), (bottom, right) = [max(at, 0) for at in first], [min(at + size // 2, size) for at in first]
        image = TF.erase(image, y, x, bottom - y, right - x, torch.zeros((), dtype=image.dtype))
    return image


@pytest.mark.parametrize(("flip", "cutout"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8), (2, 5)])
def test_equals_torchvision_one_by_one(flip: bool, cutout: bool, channels: int, size: int) -> None:
    images, draws = torch.randint(1, 256, (200, channels, size, size), dtype=torch.uint8), draw(200, seed=3, epoch=1)
    pairs = zip(images, draws.tolist(), strict=True)
    expected = torch.stack([by_torchvision(image, numbers, flip, cutout) for image, numbers in pairs])
    found = augment(images, draws, flip=flip, cutout=cutout)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
    assert torch.equal(augment(images.float(), draws, flip=flip, cutout=cutout), expected.float())


def test_an_image_fares_alike_in_every_batch() -> None:
    images, draws = torch.rand(50, 3, 16, 16), draw(50, seed=0, epoch=4)
    together = augment(images, draws, cutout=True)
    order = torch.randperm(50)
    for index in torch.split(order, 7):
        assert torch.equal(augment(images[index], draws[index], cutout=True), together[index])
    assert torch.equal(draw(30, seed=0, epoch=4), draws[:30])  # nor does the number of images matter
    torch.randn(3)
    assert torch.equal(draw(50, seed=0, epoch=4), draws)


def test_seeds_and_epochs_differ() -> None:
    tables = [draw(100, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(tables):
        for b in tables[:i]:
            assert (a == b).double().mean() < 0.01


def test_every_shift_flip_and_hole_occurs() -> None:
    n, size = 20_000, 8
    coordinates = torch.arange(1, size**2 + 1).reshape(1, 1, size, size).expand(n, 1, size, size)
    found = augment(coordinates, draw(n, seed=1, epoch=0), cutout=False)
    middle = (
        found[:, 0, size // 2, size // 2] - 1
    )  # where the pixel came from: within the image for shifts up to 4 or 3
    rows, columns = middle // size, middle % size
    inside = middle >= 0
    assert rows[inside].unique().tolist() == list(range(size))
    assert columns[inside].unique().tolist() == list(range(size))
    right = found[:, 0, size // 2, 1:] - found[:, 0, size // 2, :-1]
    mirrored = (right == -1).any(1)[(right.abs() == 1).any(1)].double().mean()
    assert mirrored == pytest.approx(0.5, abs=0.02)
    holes = (augment(torch.ones(n, 1, size, size), torch.rand(n, 5).double(), cutout=True) == 0).double().mean()
    assert holes > (augment(torch.ones(n, 1, size, size), torch.rand(n, 5).double(), cutout=False) == 0).double().mean()


def test_the_result_is_in_channels_last() -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for cutout in (False, True):
        found = augment(images, draw(4, seed=0, epoch=0), cutout=cutout)
        assert found.is_contiguous(memory_format=torch.channels_last)
