"""Checkpoints: tensors and JSON in one safetensors file, written atomically, verified when read. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

__all__ = ["CheckpointError", "digest", "digest_of_json", "load", "replace_file", "save"]

_KEY = "robust_node_fast"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not fit; the message is one sentence that names the file and says why."""


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able state to ``path``; at any moment the file there is whole, the old or the new.

    The metadata carry a SHA-256 over names, dtypes, shapes, bytes and the state: safetensors checks no content.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    # One entry: safetensors writes several in an order of its own, and equal content is to give equal files.
    replace_file(path, serialize(on_cpu, {_KEY: json.dumps({"state": text, "sha256": digest(on_cpu, text)})}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of a file that ``save`` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, corrupted or of another kind.
    """
    try:
        content = path.read_bytes()  # at once: safe_open opens the file twice, and a trainer may replace it in between
        tensors = deserialize(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        metadata = json.loads(header).get("__metadata__", {})
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated, corrupted or no safetensors file ({error})") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not one that robust_node_fast wrote")
    try:
        written = json.loads(metadata[_KEY])
        intact = digest(tensors, written["state"]) == written["sha256"]
    except (KeyError, ValueError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is corrupted: its content does not match its SHA-256")
    return tensors, json.loads(written["state"])


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, force it to the disk and move it there in one step."""
    # One fixed name: what a killed run left behind is overwritten by the next one.
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def digest_of_json(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file holds, in whatever order."""
    return digest({}, json.dumps(content, sort_keys=True))


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and a text."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
