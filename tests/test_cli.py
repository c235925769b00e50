"""The command line: what it prints and writes, one sentence and an exit code for every expected failure."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from robust_node_fast import _timing, backend_info, cli, training
from robust_node_fast.robustness import suite, tally
from robust_node_fast.training import checkpoint, locks

RUN = ["--set", "n_steps=2", "--epochs", "1"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rnf(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=env)


def assert_sentence(result: Result, pattern: str, code: int = 1) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("rnf: ")
    assert re.search(pattern, line), line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "both"
    result = rnf("train", "--out", folder, *RUN)
    assert result.exit_code == 0, result.output
    assert "vanilla" in result.stdout
    assert "contractive" in result.stdout
    assert "does NOT satisfy its rate" in result.stdout  # after one epoch
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the contractive run, to be broken."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (trained / "contractive").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_info_says_what_runs() -> None:
    result = rnf("info")
    assert result.exit_code == 0
    for op in backend_info()["ops"]:
        assert op in result.stdout
    assert json.loads(rnf("info", "--json").stdout)["ops"] == backend_info()["ops"]


def test_help_fits_on_a_screen() -> None:
    result = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert len(result.stdout.splitlines()) <= 45
    words = result.stdout.split()
    for option in ("--dataset", "--model", "--recipe", "--set", "--settings", "--resume", "--device"):
        assert option in words
    for name in (*training.MODELS, *training.RECIPES, "moons,", "cifar100,"):
        assert name in result.stdout


@pytest.mark.parametrize(("short", "model"), [("staged", "StagedCIFARNode"), ("cifar", "CIFARNode")])
def test_networks_for_short(short: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(folder: Path, *_: object, **__: object) -> None:
        raise training.RunError(training.load_config(folder).model)

    monkeypatch.setattr(cli, "fit_with_progress", trained)
    result = rnf("train", "--model", short, "--set", "step_size=0.1", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"rnf: {model}\n")


def test_settings_are_listed(trained: Path) -> None:
    result = rnf("train", "--settings")
    assert result.exit_code == 0
    for field in dataclasses.fields(training.TrainConfig):
        assert field.name in result.stdout
    for field in dataclasses.fields(training.ZubovConfig):
        assert f"zubov.{field.name} " in result.stdout


def test_train_writes_a_run(trained: Path) -> None:
    for network in training.NETWORKS:
        assert {path.name for path in (trained / network).iterdir()} >= {  # other tests may have added reports
            "checkpoint.safetensors",
            "config.json",
            "metrics.jsonl",
            "model.safetensors",
        }
        config = training.load_config(trained / network)
        assert (config.network, config.n_steps, config.epochs, config.batch_size) == (network, 2, 1, 64)


def test_train_options_reach_the_configuration(tmp_path: Path) -> None:
    options = {"--network": "vanilla", "--seed": "5", "--batch-size": "512", "--lr": "0.001"}
    settings = ("optimizer=sgd", "momentum=0.5", "step-size=0.02", "norm=inf", "milestones=1,2", "nesterov=true")
    flat = [word for pair in options.items() for word in pair]
    flat += [word for setting in settings for word in ("--set", setting)]
    result = rnf("train", "--out", tmp_path / "run", *flat, *RUN)
    assert result.exit_code == 0, result.output
    config = training.load_config(tmp_path / "run")
    assert config == training.TrainConfig.recipe(
        "digits",
        network="vanilla",
        seed=5,
        epochs=1,
        n_steps=2,
        batch_size=512,
        optimizer="sgd",
        momentum=0.5,
        lr=1e-3,
        step_size=0.02,
        norm="inf",
        milestones=[1, 2],
        nesterov=True,
    )


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rnf("train", "--network", "vanilla", "--seed", "3", *RUN).exit_code == 0
    assert Path("runs/digits-vanilla-seed3/model.safetensors").exists()


def test_resume_finishes_both_networks(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    for network in training.NETWORKS:
        (folder / network).mkdir(parents=True)
        (folder / network / "config.json").write_bytes((trained / network / "config.json").read_bytes())
    for name in ("checkpoint.safetensors", "metrics.jsonl"):  # vanilla done, contractive not begun
        (folder / "vanilla" / name).write_bytes((trained / "vanilla" / name).read_bytes())
    assert rnf("train", "--resume", folder).exit_code == 0
    for network in training.NETWORKS:
        ours, theirs = (root / network / "model.safetensors" for root in (folder, trained))
        assert ours.read_bytes() == theirs.read_bytes()


def test_evaluate_writes_its_report(trained: Path) -> None:
    result = rnf("evaluate", trained, "--samples", "40", "--eps", "0.05", "--eps", "0.1", "--seeds", "2")
    assert result.exit_code == 0, result.output
    for network in training.NETWORKS:
        content = json.loads((trained / network / "report.json").read_text())
        assert content["n_samples"] == 40
        assert content["settings"]["eps"] == [0.05, 0.1]
        clean = content["results"][0]["mean"]
        assert 0.3 < clean < 1.0
        assert f"{clean:.2%}" in result.stdout
        assert f"| clean | {clean:.2%} |" in (trained / network / "report.md").read_text()
        assert (trained / network / "report.png").read_bytes().startswith(b"\x89PNG")
        assert (trained / network / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert result.stdout.count("held: eps 0 = clean") == 2
    assert result.stdout.count("All 8 checks held.") + result.stdout.count("UNRELIABLE") == 2


def test_a_killed_evaluation_goes_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained / "vanilla"
    command = ("evaluate", run, "--suite", "quick", "--samples", "200", "--eps-l2", "0.5")
    assert rnf(*command).exit_code == 0
    assert not (run / "evaluation.safetensors").exists()

    def content() -> list[object]:
        report = json.loads((run / "report.json").read_text())
        return [[{**result, "seconds": 0} for result in report["results"]], report["checks"]]

    whole = content()
    (run / "report.json").unlink()
    save = tally.Progress.save

    def killed(self: tally.Progress, images: int, *, now: bool = False) -> None:
        save(self, images, now=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tally.Progress, "save", killed)
        assert rnf(*command).exit_code != 0
    assert (run / "evaluation.safetensors").exists()
    assert not (run / "report.json").exists()
    attacked = []
    run_fgsm = suite.SUITES["quick"].attacks[0]
    counting = dataclasses.replace(run_fgsm, run=lambda *a: attacked.append(len(a[2])) or run_fgsm.run(*a))
    monkeypatch.setitem(
        suite.SUITES,
        "quick",
        dataclasses.replace(suite.SUITES["quick"], attacks=(counting, *suite.SUITES["quick"].attacks[1:])),
    )
    assert rnf(*command).exit_code == 0
    assert content() == whole
    assert attacked[0] == 72  # the second batch
    assert not (run / "evaluation.safetensors").exists()


def test_evaluate_transfers_between_the_networks_of_a_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = suite.SUITES["full"]
    few = [attack for attack in suite.SUITES["quick"].attacks if attack.norm == "inf"]
    monkeypatch.setitem(suite.SUITES, "full", dataclasses.replace(full, attacks=(*few, suite._square(5)), eps_l2=()))
    result = rnf("evaluate", trained, "--suite", "full", "--samples", "10")
    assert result.exit_code == 0, result.output
    for network, other in (("vanilla", "contractive"), ("contractive", "vanilla")):
        report = json.loads((trained / network / "report.json").read_text())
        assert report["suite"] == "full"
        assert report["settings"]["sources"] == [other]
        assert f"pgd on {other}" in [entry["name"] for entry in report["results"]]
    assert (
        rnf(
            "evaluate",
            trained / "vanilla",
            "--suite",
            "quick",
            "--samples",
            "10",
            "--eps-l2",
            "0.3",
            "--transfer-from",
            trained / "contractive",
        ).exit_code
        == 0
    )
    report = json.loads((trained / "vanilla" / "report.json").read_text())
    assert (report["settings"]["sources"], report["settings"]["eps_l2"]) == (["contractive"], [0.3])


def test_transfer_from_a_network_of_other_images(trained: Path, run: Path) -> None:
    other = dataclasses.replace(training.load_config(run), dataset="mnist")
    (run / "config.json").write_text(other.to_json())
    result = rnf("evaluate", trained / "vanilla", "--transfer-from", run)
    assert_sentence(result, "run was trained on mnist, expected digits to transfer attacks from it")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_certify_writes_what_it_prints(trained: Path, norm: str) -> None:
    result = rnf("certify", trained, "--samples", "40", "--eps", "0", "--eps", "0.02", "--norm", norm)
    assert result.exit_code == 0, result.output
    assert "samples" in result.stdout
    for network in training.NETWORKS:
        content = json.loads((trained / network / f"certificate_{norm}.json").read_text())
        assert content["norm"] == norm
        assert content["n_samples"] == 40
        assert content["clean"] >= content["certified"]["0.0"] >= content["certified"]["0.02"]
        assert 0.3 < content["certified"]["0.0"] <= 1.0
        assert 0 < content["radius_mean"] < 1.0
        assert f"{content['certified']['0.02']:.2%}" in result.stdout
        assert f"{content['radius_quantiles']['0.5']:.4g}" in result.stdout
    printed = rnf("certify", trained / "vanilla", "--samples", "40", "--norm", norm, "--json")
    assert json.loads(printed.stdout) == json.loads((trained / "vanilla" / f"certificate_{norm}.json").read_text())


def test_certificates_that_cannot_be_had(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_sentence(rnf("certify", tmp_path / "nothing"), "nothing is no run folder")
    whole = cli.data.load("digits")
    for images, labels, sentence in (
        (whole.test_images, whole.test_labels + 5, r"cannot be certified: y lies in \[5, 14\], expected labels from 0"),
        (whole.test_images[:0], whole.test_labels[:0], "cannot be certified: data is empty"),
        (whole.test_images * torch.nan, whole.test_labels, "cannot be certified: x is not finite"),
    ):
        broken = dataclasses.replace(whole, test_images=images, test_labels=labels)
        monkeypatch.setattr(cli.data, "load", lambda *_, broken=broken: broken)
        assert_sentence(rnf("certify", run), sentence)
    monkeypatch.undo()
    model, config = training.load_model(run)
    monkeypatch.setattr(cli.training, "load_model", lambda _: (model.train(), config))
    assert_sentence(rnf("certify", run), "cannot be certified: model is in training mode")
    monkeypatch.undo()
    tensors, state = checkpoint.load(run / "model.safetensors")
    tensors["fc1.bias"][0] = float("nan")
    checkpoint.save(run / "model.safetensors", tensors, state)
    assert_sentence(rnf("certify", run), "cannot be certified: model's fc1.bias is not finite")


def test_usage_errors_exit_with_2(trained: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["train", "--learning-rate", "1"], "No such option"),
        (["train", "--dataset", "imagenet"], "dataset='imagenet' is unknown, expected one of 'digits'"),
        (["train", "--model", "ResNet"], "model='ResNet' is unknown"),
        (["train", "--recipe", "best"], "recipe='best' is unknown"),
        (["train", "--model", "zubov", "--network", "both"], "network='both' is for convolutional networks"),
        (["train", "--set", "epoch=3"], "there is no setting 'epoch', did you mean 'epochs'? --settings lists all"),
        (["train", "--set", "reach=3"], "there is no setting 'reach', did you mean 'zubov.reach'?"),
        (["train", "--set", "epochs=3"], "epochs is an option of its own, expected --epochs 3"),
        (["train", "--set", "n_steps"], "'n_steps' is no setting, expected name=value"),
        (["train", "--set", "n_steps=few"], "n_steps='few' is no int"),
        (["train", "--set", "compile=1"], "compile='1' is no bool, expected true or false"),
        (["train", "--set", "norm=2", "--set", "norm=1"], "norm is set twice"),
        (["train", "--set", "norm=3"], "norm='3' is unknown"),
        (["train", "--model", "zubov", "--set", "zubov.margin=-1"], "zubov.margin=-1.0 is out of range"),
        (["train", "--network", "all"], "all"),
        (["train", "--backend", "abacus"], "abacus"),
        (["train", "--epochs", "many"], "'--epochs'"),
        (["train", "--lr", "-1"], "lr=-1.0 is out of range"),
        (["train", "--resume", str(trained), "--lr", "1"], "--resume takes no lr"),
        (["train", "--resume", str(trained), "--set", "norm=1"], "--resume takes no --set"),
        (["evaluate", str(trained), "--eps", "-0.1"], "'--eps'"),
        (["evaluate"], "Missing argument"),
        (["certify", str(trained), "--eps", "-0.1"], "'--eps'"),
        (["certify", str(trained), "--norm", "l3"], "l3"),
        (["fly"], "No such command"),
    ):
        result = rnf(*arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_folders_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    assert_sentence(rnf("train", "--out", trained / "vanilla", "--network", "vanilla", *RUN), "holds a run already")
    assert_sentence(rnf("train", "--resume", tmp_path / "nothing"), "nothing is no run folder: it has no config.json")
    assert_sentence(rnf("evaluate", tmp_path / "nothing"), "nothing is no run folder")
    (tmp_path / "file").write_text("")
    assert_sentence(rnf("train", "--out", tmp_path / "file" / "run", *RUN), "file/run.* cannot be written")
    assert_sentence(rnf("evaluate", tmp_path / "file" / "run"), "is no run folder")
    assert_sentence(rnf("demo", "--out", tmp_path / "file" / "demo"), "file/demo.* cannot be written")


def test_unwritable_run_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    assert_sentence(rnf("evaluate", run), "the run folder .* cannot be written .*Permission denied")


def test_broken_weights(run: Path) -> None:
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-100])
    assert_sentence(rnf("evaluate", run), "model.safetensors is truncated, corrupted")
    content[-100] ^= 1
    path.write_bytes(content)
    assert_sentence(rnf("evaluate", run), "model.safetensors is corrupted: .* SHA-256")
    path.unlink()
    (run / "checkpoint.safetensors").write_bytes(b"")
    assert_sentence(rnf("evaluate", run), "checkpoint.safetensors is truncated, corrupted")
    assert_sentence(rnf("train", "--resume", run), "checkpoint.safetensors is truncated, corrupted")
    (run / "checkpoint.safetensors").unlink()
    assert_sentence(rnf("evaluate", run), "has no weights yet")


def test_weights_of_another_network(run: Path) -> None:
    other = dataclasses.replace(training.load_config(run), n_steps=5)
    (run / "config.json").write_text(other.to_json())
    assert_sentence(rnf("evaluate", run), "model.safetensors does not belong to the run")
    assert_sentence(rnf("train", "--resume", run), "checkpoint.safetensors does not belong to the run")
    tensors, _ = checkpoint.load(run / "model.safetensors")
    checkpoint.save(run / "model.safetensors", tensors, {"config": dataclasses.asdict(other)})
    assert_sentence(rnf("evaluate", run), "model.safetensors does not fit the network")
    checkpoint.save(run / "checkpoint.safetensors", tensors, {"config": dataclasses.asdict(other)})
    assert_sentence(rnf("train", "--resume", run), "checkpoint.safetensors holds weights only")


def test_nan_weights(run: Path) -> None:
    tensors, state = checkpoint.load(run / "model.safetensors")
    tensors["fc1.bias"][0] = float("nan")
    checkpoint.save(run / "model.safetensors", tensors, state)
    assert_sentence(rnf("evaluate", run), "cannot be evaluated: model has values that are not finite in fc1.bias")


@pytest.mark.skipif(locks.fcntl is None, reason="this system has no locks on folders")
def test_two_evaluations_of_a_run_at_the_same_time(run: Path) -> None:
    with training.alone(run):
        assert_sentence(rnf("evaluate", run), f"{run} is in use: another process works there")


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    arguments = ("train", "--dataset", "mnist", "--out", tmp_path / "run")
    assert_sentence(rnf(*arguments, "--data-root", tmp_path / "none"), "mnist can be neither read from nor downloaded")
    (tmp_path / "file").write_text("")
    assert_sentence(rnf(*arguments, env={"RNF_DATA_ROOT": str(tmp_path / "file" / "x")}), "mnist can be neither read")
    assert not (tmp_path / "run").exists()


def test_unusable_back_end_and_device(run: Path) -> None:
    unavailable = [name for name, backend in backend_info()["backends"].items() if not backend["available"]]
    if not unavailable:
        pytest.skip("every back end is available here")
    assert_sentence(rnf("evaluate", run, "--backend", unavailable[0]), f"backend '{unavailable[0]}' cannot be used")
    assert_sentence(rnf("evaluate", run, "--device", "abacus"), "device 'abacus' cannot be used")


def test_module_import_is_light() -> None:
    heavy = ("sklearn", "torchvision", "matplotlib", "typer", "tensorboard", "robust_node_fast.training")
    code = f"import sys, robust_node_fast; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_interrupt_says_how_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "robust_node_fast", "train"]
    start = [*command, "--out", str(folder), "--network", "contractive", "--set", "n_steps=2"]
    start += ["--set", "checkpoint_every=5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "60"}

    def stop(arguments: list[str], number: signal.Signals, after: int) -> int:
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None and saved_step() <= after:
                time.sleep(0.02)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
        (line,) = [line for line in errors.splitlines() if line.startswith("rnf: stopped")]
        step = re.search(rf"stopped by {number.name} after step (\d+) of 690; continue with: (.*)$", line)
        assert step is not None
        assert step[2] == f"rnf train --resume {folder}"
        assert "Traceback" not in errors
        assert process.returncode == 128 + number
        assert saved_step() == int(step[1])
        return int(step[1])

    def saved_step() -> int:
        path = folder / "checkpoint.safetensors"
        return int(checkpoint.load(path)[1]["step"]) if path.exists() else 0

    first = stop(start, signal.SIGINT, 0)
    assert stop([*command, "--resume", str(folder)], signal.SIGTERM, first) > first
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, steps[-1] + 1))
    assert steps == sorted(steps)


def test_demo_prints_one_table_and_writes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_digits: None
) -> None:
    result = rnf("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(training.NETWORKS)]
    assert [row[0] for row in rows] == list(training.NETWORKS)
    report = json.loads((tmp_path / "report.json").read_text())
    for row in rows:
        results = {(r["name"], r["strength"]): r["mean"] for r in report["networks"][row[0]]["results"]}
        names = [("clean", 0.0), *(("gaussian", s) for s in (0.1, 0.2, 0.3))]
        names += [("salt_and_pepper", 0.05), ("salt_and_pepper", 0.2), ("fgsm", 0.1), ("pgd", 0.1)]
        assert row[1:9] == [f"{100 * results[name]:.1f}" for name in names]
    assert result.stdout.count("plain PyTorch") == 4
    for name in ("report.md", "accuracy.png", "training.png", "vanilla/model.safetensors", "contractive/metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
    assert "![accuracy](accuracy.png)" in (tmp_path / "report.md").read_text()
    assert rnf("demo", "--out", tmp_path).exit_code == 0  # again, over its own folder


def test_train_takes_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = rnf("train", "--recipe", "certified", "--epochs", "1", "--seed", "3")
    assert result.exit_code == 0, result.output
    config = training.load_config(Path("runs/digits-certified-seed3"))
    assert config == training.TrainConfig.recipe("digits", "certified", epochs=1, seed=3)
    result = rnf("train", "--recipe", "certified", "--dataset", "cifar10")
    assert result.exit_code == 2
    assert "recipe='certified' is there for" in " ".join(result.output.split())


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo in a second or two: few images, few steps."""
    whole = cli.data.load("digits")
    few = dataclasses.replace(
        whole,
        train_images=whole.train_images[:200],
        train_labels=whole.train_labels[:200],
        test_images=whole.test_images[:20],
        test_labels=whole.test_labels[:20],
    )
    monkeypatch.setattr(cli.data, "load", lambda name: few)
    monkeypatch.setitem(training.RECIPES["contractive"], "digits", {"epochs": 1, "n_steps": 2})  # type: ignore[arg-type]
    monkeypatch.setattr("robust_node_fast._demo.WORK", (("digits network", 8), ("MNIST network", 12)))


def test_interleaved_takes_the_least_in_turns() -> None:
    calls: list[str] = []
    pauses = {"slow": iter([0.0, 0.05, 0.03, 0.04]), "fast": iter([0.0, 0.002, 0.01, 0.01])}

    def work(name: str) -> None:
        calls.append(name)
        time.sleep(next(pauses[name]))

    best = _timing.interleaved({name: lambda name=name: work(name) for name in pauses}, rounds=3)
    assert calls == ["slow", "fast"] * 4
    assert best["slow"] == pytest.approx(0.03, abs=0.01)
    assert best["fast"] == pytest.approx(0.002, abs=0.006)
