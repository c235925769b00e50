"""Finds the compiled libraries once and decides, per op, device, dtype and size, which implementation runs.

Nothing above this file asks what device a tensor is on. Adding a back end is adding a ``Backend``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_node_fast._version import __version__

CHOICES = ("auto", "reference", "cpu", "triton", "cuda")


class FallbackWarning(UserWarning):
    """A call that a fused kernel was expected to serve runs the PyTorch reference instead."""


class Call(NamedTuple):  # looked up at every call
    """What the choice of an implementation depends on."""

    op: str
    device: str
    dtype: torch.dtype
    kernel_size: int | None  # None for element-wise ops
    sizes: tuple[int, ...] = ()  # number of the device, then a flow's C, H, W; where a back end asks for them


@dataclass
class Backend:
    name: str
    devices: tuple[str, ...]
    unavailable: str | None  # why it cannot be used at all, or None
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    build_info: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    module: str | None = None  # holds the implementations and is imported when first asked for one
    # Why not this op, with dtype, sizes and kernel size.
    limit: Callable[[str, torch.dtype, tuple[int, ...], int], str | None] | None = None

    def refuses(self, call: Call) -> str | None:
        """Why this back end does not take the call, or ``None`` if it does."""
        if call.device not in self.devices:
            return f"serves {' and '.join(self.devices)} tensors, not {call.device}"
        self.load()
        if self.unavailable is not None:
            return self.unavailable
        if call.dtype not in self.dtypes:
            return f"has no kernels for {str(call.dtype).removeprefix('torch.')}"
        if call.op not in self.implementations:
            return f"has no kernel for {call.op}"
        if call.kernel_size is not None and call.kernel_size not in (1, 3, 5):
            return f"has kernels for k in {{1, 3, 5}}, not {call.kernel_size}"
        if self.limit is not None and call.kernel_size is not None:
            return self.limit(call.op, call.dtype, call.sizes, call.kernel_size)
        return None

    def load(self) -> None:
        """Import what is imported late: Triton takes a second, which most processes never need to spend."""
        if self.module is None or self.unavailable is not None:
            return
        try:
            self.implementations = importlib.import_module(self.module).IMPLEMENTATIONS
        except Exception as error:  # whatever is wrong with it, other implementations work
            self.unavailable = f"cannot be imported ({type(error).__name__}: {error})"
        self.module = None

    def useless(self) -> str | None:
        """Why this back end serves nothing on this machine, or ``None`` if it does."""
        if self.unavailable is None and "cpu" not in self.devices and not torch.cuda.is_available():
            return "no CUDA or ROCm device was found"
        return self.unavailable


def _load_cpu() -> Backend:
    try:
        native = importlib.import_module("robust_node_fast._C")
    except ImportError as error:
        hint = "reinstall with a C++17 compiler; pip install -v shows what went wrong"
        return Backend("cpu", ("cpu",), f"the compiled library is missing ({error}): {hint}")
    from robust_node_fast import _cpu

    return Backend("cpu", ("cpu",), None, _cpu.IMPLEMENTATIONS, native.build_info())


def _find_cuda() -> Backend:
    from robust_node_fast import _cuda

    return Backend("cuda", ("cuda",), _cuda.missing(), _cuda.IMPLEMENTATIONS, dtypes=_cuda.DTYPES, limit=_cuda.refuses)


def _find_triton() -> Backend:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", ("cuda",), "Triton is not installed: pip install triton", dtypes=dtypes)
    return Backend("triton", ("cuda",), None, dtypes=dtypes, module="robust_node_fast._triton")


_BACKENDS: dict[str, Backend] = {
    "cpu": _load_cpu(),
    "cuda": _find_cuda(),
    "triton": _find_triton(),
}
_SIZES_COUNT = {device for b in _BACKENDS.values() if b.limit and b.unavailable is None for device in b.devices}
_REFERENCE: dict[str, Callable[..., Any]] = {}  # filled by _ops.py, which owns the contract
_chosen = "auto"
_resolved: dict[tuple[Any, ...], Callable[..., Any]] = {}
_warned: set[str] = set()


def register_reference(op: str, implementation: Callable[..., Any]) -> None:
    """The default of an op: plain PyTorch, any device, dtype and shape."""
    _REFERENCE[op] = implementation


def implementation(op: str, tensor: Tensor, kernel_size: int | None) -> Callable[..., Any]:
    """The callable that runs ``op`` for tensors like this one."""
    key = (op, tensor.device.type, tensor.dtype, kernel_size, _sizes(op, tensor))  # equals the Call, and is made faster
    try:
        return _resolved[key]
    except KeyError:
        call = Call(*key)
        name, why_not = _resolve(call)
        if name != "reference":
            function = _BACKENDS[name].implementations[op]
        elif _chosen == "reference":
            function = _REFERENCE[op]
        else:
            function = _loud_reference(call, why_not)
        _resolved[call] = function
        return function


def is_traceable(op: str, tensor: Tensor, kernel_size: int | torch.SymInt | None) -> bool:
    """Whether the op's implementation consists of what torch.compile can record: PyTorch ops and Triton kernels."""
    if tensor.device.type not in _BACKENDS["triton"].devices:  # and a symbolic size stays so
        return False
    size = None if kernel_size is None else int(kernel_size)
    return _resolve(Call(op, tensor.device.type, tensor.dtype, size, _sizes(op, tensor)))[0] == "triton"


def _sizes(op: str, tensor: Tensor) -> tuple[int, ...]:
    """Part of a call only where a back end serves the device for which they count."""
    if tensor.device.type not in _SIZES_COUNT or not torch.cuda.is_available():
        return ()
    state = tensor.shape[1:] if op.startswith("euler") else ()  # others would be chosen anew for every shape
    return tensor.device.index or 0, *map(int, state)


def _resolve(call: Call) -> tuple[str, dict[str, str]]:
    """Name of the implementation, and for each other candidate why it was passed over."""
    why_not: dict[str, str] = {}
    if _chosen == "reference":
        return "reference", dict.fromkeys(_BACKENDS, 'set_backend("reference") was called')
    for name, backend in _BACKENDS.items():
        if _chosen not in ("auto", name):
            why_not[name] = f'set_backend("{_chosen}") was called'
            continue
        reason = backend.refuses(call)
        if reason is None:
            return name, why_not
        why_not[name] = reason
    return "reference", why_not


def _loud_reference(call: Call, why_not: dict[str, str]) -> Callable[..., Any]:
    """The reference, saying once why it runs; with ``RNF_STRICT=1`` an error instead."""
    relevant = {
        name: reason
        for name, reason in why_not.items()
        if call.device in _BACKENDS[name].devices or _chosen == name or not _serves(call.device)
    }
    reasons = "; ".join(f"{name} {reason}" for name, reason in relevant.items())
    message = f"{call.op} on {call.device} runs the PyTorch reference: {reasons}"

    def run(*args: Any) -> Any:
        if os.environ.get("RNF_STRICT") == "1":
            raise RuntimeError(f"{message} (RNF_STRICT=1)")
        if reasons not in _warned:
            _warned.add(reasons)
            warnings.warn(message, FallbackWarning, stacklevel=2)
        return _REFERENCE[call.op](*args)

    return run


def _serves(device: str) -> bool:
    return any(device in backend.devices for backend in _BACKENDS.values())


def set_backend(name: str) -> None:
    """Choose the implementation of every op from now on, in the whole process.

    Args:
        name: ``"auto"`` (the best there is), ``"reference"`` (plain PyTorch), ``"cpu"``, ``"triton"`` or ``"cuda"``.
            The environment variable ``RNF_BACKEND`` sets it at import.

    Raises:
        ValueError: unknown name.
        RuntimeError: that back end cannot be used on this machine; the message says why.
    """
    global _chosen  # noqa: PLW0603  (one process, one choice)
    if name not in CHOICES:
        raise ValueError(f"backend={name!r} is unknown, expected one of {', '.join(map(repr, CHOICES))}")
    if name in _BACKENDS and (reason := _BACKENDS[name].useless()) is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    _chosen = name
    _resolved.clear()
    if torch.cuda.is_available() and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled programs hold the launches of the back end that was chosen then


def backend_info() -> dict[str, Any]:
    """Which implementation each op would use on each device (float32, k = 3, small states), and why not the others."""
    ops: dict[str, dict[str, Any]] = {}
    for op in _REFERENCE:
        ops[op] = {}
        for device in ("cpu", "cuda"):
            name, why_not = _resolve(Call(op, device, torch.float32, 3))
            ops[op][device] = {"implementation": name, "why_not": why_not}
    return {
        "robust_node_fast": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "backend": _chosen,
        "strict": os.environ.get("RNF_STRICT") == "1",
        "backends": {
            name: {
                "available": backend.useless() is None,
                "reason": backend.useless(),
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in backend.dtypes],
                **backend.build_info,
            }
            for name, backend in _BACKENDS.items()
        },
        "ops": ops,
    }


set_backend(os.environ.get("RNF_BACKEND", "auto"))
