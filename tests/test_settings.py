"""Settings as text: every one can be set to its default as listed, and the page that lists them is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust_node_fast.training import TrainConfig, settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def test_listed_defaults_are_what_parse_reads() -> None:
    for _, name, default, help in settings.listed():
        assert help.endswith(".")
        found = settings.parse([f"{name}={default.split(';')[0]}"])
        changes = {"dataset": "digits", **found}
        assert TrainConfig(**changes) == TrainConfig("digits"), name


def test_values_reach_the_fields() -> None:
    texts = ("zubov.floor=0.5", "zubov.n_rays=7", "train-samples=9", "step_size=none", "milestones=", "data_root=a=b")
    assert settings.parse(texts) == {
        "zubov": {"floor": 0.5, "n_rays": 7},
        "train_samples": 9,
        "step_size": None,
        "milestones": [],
        "data_root": "a=b",
    }


def test_departures_of_recipes_are_listed() -> None:
    found = {name: default for _, name, default, _ in settings.listed()}
    assert found["epochs"] == "5; digits: 30; cifar10: 100; certified digits/mnist: 36; certified fashionmnist: 90"
    assert found["grad_clip"] == "0.0; cifar10: 0.5; certified: 5.0; large-batch: 0.0; zubov colour: 5.0"
    assert found["steps"].endswith("zubov cifar10/cifar100: 78200; zubov svhn: 114600; zubov plane: 4000")
    assert (
        found["zubov.backbone"] == "conv; zubov colour: resnet18; zubov moons/rings: mlp; zubov blobs/blobs3: identity"
    )


def test_a_misspelled_name_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^there is no setting 'warmup', did you mean 'warmup_epochs'\? --settings"):
        settings.parse(["warmup=3"])


def test_the_page_has_the_table() -> None:
    assert settings.table() in PAGE.read_text()
