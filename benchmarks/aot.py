"""Compile every Triton kernel ahead of time, no GPU needed: `python -m benchmarks.aot [--json FILE] [--quick]`.

Each variant is the launches that a call would make, with the configuration of its architecture: all of them for
sm_80 and sm_90, where a spill is an error (exit status 1); those of bf16 and plain fp32 rows for sm_100 and sm_120,
which run the tiles of sm_90 and may spill a few bytes, as the table says. Registers, shared memory and spills are those
of the cubin. `--module FILE` reads the CUDA kernels of a built kedit_fast._cuda too. `--quick` compiles a few variants
for sm_80 and sm_90.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ARCHITECTURES = (80, 90, 100, 120)
# Bytes a block can ask for. sm_80 itself has 163 KiB; its tiles serve sm_86 and sm_89 too, which have 99.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
STRICT = (80, 90)
SPILL_LIMIT = {80: 0, 90: 0, 100: 64, 120: 64}  # bytes a thread; nothing was tuned for the last two
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUICK = (
    ("symmetric_rank_k_update_", "bfloat16 rows, float64 acc, mask"),
    ("symmetric_rank_k_update_", "bfloat16 rows, float64 acc, odd strides"),
    ("symmetric_rank_k_update_", "float32 rows, float32 acc, split"),
    ("rank_k_update_", "bfloat16 weight, k 1"), ("rank_k_update_", "bfloat16 weight, k 100"),
    ("rank_k_update_", "bfloat16 weight, k 100, odd strides"),
    ("grouped_symmetric_rank_k_update_", "bfloat16 rows, float64 acc, weights"),
    ("grouped_rank_k_update_", "bfloat16 weight, fma"), ("grouped_rank_k_update_", "bfloat16 weight, dot"),
    ("target_log_probs", "bfloat16"),
    ("distribution_kl, gradient", "bfloat16"), ("gradient of both", "bfloat16"),
    ("masked_descent_", "float32, dot, entries, box, copy"), ("masked_adam_", "float32, rows, entries, box, copy"),
    ("activation_distance", "bfloat16, silu"), ("routed_linear", "bfloat16, weight"),
    ("nearest_key", "float32 keys"),
    ("best_overlap", "words"), ("magnitude_bound", "bfloat16 sizes of differences"),
    ("ties_merge_", "bfloat16, 2 memories"), ("rms_norm", "bfloat16"), ("rms_norm, gradient", "bfloat16"),
    ("gated_silu", "bfloat16"), ("gated_silu, gradient", "bfloat16"), ("gated_gelu, gradient", "bfloat16"),
    ("tail_attention", "bfloat16, heads of 64, prefixes"),
    ("tail_attention, gradients", "bfloat16, heads of 128, prefixes by index, soft-cap, window"),
)  # fmt: skip
ODD = "odd strides"  # no stride or size is a multiple of 16 elements: loads cannot be wide


@dataclass(frozen=True)
class Variant:
    """A named case: `launches(architecture)` are those that a call with these tensors would make."""

    op: str
    case: str
    launches: Any


def variants() -> Iterator[Variant]:
    """Every combination of dtypes and options that compiles to different code."""
    from kedit_fast.kernels.triton import (
        best_overlap,
        distribution_kl,
        gated,
        grouped_rank_k_update,
        grouped_symmetric_rank_k_update,
        lm_head,
        magnitude_bound,
        masked_step,
        nearest_key,
        rank_k_update,
        rms_norm,
        row_products,
        symmetric_rank_k_update,
        tail_attention,
        target_log_probs,
        ties_merge,
    )
    from kedit_fast.kernels.triton.configs import (
        DIGITS,
        GATED,
        GRADIENT,
        LOGITS,
        MERGE,
        NEAREST,
        NORM,
        OVERLAP,
        RANK_K,
        ROW_PRODUCTS,
        STEP,
        SYMMETRIC,
        TAIL,
        lookup,
    )

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype)  # untouched: it takes no memory

    for dtype in FLOATS:
        for acc_dtype in (torch.float32, torch.float64):
            odd = ((ODD, 4095, 4095), (f"mask, {ODD}", 4095, 4095), ("transposed", 4095, 4096),
                   (f"weights, mask, {ODD}", 4095, 4095))  # fmt: skip
            for options, n, d in (
                ("", 4096, 4096), ("split", 4096, 256), ("mask", 4096, 4096), ("weights, mask", 4096, 4096),
                *(odd if dtype != torch.float16 else ()),
            ):  # fmt: skip
                x, acc = empty(n, d, dtype=dtype), empty(d, d, dtype=acc_dtype)
                if options == "transposed":
                    x = empty(d, n, dtype=dtype).T
                weights = torch.ones(n) if "weights" in options else None
                mask = torch.ones(n, dtype=torch.bool) if "mask" in options else None
                kind = symmetric_rank_k_update.shape_class(acc, x, weights)
                yield Variant(
                    SYMMETRIC, ", ".join(filter(None, (f"{name(dtype)} rows", f"{name(acc_dtype)} acc", options))),
                    lambda arch, a=(acc, x, weights, mask, 0.5), kind=kind: symmetric_rank_k_update.launches(
                        *a, lookup(SYMMETRIC, kind, arch)
                    ),
                )  # fmt: skip
    for dtype in FLOATS:
        for copy_dtype in (None, torch.bfloat16) if dtype == torch.float32 else (None,):
            for k, options in (
                *((k, "") for k in (1, 5, 16, 17, 64, 100)), *((k, ODD) for k in (1, 17, 100)),
                (100, f"factors by columns, {ODD}"), (100, "bfloat16 right"),
            ):  # fmt: skip
                out, inner = (255, 511) if ODD in options else (256, 512)
                weight, left, right = empty(out, inner, dtype=dtype), empty(out, k), empty(inner, k)
                if "columns" in options:
                    left, right = empty(k, out).T, empty(k, inner).T
                if "right" in options:
                    right = right.bfloat16()
                copy = None if copy_dtype is None else empty(out, inner, dtype=copy_dtype)
                kind = "fma" if k <= rank_k_update.MOST_FMA else "dot"
                case = f"{name(dtype)} weight, k {k}" + ("" if copy is None else f", {name(copy_dtype)} copy")
                yield Variant(
                    RANK_K, ", ".join(filter(None, (case, options))),
                    lambda arch, a=(weight, left, right, 0.5, copy), kind=kind: rank_k_update.launches(
                        *a, lookup(RANK_K, kind, arch)
                    ),
                )  # fmt: skip
    offsets, columns = torch.zeros(9, dtype=torch.int64), torch.zeros(512, dtype=torch.int64)
    for dtype in FLOATS:
        for acc_dtype in (torch.float32, torch.float64):
            for options, n, d in (
                ("", 4096, 768), ("weights", 4096, 768),
                *(((ODD, 4095, 767), (f"weights, {ODD}", 4095, 767)) if dtype != torch.float16 else ()),
            ):  # fmt: skip
                x, acc = empty(n, d, dtype=dtype), empty(8, d, d, dtype=acc_dtype)
                weights = torch.ones(n) if "weights" in options else None
                kind = grouped_symmetric_rank_k_update.shape_class(x, weights)
                yield Variant(
                    f"grouped_{SYMMETRIC}",
                    ", ".join(filter(None, (f"{name(dtype)} rows", f"{name(acc_dtype)} acc", options))),
                    lambda arch, a=(acc, x, offsets, weights, 0.5), kind=kind: grouped_symmetric_rank_k_update.launches(
                        *a, lookup(SYMMETRIC, kind, arch)
                    ),
                )  # fmt: skip
        for copy_dtype in (None, torch.bfloat16) if dtype == torch.float32 else (None,):
            for rows, options in ((64, ""), (512, ""), (64, ODD), (512, ODD), (512, "transposed"), (64, "transposed")):
                out, inner = (255, 511) if ODD in options else (256, 512)
                weight, left, right = empty(8, out, inner, dtype=dtype), empty(out, 64), empty(rows, inner)
                copy = None if copy_dtype is None else empty(8, out, inner, dtype=copy_dtype)
                if "transposed" in options:
                    weight = empty(8, inner, out, dtype=dtype).mT
                    copy = None if copy is None else empty(8, inner, out, dtype=copy_dtype).mT
                kind = grouped_rank_k_update.shape_class(right, 8)
                case = f"{name(dtype)} weight, {kind.removeprefix('grouped_')}"
                case += "" if copy is None else f", {name(copy_dtype)} copy"
                yield Variant(
                    f"grouped_{RANK_K}", ", ".join(filter(None, (case, options))),
                    lambda arch, a=(weight, left, right, columns[:rows], offsets, 0.5, copy), kind=kind:
                    grouped_rank_k_update.launches(*a, lookup(RANK_K, kind, arch)),
                )  # fmt: skip
    for dtype in FLOATS:
        odd = ((ODD, 33, 255, 4097), ("odd vocabulary", 32, 256, 4097)) if dtype != torch.float16 else ()
        for options, rows, width, tokens in (("", 32, 256, 4096), *odd):
            states, other, vocabulary = (empty(n, width, dtype=dtype) for n in (rows, rows, tokens))
            targets, row = torch.zeros(rows, dtype=torch.int64), empty(rows)
            kind = lm_head.shape_class(states, vocabulary)
            for bias, cap in ((None, 0.0), (empty(tokens), 30.0))[: 1 + ("vocabulary" not in options)]:
                case = ", ".join(filter(None, (name(dtype), "bias, soft-cap" if cap else "", options)))
                both = (states, other, vocabulary, bias, cap)
                one = (states, vocabulary, targets, bias, cap)
                d_logits = empty(rows, tokens)
                yield Variant(
                    "target_log_probs", case,
                    lambda arch, a=one, kind=kind: target_log_probs.launches(*a, lookup(LOGITS, kind, arch))[0],
                )  # fmt: skip
                yield Variant(
                    "target_log_probs, gradient", case,
                    lambda arch, a=one, kind=kind, row=row, d=d_logits: target_log_probs.d_logits_launches(
                        *a, row, 0, d, lookup(LOGITS, kind, arch)
                    ),
                )  # fmt: skip
                yield Variant(
                    "distribution_kl", case,
                    lambda arch, a=both, kind=kind: distribution_kl.launches(
                        *a, lookup(LOGITS, f"pair_{kind}", arch)
                    )[0],
                )  # fmt: skip
                yield Variant(
                    "distribution_kl, gradient", case,
                    lambda arch, a=both, kind=kind, row=row, d=d_logits: distribution_kl.d_logits_launches(
                        *a, row, row, row, 0, d, lookup(LOGITS, f"pair_{kind}", arch)
                    ),
                )  # fmt: skip
                if dtype != torch.float32:
                    yield from chunk_variants(case, states, other, vocabulary, targets, bias, cap)
            kind = lm_head.gradient_class(d_logits, vocabulary)
            yield Variant(
                "gradient of both", ", ".join(filter(None, (name(dtype), options))),
                lambda arch, e=vocabulary, kind=kind, d=d_logits: lm_head.gradient_launches(
                    d, e, lookup(GRADIENT, kind, arch)
                )[0],
            )  # fmt: skip
    flag, number = torch.ones((), dtype=torch.uint8), empty(2)
    for adam in (False, True):
        for kind, options in (
            ("rows", ""), ("rows", "entries, box, copy"), ("rows", f"entries, box, copy, {ODD}"),
            ("rows", "transposed, entries, box, copy"), ("dot", ""), ("dot", "entries, box, copy"),
            ("dot", f"entries, box, copy, {ODD}"), ("dot", "bfloat16 factors, entries, box, copy"),
        ):  # fmt: skip
            h, d, n = (255, 511, 77) if ODD in options else (256, 512, 304)
            weight, half = empty(h, d), empty(h, d, dtype=torch.bfloat16)
            if "transposed" in options:
                weight = empty(d, h).T
            factors = torch.bfloat16 if "factors" in options else torch.float32
            gradient = (empty(h, d), None, None) if kind == "rows" else (
                None, empty(n, h, dtype=factors), empty(n, d, dtype=factors)
            )  # fmt: skip
            full = "entries" in options
            rest = (torch.ones(-(-h * d // 8), dtype=torch.uint8), half, 1.0, half) if full else (None,) * 4
            state = {"adam": (empty(h, d), empty(h, d), number, 0.9, 0.999, 1e-8)} if adam else {}
            flags = {**state, "active": flag} if adam and full else {**state, "decay": 0.1 * full, "lr": 0.5}
            yield Variant(
                "masked_adam_" if adam else "masked_descent_", ", ".join(filter(None, (f"float32, {kind}", options))),
                lambda arch, a=(weight, flag, *gradient, *rest), kind=kind, flags=flags: masked_step.launches(
                    *a, lookup(STEP, kind, arch), **flags
                ),
            )  # fmt: skip
    for dtype in FLOATS:
        odd = f"bias, {ODD}"
        for options, n, h, d in (("", 64, 256, 512), (odd, 33, 255, 511), ("float32 memories", 64, 256, 512)):
            stored = torch.float32 if "memories" in options else dtype
            x, weights, outputs = empty(n, d, dtype=dtype), empty(2, h, d, dtype=stored), empty(n, h, dtype=dtype)
            bias, order = empty(h) if "bias" in options else None, torch.zeros(n, dtype=torch.int64)
            kind, case = row_products.shape_class(x, weights), ", ".join(filter(None, (name(dtype), options)))
            for activation in ("silu", "gelu", "gelu_tanh") if dtype == torch.bfloat16 else ("silu",):
                yield Variant(
                    "activation_distance", f"{case}, {activation}",
                    lambda arch, a=(x, outputs, weights, activation, bias), kind=kind: row_products.distance_launches(
                        *a, lookup(ROW_PRODUCTS, kind, arch)
                    )[0],
                )  # fmt: skip
            for beside in ("weight", "output"):
                matrix, rows = (weights[0], None) if beside == "weight" else (None, outputs)
                yield Variant(
                    "routed_linear", f"{case}, {beside}",
                    lambda arch, a=(x, matrix, weights, order, order, rows, bias, outputs), kind=kind:
                    row_products.routed_launches(*a, lookup(ROW_PRODUCTS, f"routed_{kind}", arch)),
                )  # fmt: skip
    for dtype in FLOATS:
        for options, width in (("", 256), (ODD, 255)) if dtype != torch.float16 else (("", 256),):
            queries, keys = empty(64, width), empty(512, width, dtype=dtype)
            yield Variant(
                NEAREST, ", ".join(filter(None, (f"{name(dtype)} keys", options))),
                lambda arch, a=(queries, keys): nearest_key.launches(*a, lookup(NEAREST, "rows", arch))[0],
            )  # fmt: skip
    for options, width in (("words", 1792), ("bytes", 1791)):
        masks, book = empty(4, width, dtype=torch.uint8), empty(512, width, dtype=torch.uint8)
        yield Variant(
            OVERLAP, options,
            lambda arch, a=(masks, book): best_overlap.launches(*a, lookup(OVERLAP, "words", arch))[0],
        )  # fmt: skip
    for dtype in FLOATS:
        x, y = empty(1 << 20, dtype=dtype), empty(1 << 20)
        prefix, histogram = torch.zeros(1, dtype=torch.int32), torch.zeros(512, dtype=torch.int64)
        for kind, text in enumerate(("sizes", "sizes of quotients", "sizes of differences")):
            yield Variant(
                DIGITS, f"{name(dtype)} {text}",
                lambda arch, a=(x, y, kind), counted=(prefix, histogram, prefix): [
                    launch
                    for shift in magnitude_bound.SHIFTS[:2]
                    for launch in magnitude_bound.launches(*a, shift, *counted, lookup(DIGITS, "entries", arch))
                ],
            )  # fmt: skip
        memories = {m: empty(m, 1 << 20, dtype=dtype) for m in (1, 2, 16)}
        for m, memory in memories.items():
            marks = (torch.zeros(m, dtype=torch.int32), torch.zeros(m, dtype=torch.int64), empty(m))
            yield Variant(
                MERGE, f"{name(dtype)}, {m} memories",
                lambda arch, a=(x, x, memory, *marks): ties_merge.launches(*a, lookup(MERGE, "entries", arch)),
            )  # fmt: skip
    for dtype in FLOATS:
        for options, width in (("", 4096), (ODD, 4095)) if dtype != torch.float16 else (("", 4096),):
            x, grad, out, beside = (empty(64, width, dtype=dtype) for _ in range(4))
            rstd, case = empty(64), ", ".join(filter(None, (name(dtype), options)))
            for stored in dict.fromkeys((dtype, torch.float32)):
                weight, text = empty(width, dtype=stored), case if stored == dtype else f"{case}, float32 weight"
                yield Variant(
                    NORM, text,
                    lambda arch, a=(out, rstd, x, weight, 1e-6, True): rms_norm.launches(
                        *a, lookup(NORM, "rows", arch)
                    ),
                )  # fmt: skip
                yield Variant(
                    f"{NORM}, gradient", text,
                    lambda arch, a=(out, grad, x, weight, rstd): rms_norm.backward_launches(
                        *a, lookup(NORM, "backward", arch)
                    ),
                )  # fmt: skip
            for op, activation in (("gated_silu", gated.SILU), ("gated_gelu", gated.GELU_TANH)):
                yield Variant(
                    op, case,
                    lambda arch, a=(out, x, grad, activation): gated.launches(*a, lookup(GATED, "entries", arch)),
                )  # fmt: skip
                yield Variant(
                    f"{op}, gradient", case,
                    lambda arch, a=(out, beside, x, x, grad, activation): gated.backward_launches(
                        *a, lookup(GATED, "backward", arch)
                    ),
                )  # fmt: skip
    starts, spans = torch.zeros(9, dtype=torch.int64), torch.zeros(8, 2, dtype=torch.int64)
    for dtype in FLOATS:
        for size, options in (
            (64, "no prefixes"), (64, "prefixes"), (128, "prefixes"),
            (128, "prefixes by index, soft-cap, window"), (63, f"prefixes by index, soft-cap, window, {ODD}"),
            (256, "prefixes"), (256, "prefixes by index, soft-cap, window"),
        ):  # fmt: skip
            if dtype == torch.float32 and size > 64:  # torch's
                continue
            query, key = empty(512, 32, size, dtype=dtype), empty(512, 8, size, dtype=dtype)
            stored = None if options == "no prefixes" else empty(8, 8, 32, size, dtype=dtype)
            rows = starts[:8] if "index" in options else None
            cap, window = (30.0, 64) if "window" in options else (0.0, 0)
            inputs = (query, key, key, starts, 64, stored, stored, None if stored is None else spans, rows,
                      0.125, cap, window)  # fmt: skip
            normalizer, means = empty(512, 32, 2), empty(512, 32)
            case, kind = f"{name(dtype)}, heads of {size}, {options}", tail_attention.shape_class(query)
            yield Variant(
                TAIL, case,
                lambda arch, a=(inputs, query, normalizer), kind=kind: tail_attention.launches(
                    *a, lookup(TAIL, kind, arch)
                ),
            )  # fmt: skip
            yield Variant(
                f"{TAIL}, gradients", case,
                lambda arch, a=(inputs, query, normalizer, (means, query, key, key)), kind=kind:
                tail_attention.backward_launches(*a, lookup(TAIL, f"backward_{kind}", arch)),
            )  # fmt: skip


def chunk_variants(case: str, states, other, vocabulary, targets, bias, cap) -> Iterator[Variant]:
    """The two ops from products of a library: values alone, and with the gradient."""
    from kedit_fast.kernels.triton import head_chunks
    from kedit_fast.kernels.triton.configs import CHUNK, lookup

    rows, tokens = states.shape[0], vocabulary.shape[0]
    both = torch.empty(2 * rows, tokens)
    for gradient in (False, True):
        planes = [head_chunks.planes_of(states, gradient, cancels) for cancels in (cap > 0, True)]
        of_one = head_chunks.Chunks(states, vocabulary, bias, cap, planes[0], tokens)
        of_both = head_chunks.Chunks(torch.cat([states, other]), vocabulary, bias, cap, planes[1], tokens)
        row, logits = torch.empty(rows), torch.empty(rows, tokens)
        text = f"{case}, weights" if gradient else case
        yield Variant(
            "target_log_probs, chunk", text,
            lambda arch, a=(of_one, targets, row, targets, logits): head_chunks.log_probs_launches(
                *a, 0, lookup(CHUNK, "rows", arch)
            ),
        )  # fmt: skip
        for reverse in (False, True):
            yield Variant(
                "distribution_kl, chunk", f"{text}, reverse" if reverse else text,
                lambda arch, a=(of_both, row, row, reverse, both):
                head_chunks.divergence_launches(*a, 0, lookup(CHUNK, "rows", arch)),
            )  # fmt: skip


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_launch(launch, architecture: int):
    """The kernel as Triton would compile it for these arguments, specialized as a launch specializes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
        torch.int64: "*i64", torch.uint8: "*u8", torch.int32: "*i32",
    }  # fmt: skip
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, argument in enumerate(launch.kernel.arg_names):
        if argument in launch.constants:
            signature[argument] = "constexpr"
            continue
        value = launch.arguments[argument]
        if isinstance(value, torch.Tensor):
            signature[argument] = pointer[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[argument], divisible = "fp32", False
        elif value == 1:
            signature[argument], constants[argument] = "constexpr", 1
            continue
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(binary: Path) -> list[dict[str, Any]]:
    """Function, architecture, registers, stack, local and shared bytes of every kernel that cuobjdump finds."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    kernels, architecture = [], ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r" *Function (\S+):", line):
            function = match[1]
        elif "REG:" in line:
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            kernels.append({
                "kernel": function, "architecture": architecture, "registers": number["REG"],
                "spill_bytes": number["STACK"] + number["LOCAL"], "shared_bytes": number["SHARED"],
            })  # fmt: skip
    return kernels


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = usage(Path(file.name))
    return {name: kernel[name] for name in ("registers", "spill_bytes")}


def module_table(path: Path) -> list[dict[str, Any]]:
    """The kernels of a built kedit_fast._cuda."""
    rows = []
    for row in usage(path):
        op, types = re.search(r"\d+([a-z_]+)_kernelI(.*?)EEv", row["kernel"]).groups()
        names = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
        types = types.replace("S3_", re.match(r"f|\d+[a-z_0-9]*?(?:16|half)", types)[0])  # the first type again
        operand_types = [names[t] for t in re.findall(r"f|13__nv_bfloat16|6__half", types.rsplit("Lb", 1)[0])]
        aligned = "16-byte accesses" if "Lb1" in types else "any strides"
        rows.append({
            "op": f"{op}_", "case": f"{operand_types[0]} weight, {operand_types[1]} copy, {aligned}", **row,
            "kernel": f"{op}_kernel (CUDA C++)", "tile": None, "warps": None, "stages": None,
        })  # fmt: skip
    return rows


def common(variant: Variant) -> bool:
    """Of bf16, or fp32 rows into an fp32 sum: what is compiled for the newer architectures too."""
    return "bfloat16" in variant.case or "float32 rows, float32" in variant.case


def table(quick: bool = False) -> list[dict[str, Any]]:
    rows = []
    for variant in variants():
        if quick and (variant.op, variant.case) not in QUICK:
            continue
        for architecture in STRICT if quick or not common(variant) else ARCHITECTURES:
            for launch in variant.launches(f"sm_{architecture}"):
                compiled = compile_launch(launch, architecture)
                c = launch.config
                rows.append({
                    "op": variant.op, "case": variant.case, "kernel": launch.kernel.__name__,
                    "architecture": f"sm_{architecture}", "tile": [c.m, c.n, c.k], "warps": c.warps,
                    "stages": c.stages, **resources(compiled.asm["cubin"]),
                    "shared_bytes": compiled.metadata.shared,
                })  # fmt: skip
    return rows


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Variants that spill more than they may or ask for more shared memory than there is."""
    messages = []
    for row in rows:
        where = f"{row['op']} ({row['case']}), {row['kernel']} on {row['architecture']}"
        if row["spill_bytes"] > SPILL_LIMIT[int(row["architecture"].removeprefix("sm_"))]:
            messages.append(f"{where} spills {row['spill_bytes']} bytes")
        if row["shared_bytes"] > SHARED_LIMIT[int(row["architecture"].removeprefix("sm_"))]:
            messages.append(f"{where} asks for {row['shared_bytes']} bytes of shared memory")
    return messages


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    quick: Annotated[bool, typer.Option(help="the variants of QUICK alone, for sm_80 and sm_90")] = False,
    module: Annotated[Path | None, typer.Option(help="a built kedit_fast._cuda to read")] = None,
) -> None:
    """Compile, print the table, and exit with 1 when a variant spills more than it may."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 compiles nothing: unset it")
    rows = ([] if module is None else module_table(module)) + table(quick)
    report = Table(title=f"triton {triton.__version__}", title_justify="left")
    columns = ("op", "case", "kernel", "architecture", "tile", "warps", "stages", "registers", "spill_bytes",
               "shared_bytes")  # fmt: skip
    for column in columns:
        report.add_column(column)
    for row in rows:
        report.add_row(*(str(row[column]) for column in columns))
    Console(width=180).print(report)
    if json_file is not None:
        document = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for fault in (violations := faults(rows)):
        print(fault, file=sys.stderr)
    raise typer.Exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
