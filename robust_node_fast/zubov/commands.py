"""``rnf zubov plot`` and ``rnf reproduce zubov``; Zubov-Nets are trained by ``rnf train``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_node_fast import data, training
from robust_node_fast.training import RunError, writing
from robust_node_fast.training.checkpoint import replace_file
from robust_node_fast.zubov import experiments, page, picture, planar
from robust_node_fast.zubov.network import ZubovNet

__all__ = ["plot", "reproduce"]

Side = Annotated[int, typer.Option(min=2, help="Points along each side of the grid that is simulated.")]


def plot(
    run: Annotated[Path, typer.Argument(help="Run folder of `rnf train --model zubov --dataset moons`, ...")],
    side: Side = 101,
    output: Annotated[Path | None, typer.Option(help="PNG to write.", show_default="RUN/regions.png")] = None,
) -> None:
    """Draw prescribed and simulated regions of attraction in the plane side by side, before and after training."""
    net, config = training.load_model(run)
    if config.dataset not in data.PLANE or not isinstance(net, ZubovNet) or config.zubov.dim != 2:
        raise RunError(
            f"{run} has no regions to draw: expected model='zubov' with states in the plane and a data set of "
            f"{', '.join(data.PLANE)}"
        )
    untrained = config.initial_model()
    assert isinstance(untrained, ZubovNet)
    dataset = data.load(config.dataset)
    points, labels = dataset.train_images, dataset.train_labels
    before, after = (planar.regions(each, points, side=side) for each in (untrained, net))
    target = output or run / "regions.png"
    with writing(target.parent):
        title = f"{config.dataset}, step {training.last_step(run)['step']}"
        picture.side_by_side(title, {"before training": before, "after training": after}, labels, target)
    overlaps = ", ".join(f"{value:.3f}" for value in after.overlaps)
    print(f"IoU of prescribed and simulated regions: {overlaps}; wrote {target}")


def reproduce(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="plane, digits, mnist, fashionmnist, cifar10, or PART/ROW, or how it begins (repeat for several).",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds on images.")] = 3,
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
