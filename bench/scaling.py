"""How training would scale to 1,024 cards: a model, and what of it can be checked on one machine without any.

    python -m robust_node_fast.bench.scaling [--measure] [--output bench/results] [--page docs/scaling.md]

writes ``scaling.csv`` (predicted, nothing in it is measured), with ``--measure`` also ``scaling_gloo.csv``: all-reduces
and training steps of one and two gloo processes here, beside what the same rules predict. What goes in:

- the time of the flows on one card: ``bench/model.py``, bfloat16, ``recompute=False``;
- ``ENDS`` passes over the first state for all that is not a flow, and the optimizer's over the parameters;
- ``HOST`` for every launch, if no CUDA graph replays them;
- NCCL's own model of ring and tree (``src/graph/tuning.cc``, protocol LL128), the faster of which it takes;
- what the trainer sends: every parameter's gradient by itself as soon as backward has it, in that order, and three
  small sums (batch norm forward and backward, the metrics) that everybody waits for. A flow has the gradients of all
  its steps at its end.
"""

from __future__ import annotations

import datetime
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer

import robust_node_fast as rnf
from robust_node_fast._machine import machine
from robust_node_fast.bench import model, throughput
from robust_node_fast.bench.plot import BLUE, GREY, ORANGE
from robust_node_fast.bench.registry import OURS
from robust_node_fast.bench.report import replace_tables, table
from robust_node_fast.bench.resources import RESULTS as RESOURCES
from robust_node_fast.bench.resources import Resources, read
from robust_node_fast.bench.rows import read_as, write
from robust_node_fast.bench.throughput import TRAINING, Net
from robust_node_fast.bench.together import together
from robust_node_fast.models import CIFARNode, StagedCIFARNode

RESULTS, MEASURED = "scaling.csv", "scaling_gloo.csv"
CARD = next(card for card in model.CARDS if card.name == "H100 SXM")
NODE = 8  # cards
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and card, one way: H100's data sheet; DGX H100: one 400 Gb/s port a card
BUS = 0.8  # of these, what all-reduces are assumed to reach
BASE = {"ring": 10.0e-6, "tree": 4.4e-6}  # NCCL: seconds of any all-reduce, and of a hop in a node and between nodes
HOP, FAR_HOP = {"ring": 1.9e-6, "tree": 1.2e-6}, {"ring": 4.0e-6, "tree": 8.5e-6}
TREE = 0.9  # of the ring's bandwidth; NCCL's too
ENDS, END_LAUNCHES = 20, 40  # assumed: passes over the first state; kernels that belong to no flow, optimizer included
HOST = 10e-6  # assumed: seconds from one launch to the next when Python makes them
SMALL = 4096  # bytes of a sum that is there for batch norm or the metrics
CARDS = tuple(2**k for k in range(11))
WEAK, STRONG = 128, 4096  # images a card; images in all
IMAGES = 50_000  # of CIFAR-10's training set
HALF = 0.5  # efficiency below which scaling is said to have stopped


class Gradient(NamedTuple):
    """Of one parameter: how many numbers, the last flow that backward passes before it is ready, if a flow's own."""

    numbers: int
    last_flow: int
    of_flow: bool


@dataclass(frozen=True)
class Network:
    """What the model has to know.

    Attributes:
        flows: in the order of evaluation.
        gradients: in the order of evaluation. ``last_flow`` is the number of flows for the head, which none precedes.
    """

    name: str
    flows: tuple[model.Shape, ...]
    gradients: tuple[Gradient, ...]

    @classmethod
    def of(cls, network: CIFARNode | StagedCIFARNode, size: int = 32) -> Network:
        flows = network.flows()
        shapes = [
            model.Shape(name, flow.weight.shape[1], size >> k, flow.n_steps) for k, (name, flow) in enumerate(flows)
        ]
        places = {name: place for place, (name, _) in enumerate(flows)}
        found: list[Gradient] = []
        for name, parameter in network.named_parameters():
            own = places.get(name.rpartition(".")[0])
            stem = own is None and not any(gradient.of_flow for gradient in found)
            place = own if own is not None else 0 if stem else len(flows)
            found.append(Gradient(parameter.numel(), place, own is not None))
        return cls(type(network).__name__, tuple(shapes), tuple(found))

    @property
    def parameters(self) -> int:
        return sum(gradient.numbers for gradient in self.gradients)


@dataclass(frozen=True)
class Plan:
    """How training is run; the defaults are what ``rnf train`` does today.

    Attributes:
        itemsize: bytes of a gradient on the wire.
        parts: a flow is cut into so many flows, each of which has its gradients at its own end.
        joined: the gradients that are ready at the same time go in one all-reduce.
        accumulate: so many batches are computed between two optimizer steps.
        host: seconds between two launches.
        algorithms: that NCCL may take.
    """

    name: str
    itemsize: int = 4
    parts: int = 1
    joined: bool = False
    accumulate: int = 1
    host: float = HOST
    algorithms: tuple[str, ...] = ("ring", "tree")


PLANS = (
    Plan("today"),
    Plan("flat ring only", algorithms=("ring",)),
    Plan("one bucket when ready", joined=True),
    Plan("bf16 gradients", itemsize=2),
    Plan("flows in 4 parts", parts=4),
    Plan("4 batches a step", accumulate=4),
    Plan("CUDA graph", host=model.LAUNCH),
    Plan("graph, bucket, bf16", itemsize=2, joined=True, host=model.LAUNCH),
)


@dataclass
class Prediction:
    """A row of the model, of one optimizer step. Nothing is measured.

    ``efficiency`` is images a second over those of so many single cards that train as they do today; a plan that is
    faster on one card begins above 1.
    """

    network: str
    scaling: str
    plan: str
    cards: int
    batch_per_card: int
    compute_ms: float = 0.0
    communication_ms: float = 0.0
    exposed_ms: float = 0.0
    images_per_s: float = 0.0
    efficiency: float = 0.0


@dataclass
class Check:
    """What was measured here, with gloo, and what the rules predict.

    ``batch`` of each process. The prediction of an all-reduce is a line through all of them; of a step, the time of the
    same processes without communication plus all of it: gloo computes on the cores that backward needs, so none is
    hidden.
    """

    work: str
    processes: int
    measured_ms: float
    predicted_ms: float
    network: str = ""
    batch: int | None = None
    bytes: int | None = None
    rounds: int = 0
    machine: str = ""
    torch: str = torch.__version__
    robust_node_fast: str = rnf.__version__
    time: str = ""


def all_reduce(cards: int, size: float, algorithm: str) -> float:
    """Seconds; NCCL's model."""
    if cards == 1:
        return 0.0
    nodes, near = math.ceil(cards / NODE), min(cards, NODE)
    bandwidth = BUS * (NVLINK if nodes == 1 else min(NVLINK, NODE * NETWORK))  # every card of a node has its own port
    if algorithm == "ring":
        hops, far_hops = 2 * (cards - 1), 2 * (nodes - 1)
        moved = 2.0 * (cards - 1) / cards * size / bandwidth
    else:  # a chain in the node, two binary trees between nodes
        hops, far_hops = 2 * (near - 1), 2 * math.ceil(math.log2(nodes))
        moved = 2.0 * size / (TREE * bandwidth)
    near_hops = hops - far_hops if algorithm == "ring" else hops
    return BASE[algorithm] + near_hops * HOP[algorithm] + far_hops * FAR_HOP[algorithm] + moved


def exposed(ready: Iterable[tuple[float, float]], seconds: Callable[[float], float], end: float) -> tuple[float, float]:
    """Seconds of all gradients' all-reduces, one after another, and of what is left when backward is done.

    Args:
        ready: (when a gradient is there, its bytes), in this order.
        seconds: of an all-reduce of so many bytes.
        end: of backward.
    """
    total = free = 0.0
    for moment, size in ready:
        taken = seconds(size)
        total, free = total + taken, max(free, moment) + taken
    return total, max(0.0, free - end)


def gradients(network: Network, plan: Plan, backward: Sequence[float]) -> list[tuple[float, float]]:
    """When each gradient is ready, and its bytes; ``backward`` holds the seconds of every flow."""
    found = []
    for numbers, flow, of_flow in reversed(network.gradients):
        end, parts = sum(backward[flow:]), plan.parts if of_flow else 1
        for part in range(1, parts + 1):
            early = backward[flow] * (1 - part / parts) if of_flow else 0.0
            found.append((end - early, plan.itemsize * numbers / parts))
    found.sort(key=lambda each: each[0])
    if plan.joined:
        sums: dict[float, float] = {}
        for moment, size in found:
            sums[moment] = sums.get(moment, 0.0) + size
        return list(sums.items())
    return found


def predict(
    network: Network, plan: Plan, cards: int, batch: int, table_: list[Resources]
) -> tuple[float, float, float]:
    """Seconds of one optimizer step without communication, of all communication, and of the exposed part."""
    kernels = model.PASSES["training"]["ours, recompute=False"]
    flows = [model.flow_time(CARD, shape, batch, "bfloat16", kernels, table_)[0] for shape in network.flows]
    stream = model.STREAM * CARD.bandwidth
    ends = 2.0 * ENDS * network.flows[0].state(batch) / stream + END_LAUNCHES * model.LAUNCH
    optimizer = 5.0 * 4 * network.parameters / stream  # reads weight, gradient and momentum, writes two of them
    launches = END_LAUNCHES + len(kernels) * sum(shape.n_steps for shape in network.flows)
    once = max(sum(flows) + ends, launches * plan.host)
    slower = once / (sum(flows) + ends)  # waiting for the host stretches all of it

    def seconds(size: float) -> float:
        return min(all_reduce(cards, size, algorithm) for algorithm in plan.algorithms)

    backward = [2.0 / 3.0 * slower * flow for flow in flows]
    total, left = exposed(gradients(network, plan, backward), seconds, sum(backward))
    sums = (2 * plan.accumulate + 1) * seconds(SMALL)  # batch norm's for every batch
    return plan.accumulate * once + optimizer, total + sums, left + sums


def predictions() -> list[Prediction]:
    table_ = read(RESOURCES)
    rows = []
    for network in (Network.of(CIFARNode()), Network.of(StagedCIFARNode())):
        for scaling in ("weak", "strong"):
            one = 0.0  # images a second of one card today
            for plan in PLANS:
                for cards in CARDS:
                    batch = WEAK if scaling == "weak" else STRONG // cards
                    if batch % plan.accumulate:
                        continue
                    part = batch if scaling == "weak" else batch // plan.accumulate
                    compute, communication, left = predict(network, plan, cards, part, table_)
                    images = cards * part * plan.accumulate / (compute + left)
                    one = one or images
                    row = Prediction(network.name, scaling, plan.name, cards, part)
                    row.compute_ms, row.communication_ms, row.exposed_ms = (
                        1e3 * compute,
                        1e3 * communication,
                        1e3 * left,
                    )
                    row.images_per_s, row.efficiency = images, images / one / cards
                    rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Here, with gloo
# ---------------------------------------------------------------------------------------------------------------------

SIZES = tuple(4**k for k in range(6, 13))  # bytes of the all-reduces: 4 KiB to 16 MiB
CHECKED = ((Net("CIFARNode"), 2), (Net("StagedCIFARNode"), 8))  # batch of each process: so few that sending shows
SMOKE = ((Net("StagedCIFARNode", (8, 16, 16), 1), 4),)


def _seconds(call: Callable[[], object]) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reduces(rounds: int) -> list[float]:
    """Median seconds of an all-reduce of each of ``SIZES``."""
    found = []
    for size in SIZES:
        tensor, taken = torch.ones(size // 4), []
        for _ in range(1 + rounds):
            tensor.fill_(1.0)
            taken.append(_seconds(functools.partial(dist.all_reduce, tensor)))
        found.append(statistics.median(taken[1:]))
    return found


def steps(net: Net, batch: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a training step without communication, and with it; they take turns."""
    way = next(way for way in throughput.WAYS if way.name == OURS)
    whole = batch * (dist.get_world_size() if dist.is_initialized() else 1)
    calls = [throughput.work(net, way, TRAINING, whole, averaged=averaged) for averaged in (False, True)]
    for call in calls:
        call()
        call()  # DDP arranges its buckets anew after the first step
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        for call, seconds in zip(calls, taken, strict=True):
            seconds.append(_seconds(call))
    alone, averaged = map(statistics.median, taken)
    return alone, averaged


def line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and seconds a byte: least squares of the relative errors."""
    weights = torch.tensor(seconds, dtype=torch.float64).reciprocal()
    unknowns = torch.stack([torch.ones(len(sizes), dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)], 1)
    latency, each = torch.linalg.lstsq(unknowns * weights[:, None], torch.ones_like(weights)).solution.tolist()
    return latency, each


def measure(smoke: bool) -> list[Check]:
    """One and two processes, one thread each."""
    rounds = 3 if smoke else 15
    about: dict[str, Any] = {
        "machine": machine(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    found = together(reduces, 2, 10 * rounds)[0]
    latency, each = line(SIZES, found)
    rows = [
        Check("all-reduce", 2, 1e3 * measured, 1e3 * (latency + size * each), bytes=size, rounds=10 * rounds, **about)
        for size, measured in zip(SIZES, found, strict=True)
    ]
    for net, batch in SMOKE if smoke else CHECKED:
        network = Network.of(net.build(throughput.WAYS[-1]))
        sent = sum(latency + 4 * gradient.numbers * each for gradient in network.gradients)
        for processes in (1, 2):
            alone, averaged = together(steps, processes, net, batch, rounds)[0]
            left = sent if processes > 1 else 0.0
            row = Check("training step", processes, 1e3 * averaged, 1e3 * (alone + left), net.name, batch, **about)
            rows.append(replace(row, rounds=rounds))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def stops(rows: Sequence[Prediction]) -> int:
    """The most cards, with all smaller numbers, at ``HALF`` the speed a card or more."""
    most = 1
    for row in sorted(rows, key=lambda row: row.cards):
        if row.efficiency < HALF:
            break
        most = row.cards
    return most


def tables(rows: Sequence[Prediction], checks: Sequence[Check]) -> dict[str, list[str]]:
    """Name -> lines in Markdown of the tables in the page."""
    groups: dict[tuple[str, str, str], list[Prediction]] = {}
    for row in rows:
        groups.setdefault((row.network, row.scaling, row.plan), []).append(row)
    shown = (8, 64, 256, 1024)
    efficiencies = []
    for key, found in groups.items():
        by = {row.cards: row for row in found}
        cells = [f"{by[cards].efficiency:.0%}" if cards in by else "" for cards in shown]
        efficiencies.append((*key, *cells, str(stops(found))))
    steps_ = [
        (
            row.network,
            row.scaling,
            str(row.cards),
            str(row.batch_per_card),
            *(f"{value:.3g}" for value in (row.compute_ms, row.communication_ms, row.exposed_ms, row.images_per_s)),
        )
        for row in rows
        if row.plan == PLANS[0].name and row.cards in (1, *shown)
    ]
    checked = [
        (
            check.work if not check.network else f"{check.network}, {check.work} of {check.batch} images",
            str(check.processes),
            "" if check.bytes is None else str(check.bytes),
            f"{check.measured_ms:.4g}",
            f"{check.predicted_ms:.4g}",
            f"{check.measured_ms / check.predicted_ms:.2f}",
        )
        for check in checks
    ]
    return {
        "efficiency": table(
            ("network", "scaling", "plan", *(f"{cards} cards" for cards in shown), "half the speed until"), efficiencies
        ),
        "steps": table(
            ("network", "scaling", "cards", "images a card", "compute, ms", "sent, ms", "exposed, ms", "images/s"),
            steps_,
        ),
        "gloo": table(("work", "processes", "bytes", "measured, ms", "predicted, ms", "ratio"), checked),
        "conditions": [f"{checks[0].machine}, torch {checks[0].torch}, {checks[0].time[:10]}, one thread a process."],
    }


def draw(rows: Sequence[Prediction], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    styles = {PLANS[0].name: "-", PLANS[1].name: ":", PLANS[-1].name: "--"}
    for axes, scaling in zip(figure.subplots(1, 2), ("weak", "strong"), strict=True):
        axes.plot(CARDS, [1.0] * len(CARDS), color=GREY, linewidth=0.6)
        for network, color in ((CIFARNode.__name__, BLUE), (StagedCIFARNode.__name__, ORANGE)):
            for plan, style in styles.items():
                found = [row for row in rows if (row.network, row.scaling, row.plan) == (network, scaling, plan)]
                axes.plot(
                    [row.cards for row in found],
                    [row.efficiency for row in found],
                    color=color,
                    linestyle=style,
                    label=f"{network}, {plan}",
                )
        sizes = f"{WEAK} images a card" if scaling == "weak" else f"{STRONG} images in all"
        axes.set_xscale("log", base=2)
        axes.set_xticks(CARDS[::2], [f"{cards:,}" for cards in CARDS[::2]])
        axes.set(xlabel="H100 cards", ylabel="efficiency", ylim=(0, 1.5), title=f"{scaling}: {sizes}")
    axes.legend(fontsize=7, loc="upper right")
    figure.suptitle("A model, not a measurement: no card has run this", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(
    measured: Annotated[
        bool, typer.Option("--measure", help="Also time gloo here: two minutes, idle machine.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the CSVs.")] = Path("bench/results"),
    picture: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    page: Annotated[Path | None, typer.Option(help="Page whose tables are replaced.")] = None,
    smoke: Annotated[bool, typer.Option(help="A tiny network: that it runs.")] = False,
) -> None:
    rows = predictions()
    write(rows, output / RESULTS, Prediction)
    if measured:
        write(measure(smoke), output / MEASURED, Check)
    if picture:
        draw(rows, picture)
    found = tables(read_as(Prediction, output / RESULTS), read_as(Check, output / MEASURED))
    print("\n\n".join("\n".join(lines) for lines in found.values()))
    if page:
        replace_tables(page, found)


if __name__ == "__main__":
    typer.run(main)
