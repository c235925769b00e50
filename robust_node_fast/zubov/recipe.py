"""The full recipe: a ResNet-18 backbone for 32x32 images, on CIFAR-10, CIFAR-100 and SVHN; for a GPU.

    python -m robust_node_fast.zubov.recipe cifar10 --device cuda

Only that it runs has been tried here, on a few batches; schedule and sizes are our reading, the paper's are not known.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_node_fast import _checks
from robust_node_fast.zubov.lyapunov import ConvexLyapunov
from robust_node_fast.zubov.network import DenseFlow, ZubovNet
from robust_node_fast.zubov.training import Budget, ZubovObjective, accuracy, fit

__all__ = ["DATASETS", "Recipe", "crop_and_flip", "load", "main"]

# Name -> number of classes.
DATASETS = {"cifar10": 10, "cifar100": 100, "svhn": 10}
BUDGET = Budget(steps=78_200, lr=0.1, optimizer="sgd", weight_decay=5e-4, grad_clip=5.0)
OBJECTIVE = ZubovObjective(rate=1.0, n_rays=12, reach=0.25, floor=0.3)


@dataclass(frozen=True)
class Recipe:
    """Network, objective and budget for one of ``DATASETS``: 200 epochs of 50,000 images by default.

    Raises:
        TypeError, ValueError: naming the field, its value and what was expected.
    """

    dataset: str
    seed: int = 0
    dim: int = 64
    budget: Budget = BUDGET
    objective: ZubovObjective = OBJECTIVE

    def __post_init__(self) -> None:
        _checks.choice("dataset", self.dataset, tuple(DATASETS))
        _checks.count("dim", self.dim)

    def build(self) -> ZubovNet:
        """torchvision's ResNet-18 with a first convolution for small images and without the pooling behind it."""
        from torchvision.models import resnet18

        torch.manual_seed(self.seed)
        backbone = resnet18(num_classes=self.dim)
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
        flow = DenseFlow(self.dim, 6, 0.5, width=256, shared_weights=True)
        lyapunov = ConvexLyapunov(self.dim, DATASETS[self.dataset], width=64, depth=3, eps=0.05)
        return ZubovNet(backbone, flow, lyapunov)


def load(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, 32, 32)`` in [0, 1] and labels, from torchvision's files in ``root``; nothing is downloaded.

    Raises:
        ValueError: unknown name.
        RuntimeError: torchvision's, where the files are missing or broken.
    """
    from torchvision import datasets

    _checks.choice("name", name, tuple(DATASETS))
    if name == "svhn":
        source = datasets.SVHN(root, split="train" if train else "test")
        images, labels = torch.as_tensor(source.data), torch.as_tensor(source.labels)
    else:
        source = (datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100)(root, train=train)
        images, labels = torch.as_tensor(source.data).permute(0, 3, 1, 2), torch.as_tensor(source.targets)
    return images.contiguous().float().div_(255.0), labels.long()


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to four pixels and, by half a chance, mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    random = torch.rand(3, count, 1, device=images.device, generator=generator)
    rows = (9 * random[0]).long() + torch.arange(height, device=images.device)
    columns = (9 * random[1]).long() + torch.arange(width, device=images.device)
    columns = torch.where(random[2] < 0.5, columns, columns.flip(1))
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def main(arguments: list[str] | None = None) -> None:
    """Train and say the accuracy; a killed run goes on when the command is given again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=tuple(DATASETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--test-samples", type=int, help="first test images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("RNF_DATA_ROOT", "~/.cache/robust_node_fast"))
    parser.add_argument("--out", type=Path, default=Path("runs/zubov-recipe"))
    given = parser.parse_args(arguments)
    recipe = Recipe(given.dataset, given.seed)
    changes = {"steps": given.steps, "batch_size": given.batch_size}
    budget = replace(recipe.budget, **{name: value for name, value in changes.items() if value is not None})
    root = Path(given.data_root).expanduser()
    train, test = (load(given.dataset, root, train=flag) for flag in (True, False))
    net = recipe.build().to(given.device)
    checkpoint = given.out / f"{given.dataset}-seed{given.seed}.safetensors"

    def report(step: int, total: int, terms: dict[str, float]) -> None:
        if step % 100 == 0 or step == total:
            print(f"step {step} of {total}: {', '.join(f'{name} {value:.4f}' for name, value in terms.items())}")

    fit(
        net, recipe.objective, *train, budget,
        seed=given.seed, checkpoint=checkpoint, every=500, augment=crop_and_flip, on_step=report,
    )  # fmt: skip
    few = slice(given.test_samples)
    print(f"accuracy {accuracy(net, test[0][few], test[1][few]):.2%}")


if __name__ == "__main__":
    main()
