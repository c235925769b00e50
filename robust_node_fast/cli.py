"""The command line ``rnf``: an expected failure is one sentence on stderr and exit code 1, a wrong option code 2."""

from __future__ import annotations

import functools
import itertools
import json
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from robust_node_fast import _backends, data, robustness, training
from robust_node_fast import reproduce as reproduction
from robust_node_fast._version import __version__
from robust_node_fast.certify import Summary, summarise
from robust_node_fast.training import Outcome, TrainConfig, distributed, settings
from robust_node_fast.training.checkpoint import replace_file
from robust_node_fast.zubov import ZubovNet, margin_radius
from robust_node_fast.zubov import commands as zubov_commands

app = typer.Typer(
    name="rnf",
    help="Fast, robust convolutional Neural ODEs: train, evaluate, and see what runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reproduce_app = typer.Typer(no_args_is_help=True, help="Train, evaluate and compare what a paper compares.")
app.add_typer(reproduce_app, name="reproduce")
out = Console()
if not out.is_terminal:
    out.width = 140  # a pipe or a file has no width: tables are not squeezed into 80 columns
err = Console(stderr=True, highlight=False)

# Networks of rnf.models, for short.
_SHORT = {"cifar": "CIFARNode", "staged": "StagedCIFARNode"}

Backend = Annotated[
    Literal["auto", "reference", "cpu", "triton", "cuda"] | None,
    typer.Option(help="Implementation of the ops.", show_default="$RNF_BACKEND, else auto"),
]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns expected failures into one sentence and an exit code, warnings into one line each."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: _note(message)
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # to its developers
                command(*args, **kwargs)
        except (data.DataError, reproduction.CellError, training.RunError, training.CheckpointError) as error:
            _fail(str(error), 1)
        except training.Interrupted as stopped:
            _fail(str(stopped), 128 + stopped.signal)
        except KeyboardInterrupt:
            _fail("stopped by SIGINT", 128 + signal.SIGINT)

    return run


def _fail(sentence: str, code: int) -> NoReturn:
    _say(sentence)
    raise typer.Exit(code)


def _note(message: Warning | str) -> None:
    if distributed.rank() == 0:
        _say(f"note: {message}")


def _say(sentence: str) -> None:
    who = f"process {distributed.rank()}: " if distributed.world_size() > 1 else ""
    err.print(f"rnf: {who}{sentence}", markup=False, soft_wrap=True)


def _settings(wanted: bool) -> None:
    """Prints every setting of a training run, and ends the command."""
    if not wanted:
        return
    for section, rows in itertools.groupby(settings.listed(), key=lambda row: row[0]):
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=section, title_justify="left")
        for heading in ("setting", "default; recipes", ""):
            shown.add_column(heading)
        for _, *row in rows:
            shown.add_row(*row)
        out.print(shown)
    raise typer.Exit


@app.command()
@_reported
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Which implementation every op would use here, and why not the others."""
    found = _backends.backend_info()
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return
    out.print(
        f"robust_node_fast {found['robust_node_fast']}, torch {found['torch']}, {found['machine']}, "
        f"backend {found['backend']}{', strict' if found['strict'] else ''}",
        highlight=False,
    )
    backends = Table("back end", "available", "details", title="Back ends")
    for name, backend in found["backends"].items():
        details = [f"{key} {value}" for key, value in backend.items() if key not in ("available", "reason")]
        backends.add_row(name, "yes" if backend["available"] else "no", backend["reason"] or "; ".join(details))
    out.print(backends)
    ops = Table("op", "device", "runs on", "why not the others", title="Ops (float32, 3x3)")
    for op, devices in found["ops"].items():
        for device, choice in devices.items():
            why_not = "; ".join(f"{name}: {reason}" for name, reason in choice["why_not"].items())
            ops.add_row(op, device, choice["implementation"], why_not)
    out.print(ops)


@app.command()
@_reported
def train(
    context: typer.Context,
    *,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help=f"{', '.join(data.IMAGES)}; points: {', '.join(data.PLANE)}.")
    ] = "digits",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(training.MODELS)}; for short {', '.join(_SHORT)}.",
            show_default="the recipe's",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(training.RECIPES)}.", show_default="by model"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="vanilla, contractive, or both from the same start.", show_default="both"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training set.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images per step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of weights, data order, augmentation.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...", show_default="cpu")] = None,
    data_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="torchvision's folder.", show_default="$RNF_DATA_ROOT")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, e.g. n_steps=5 (repeat for several)."),
    ] = None,
    _listed: Annotated[
        bool, typer.Option("--settings", callback=_settings, is_eager=True, help="List all settings and exit.")
    ] = False,
    out_folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder.", show_default="runs/<name>")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Continue the run in this folder.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")] = False,
    backend: Annotated[
        Literal["auto", "reference", "cpu", "triton", "cuda"] | None,
        typer.Option(metavar="NAME", help="Implementation of the ops.", show_default="$RNF_BACKEND, else auto"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="X", help="Under torchrun: seconds to wait for another process.")
    ] = 600,
) -> None:
    """Train a network on a data set, by the recipe for it; docs/training.md has all settings.

    Stopped or killed at any moment, a run is continued with --resume and ends with the same bits.
    On several cards: torchrun --nproc-per-node 8 -m robust_node_fast train ...
    """
    if resume is not None:
        free = {"resume", "tensorboard", "backend", "timeout"}
        fixed = [name for name in context.params if name not in free and _is_given(context, name)]
        if fixed:
            named = ["--set" if name == "changes" else name for name in fixed]
            raise typer.BadParameter(f"--resume takes no {', '.join(named)}: the configuration of a run is fixed")
        folders = _runs_in(resume)
    else:
        options = {
            "model": _SHORT.get(model or "", model),
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "device": device,
            "data_root": data_root,
        }
        given = {name: value for name, value in options.items() if value is not None}
        configs = _configs(dataset, recipe, network, given, [*options, "dataset", "network"], changes or [])
        first = next(iter(configs.values()))
        which = next(iter(configs)) if len(configs) == 1 else "both"
        if recipe not in (None, "contractive", "zubov"):
            which = str(recipe)
        folder = out_folder or Path("runs") / f"{dataset}-{which}-seed{first.seed}"
        folders = [folder / name if len(configs) > 1 else folder for name in configs]
    config = training.load_config(folders[0]) if resume is not None else first
    _choose(backend)
    with distributed.process_group(config.device, timeout):
        images = _load_data(config)
        if resume is None:
            for path, config in zip(folders, configs.values(), strict=True):
                # All of them first: --resume finds also those that had not begun.
                distributed.on_rank_0(functools.partial(_prepare, config, path))
        top = folders[0].parent if len(folders) > 1 else folders[0]
        try:
            outcomes = [fit_with_progress(path, images, tensorboard=tensorboard) for path in folders]
        except (training.Interrupted, KeyboardInterrupt) as stopped:
            number = stopped.signal if isinstance(stopped, training.Interrupted) else signal.SIGINT
            _fail(f"{str(stopped) or 'stopped by SIGINT'}; continue with: rnf train --resume {top}", 128 + number)
        if distributed.rank() == 0:
            _print_outcomes(outcomes)


def _load_data(config: TrainConfig) -> data.Dataset:
    found: list[data.Dataset] = []

    def load() -> None:
        found.append(data.load(config.dataset, config.data_root))

    # Rank 0 before the others, and on other machines their first: what is missing is downloaded once.
    distributed.on_rank_0(load)
    if not found and distributed.local_rank() == 0:
        load()
    distributed.wait_for_all()
    if not found:
        load()
    return found[0]


def _prepare(config: TrainConfig, folder: Path) -> None:
    # torchrun, which starts all processes anew when one has failed, repeats the command: it is to go on then.
    training.prepare(config, folder, resume=distributed.is_parallel())


def _configs(
    dataset: str,
    recipe: str | None,
    network: str | None,
    given: dict[str, Any],
    options: list[str],
    texts: list[str],
) -> dict[str, TrainConfig]:
    """The runs that a command asks for, by name: two for ``--network both``, else one."""
    try:
        changes = given | settings.parse(texts, options)
        usual = TrainConfig.recipe(dataset, recipe, **{"network": "vanilla", **changes})
        if not usual.is_convolutional:
            if network is not None:
                raise ValueError(f"network={network!r} is for convolutional networks, not for model={usual.model!r}")
            return {usual.title: usual}
        if network is None:
            network = "vanilla" if recipe == "certified" else "both"
        names = training.NETWORKS if network == "both" else (network,)
        return {name: TrainConfig.recipe(dataset, recipe, **changes, network=name) for name in names}
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _choose(backend: str | None) -> None:
    if backend is not None:
        try:
            _backends.set_backend(backend)
        except RuntimeError as error:
            _fail(str(error), 1)


def _runs_in(folder: Path) -> list[Path]:
    """The run in a folder, or the two that ``--network both`` put below it."""
    below = [folder / name for name in training.NETWORKS if (folder / name / "config.json").exists()]
    return below if below and not (folder / "config.json").exists() else [folder]


@contextmanager
def _progress(task: str, total: int) -> Iterator[Callable[[int, str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not err.is_terminal or distributed.rank() != 0
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=err, disable=hidden) as progress:
        bar = progress.add_task(task, total=total, note="")
        yield lambda done, note: progress.update(bar, completed=done, note=note)


def fit_with_progress(folder: Path, dataset: data.Dataset, *, tensorboard: bool = False) -> Outcome:
    """``training.fit`` under a progress bar on stderr."""
    config = training.load_config(folder)
    steps = config.total_steps(len(dataset.train_labels[: config.train_samples]))
    with _progress(f"train {config.title}", steps) as update:
        return training.fit(
            folder,
            dataset,
            on_step=lambda step, _, record: update(step, " ".join(_values(record))),
            tensorboard=tensorboard,
        )


def _values(record: dict[str, float]) -> list[str]:
    """The metrics of a step, without its place in the run."""
    return [f"{name} {value:.3g}" for name, value in record.items() if name not in ("step", "epoch", "lr")]


def _print_outcomes(outcomes: list[Outcome]) -> None:
    """Networks of one kind: convolutional ones with their rates, of others the last step's losses."""
    convolutional = outcomes[0].config.is_convolutional
    own = ("guaranteed rate", "asked rate", "penalty") if convolutional else ("last step",)
    table = Table("network", "clean accuracy", *own, "s / epoch", "folder")
    for outcome in outcomes:
        if convolutional:
            asked = f"{outcome.config.rate:g}" if outcome.config.network == "contractive" else "-"
            values = [f"{outcome.rate:.4g}", asked, f"{outcome.penalty:.4g}"]
        else:
            values = [", ".join(_values(training.last_step(outcome.folder)))]
        seconds = f"{outcome.seconds_per_epoch:.2f}"
        table.add_row(outcome.config.title, f"{outcome.accuracy:.2%}", *values, seconds, str(outcome.folder))
    out.print(table)
    for outcome in outcomes:
        if outcome.config.network == "contractive":
            out.print(training.rate_sentence(outcome), highlight=False, soft_wrap=True)


@app.command()
@_reported
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of `rnf train`.")],
    *,
    suite: Annotated[
        Literal["quick", "standard", "full"], typer.Option(help="Which noises and attacks (docs/robustness.md).")
    ] = "standard",
    eps: Annotated[list[float], typer.Option(min=0.0, help="l_inf radius (repeat for several).")] = [0.1],  # noqa: B006
    eps_l2: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0, help="l_2 radius (repeat for several).", show_default="none; 0.5, 1, 2 in the full suite"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of noise seeds.")] = 3,
    attack_seeds: Annotated[
        int, typer.Option(min=1, help="Of these, how many attacks with random starts run with: so much longer.")
    ] = 1,
    samples: Annotated[int | None, typer.Option(min=1, help="First test images.", show_default="all")] = None,
    transfer_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run folder of a network to transfer attacks from (repeat for several).",
            show_default="none; in the full suite the other network of RUN",
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help=TrainConfig.__dataclass_fields__["data_root"].metadata["help"])
    ] = None,
    device: Annotated[str, typer.Option(help="Device to evaluate on.")] = "cpu",
    backend: Backend = None,
) -> None:
    """Accuracy of a trained network under noise and attacks: report.md, .json, .png and .html in its folder."""
    _choose(backend)
    training.check_device(device)
    folders = _runs_in(run)
    for folder in folders:
        model, config = training.load_model(folder)
        model.to(device)
        others = transfer_from or ([other for other in folders if other != folder] if suite == "full" else [])
        sources = {_short(other, others): _source(other, config).to(device) for other in others}
        with training.writing(folder):
            tempfile.TemporaryFile(dir=folder).close()  # before minutes of work rather than after them
        dataset = data.load(config.dataset, data_root or config.data_root)
        images, labels = dataset.test_images[:samples], dataset.test_labels[:samples]
        title = f"{config.dataset}, {config.title}"
        unfinished = folder / "evaluation.safetensors"  # a killed evaluation goes on by the same command
        with training.writing(folder), training.alone(folder):
            with _progress(f"evaluate {config.title}", len(labels)) as update:
                try:
                    report = robustness.evaluate(
                        model,
                        (images, labels),
                        suite=suite,
                        eps=eps,
                        eps_l2=eps_l2 or None,
                        seeds=range(seeds),
                        attack_seeds=attack_seeds,
                        sources=sources,
                        certify=training.certificate(model),
                        checkpoint=unfinished,
                        on_batch=lambda done: update(done, ""),
                    )
                except ValueError as error:
                    _fail(f"{folder} cannot be evaluated: {error}", 1)
            for name, text in (
                ("report.md", f"# {title}\n\n{report.to_markdown()}"),
                ("report.json", report.to_json()),
                ("report.html", report.to_html(title)),
            ):
                replace_file(folder / name, text.encode())
            report.plot(folder / "report.png")
            unfinished.unlink()
        _print_report(f"{title} ({folder})", report)


def _short(folder: Path, folders: list[Path]) -> str:
    """The folder's name, or all of its path where two have the same name."""
    return folder.name if [other.name for other in folders].count(folder.name) == 1 else str(folder)


def _source(folder: Path, config: TrainConfig) -> nn.Module:
    """The network to transfer attacks from."""
    dataset = training.load_config(folder).dataset
    if dataset != config.dataset:
        _fail(f"{folder} was trained on {dataset}, expected {config.dataset} to transfer attacks from it", 1)
    return training.load_model(folder)[0]


def _print_report(title: str, report: robustness.Report) -> None:
    table = Table("test", "accuracy", "spread over seeds", title=title)
    for result in report.results:
        spread = f"{result.std:.2%}" if len(result.per_seed) > 1 else ""
        table.add_row(result.label, f"{result.mean:.2%}", spread)
    out.print(table)
    for check in report.checks:
        out.print(f"{'held' if check.passed else 'NOT HELD'}: {check.name} ({check.detail})", highlight=False)
    for sentence in (*report.notes, report.verdict):
        out.print(sentence, highlight=False, soft_wrap=True)


@app.command()
@_reported
def certify(
    run: Annotated[Path, typer.Argument(help="Run folder of `rnf train`.")],
    *,
    eps: Annotated[list[float], typer.Option(min=0.0, help="Radius to certify (repeat for several).")] = [0.1],  # noqa: B006
    norm: Annotated[
        Literal["linf", "l2"],
        typer.Option(help="linf: each sample's own interval bound; l2: the better of it and Lipschitz constants."),
    ] = "linf",
    samples: Annotated[int | None, typer.Option(min=1, help="First test images.", show_default="all")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help=TrainConfig.__dataclass_fields__["data_root"].metadata["help"])
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    backend: Backend = None,
) -> None:
    """What no attack can break: certified accuracy and radii; certificate_<norm>.json in the run folder."""
    _choose(backend)
    for folder in _runs_in(run):
        model, config = training.load_model(folder)
        with training.writing(folder):
            tempfile.TemporaryFile(dir=folder).close()  # before minutes of work rather than after them
        dataset = data.load(config.dataset, data_root or config.data_root)
        images, labels = dataset.test_images[:samples], dataset.test_labels[:samples]
        radius = None
        if isinstance(model, ZubovNet):
            radius = functools.partial(margin_radius, model, p="2" if norm == "l2" else "inf")
        with _progress(f"certify {config.title}", len(labels)) as update:
            try:
                found = summarise(
                    model, images, labels, eps=eps, norm=norm, radius=radius, on_batch=lambda done: update(done, "")
                )
            except (TypeError, ValueError) as error:
                _fail(f"{folder} cannot be certified: {error}", 1)
        with training.writing(folder):
            replace_file(folder / f"certificate_{norm}.json", found.to_json().encode())
        if as_json:
            print(found.to_json())
        else:
            _print_certificates(f"{config.dataset}, {config.title} ({folder})", found)


def _print_certificates(title: str, found: Summary) -> None:
    table = Table(found.norm, "value", title=title)
    table.add_row("samples", str(found.n_samples))
    table.add_row("clean accuracy", f"{found.clean:.2%}")
    for eps, fraction in found.certified.items():
        table.add_row(f"certified accuracy at {eps:g}", f"{fraction:.2%}")
    table.add_row("mean certified radius", f"{found.radius_mean:.4g}")
    for quantile, radius in found.radius_quantiles.items():
        table.add_row(f"radius, {quantile:.0%} quantile", f"{radius:.4g}")
    out.print(table)


@reproduce_app.command()
@_reported
def cnode(
    *,
    dataset: Annotated[Literal["digits", "mnist", "fashionmnist"], typer.Option(help="Data set.")] = "mnist",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of training seeds.", show_default="3; sweeps: 1")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows, or what some begin with: grid, grid/identity, grid/identity/2, rho, ... (repeat for several).",
            show_default="all",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training set.", show_default="the recipe's")
    ] = None,
    train_samples: Annotated[int | None, typer.Option(help="First training images.", show_default="all")] = None,
    attack_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="First test images, for attacks only; all else takes all.", show_default="all; sweeps: 1000"
        ),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything.", show_default="runs/reproduce-<dataset>")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help=TrainConfig.__dataclass_fields__["data_root"].metadata["help"])
    ] = None,
    backend: Backend = None,
) -> None:
    """Contractive Neural ODEs (arXiv 2508.11432): train and evaluate what is compared, cell by cell, and sum it up.

    Stopped or killed, the same command goes on where it was: finished cells are files that are not computed again.
    """
    budget = {"epochs": epochs, "train_samples": train_samples}
    given = {name: value for name, value in budget.items() if value is not None}
    try:
        cells = reproduction.cells(dataset, seeds=seeds, only=only or (), attack_samples=attack_samples, **given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _choose(backend)
    folder = out_folder or Path("runs") / f"reproduce-{dataset}"
    results = _computed(cells, folder, data.load(dataset, data_root))
    for part, rows in reproduction.by_row(cells, results).items():
        (first, *others), *lines = reproduction.table(rows, spread=False)
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title=f"{part}, {dataset}")
        shown.add_column(first, no_wrap=True)
        for heading in others:
            shown.add_column(heading.replace(" ", "\n"), justify="right")
        for line in lines:
            shown.add_row(*line)
        out.print(shown)
    _write_summary(cells, results, folder / "summary.md")


@reproduce_app.command()
@_reported
def cifar(
    *,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="40")] = None,
    train_samples: Annotated[int | None, typer.Option(help="First training images.", show_default="all")] = None,
    attack_samples: Annotated[int, typer.Option(min=1, help="First test images, for attacks only.")] = 1000,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for everything.")] = Path("runs/reproduce-cifar10"),
    page: Annotated[Path | None, typer.Option(help="Markdown file.", show_default="summary.md in --out")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help=TrainConfig.__dataclass_fields__["data_root"].metadata["help"])
    ] = None,
    backend: Backend = None,
) -> None:
    """The staged network on CIFAR-10, vanilla and contractive, within hours on a CPU: curves, noise, attacks.

    Stopped or killed, the same command goes on where it was.
    """
    budget = {"epochs": epochs, "train_samples": train_samples}
    given = {name: value for name, value in budget.items() if value is not None}
    try:
        cells = reproduction.cifar_cells(seeds=seeds, attack_samples=attack_samples, **given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _choose(backend)
    path = page or out_folder / "summary.md"
    with training.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)  # before hours of work rather than after them
    results = _computed(cells, out_folder, data.load("cifar10", data_root))
    picture = path.with_suffix(".png")
    with training.writing(path.parent), training.alone(path.parent, wait=True):
        replace_file(path, reproduction.cifar_markdown(cells, results, picture.name).encode())
        reproduction.cifar_picture(cells, results, picture)
    _say(f"wrote {path} and {picture}")


def _computed(
    cells: Sequence[reproduction.Cell], folder: Path, images: data.Dataset
) -> dict[str, reproduction.CellResult]:
    """The results of all cells by name: of those that have none yet, computed."""
    with training.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # before minutes of work rather than after them
    unique = {cell.name: cell for cell in cells}
    loaded = {name: reproduction.load(cell, folder) for name, cell in unique.items()}
    results = {name: result for name, result in loaded.items() if result is not None}
    _say(f"{len(results)} of {len(unique)} cells are done")
    with _progress("reproduce", len(unique)) as update:

        def done(cell: reproduction.Cell) -> reproduction.CellResult | None:
            """By another process; what is to be computed again may still be there."""
            try:
                found = reproduction.read(cell, folder)
            except reproduction.CellError:
                return None
            return found if found is not None and found.version == __version__ else None

        def compute(cell: reproduction.Cell) -> reproduction.CellResult:
            try:
                return reproduction.compute(cell, folder, images, on_progress=functools.partial(update, len(results)))
            except ValueError as error:
                _fail(f"{cell.label} cannot be evaluated: {error}", 1)

        left = [cell for name, cell in unique.items() if name not in results]
        try:
            for cell, result in training.shared_out(left, done, compute):
                results[cell.name] = result
                _say(f"{len(results)} of {len(unique)}: {cell.label}, {result.seconds:.0f} s, {result.report.verdict}")
                update(len(results), cell.label)
        except (training.Interrupted, KeyboardInterrupt) as stopped:
            number = stopped.signal if isinstance(stopped, training.Interrupted) else signal.SIGINT
            _fail(f"{str(stopped) or 'stopped by SIGINT'}; the same command goes on", 128 + number)
    return results


@reproduce_app.command()
@_reported
def summary(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `rnf reproduce cnode`.")],
    *,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of training seeds that there are to be.", show_default="3; sweeps: 1"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/results.md"),
) -> None:
    """One page of the cells there are, for MNIST and FashionMNIST, beside the paper's claims; it names the missing.

    Beside it, once there is a network trained for certificates, a picture: what attacks leave and what is certified.
    """
    for folder in folders:
        if not any(folder.glob("cells/*.json")):
            raise typer.BadParameter(f"{folder} has no cells, expected folders of `rnf reproduce cnode`")
    there = {path.stem for folder in folders for path in folder.glob("cells/*.json")}
    cells: list[reproduction.Cell] = []
    for dataset in ("mnist", "fashionmnist"):
        cells += (asked_for := reproduction.cells(dataset, seeds=seeds))
        if seeds is None:  # of the sweeps there is to be one seed, and may be more
            more = reproduction.cells(dataset, seeds=reproduction.SEEDS)
            cells += [cell for cell in more if cell.name in there and cell not in asked_for]
    found = [(cell, reproduction.read(cell, folder)) for cell in cells for folder in folders]
    results = {cell.name: result for cell, result in found if result is not None}
    others = [path for folder in folders for path in sorted(folder.glob("cells/*.json")) if path.stem not in results]
    if others:
        _say(f"note: {len(others)} cells of other settings are left out, {others[0]} for one")
    _write_summary(cells, results, output)
    picture = output.with_name(f"{output.stem}_certified.png")
    with training.writing(output.parent):
        if reproduction.attacked_and_certified(cells, results, picture):
            _say(f"wrote {picture}")


def _write_summary(cells: list[reproduction.Cell], results: dict[str, reproduction.CellResult], path: Path) -> None:
    with training.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with training.alone(path.parent, wait=True):  # of several processes with the same command
            replace_file(path, reproduction.markdown(cells, results).encode())
    _say(f"wrote {path}, {len(results)} of {len({cell.name for cell in cells})} cells")


@app.command()
@_reported
def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path("runs/demo"),
    backend: Backend = None,
) -> None:
    """Train both networks on digits from the same start, compare them under noise and attacks, measure the speed."""
    from robust_node_fast import _demo

    _choose(backend)
    _demo.run(out_folder, out, fit_with_progress)


@app.command()
@_reported
def bench(
    *,
    group: Annotated[
        Literal["bars", "scaling", "grid", "all"], typer.Option(help="Rows of the registry (bench/registry.py).")
    ] = "all",
    only: Annotated[str, typer.Option(help="Only workloads whose name contains this.", show_default="all")] = "",
    mode: Annotated[
        Literal["forward", "input gradient", "forward+backward", "memory"] | None,
        typer.Option(help="Only this mode.", show_default="each row's own"),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(help="cuda: the networks of the papers (bench/gpu.py), no other option but --output."),
    ] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for flow.csv, or gpu_<card>.csv.")] = Path("runs/bench"),
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots.", show_default="that of --output")] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch.set_num_threads, where a row does not fix it.")] = 2,
    budget_minutes: Annotated[float, typer.Option(min=0.0, help="What no time is left for is skipped.")] = 19.0,
) -> None:
    """Time this package against PyTorch and inference engines: every kernel is verified first; CSV, plots, a table."""
    import torch

    from robust_node_fast.bench import capability, gpu, plot, providers, registry, report, rows, run, verify

    if device == "cuda":
        if not torch.cuda.is_available():
            _fail("nothing to measure: PyTorch sees no CUDA device on this machine", 1)
        try:
            _say(f"wrote {gpu.suite(torch.device('cuda'), output)}")
        except verify.WrongResult as wrong:
            _fail(f"nothing is reported: {wrong}", 1)
        return
    missing = providers.PROVIDERS[registry.OURS].missing()
    if missing is not None:
        _fail(f"nothing to measure: this package {missing}", 1)
    try:
        pairs = registry.select(group, only, mode)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with training.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()  # before minutes of work rather than after them
    advice = capability.advice()
    if advice is not None:
        _say(advice)
    with _progress("bench", len(pairs)) as update:
        done = itertools.count(1)
        try:
            found = run.suite(
                pairs,
                threads=threads,
                minutes=budget_minutes,
                on_rows=lambda latest: update(next(done), f"{latest[-1].workload}, {latest[-1].mode}"),
            )
        except verify.WrongResult as wrong:
            _fail(f"nothing is reported: {wrong}", 1)
    with training.writing(output):
        rows.write(found, output / "flow.csv")
        drawn = plot.draw(output / "flow.csv", plots or output)
    print(report.markdown(found))
    _say(f"wrote {', '.join(str(path) for path in (output / 'flow.csv', *drawn))}")


zubov_app = typer.Typer(no_args_is_help=True, help="Zubov-Nets in the plane: draw the regions of a run.")
app.add_typer(zubov_app, name="zubov")
zubov_app.command("plot")(_reported(zubov_commands.plot))
reproduce_app.command("zubov")(_reported(zubov_commands.reproduce))


def main() -> None:
    """The console script ``rnf``."""
    app()
