"""``rnf zubov train`` and ``plot`` in the plane, and what ``rnf reproduce zubov`` runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from robust_node_fast.training import RunError, writing
from robust_node_fast.training.checkpoint import load, replace_file
from robust_node_fast.zubov import experiments, page, picture, planar
from robust_node_fast.zubov.training import Budget, ZubovObjective, fit, load_weights

__all__ = ["plot", "reproduce", "train"]

_CONFIG, _CHECKPOINT = "config.json", "checkpoint.safetensors"
Side = Annotated[int, typer.Option(min=2, help="Points along each side of the grid that is simulated.")]


def train(
    problem: Annotated[
        Literal["moons", "rings", "blobs", "blobs3"], typer.Option(help="Points in the plane.")
    ] = "blobs",
    backbone: Annotated[
        Literal["identity", "mlp"], typer.Option(help="The state: the point itself, or two hidden layers of it.")
    ] = "identity",
    attention: Annotated[
        Literal["full", "partial"], typer.Option(help="Of the Lyapunov functions: without or with the context network.")
    ] = "full",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2500,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data and their order.")] = 0,
    consistency: Annotated[float, typer.Option(min=0.0, help="Weight of the loss.")] = planar.BEST.consistency,
    classification: Annotated[float, typer.Option(min=0.0, help="Weight of the loss.")] = planar.BEST.classification,
    separation: Annotated[float, typer.Option(min=0.0, help="Weight of the loss.")] = planar.BEST.separation,
    side: Side = 101,
    out_folder: Annotated[Path, typer.Option("--out", help="Run folder; the run in it goes on.")] = Path("runs/zubov"),
) -> None:
    """Train a Zubov-Net in the plane. Killed, the same command goes on where it was and ends with the same bits."""
    goal = dataclasses.replace(
        planar.BEST, consistency=consistency, classification=classification, separation=separation
    )
    config = planar.Planar(
        problem, backbone, attention, seed, objective=goal, budget=dataclasses.replace(planar.BUDGET, steps=steps)
    )
    text = json.dumps(dataclasses.asdict(config), indent=1)
    with writing(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        path = out_folder / _CONFIG
        if path.exists() and path.read_text() != text:
            raise RunError(f"{out_folder} holds another run: choose another --out, or delete it")
        replace_file(path, text.encode())
    points, labels = planar.data(problem, config.samples, seed)
    net = config.build()
    with writing(out_folder):
        terms = fit(net, goal, points, labels, config.budget, seed=seed, checkpoint=out_folder / _CHECKPOINT)
    found = planar.regions(net, points, side=side)
    print(", ".join(f"{name} {value:.3g}" for name, value in terms.items()))
    print(f"IoU of prescribed and simulated regions: {', '.join(f'{value:.3f}' for value in found.overlaps)}")


def plot(
    run: Annotated[Path, typer.Argument(help="Run folder of `rnf zubov train`.")],
    side: Side = 101,
    output: Annotated[Path | None, typer.Option(help="PNG to write.", show_default="RUN/regions.png")] = None,
) -> None:
    """Draw prescribed and simulated regions of attraction side by side, before and after training."""
    path = run / _CONFIG
    try:
        content = json.loads(path.read_text())
        goal, budget = ZubovObjective(**content.pop("objective")), Budget(**content.pop("budget"))
        config = planar.Planar(**content, objective=goal, budget=budget)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run} is no run folder of `rnf zubov train`: it has no {_CONFIG}") from None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} is no configuration of a run ({error})") from error
    tensors, state = load(run / _CHECKPOINT)
    untrained, net = config.build(), config.build()
    load_weights(run / _CHECKPOINT, net, tensors)
    points, labels = planar.data(config.problem, config.samples, config.seed)
    states = [(each, planar.regions(each, points, side=side)) for each in (untrained, net)]
    target = output or run / "regions.png"
    with writing(target.parent):
        picture.before_and_after(f"{config.problem}, step {state['step']}", states, points, labels, target)
    print(f"wrote {target}")


def reproduce(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="plane, digits, mnist, or PART/ROW, or how it begins (repeat for several).", show_default="all"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds on images.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training.", show_default="each part's own")] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=0, help="Compute so many cells and stop.", show_default="all that are missing")
    ] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the results.")] = Path("runs/zubov/results"),
    work: Annotated[Path, typer.Option(help="Folder of checkpoints.")] = Path("runs/zubov/checkpoints"),
    data_root: Annotated[
        Path | None, typer.Option(help="torchvision's folder.", show_default="$RNF_DATA_ROOT, else ~/.cache/...")
    ] = None,
) -> None:
    """Zubov-Net (arXiv 2509.21879): regions in the plane, methods side by side on images, cell by cell, and tables.

    Stopped or killed, the same command goes on where it was: finished cells are files that are not computed again.
    """
    try:
        chosen = experiments.cells(seeds=seeds, only=only or (), steps=steps)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    left = [cell for cell in chosen if experiments.read(cell, out_folder) is None]
    typer.echo(f"rnf: {len(chosen) - len(left)} of {len(chosen)} cells are done", err=True)
    with Console(stderr=True).status("") as status:
        for cell in left[:max_cells]:
            found = experiments.compute(cell, out_folder, work, on_progress=status.update, data_root=data_root)
            typer.echo(f"rnf: {cell.part}/{cell.row}, seed {cell.seed}: {found['seconds']:.0f} s", err=True)
    with writing(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        replace_file(out_folder / "tables.md", page.markdown(chosen, out_folder).encode())
    typer.echo(f"rnf: wrote {out_folder / 'tables.md'}", err=True)
