"""The settings of a configuration as ``rnf train --set name=value`` has them: read from text, listed with defaults."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from robust_node_fast.training.config import TrainConfig, ZubovConfig
from robust_node_fast.training.recipes import RECIPES

__all__ = ["listed", "parse", "table"]

_NESTED = "zubov."
# Data sets that recipes treat alike, for short.
_GROUPS = {"cifar10/cifar100/svhn": "colour", "moons/rings/blobs/blobs3": "plane"}


def _fields() -> dict[str, dataclasses.Field[Any]]:
    """Every setting by its name; those of ``ZubovConfig`` begin with ``zubov.``."""
    found = {field.name: field for field in dataclasses.fields(TrainConfig) if field.name != "zubov"}
    return found | {f"{_NESTED}{field.name}": field for field in dataclasses.fields(ZubovConfig)}


def parse(texts: Sequence[str], options: Collection[str] = ()) -> dict[str, Any]:
    """Changes for ``TrainConfig.recipe`` from texts ``name=value``.

    Numbers and words as they are, ``true`` or ``false``, ``none``, lists as ``22,27``.

    Args:
        texts: one for each setting.
        options: settings that have an option of their own, which is to be used.

    Raises:
        ValueError: no such setting, named twice, or a value of another kind; one sentence says which.
    """
    fields, kinds = _fields(), {ZubovConfig: get_type_hints(ZubovConfig), TrainConfig: get_type_hints(TrainConfig)}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{text!r} is no setting, expected name=value")
        if name in options:
            raise ValueError(f"{name} is an option of its own, expected --{name.replace('_', '-')} {value}")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, cutoff=0.0)
            raise ValueError(f"there is no setting {name!r}, did you mean {near[0]!r}? --settings lists all")
        own = name.removeprefix(_NESTED)
        into = found.setdefault("zubov", {}) if own != name else found
        if own in into:
            raise ValueError(f"{name} is set twice")
        into[own] = _value(name, value.strip(), kinds[ZubovConfig if own != name else TrainConfig][own])
    return found


def _value(name: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        (kind,) = (each for each in get_args(kind) if each is not types.NoneType)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text!r} is no bool, expected true or false")
        return text.lower() == "true"
    if get_origin(kind) is list:
        return [] if text.lower() in ("", "none") else [_value(name, part, int) for part in text.split(",")]
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no {kind.__name__}, expected one") from None


def listed() -> Iterator[tuple[str, str, str, str]]:
    """Section, name, default (then the recipes that depart from it) and help of every setting, section by section."""
    fields = _fields()
    for section in dict.fromkeys(field.metadata["section"] for field in fields.values()):
        for name, field in fields.items():
            if field.metadata["section"] == section:
                yield section, name, _default_of(name, field), f"{field.metadata['help']}{_choices(name)}"


def _choices(name: str) -> str:
    """`` Of a, b.`` for a field with so many values."""
    own = name.removeprefix(_NESTED)
    kind = get_type_hints(ZubovConfig if own != name else TrainConfig)[own]
    return f" Of {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""


def _default_of(name: str, field: dataclasses.Field[Any]) -> str:
    """``5; digits: 30; certified: 36``: "contractive" goes without saying, as do data sets where all agree."""
    if field.default is dataclasses.MISSING and not callable(field.default_factory):
        return "digits"  # the data set, which rnf train has a default for
    default = field.default_factory() if callable(field.default_factory) else field.default
    departures = []
    for recipe, datasets in RECIPES.items():
        values: dict[str, list[str]] = {}
        for dataset, settings in datasets.items():
            value = _nested(name, settings, default)
            usual = _nested(name, RECIPES["contractive"][dataset], default) if recipe == "large-batch" else default
            values.setdefault("" if value == usual else _said(value), []).append(dataset)
        prefix = "" if recipe == "contractive" else recipe
        for value, names in values.items():
            if value:
                which = "" if prefix and len(values) == 1 else "/".join(names)
                for group, short in _GROUPS.items():
                    which = which.replace(group, short)
                departures.append(f"{f'{prefix} {which}'.strip()}: {value}")
    return "; ".join([_said(default), *departures])


def _nested(name: str, settings: Mapping[str, Any], default: Any) -> Any:
    if name.startswith(_NESTED):
        settings = settings.get("zubov", {})
    return settings.get(name.removeprefix(_NESTED), default)


def _said(value: Any) -> str:
    """As ``parse`` reads it."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def table() -> str:
    """The settings as Markdown, one table for each section."""
    parts = []
    for section, rows in itertools.groupby(listed(), key=lambda row: row[0]):
        cells = [" | ".join((f"`{name}`", *rest)).replace("|x - x*|", "\\|x - x*\\|") for _, name, *rest in rows]
        parts.append(
            "\n".join([f"### {section}", "", "| setting | default | |", "|---|---|---|", *map("| {} |".format, cells)])
        )
    return "\n\n".join(parts) + "\n"
