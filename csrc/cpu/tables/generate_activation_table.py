"""Writes the coefficients in ../activation_table.inc: g(x) = log1p(exp(-x)) as polynomials in d = x - centre.

python csrc/cpu/tables/generate_activation_table.py          rewrite the block between the two marker lines
python csrc/cpu/tables/generate_activation_table.py --check  fail if it differs from what would be written

Only the standard library, 50 digits; the errors it prints are those of the exact polynomials, before any rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from decimal import Decimal, getcontext
from pathlib import Path

getcontext().prec = 50
TARGET = Path(__file__).resolve().parent.parent / "activation_table.inc"
BEGIN = "// Written by tables/generate_activation_table.py:"
END = "// End of what tables/generate_activation_table.py writes."

SEGMENTS = 32  # entries of a lookup in two AVX-512 registers
NARROW = 13  # segments of width WIDTH, centred on 0, WIDTH, 2 WIDTH, ...; those after them are twice as wide
WIDTH = Decimal(3) / 8  # exact in float, so that d is exact too
FIRST_NARROW = SEGMENTS - NARROW  # where the lookup has x = 0: the index is that of a rounding trick, modulo 32
POINTS = 200  # per segment, where errors are measured


def softplus_rest(x: Decimal) -> Decimal:
    return (1 + (-x).exp()).ln()


def minus_sigmoid(x: Decimal) -> Decimal:
    return -1 / (1 + x.exp())


def segment(entry: int) -> tuple[Decimal, Decimal, Decimal]:
    """Centre of a lookup entry, and its ends relative to that."""
    if entry >= FIRST_NARROW:
        step = entry - FIRST_NARROW
        return step * WIDTH, -WIDTH / 2 if step else Decimal(0), WIDTH / 2
    return (NARROW + 2 * entry) * WIDTH, -WIDTH if entry else -WIDTH / 2, WIDTH


def interpolate(f: Callable[[Decimal], Decimal], entry: int, degree: int) -> list[Decimal]:
    """The polynomial in d that equals f at the Chebyshev nodes of the segment: close to the best one."""
    centre, left, right = segment(entry)
    cosines = [Decimal(math.cos(math.pi * (k + 0.5) / (degree + 1))) for k in range(degree + 1)]
    nodes = [(left + right) / 2 + (right - left) / 2 * cosine for cosine in cosines]
    newton = [f(centre + node) for node in nodes]
    for level in range(1, degree + 1):
        for k in range(degree, level - 1, -1):
            newton[k] = (newton[k] - newton[k - 1]) / (nodes[k] - nodes[k - level])
    result = [newton[degree]]
    for k in range(degree - 1, -1, -1):  # result * (d - node) + newton[k]
        shifted = [Decimal(0), *result]
        result = [high - nodes[k] * low for high, low in zip(shifted, [*result, Decimal(0)], strict=True)]
        result[0] += newton[k]
    return result


def evaluate(coefficients: list[Decimal], d: Decimal) -> Decimal:
    total = Decimal(0)
    for coefficient in reversed(coefficients):
        total = total * d + coefficient
    return total


def errors(f: Callable[[Decimal], Decimal], entry: int, coefficients: list[Decimal]) -> list[Decimal]:
    centre, left, right = segment(entry)
    points = [left + (right - left) * k / POINTS for k in range(POINTS + 1)]
    return [evaluate(coefficients, d) - f(centre + d) for d in points]


def value_row(entry: int) -> list[Decimal]:
    if entry == FIRST_NARROW - 1:  # the last segment, where x is clamped: exactly nothing, so that s is exactly linear
        return [Decimal(0)] * 5
    return interpolate(softplus_rest, entry, 4)


def both_row(entry: int) -> list[Decimal]:
    """The slope is what is hard to get right: its polynomial, integrated."""
    if entry == FIRST_NARROW - 1:
        return [Decimal(0)] * 6
    slope = interpolate(minus_sigmoid, entry, 4)
    row = [Decimal(0)] + [coefficient / (k + 1) for k, coefficient in enumerate(slope)]
    off = errors(softplus_rest, entry, row)
    row[0] = -(max(off) + min(off)) / 2
    return row


def derivative(row: list[Decimal]) -> list[Decimal]:
    return [k * coefficient for k, coefficient in enumerate(row)][1:]


def table(name: str, rows: list[list[Decimal]], digits: int = 11) -> list[str]:
    lines = [f"constexpr double {name}[{len(rows[0])}][{SEGMENTS}] = {{"]
    for k in range(len(rows[0])):
        numbers = [f"{float(row[k]):.{digits}g}" for row in rows]
        line = "    {"
        for i, number in enumerate(numbers):
            piece = number + ("," if i + 1 < len(numbers) else "}" + ("," if k + 1 < len(rows[0]) else "};"))
            joint = "" if line.endswith("{") else " "
            if len(line) + len(joint) + len(piece) > 120:
                lines.append(line)
                line, joint = "     ", ""
            line += joint + piece
        lines.append(line)
    return lines


def block() -> str:
    values = [value_row(entry) for entry in range(SEGMENTS)]
    both = [both_row(entry) for entry in range(SEGMENTS)]
    worst = [
        max(abs(e) for entry in range(SEGMENTS) for e in errors(f, entry, rows[entry]))
        for f, rows in (
            (softplus_rest, values),
            (softplus_rest, both),
            (minus_sigmoid, [derivative(row) for row in both]),
        )
    ]
    return "\n".join(
        [
            BEGIN,
            f"// largest errors kTableValue {worst[0]:.1e}; kTableBoth {worst[1]:.1e}, its derivative {worst[2]:.1e}.",
            "// A row per power of d; columns in the order of the index, which has x = 0 at 32 - kTableNarrow.",
            "// clang-format off",
            f"constexpr int kTableNarrow = {NARROW};",
            f"constexpr float kTableWidth = {WIDTH}f;",
            *table("kTableValue", values),
            *table("kTableBoth", both),
            "// clang-format on",
            END,
        ]
    )


def main() -> None:
    text = TARGET.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    written = text[:begin] + block() + text[end:]
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(written)
    elif written != text:
        sys.exit(f"{TARGET} is not what {Path(__file__).name} writes")


if __name__ == "__main__":
    main()
