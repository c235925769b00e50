"""Argument checks of the public functions: each error names the argument, its value and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORMS = ("2", "2-sharp", "inf", "1")
REDUCTIONS = ("sum", "mean", "none")
DUALS = ("inf", "1", "2")
_LARGEST = sys.float_info.max


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}, expected float16, bfloat16, float32 or float64")


def number(name: str, value: object) -> None:
    """A finite Python number. Tensors are refused: they would make the step size data the graph depends on."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    if not -_LARGEST <= value <= _LARGEST:  # not math.isfinite, which torch.compile cannot trace for a dynamic float
        raise ValueError(f"{name}={value!r} is not finite, expected a finite float")


def count(name: str, value: object) -> None:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name}={value!r} is too small, expected at least 1")


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {', '.join(map(repr, choices))}")


def slope(value: object, *, rising: bool = True) -> None:
    expected = "(a, b) with 0 < a <= b" if rising else "(a, b) with a <= b"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"slope={value!r} is not a pair, expected {expected}")
    number("slope[0]", value[0])
    number("slope[1]", value[1])
    if not (value[0] <= value[1] and (value[0] > 0 or not rising)):
        raise ValueError(f"slope={tuple(value)!r} is out of order, expected {expected}")


def filters(weight: object, ranks: tuple[int, ...]) -> None:
    """A bank of square, odd filters that keeps the number of channels: ``(C, C, k, k)`` or ``(N, C, C, k, k)``."""
    tensor("weight", weight)
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape)
    if len(shape) in ranks and shape[-4] == shape[-3] >= 1 and shape[-2] == shape[-1] and shape[-1] % 2 == 1:
        return
    expected = " or ".join({4: "(C, C, k, k)", 5: "(N, C, C, k, k)"}[rank] for rank in ranks)
    if len(shape) not in ranks:
        raise ValueError(f"weight has shape {shape}, expected {expected}")
    if shape[-4] != shape[-3]:
        raise ValueError(f"weight has shape {shape}, expected {expected}: as many output as input channels")
    if shape[-2] != shape[-1] or shape[-1] % 2 == 0:
        raise ValueError(f"weight has shape {shape}, expected {expected} with one odd kernel size k")
    raise ValueError(f"weight has shape {shape}, expected {expected} with at least one channel")


def flow(
    input: object, weight: object, bias: object, ranks: tuple[int, ...], step_size: object, negative_slope: object
) -> None:
    """Everything ``euler_conv_step`` and ``euler_conv_flow`` share."""
    tensor("input", input)
    filters(weight, ranks)
    assert isinstance(input, Tensor)
    assert isinstance(weight, Tensor)
    if input.dim() != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected (B, C, H, W)")
    channels = weight.shape[-3]
    if input.shape[1] != channels:
        raise ValueError(
            f"input has shape {tuple(input.shape)} with {input.shape[1]} channels, "
            f"expected {channels} as in weight {tuple(weight.shape)}"
        )
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected at least one row and one column")
    same_kind("weight", weight, input)
    if bias is not None:
        tensor("bias", bias)
        assert isinstance(bias, Tensor)
        if bias.shape != weight.shape[:-3]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:-3])} "
                f"for weight {tuple(weight.shape)}"
            )
        same_kind("bias", bias, input)
    number("step_size", step_size)
    number("negative_slope", negative_slope)


def same_kind(name: str, value: Tensor, input: Tensor) -> None:
    """Same device as ``input``, and the same dtype unless autocast is going to unify them."""
    if value.device != input.device:
        raise ValueError(f"{name} is on {value.device}, expected {input.device} as input")
    if value.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"{name} has dtype {value.dtype}, expected {input.dtype} as input")


def steps(weight: Tensor, n_steps: object) -> None:
    """``n_steps`` belongs to shared weights and to nothing else."""
    if weight.dim() == 5:
        if n_steps is not None:
            raise ValueError(
                f"n_steps={n_steps!r} is given twice: weight {tuple(weight.shape)} already holds one filter bank "
                f"per step, expected n_steps=None"
            )
        if weight.shape[0] < 1:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected at least one step")
        return
    if n_steps is None:
        raise ValueError(f"n_steps is missing: weight {tuple(weight.shape)} is shared by all steps, expected an int")
    if isinstance(n_steps, bool) or not isinstance(n_steps, (int, torch.SymInt)):
        raise TypeError(f"n_steps={n_steps!r} is a {type(n_steps).__name__}, expected an int")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps!r} is too small, expected at least 1")
