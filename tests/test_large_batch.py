"""Training settings for large batches: each does what its definition says, and a run with all of them resumes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import records
from torch import Tensor
from torch.distributed import run as torchrun
from typer.testing import CliRunner

from robust_node_fast import cli, data, models, training
from robust_node_fast.certify import linf_certified
from robust_node_fast.training import TrainConfig, checkpoint

DIGITS = data.load("digits")
FEW = dataclasses.replace(
    DIGITS,
    train_images=DIGITS.train_images[:150],
    train_labels=DIGITS.train_labels[:150],
    test_images=DIGITS.test_images[:50],
    test_labels=DIGITS.test_labels[:50],
)
BYTES = dataclasses.replace(FEW, train_images=(FEW.train_images * 255).round().to(torch.uint8))
SGD = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.02, "network": "vanilla", "init": "default"}
EVERYTHING = {
    **SGD,
    "network": "contractive",
    "rate": 0.1,
    "model": "StagedCIFARNode",
    "n_steps": 1,
    "augmentation": "crop-flip-cutout",
    "accumulate": 2,
    "nesterov": True,
    "warmup_epochs": 1,
    "lr_batch_size": 16,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "grad_clip": 0.5,
    "channels_last": True,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> TrainConfig:
    few = {"epochs": 2, "batch_size": 32, "n_steps": 2, "milestones": [], "checkpoint_every": 2}
    return TrainConfig.recipe("digits", **{**few, **changes})


def fit(folder: Path, config: TrainConfig, dataset: data.Dataset = FEW, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a run without the clock's."""
    training.prepare(config, folder, replace=True)
    training.fit(folder, dataset, **options)
    return records(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder / "model.safetensors")[0]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in found if "loss" in record]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{}, {"autocast": True}, {"model": "CIFARNode"}], ids=["all", "autocast", "dropout"]
)
def test_a_run_with_everything_resumes_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**{**EVERYTHING, **changes})
    undisturbed = fit(tmp_path / "undisturbed", config, BYTES)
    folder = tmp_path / "stopped"
    training.prepare(config, folder)
    for step in (1, 4, 7):

        def on_step(done: int, total: int, record: dict[str, float], step: int = step) -> None:
            if done == step:
                raise Stop

        with pytest.raises(Stop):
            training.fit(folder, BYTES, on_step=on_step)
    training.fit(folder, BYTES)
    assert records(folder) == undisturbed
    for name in ("model.safetensors", "checkpoint.safetensors"):
        ours, theirs = (checkpoint.load(tmp_path / run / name)[0] for run in ("stopped", "undisturbed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_bytes_train_like_floats(tmp_path: Path) -> None:
    floats = dataclasses.replace(BYTES, train_images=data.to_float(BYTES.train_images))
    for name, augmentation in (("plain", "none"), ("augmented", "crop-flip")):
        config = tiny(augmentation=augmentation)
        assert fit(tmp_path / name, config, BYTES) == fit(tmp_path / f"{name} floats", config, floats)


def test_augmentation_changes_what_is_seen(tmp_path: Path) -> None:
    kinds = ("none", "crop", "crop-flip", "crop-flip-cutout")
    found = [losses(fit(tmp_path / kind, tiny(augmentation=kind)))[0] for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_learning_rate_follows_the_step(tmp_path: Path) -> None:
    config = tiny(epochs=4, warmup_epochs=2, lr=0.01, lr_batch_size=16, lr_decay=0.5, milestones=[3])
    lr = [record["lr"] for record in fit(tmp_path, config) if "lr" in record]  # 5 steps an epoch
    peak = 0.02  # twice the batch that 0.01 is for
    warm = [0.01 + 0.99 * step / 10 for step in range(10)]
    expected = [
        *(peak * factor for factor in warm[:5]),
        *(peak * 0.5 * factor for factor in warm[5:]),
        *[peak * 0.25] * 5,
        *[peak * 0.0125] * 5,
    ]
    assert lr == pytest.approx(expected)


def test_accumulated_parts_make_the_batch(tmp_path: Path) -> None:
    runs = [fit(tmp_path / str(parts), tiny(accumulate=parts)) for parts in (1, 3)]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    for name in ("penalty", "rate"):
        assert runs[1][0][name] == pytest.approx(runs[0][0][name], rel=1e-6)


def test_label_smoothing_is_that_of_cross_entropy(tmp_path: Path) -> None:
    config = tiny(label_smoothing=0.2, batch_size=150, epochs=1)
    torch.manual_seed(config.seed)
    logits = config.build_model()(FEW.train_images)
    expected = torch.nn.functional.cross_entropy(logits, FEW.train_labels, label_smoothing=0.2)
    assert losses(fit(tmp_path, config)) == pytest.approx([expected.item()], rel=1e-5)


def test_averaged_weights_are_the_average(tmp_path: Path) -> None:
    """Those of every step, collected from the checkpoints, averaged by hand."""
    config = tiny(**{**EVERYTHING, "ema_decay": 0.75}, checkpoint_every=1)
    folder, seen = tmp_path / "run", []
    training.prepare(config, folder)

    def on_step(step: int, total: int, record: dict[str, float]) -> None:
        if step > 1:
            seen.append(checkpoint.load(folder / "checkpoint.safetensors")[0])

    training.fit(folder, BYTES, on_step=on_step)
    seen.append(checkpoint.load(folder / "checkpoint.safetensors")[0])
    assert len(seen) == 10
    for name, final in weights(folder).items():
        if final.is_floating_point():
            average = seen[0][f"model.{name}"].double()
            for tensors in seen[1:]:
                average = 0.75 * average + 0.25 * tensors[f"model.{name}"].double()
            torch.testing.assert_close(final.double(), average, rtol=1e-4, atol=1e-5)
        assert torch.equal(final, seen[-1][f"ema.module.{name}"])
    (folder / "model.safetensors").unlink()  # from the checkpoint alone: the average too
    model, _ = training.load_model(folder)
    assert torch.equal(model.fc1.weight, seen[-1]["ema.module.fc1.weight"])
    right = (model(FEW.test_images).argmax(1) == FEW.test_labels).double().mean().item()
    assert right == pytest.approx(records(folder)[-1]["test_accuracy"])


def test_certificates_are_tracked(tmp_path: Path) -> None:
    config = tiny(**{**EVERYTHING, "track_eps": 0.01})
    found = [record["test_certified"] for record in fit(tmp_path / "run", config, BYTES) if "test_certified" in record]
    assert len(found) == 2
    model, _ = training.load_model(tmp_path / "run")
    certified = linf_certified(model, BYTES.test_images, BYTES.test_labels, 0.01)
    assert found[-1] == pytest.approx(certified.double().mean().item())
    assert 0.0 < found[-1] < 1.0
    fit(tmp_path / "without", dataclasses.replace(config, track_eps=0.0), BYTES)
    for name, tensor in weights(tmp_path / "without").items():  # looking changes nothing
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


def test_optimizers(tmp_path: Path) -> None:
    first = {}
    for name, changes in {
        "adam": {"weight_decay": 0.1},
        "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
        "sgd": SGD,
        "nesterov": {**SGD, "nesterov": True},
    }.items():
        first[name] = losses(fit(tmp_path / name, tiny(**changes)))[-1]
    assert len(set(first.values())) == 4


def test_bfloat16_autocast_trains_about_alike(tmp_path: Path) -> None:
    exact, rough = (losses(fit(tmp_path / str(on), tiny(**SGD, autocast=on))) for on in (False, True))
    assert exact != rough
    assert rough == pytest.approx(exact, rel=0.05)
    assert weights(tmp_path / "True")["flow.weight"].dtype == torch.float32


def test_channels_last_trains_alike(tmp_path: Path) -> None:
    config = {**EVERYTHING, "augmentation": "none"}
    runs = [losses(fit(tmp_path / str(on), tiny(**{**config, "channels_last": on}), BYTES)) for on in (False, True)]
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


def test_compiled_steps_train_alike(tmp_path: Path) -> None:
    config = tiny(epochs=1, batch_size=50)
    plain = fit(tmp_path / "plain", config, BYTES)
    compiled = fit(tmp_path / "compiled", dataclasses.replace(config, compile=True), BYTES)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_gradient_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with an infinite gradient would put NaN into the weights, and these into the next checkpoint."""
    folder, config = tmp_path / "run", tiny(checkpoint_every=1)
    training.prepare(config, folder)

    def on_step(step: int, total: int, record: dict[str, float]) -> None:
        if step == 3:
            monkeypatch.setattr(models._Node, "forward", overflowing)

    plain = models._Node.forward

    def overflowing(self: models._Node, input: Tensor) -> Tensor:
        logits = plain(self, input)
        logits.register_hook(lambda gradient: gradient * 1e38 * 1e38)
        return logits

    message = r"^the gradient is not finite at step 4: (inf|nan); .*; the checkpoint of step 3 is kept$"
    with pytest.raises(training.RunError, match=message):
        training.fit(folder, FEW, on_step=on_step)
    monkeypatch.undo()
    tensors, state = checkpoint.load(folder / "checkpoint.safetensors")
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    undisturbed = fit(tmp_path / "undisturbed", config)
    training.fit(folder, FEW)
    assert records(folder) == undisturbed


def test_batches_too_small_for_their_parts(tmp_path: Path) -> None:
    message = "a batch of 2 images is too small for 1 processes that take it in 3 parts: choose another --batch-size"
    with pytest.raises(training.RunError, match=message):
        fit(tmp_path, tiny(batch_size=4, accumulate=3))


def test_the_recipe_trains_on_real_images(data_root: Path, tmp_path: Path) -> None:
    if not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip("cifar-10-batches-py is not in the folder with the real data")
    whole = data.load("cifar10", data_root)
    few = dataclasses.replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])
    small = {"n_steps": 1, "train_samples": 512, "batch_size": 64, "epochs": 5, "warmup_epochs": 1, "autocast": True}
    found = losses(fit(tmp_path, TrainConfig.recipe("cifar10", "large-batch", network="vanilla", **small), few))
    assert found[0] == pytest.approx(torch.tensor(10.0).log().item(), abs=0.5)  # knows nothing
    assert sum(found[-8:]) / 8 < found[0] - 0.1


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parent.parent / "examples").glob("cifar_*.sh")), ids=lambda path: path.stem
)
def test_example_commands(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the device, the compiler, the data and their amount."""
    command = [line for line in script.read_text().replace("\\\n", " ").splitlines() if not line.startswith("#")]
    words = shlex.split(" ".join(command).removeprefix("exec "))
    before, arguments = words[: words.index("train")], words[words.index("train") : -1]
    if before[0] == "torchrun":
        options = torchrun.parse_args(before[1:])
        assert (options.training_script, options.module, options.nproc_per_node) == ("robust_node_fast", True, "8")
    else:
        assert before == ["rnf"]
    images, labels = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset("cifar10", images, labels, data.to_float(images), labels))
    arguments = [word.replace("compile=true", "n_steps=1") for word in arguments]
    small = ["--device", "cpu", "--epochs", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, [*arguments, *small])
    assert result.exit_code == 0, result.output
    for network in training.NETWORKS:
        assert "test_certified" in records(tmp_path / "run" / network)[-1]


def test_recipe() -> None:
    config = TrainConfig.recipe("cifar10", "large-batch")
    assert (config.model, config.batch_size, config.epochs, config.rate) == ("StagedCIFARNode", 1024, 100, 0.1)
    assert config.scaled_lr == pytest.approx(4e-3)
    assert [config.lr_factor(epochs) for epochs in (0, 2.5, 5, 49.9, 50)] == pytest.approx([0.01, 0.505, 1, 1, 0.1])
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="recipe='large-batch' is there for cifar10, not for dataset='mnist'"):
        TrainConfig.recipe("mnist", "large-batch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 is too small, expected at least 1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 is too small, expected at least 0"),
        ({"lr_batch_size": 0}, "lr_batch_size=0 is too small"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 is out of range, expected a number < 1"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 is out of range"),
        ({"augmentation": "mixup"}, "augmentation='mixup' is unknown"),
        ({"nesterov": True}, "nesterov=True asks for a momentum"),
        ({"momentum": 0.9, "optimizer": "adamw"}, "momentum=0.9 belongs to SGD, expected 0 with optimizer='adamw'"),
        ({"compile": True, "certified_eps": 0.1}, "compile=True does not fit certified_eps"),
        ({"autocast": True, "regularizer": "jacobian"}, "autocast=True does not fit regularizer='jacobian'"),
    ],
)
def test_configurations_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig("mnist", **changes)
    with pytest.raises(TypeError, match=r"compile=1 is a int, expected a bool"):
        TrainConfig("mnist", compile=1)  # type: ignore[arg-type]
