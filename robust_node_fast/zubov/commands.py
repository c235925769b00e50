"""``rnf zubov plot`` and ``rnf reproduce zubov``; Zubov-Nets are trained by ``rnf train``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_node_fast import data, training
from robust_node_fast.training import RunError, TrainConfig, writing
from robust_node_fast.training.checkpoint import replace_file
from robust_node_fast.zubov import experiments, page, picture, planar
from robust_node_fast.zubov.following import followed
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["plot", "reproduce"]

Side = Annotated[int, typer.Option(min=2, help="Points along each side of the grid that is simulated.")]


def plot(
    run: Annotated[Path, typer.Argument(help="Run folder of `rnf train --model zubov`.")],
    side: Side = 101,
    output: Annotated[Path | None, typer.Option(help="PNG to write.", show_default="RUN/regions.png")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="torchvision's folder.", show_default="$RNF_DATA_ROOT, else ~/.cache/...")
    ] = None,
) -> None:
    """In the plane: prescribed and simulated regions of attraction side by side, before and after training.

    Of images, whose states have more dimensions: V of the own class and the smallest other one along trajectories of
    the first 512 test images, up to time 200.
    """
    net, config = training.load_model(run)
    if not isinstance(net, ZubovNet):
        raise RunError(f"{run} has model={config.model!r}, expected 'zubov': others have no regions to draw")
    target = output or run / "regions.png"
    title = f"{config.dataset}, step {training.last_step(run)['step']}"
    if config.dataset in data.PLANE:
        said = _plot_regions(net, config, side, title, target)
    else:
        dataset = data.load(config.dataset, data_root)
        found = followed(net, data.to_float(dataset.test_images[:512]), dataset.test_labels[:512])
        with writing(target.parent):
            picture.over_time(title, found, target)
        first, last = (float((value < 1.0).double().mean()) for value in (found.own[0], found.own[-1]))
        said = f"States in their own region: {first:.1%} at first, {last:.1%} at time {found.times[-1]:g}"
    print(f"{said}; wrote {target}")


def _plot_regions(net: ZubovNet, config: TrainConfig, side: int, title: str, target: Path) -> str:
    if config.zubov.dim != 2:
        raise RunError(f"the states of this run have {config.zubov.dim} numbers, expected 2 to draw regions")
    untrained = config.initial_model()
    assert isinstance(untrained, ZubovNet)
    dataset = data.load(config.dataset)
    points, labels = dataset.train_images, dataset.train_labels
    before, after = (planar.regions(each, points, side=side) for each in (untrained, net))
    with writing(target.parent):
        picture.side_by_side(title, {"before training": before, "after training": after}, labels, target)
    return f"IoU of prescribed and simulated regions: {', '.join(f'{value:.3f}' for value in after.overlaps)}"


def reproduce(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="plane, digits, mnist, fashionmnist, cifar10, or PART/ROW, or how it begins (repeat for several).",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training.", show_default="each part's own")] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=0, help="Compute so many cells and stop.", show_default="all that are missing")
    ] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the results.")] = Path("runs/zubov/results"),
    work: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs/zubov/networks"),
    data_root: Annotated[
        Path | None, typer.Option(help="torchvision's folder.", show_default="$RNF_DATA_ROOT, else ~/.cache/...")
    ] = None,
) -> None:
    """Zubov-Net (arXiv 2509.21879): regions in the plane, methods side by side on images, cell by cell, and tables.

    Stopped or killed, the same command goes on where it was: finished cells are files that are not computed again.
    """
    try:
        chosen = experiments.cells(seeds=seeds, only=only or (), steps=steps)
        every = experiments.cells(seeds=max(3, seeds), steps=steps)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    left = [cell for cell in chosen if experiments.read(cell, out_folder) is None]
    typer.echo(f"rnf: {len(chosen) - len(left)} of {len(chosen)} cells are done", err=True)
    with Console(stderr=True).status("") as status:
        compute = functools.partial(
            experiments.compute, folder=out_folder, work=work, on_progress=status.update, data_root=data_root
        )
        done = functools.partial(experiments.read, folder=out_folder)
        for cell, found in training.shared_out(left[:max_cells], done, compute):
            typer.echo(f"rnf: {experiments.label(cell)}: {found['seconds']:.0f} s", err=True)
    with writing(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        replace_file(out_folder / "tables.md", page.markdown(every, out_folder).encode())
        drawn = page.draw(every, out_folder)
    typer.echo(f"rnf: wrote {', '.join(str(path) for path in (out_folder / 'tables.md', *drawn))}", err=True)
