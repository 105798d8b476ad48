"""Products on matrix units that are exact to fp32, and replacements for what the interpreter lacks.

An fp32 number is the sum of three bf16 numbers (8 + 8 + 8 bits). Of the nine products of two such sums the six largest
are computed: the rest is below 2^-24 of the product, the rounding of fp32 itself.

Matrix units truncate their sums instead of rounding them (Fasi et al., PeerJ Computer Science 7, e330): by up to an ulp
per step and always towards zero, so a long sum drifts. Here a sum within the unit is 256 deep and is then added to the
total by an ordinary addition.

The interpreter multiplies bf16 bit patterns as integers and rounds them half up. There the operands stay in fp32, and
the rounding is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _high_part(value):
    """The bf16 nearest to fp32 `value`, as fp32; values that would round to infinity are truncated."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = tl.where((bits & 0x7FFFFFFF) < 0x7F7F8000, bits + 0x8000, bits) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _multiply(a, b, total, INTERPRET: tl.constexpr):
    """total + a b for fp32 operands whose values are bf16 numbers."""
    if INTERPRET:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)


@triton.jit
def dot(a, b, total, PRODUCTS: tl.constexpr, INTERPRET: tl.constexpr):
    """total + a b, exact to fp32. PRODUCTS: 1 for 16-bit operands, 3 for fp32 a and bf16 b, 6 for two of fp32."""
    if PRODUCTS == 1:
        if INTERPRET:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
    else:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        a0 = _high_part(a)
        a1 = _high_part(a - a0)
        a2 = a - a0 - a1
        if PRODUCTS == 3:
            total = _multiply(a2, b, total, INTERPRET)
            total = _multiply(a1, b, total, INTERPRET)
            total = _multiply(a0, b, total, INTERPRET)
        else:
            b0 = _high_part(b)
            b1 = _high_part(b - b0)
            b2 = b - b0 - b1
            total = _multiply(a2, b0, total, INTERPRET)  # the small ones first
            total = _multiply(a0, b2, total, INTERPRET)
            total = _multiply(a1, b1, total, INTERPRET)
            total = _multiply(a1, b0, total, INTERPRET)
            total = _multiply(a0, b1, total, INTERPRET)
            total = _multiply(a0, b0, total, INTERPRET)
    return total


@triton.jit
def accumulate(a, b, part, total, step, PRODUCTS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Add a b to `part`, and `part` to `total` once it is 256 deep; returns the new part and total.

    `step` counts calls from 0; after the last call part + total is the result.
    """
    STEPS: tl.constexpr = 256 // DEPTH  # 256 is a multiple of every tile's depth
    if PRODUCTS == 1:
        part = dot(a, b, part, PRODUCTS, INTERPRET)
        if step % STEPS == STEPS - 1:
            total += part
            part = tl.zeros_like(part)
    else:
        total += dot(a, b, tl.zeros_like(part), PRODUCTS, INTERPRET)
    return part, total


@triton.jit
def narrow(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 `value` rounded to nearest even in `dtype`."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def tanh(x):
    """tanh of fp32 to 3 ulp: the series where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    big = 1 - 2 / (tl.exp(2 * tl.minimum(tl.abs(x), 15.0)) + 1)
    bounded = tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -big, big))
    return tl.where(x != x, x, bounded)  # a GPU's minimum of NaN and 15 is 15
