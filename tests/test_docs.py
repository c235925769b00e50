"""Every Python block in the README and docs/ runs as written, page by page."""

from __future__ import annotations

import csv
import functools
import json
import operator
import re
import statistics
from pathlib import Path

import pytest

from robust_node_fast import reproduce
from robust_node_fast.zubov import experiments

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def means(dataset: str, row: str) -> dict[tuple[str, float], float]:
    """In %, over the training seeds there are."""
    return _means(reproduce.cells(dataset, only=[row], seeds=3), dataset)


def cifar_means(row: str) -> dict[tuple[str, float], float]:
    return _means([cell for cell in reproduce.cifar_cells(attack_samples=1000) if cell.row == row], "cifar10")


def _means(cells: list[reproduce.Cell], folder: str) -> dict[tuple[str, float], float]:
    paths = (reproduce.path_of(cell, ROOT / "docs" / "results" / folder) for cell in cells)
    reports = [
        {(result["name"], result["strength"]): 100.0 * result["mean"] for result in content["report"]["results"]}
        for content in (json.loads(path.read_text()) for path in paths if path.exists())
    ]
    every = set.intersection(*map(set, reports))  # newer cells have a line more
    return {test: statistics.fmean(report[test] for report in reports) for test in every}


def masked(dataset: str, row: str, eps: float, *, seeds: int | None = None) -> dict[str, list[int]]:
    """Images that fall to an attack at l_inf ``eps`` and to none with gradients, per seed with too many."""
    found: dict[str, list[int]] = {}
    for cell in reproduce.cells(dataset, only=[row], seeds=seeds):
        path = reproduce.path_of(cell, ROOT / "docs" / "results" / dataset)
        for check in json.loads(path.read_text())["report"]["checks"]:
            named = re.fullmatch(rf"white box <= (.+) at l_inf eps {eps:g}", check["name"])
            if named and not check["passed"]:
                found.setdefault(named[1], []).append(int(check["detail"].split()[0]))
    return found


def assert_says(page: str, *sentences: str) -> None:
    """However its lines are broken."""
    text = " ".join((ROOT / page).read_text().split())
    for sentence in sentences:
        assert sentence in text, sentence


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:csrc|tests|bench|examples|docs|robust_node_fast)/[\w./]+)`", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing


def test_figures_of_the_readme_come_from_the_committed_results() -> None:
    results, mnist, cifar = ROOT / "bench" / "results", "MNIST net, B128", "CIFAR net, B16"
    saving = "robust_node_fast, recompute=False"

    def epoch(folder: Path) -> tuple[float, float]:
        with (folder / "mnist_epoch.csv").open() as file:
            seconds = {row["provider"]: float(row["seconds_per_epoch"]) for row in csv.DictReader(file)}
        return seconds["robust_node_fast"], seconds["plain PyTorch"]

    def numbers(folder: Path, column: str, *of: tuple[str, str, str]) -> list[float]:
        with (folder / "flow.csv").open() as file:
            rows = {(row["workload"], row["mode"], row["provider"]): row for row in csv.DictReader(file)}
        return [float(rows[which][column]) for which in of]

    def ratios(folder: Path, *of: tuple[str, str, str]) -> list[str]:
        return [f"{number:.1f}" for number in numbers(folder, "best_pytorch_over_this", *of)]

    of_mnist = tuple((mnist, mode, "robust_node_fast") for mode in ("forward", "input gradient", "forward+backward"))
    of_cifar = (
        (cifar, "forward", "robust_node_fast"),
        (cifar, "input gradient", saving),
        (cifar, "forward+backward", saving),
    )
    of_cifar_kept = tuple((cifar, mode, "robust_node_fast") for mode in ("input gradient", "forward+backward"))
    ours, plain = epoch(results)
    forward, attack, training, *wide = ratios(results, *of_mnist, *of_cifar)
    openvino, fused = numbers(results, "p50_ms", (mnist, "forward", "OpenVINO"), of_mnist[0])
    intel = results / "intel_amx"
    old_ours, old_plain = epoch(intel)
    old = ratios(intel, *of_mnist, *of_cifar)

    def accuracies(row: str) -> dict[tuple[str, float], str]:
        return {test: f"{accuracy:.1f}%" for test, accuracy in means("mnist", row).items()}

    certified, paper, authors = map(accuracies, ("certified", "grid/default/2", "grid/authors/2"))

    def gains(dataset: str) -> list[str]:
        """In points: of the paper's network, of its initialisation and of its penalty over a vanilla network; what its
        penalty adds to its initialisation."""
        rows = ("authors/2", "authors/none", "default/2", "default/none")
        paper, start, penalty, vanilla = (means(dataset, f"grid/{row}")["pgd", 0.02] for row in rows)
        return [f"{gain:.1f}" for gain in (paper - vanilla, start - vanilla, penalty - vanilla, paper - start)]

    everything = accuracies("full/certified")
    of_mnist_net, of_fashion_net = gains("mnist"), gains("fashionmnist")
    wide_vanilla, wide_contractive = (cifar_means(row) for row in ("cifar/vanilla", "cifar/contractive"))
    assert_says(
        "README.md",
        f"its network keeps {of_mnist_net[0]} points more than a vanilla one initialised as PyTorch does on MNIST, and "
        f"{of_fashion_net[0]} on FashionMNIST",
        f"already keeps {of_mnist_net[1]} and {of_fashion_net[1]} more, to which the penalty adds {of_mnist_net[3]} "
        f"and {of_fashion_net[3]}; with PyTorch's initialisation it adds {of_mnist_net[2]} and {of_fashion_net[2]}",
        f"classifies {certified['clean', 0.0]} of the clean images, {certified['pgd', 0.1]} under PGD-40",
        f"{certified['certified', 0.1]} are certified there",
        f"leaves {everything['worst case', 0.1]} at 0.1",
        f"it leaves {everything['worst case', 0.2]} where suite `standard` leaves {certified['worst case', 0.2]}",
        f"keeps {paper['pgd', 0.1]} under PGD at 0.1, {authors['pgd', 0.1]} from its authors' initialisation",
        f"keeps {wide_contractive['pgd', 4 / 255]:.1f}% under PGD at 4/255",
        f"for {wide_contractive['clean', 0.0]:.1f}% instead of {wide_vanilla['clean', 0.0]:.1f}% of the clean images",
        f"**{plain / ours:.1f} times faster training**",
        f"takes {ours:.1f} s instead of {plain:.1f} s",
        f"**{forward} times faster flow, {attack} times faster input gradients**, as attacks need them, than the best",
        f"{openvino / fused:.1f} times slower forward",
    )
    assert wide_vanilla["pgd", 4 / 255] == 0.0
    assert_says(
        "docs/kernels.md",
        f"against eager | {plain / ours:.1f} | {old_plain / old_ours:.1f} |",
        f"training | {forward}, {attack}, {training} | {', '.join(old[:3])} |",
        f"`recompute=False` | {', '.join(wide)} | {', '.join(old[3:])} |",
        f"which gives {' and '.join(ratios(results, *of_cifar_kept))} in the place of {' and '.join(wide[1:])}",
    )


def test_figures_of_the_page_on_certificates_come_from_the_committed_results() -> None:
    with (ROOT / "bench" / "results" / "certify.csv").open() as file:
        costs = list(csv.DictReader(file))
    forwards = {(row["network"], row["work"]): f"{float(row['forwards']):.1f}" for row in costs}
    small, strided = (
        [forwards[network, work] for work in ("certificate", "constants, l_inf", "constants, l_2")]
        for network in ("MNISTNode", "StridedNode")
    )
    with (ROOT / "bench" / "results" / "certificates.csv").open() as file:
        (sure, by_constants, in_l2) = csv.DictReader(file)
    assert {row["threads"] for row in costs} == {"1"}
    assert {row["images"] for row in costs} == {"10000"}
    assert {row["images"] for row in (sure, by_constants, in_l2)} == {"1000"}
    held, not_held = (f"{100 * float(row['certified']):.1f}" for row in (sure, by_constants))
    sentences = [
        f"takes {small[0]} plain forward passes of the papers' network, and {strided[0]} of `StridedNode`",
        f"radii in l_inf take {small[1]} and {strided[1]} forward passes, in l_2 {small[2]} and {strided[2]}",
        f"bound E certifies {held}% of the first 1,000 test images at l_inf radius 0.1, the constants {not_held}%",
        f"The median radius by constants is {float(by_constants['median_radius']):.1e} in l_inf "
        f"and {float(in_l2['median_radius']):.1e} in l_2; by bound E it is {float(sure['median_radius']):.2f}",
    ]
    mnist, fashion = means("mnist", "certified"), means("fashionmnist", "certified")
    for found, eps in ((mnist, 0.1), (fashion, 0.05)):
        clean, attacked, held = (found[key] for key in (("clean", 0.0), ("pgd", eps), ("certified", eps)))
        sentences.append(f"{clean:.1f}% clean, {attacked:.1f}% under PGD-40, {held:.1f}% certified")
    compared = [
        [means(dataset, row) for row in ("certified", "grid/authors/2", "grid/default/2")]
        for dataset in ("mnist", "fashionmnist")
    ]
    for name, aim, key in (
        ("clean", "0.5 less at most", ("clean", 0.0)),
        ("Gaussian noise 0.2", "more", ("gaussian", 0.2)),
        ("Gaussian noise 0.3", "more", ("gaussian", 0.3)),
        ("PGD-40 at 0.1", "more", ("pgd", 0.1)),
        ("PGD-40 at 0.2", "more", ("pgd", 0.2)),
        ("certified at 0.1", "more", ("certified", 0.1)),
    ):
        reached = " | ".join(f"{network[key]:.1f}" for networks in compared for network in networks)
        sentences.append(f"| {name} | {aim} | {reached} |")
    on_mnist, on_fashion = (
        [[f"{network['salt_and_pepper', part]:.1f}%" for network in networks] for part in (0.2, 0.05)]
        for networks in compared
    )
    sentences += [
        f"{on_mnist[0][0]} instead of {on_mnist[0][1]}, at 0.05 {on_mnist[1][0]} instead of {on_mnist[1][1]}",
        f"it is {on_fashion[0][0]} where the paper's networks have {on_fashion[0][1]} (the authors' initialisation) "
        f"and {on_fashion[0][2]} (PyTorch's)",
    ]
    everything = means("mnist", "full/certified")
    (worst, attacked), (far_worst, far_attacked) = (
        (everything["worst case", eps], everything["pgd", eps]) for eps in (0.1, 0.2)
    )
    sentences += [
        f"{worst:.1f}% survive every attack at 0.1, AutoAttack among them, against {attacked:.1f}% for PGD-40 alone",
        f"that is {far_worst:.1f}% against {far_attacked:.1f}%",
    ]
    fashionable = means("fashionmnist", "full/certified")
    near, far, far_attacked = (fashionable[key] for key in (("worst case", 0.05), ("worst case", 0.1), ("pgd", 0.1)))
    sentences += [
        f"{near:.1f}% survive every attack at 0.05",
        f"{far:.1f}%, against {far_attacked:.1f}% for PGD-40 alone",
    ]
    alone = masked("mnist", "certified", 0.3)
    sentences += [
        f"breaks {min(alone['square'])} to {max(alone['square'])} of 64 images that nothing with gradients breaks",
        f"{min(alone['pgd on vanilla']) / 100:.1f} to {max(alone['pgd on vanilla']) / 100:.1f}% of all images",
    ]
    (near,), (far,) = (masked("fashionmnist", "full/certified", eps)["square"] for eps in (0.1, 0.2))
    sentences.append(f"Square alone breaks {near} images at 0.1, {far} at 0.2")
    broken = masked("mnist", "full/certified", 0.2, seeds=3)["square"]
    assert len(broken) == 3
    sentences.append(f"it breaks {min(broken)} to {max(broken)} of the 500 images that neither FGSM nor PGD breaks")
    # What the page says of the two comparisons on either data set, as the results work it out.
    results = (ROOT / "docs" / "results.md").read_text().split("\n## ")[1:]
    verdicts = [
        re.findall(r"Against `grid/(\w+)/2`.*The certified network (dominates|does not)", part) for part in results
    ]
    assert verdicts == [
        [("authors", "dominates"), ("default", "dominates")],
        [("authors", "dominates"), ("default", "dominates")],
    ]
    ours, theirs = (means("fashionmnist", row)["clean", 0.0] for row in ("certified", "grid/authors/2"))
    sentences.append(f"{ours:.1f}% instead of {theirs:.1f}% of the clean images")
    assert_says("docs/certify.md", *sentences)


def test_figures_of_the_page_on_cpu_kernels_come_from_the_committed_results() -> None:
    results = ROOT / "bench" / "results"

    def rows(path: Path) -> list[dict[str, str]]:
        with path.open() as file:
            return list(csv.DictReader(file))

    def slowest(folder: Path) -> dict[str, str]:
        found = [
            row for row in rows(folder / "flow.csv") if row["provider"] == "robust_node_fast" and row["status"] == "ok"
        ]
        return min(found, key=lambda row: float(row["best_pytorch_over_this"] or "inf"))

    here, intel = slowest(results), slowest(results / "intel_amx")
    shape = "one of {channels} channels and {height}x{width} trains".format(**here)
    old_shape = "with {channels} channels and {height}x{width}".format(**intel)
    assert here["mode"] == "forward+backward"
    step = {
        row["provider"]: float(row["p50_ms"] or "nan")
        for row in rows(results / "flow.csv")
        if row["workload"] == "one step, C64, B1"
    }
    rounding = {row["algorithm"]: float(row["flow_max"]) for row in rows(results / "winograd_error.csv")}
    narrow = rounding["F(4x4) 0 1/sqrt2 sqrt2"]
    wide = min(error for name, error in rounding.items() if name.startswith("F(6x6)"))
    assert_says(
        "docs/kernels.md",
        f"{shape} {float(here['best_pytorch_over_this']):.1f} times as fast",
        f"{step['ncnn (convolution only)'] / step['robust_node_fast']:.2f} times as fast",
        f"ours had {float(intel['best_pytorch_over_this']):.2f} of its speed {old_shape}",
        f"it has {wide:.1f} times PyTorch's error over 16 steps, where F(4x4, 3x3) has {narrow:.1f}",
    )


def test_figures_of_the_page_on_zubov_nets_come_from_the_committed_results() -> None:
    with (ROOT / "bench" / "results" / "zubov.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loop_over_this"]]
    speed = {(row["work"], int(row["classes"]), row["provider"]): float(row["loop_over_this"]) for row in rows}

    def times(work: str, classes: int, over: str, by: str = "robust_node_fast") -> float:
        return speed[work, classes, by] / speed[work, classes, over]

    def step(method: str) -> float:
        return speed["training step, digits", 10, method]

    derivative = [times("value and derivative", k, "loop") for k in (10, 100)]
    forward_mode = [times("value and derivative", k, "loop", "torch.func.jvp") for k in (10, 100)]
    rays, together = ([times("boundary", k, over) for k in (10, 100)] for over in ("loop", "loop over classes"))
    both, better = ([times("both", k, over) for k in (10, 100)] for over in ("loop", "loop over classes"))
    assert both[0] >= 5.0
    assert both[1] >= 20.0
    assert better[0] >= 5.0
    assert_says(
        "docs/zubov.md",
        f"bisection: {both[0]:.0f} times faster with 10 classes, {both[1]:.0f} times with 100: both aims are met",
        f"all rays of a class together: {better[0]:.1f} and {better[1]:.1f} times, which meets the first",
        f"values and derivatives {derivative[0]:.1f} and {derivative[1]:.1f} times",
        f"`torch.func.jvp` of our functions {forward_mode[0]:.1f} and {forward_mode[1]:.1f}",
        f"takes {step('resnet'):.1f} times as long as that of `resnet`, {step('node'):.1f} times that of `node`",
        f"{step('lyanet'):.1f} times that of `lyanet` and {step('contractive-node'):.1f} times that of `contr",
        f"[{step('contractive-node'):.1f} to {step('resnet'):.0f} times as long](#cost)",
        f"the boundary {rays[0]:.0f} and {rays[1]:.0f} times, or {together[0]:.1f} and {together[1]:.1f} with all rays",
    )


def zubov_mean(part: str, row: str, *where: str | int) -> float:
    """Over three seeds, in %."""
    cells = [cell for cell in experiments.cells(only=[part]) if cell.row == row]
    found = [experiments.read(cell, ROOT / "docs" / "results" / "zubov") for cell in cells]
    assert len(found) == 3
    return 100.0 * statistics.fmean(functools.reduce(operator.getitem, where, content) for content in found)


def test_figures_of_the_zubov_nets_come_from_the_committed_results() -> None:
    def kept(part: str, row: str = "zubov") -> str:
        return f"{zubov_mean(part, row, 'autoattack', str(experiments.EPS[part][1])):.1f}"

    def without(change: str) -> str:
        return f"{kept('digits', f'zubov, {change}')}%"

    def state(part: str, what: str = "stays", row: str = "zubov") -> str:
        return f"{zubov_mean(part, row, 'regions', 'test', what):.0f}"

    assert state("digits", "arrives") == state("digits")
    assert_says(
        "docs/zubov.md",
        f"{state('digits')}% (digits), {state('mnist')}% (MNIST) and {state('fashionmnist')}% (FashionMNIST) of the",
        f"on CIFAR-10, with small networks, {state('cifar10')}% |",
        f"{state('digits')}% of the first states of test images on digits, {state('mnist')}% on MNIST and "
        f"{state('fashionmnist')}% on FashionMNIST are in the region of their class at time 200",
        f"at first, and {state('digits', row='zubov, no arrival')}%, {state('mnist', row='zubov, no arrival')}% and "
        f"{state('fashionmnist', row='zubov, no arrival')}% still at time 200",
        f"leaves {without('no arrival')} on digits instead of {kept('digits')}%. On MNIST it is "
        f"{kept('mnist', 'zubov, no arrival')}% instead of {kept('mnist')}%, but "
        f"{kept('mnist', 'zubov, consistency 100, no arrival')}% with a weight of consistency of 100",
        f"(AutoAttack at 0.1: {kept('digits')} and {without('no arrival')}; `contractive-node` "
        f"{kept('digits', 'contractive-node')}%, `resnet` {kept('digits', 'resnet')}%)",
        f"{kept('digits')}% with all of them): without consistency {without('no consistency')}",
        f"without both losses for the equation {without('no consistency, no arrival')}, without containment "
        f"{without('no containment')}, without exclusion {without('no exclusion')}, without classification "
        f"{without('no classification')}:",
        f"{zubov_mean('digits', 'zubov, no separation, no spacing', 'meeting'):.0f}% of the pairs of regions meet, and "
        f"{without('no separation, no spacing')} are kept. Fixed equilibria: {without('fixed equilibria')}, an f for "
        f"each step: {without('f of each step')}, partial attention: {without('partial attention')}, none: "
        f"{without('no attention')}.",
        f"{zubov_mean('digits', 'zubov, convolutional flow', 'report', 'results', 0, 'mean'):.1f}% clean, "
        f"{without('convolutional flow')}.",
        f"{state('fashionmnist', 'inside_others')}% on FashionMNIST lie in the region of another class",
    )
    assert_says(
        "README.md",
        f"{state('digits')}, {state('mnist')} and {state('fashionmnist')}% of the test images' states",
        f"(AutoAttack at 0.1: {kept('digits')}%, the next {kept('digits', 'contractive-node')}%)",
        f"keeps {without('no arrival')} on digits",
    )


def test_figures_on_rounding_come_from_the_committed_results() -> None:
    with (ROOT / "bench" / "results" / "interval_rounding.csv").open() as file:
        value, slope = csv.DictReader(file)
    assert (value["radius"], slope["radius"]) == ("0.0", "1.0")
    assert float(slope["worst"]) <= 1.0
    assert_says(
        "docs/certify.md",
        f"over all {int(value['numbers']) / 1e9:.1f} billion float32 numbers from -120 to 120, at slope "
        f"{value['negative_slope']} and step {float(value['step_size']):g}, the largest error uses up "
        f"{float(value['worst']):.0%} of the radius",
    )


def test_figures_of_the_regions_in_the_plane_come_from_the_committed_results() -> None:
    """Of the four long runs, three seeds each."""
    rows = ("blobs", "moons, mlp", "blobs3", "rings, mlp")
    found: list[float] = []
    for cell in experiments.cells(only=["plane"]):
        if isinstance(cell, experiments.Plane) and cell.row in rows:
            content = experiments.read(cell, ROOT / "docs" / "results" / "zubov")
            assert content is not None
            found += content["after"]["iou"]
    assert len(found) == 3 * (2 + 2 + 3 + 2)  # classes
    assert_says("docs/zubov.md", f"IoU {min(found):.3f} to {max(found):.3f} in every class of")
    assert_says("README.md", f"(IoU {min(found):.2f} and more after 4,000 steps, three seeds)")
