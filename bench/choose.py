"""Learning rate and weight of every method's own term, for the comparisons of ``rnf reproduce zubov``. Writes a CSV.

    RNF_DATA_ROOT=... python bench/choose.py [PART ...] [--output bench/results/choices.csv]

The last training images are held out, the network is trained on the others and judged on those: of the settings whose
clean accuracy is within a point of the best, the one that keeps most under PGD on the margin at the part's smallest
radius. Learning rates come first, then the weights at the one that is chosen. Networks but those of digits take half
the steps. Test images are not looked at. Rows that the CSV has are not computed again. What is chosen from it is
``CHOSEN`` in ``training/recipes.py`` and, for CIFAR-10, ``SMALL_CHOSEN`` in ``zubov/experiments.py``.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import robust_node_fast as rnf
from robust_node_fast import data, training
from robust_node_fast._machine import processor
from robust_node_fast.training import TrainConfig
from robust_node_fast.zubov import contenders, experiments

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# What a method has beside the cross-entropy: the field that weighs it, and its values.
WEIGHTS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "contractive-node": ("penalty_weight", (0.001, 0.01, 0.1, 1.0, 10.0)),
    "lyanet": ("penalty_weight", (0.001, 0.01, 0.1, 1.0, 10.0)),
    "zubov": ("consistency", (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
}
RECIPE = {"penalty_weight": 1.0, "consistency": 100.0, "": 0.0}  # beside the learning rate of 3e-3
SEEDS = {"digits": (0, 1, 2), "mnist": (0,), "fashionmnist": (0,), "cifar10": (0,)}
HELD_OUT = {"digits": 300, "mnist": 10_000, "fashionmnist": 10_000, "cifar10": 10_000}
ATTACKED = 1000  # of the images held out
COLUMNS = ("part", "method", "lr", "weight", "seed", "steps", "clean", "pgd_margin", "eps", "seconds")
ABOUT = ("machine", "threads", "torch", "version")
LESS_CLEAN = 0.01  # that a setting may have and be chosen
Row = dict[str, Any]
Setting = tuple[float, float]  # learning rate and weight
Scores = tuple[float, float]  # accuracy of clean images and under PGD


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Which data sets.", show_default="all")] = None,
    output: Annotated[Path, typer.Option(help="CSV to write.")] = Path("bench/results/choices.csv"),
    threads: Annotated[int, typer.Option(help="torch.set_num_threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    for part in parts or experiments.PARTS[1:]:
        dataset = held_out(part)
        for method in contenders.METHODS:
            print(part, method, *chosen(output, dataset, method), flush=True)


def chosen(output: Path, dataset: data.Dataset, method: str) -> Setting:
    field, weights = WEIGHTS.get(method, ("", (0.0,)))
    tried = {(lr, RECIPE[field]): scores(output, dataset, method, lr, RECIPE[field]) for lr in RATES}
    lr, _ = best(tried)
    return best(tried | {(lr, weight): scores(output, dataset, method, lr, weight) for weight in weights})


def best(tried: Mapping[Setting, Scores]) -> Setting:
    clean = max(score[0] for score in tried.values())
    near = {setting: pgd for setting, (accuracy, pgd) in tried.items() if accuracy >= clean - LESS_CLEAN}
    return max(near, key=lambda setting: near[setting])


def held_out(part: str) -> data.Dataset:
    """A data set whose test images are the last training images, which are no training images then."""
    whole, count = data.load(part), HELD_OUT[part]
    return dataclasses.replace(
        whole,
        train_images=whole.train_images[:-count],
        train_labels=whole.train_labels[:-count],
        test_images=data.to_float(whole.train_images[-count:]),
        test_labels=whole.train_labels[-count:],
    )


def scores(output: Path, dataset: data.Dataset, method: str, lr: float, weight: float) -> Scores:
    """The means over the part's seeds; rows that are missing are computed and written."""
    found = []
    for seed in SEEDS[dataset.name]:
        wanted = {"part": dataset.name, "method": method, "lr": lr, "weight": weight, "seed": seed}
        rows = read(output)
        known = [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]
        row = known[0] if known else computed(dataset, wanted)
        if not known:
            write(output, [*rows, row])
        found.append((float(row["clean"]), float(row["pgd_margin"])))
    clean, attacked = zip(*found, strict=True)
    return statistics.fmean(clean), statistics.fmean(attacked)


def config_of(part: str, method: str, lr: float, weight: float, seed: int) -> TrainConfig:
    """The recipe with these two, in half its steps but on digits."""
    changes = {**(experiments.SMALL if part == "cifar10" else {}), "lr": lr}
    field = WEIGHTS.get(method, ("", ()))[0]
    if field == "penalty_weight":
        changes[field] = weight
    elif field:
        changes["zubov"] = {**changes.get("zubov", {}), field: weight}
    config = TrainConfig.recipe(part, "zubov", **changes, model=method, seed=seed)
    assert config.steps is not None
    return config if part == "digits" else dataclasses.replace(config, steps=config.steps // 2)


def computed(dataset: data.Dataset, wanted: Row) -> Row:
    config = config_of(dataset.name, wanted["method"], wanted["lr"], wanted["weight"], wanted["seed"])
    start, eps = time.perf_counter(), experiments.EPS[dataset.name][0]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        training.prepare(config, run)
        try:
            clean = training.fit(run, dataset).accuracy
        except training.Refused:  # by a guard: it learns nothing
            clean = attacked = 0.0
        else:
            net = training.load_model(run)[0]
            images, labels = dataset.test_images[:ATTACKED], dataset.test_labels[:ATTACKED]
            attacked = experiments.margin_attack(net, images, labels, eps, config.seed)
    found = (config.steps, clean, attacked, eps, round(time.perf_counter() - start, 1))
    row = {**wanted, **dict(zip(COLUMNS[5:], found, strict=True))}
    about = (processor(), torch.get_num_threads(), torch.__version__, rnf.__version__)
    return {**row, **dict(zip(ABOUT, about, strict=True))}


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *ABOUT], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
