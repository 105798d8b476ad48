"""The shapes of the micro-benchmarks: the only place that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """The widths that the ops meet in a model: W of down_proj is [hidden, inner]."""

    hidden: int
    inner: int
    vocabulary: int


MODELS = {
    "GPT-2": Model(768, 3072, 50257),
    "GPT-J": Model(4096, 16384, 50400),
    "Llama-3-8B": Model(4096, 14336, 128256),
    "Qwen2.5-7B": Model(3584, 18944, 152064),
}


@dataclass(frozen=True)
class Case:
    """One op on one shape; `floor` and `goal` are ratios against the eager baseline.

    `elsewhere` has other floors and goals by instruction set, as `benchmarks.run.isa` names it.
    """

    op: str
    name: str
    dtype: str
    sizes: dict[str, int] = field(hash=False)
    floor: float | None = None
    goal: float | None = None
    note: str = ""
    """What was scaled down, and why."""
    elsewhere: dict[str, tuple[float | None, float | None]] = field(default_factory=dict, hash=False)

    def bars(self, isa: str) -> tuple[float | None, float | None]:
        """Floor and goal on an instruction set."""
        return self.elsewhere.get(isa, (self.floor, self.goal))

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.dtype}"


# Without a bf16 unit half of the products is all there is to save.
NO_BF16_UNIT: dict[str, tuple[float | None, float | None]] = dict.fromkeys(("avx512", "avx2", "generic"), (1.6, None))


def _symmetric() -> list[Case]:
    """The rows of x are tokens."""
    cases = [
        Case(
            "symmetric_rank_k_update_",
            f"x [{rows}, {d}]",
            dtype,
            {"rows": rows, "d": d},
            floor,
            goal,
            elsewhere=NO_BF16_UNIT if dtype == "bfloat16" else {},
        )
        for dtype, floor, goal in (("bfloat16", 5.0, 10.0), ("float32", 1.4, 1.8))
        for d, rows in ((1024, 4096), (2048, 4096), (4096, 4096), (8192, 2048))
    ]
    for model, dtype, rows in (
        ("GPT-2", "float32", 4096), ("GPT-J", "float32", 1024), ("Llama-3-8B", "bfloat16", 1024),
        ("Qwen2.5-7B", "bfloat16", 512),
    ):  # fmt: skip
        d = MODELS[model].inner
        sizes = {"rows": rows, "d": d}
        note = "" if rows == 4096 else f"{rows} rows instead of 4096: time on 2 cores"
        cases.append(Case("symmetric_rank_k_update_", f"{model}, x [{rows}, {d}]", dtype, sizes, note=note))
    return cases


def _rank_k() -> list[Case]:
    floors = {1: (5.0, 8.0), 16: (4.0, 8.0), 64: (2.0, 3.0)}
    cases = []
    for model, dtype, ranks in (
        ("Llama-3-8B", "bfloat16", (1, 16, 64, 100)), ("GPT-2", "float32", (1, 16, 64)),
        ("GPT-J", "float16", (1, 16, 64)), ("Qwen2.5-7B", "bfloat16", (1, 16, 64)),
    ):  # fmt: skip
        out, inner = MODELS[model].hidden, MODELS[model].inner
        for k in ranks:
            floor, goal = floors.get(k, (None, None)) if model == "Llama-3-8B" else (None, None)
            sizes = {"out": out, "inner": inner, "k": k, "transposed": model == "GPT-2"}  # GPT-2's Conv1D
            cases.append(Case("rank_k_update_", f"{model}, W [{out}, {inner}], k {k}", dtype, sizes, floor, goal))
    m = MODELS["Llama-3-8B"]
    for k in (1, 16):
        sizes = {"out": m.hidden, "inner": m.inner, "k": k, "copy": True}
        name = f"Llama-3-8B, fp32 master + bf16 copy, k {k}"
        cases.append(Case("rank_k_update_", name, "float32", sizes))
    return cases


def _grouped(gpu: bool = False) -> list[Case]:
    """The experts of a mixture: moments of a batch of tokens, each of which chose 8 experts, and the write of edits."""
    groups, d, out = 128, 768, 2048  # Qwen3-30B-A3B
    model, cases = "Qwen3-30B-A3B", []
    bars = {"bfloat16": (2.0, None), "float32": (1.3, None)}
    no_unit: dict[str, tuple[float | None, float | None]] = dict.fromkeys(("avx512", "avx2", "generic"), (1.3, None))
    for dtype, rows, options in (
        ("float32", 32, ""), ("float32", 256, ""), ("bfloat16", 32, ""), ("bfloat16", 256, ""),
        ("bfloat16", 256, "weighted"), ("bfloat16", 256, "weighted, uneven"),
    ):  # fmt: skip
        floor, goal = bars[dtype] if not options and not gpu else (None, None)
        cases.append(
            Case(
                "grouped_symmetric_rank_k_update_",
                ", ".join(filter(None, (f"{model}, {groups} experts, {rows} rows each, d {d}", options))),
                dtype,
                {"groups": groups, "rows": rows, "d": d, **{option: 1 for option in options.split(", ") if option}},
                floor,
                goal,
                elsewhere=no_unit if floor and dtype == "bfloat16" else {},
            )
        )
    for dtype, rows, options in (
        ("bfloat16", 6, ""), ("bfloat16", 32, ""), ("bfloat16", 256, ""), ("bfloat16", 32, "uneven"),
        ("float32", 32, ""), ("float32", 32, "copy"),
    ):  # fmt: skip
        floor = 3.0 if rows == 32 and dtype == "bfloat16" and not options and not gpu else None
        name = f"{model}, {groups} experts [{out}, {d}], {rows} rows each"
        sizes = {"groups": groups, "rows": rows, "out": out, "inner": d}
        sizes |= {option: 1 for option in (options,) if option}
        cases.append(Case("grouped_rank_k_update_", ", ".join(filter(None, (name, options))), dtype, sizes, floor))
    return cases


def _head() -> list[Case]:
    """Rows are the target tokens of a step: 64 requests of three tokens, and one KL prompt each."""
    cases = []
    for model, dtype, rows in (("GPT-2", "float32", 192), ("GPT-J", "float32", 64), ("Llama-3-8B", "bfloat16", 64)):
        m = MODELS[model]
        sizes = {"rows": rows, "width": m.hidden, "vocabulary": m.vocabulary}
        note = "" if rows == 192 else f"{rows} rows instead of 192: time on 2 cores"
        for op in ("target_log_probs", "distribution_kl"):
            name = f"{model}, [{rows}, {m.hidden}] x [{m.vocabulary}, {m.hidden}], forward + backward"
            cases.append(Case(op, name, dtype, sizes, note=note))
    for width in (768, 4096):
        for vocabulary in (50257, 32000):
            sizes = {"rows": 64, "width": width, "vocabulary": vocabulary, "forward": 1}
            for op in ("target_log_probs", "distribution_kl"):
                cases.append(Case(op, f"[64, {width}] x [{vocabulary}, {width}], forward", "float32", sizes))
    for op in ("target_log_probs", "distribution_kl"):  # what a call takes that has nothing to compute
        sizes = {"rows": 2, "width": 8, "vocabulary": 16}
        cases.append(Case(op, "[2, 8] x [16, 8], forward + backward", "float32", sizes))
    return cases


def _solve() -> list[Case]:
    return [
        Case("spd_solve", f"[{u}, {u}], {m} right sides", dtype, {"u": u, "columns": m})
        for dtype in ("float32", "float64")
        for u, m in ((100, 4096), (1000, 4096))
    ]


def _by_rows() -> list[Case]:
    """Rows are the tokens of a batch of statistics."""
    cases = []
    for model, dtype, rows in (("Llama-3-8B", "bfloat16", 4096), ("Llama-3-8B", "float32", 4096)):
        m = MODELS[model]
        for op, d in (("rms_norm", m.hidden), ("gated_silu", m.inner)):
            cases.append(Case(op, f"{model}, [{rows}, {d}]", dtype, {"rows": rows, "d": d}))
    return cases


def _by_rows_backward(gpu: bool = False) -> list[Case]:
    """Rows are the tokens of a step of values, whose norms and activations are differentiated."""
    cases, floor = [], None if gpu else 1.5
    m, tokens = MODELS["Llama-3-8B"], 4096 if gpu else 1024
    large = [("Llama-3-8B", dtype, tokens, m.hidden, m.inner) for dtype in ("float32", "bfloat16")]
    small = [] if gpu else [("small Llama", "float32", 2048, 512, 1376)]
    for model, dtype, rows, hidden, inner in small + large:
        for op, d in (("rms_norm", hidden), ("gated_silu", inner), ("gated_gelu", inner)):
            sizes = {"rows": rows, "d": d, "backward": 1}
            even = op == "gated_silu" and dtype == "bfloat16"  # torch's two passes are as fast
            name = f"{model}, [{rows}, {d}], forward + backward"
            cases.append(Case(op, name, dtype, sizes, None if even else floor))
    return cases


def _steps() -> list[Case]:
    """One step on a matrix: WISE's, from the factors of 300 tokens, and one of Adam with a box, as FT takes it."""
    m = MODELS["GPT-2"]
    cases = []
    for h, d, floor, note in (
        (m.hidden, m.inner, None, ""), (2048, 8192, 4.0, "about half the sides of Llama-3-8B: time on 2 cores"),
    ):  # fmt: skip
        sizes = {"h": h, "d": d}
        tokens = {**sizes, "tokens": 300}
        name = f"W [{h}, {d}]"
        masked = f"{name}, 300 tokens, a fifth of the entries, box"
        cases += [
            Case("masked_descent_", masked, "float32", {**tokens, "share": 20}, floor, note=note),
            Case("masked_descent_", f"{name}, 300 tokens, all entries, box", "float32", tokens, note=note),
            Case("masked_adam_", f"{name}, box", "float32", sizes, 2.0, note=note),
        ]
    return cases


def _memories() -> list[Case]:
    """What a memory costs beside a layer: routing prompts of 25 tokens, and a token of each sequence afterwards."""
    m = MODELS["GPT-J"]
    h, d = m.hidden // 2, m.inner // 2
    note = "half the sides of GPT-J: time on 2 cores"
    sizes = {"h": h, "d": d, "memories": 2}
    return [
        Case("activation_distance", f"4 prompts of 25 tokens, 2 memories [{h}, {d}]", "float32",
             {**sizes, "sequences": 4, "tokens": 25}, note=note),
        Case("routed_linear", f"100 tokens, 2 memories [{h}, {d}]", "float32",
             {**sizes, "sequences": 4, "tokens": 25}, note=note),
        Case("routed_linear", f"4 tokens, 2 memories [{h}, {d}]", "float32",
             {**sizes, "sequences": 4, "tokens": 1}, note=note),
    ]  # fmt: skip


def _selections(gpu: bool = False) -> list[Case]:
    """What side memories ask for each sequence, and what is selected over a whole matrix."""
    near, book = {"queries": 256, "keys": 10_000, "d": 4096}, {"entries": 15_000, "bits": 14_336}
    floors = {"near": 1.5, "book": 20.0, "bound": 2.0, "merge": 3.0} if not gpu else {}
    name = "GRACE, queries [256, 4096], 10,000 keys"
    cases = [
        Case("nearest_key", f"{name}, none near", "float32", near, floors.get("near")),
        Case("nearest_key", f"{name}, each near one", "float32", {**near, "close": 1}),
    ]
    for rows in (1, 16):
        label = f"MEMOIR, masks [{rows}, 14336 bits], book of 15,000"
        cases.append(Case("best_overlap", label, "uint8", {**book, "masks": rows}, floors.get("book")))
    m = MODELS["Llama-3-8B"]
    out, inner = (m.hidden, m.inner) if gpu else (m.hidden // 4, m.inner)
    note = "" if gpu else f"{out} rows instead of {m.hidden}: time of the baselines"
    for dtype, divided in (("float32", 0), ("bfloat16", 0), ("float32", 1)):
        sizes = {"out": out, "inner": inner, "divided": divided}
        label = f"Llama-3-8B, [{out}, {inner}], the largest 40 % of {'|x / y|' if divided else '|x|'}"
        cases.append(Case("magnitude_bound", label, dtype, sizes, floors.get("bound"), note=note))
    sizes = {"out": out, "inner": inner, "memories": 2}
    label = f"WISE, Llama-3-8B, 2 memories [{out}, {inner}]"
    cases.append(Case("ties_merge_", label, "float32", sizes, floors.get("merge"), note=note))
    return cases


def _tails(gpu: bool = False) -> list[Case]:
    """A pass and its gradients in the loop of values: rows of tails and prefixes of lengths up to those named."""
    cases = []
    shapes = [
        ("GPT-2", 64, 20, 20, 12, 12, 64, "float32", 2.0), ("GPT-2", 512, 20, 8, 12, 12, 64, "float32", 2.0),
        ("small Llama", 64, 40, 12, 8, 2, 32, "float32", 1.3), ("small Llama", 512, 12, 6, 8, 4, 64, "float32", 1.6),
        ("Llama-3-8B", 64, 20, 20, 32, 8, 128, "bfloat16", None),
        ("GPT-2, whole rows", 16, 0, 200, 12, 12, 64, "float32", None),
        ("small Llama, whole rows", 16, 0, 64, 8, 2, 64, "float32", None),
    ]  # fmt: skip
    for model, rows, prefix, tail, heads, groups, size, dtype, floor in shapes:
        sizes = {"rows": rows, "prefix": prefix, "tail": tail, "heads": heads, "groups": groups, "size": size}
        name = f"{model}, {rows} rows, prefixes to {prefix}, tails to {tail}, {heads} heads of {size}, {groups} groups"
        cases.append(Case("tail_attention", f"{name}, forward + backward", dtype, sizes, None if gpu else floor))
    return cases


OPS = [
    *_symmetric(), *_rank_k(), *_grouped(), *_head(), *_solve(), *_by_rows(), *_by_rows_backward(), *_steps(),
    *_memories(), *_selections(), *_tails(),
]  # fmt: skip


def _gpu() -> list[Case]:
    """Real sizes with nothing scaled down; floors and goals are those of an H200."""
    cases = [
        Case("symmetric_rank_k_update_", f"{model}, x [{rows}, {d}]", dtype, {"rows": rows, "d": d}, floor, goal)
        for model, rows, d, dtype, floor, goal in (
            ("Llama-3-8B", 16384, 14336, "bfloat16", 1.3, 1.6), ("Llama-3-8B", 16384, 14336, "float32", None, None),
            ("GPT-2", 16384, 3072, "float32", None, None), ("GPT-J", 16384, 16384, "float16", None, None),
            ("Qwen2.5-7B", 16384, 18944, "bfloat16", None, None),
        )
    ]  # fmt: skip
    for model, d, dtype in (("Llama-3-8B", 14336, "bfloat16"), ("GPT-J", 16384, "float16"), ("GPT-2", 3072, "float32")):
        # What statistics call: a batch of 4096 tokens, its padding masked, into a float64 sum.
        sizes = {"rows": 4096, "d": d, "masked": 1, "wide_acc": 1}
        cases.append(Case("symmetric_rank_k_update_", f"{model}, x [4096, {d}], masked, float64 acc", dtype, sizes))
    for model, out, inner in (("Llama-3-8B", 4096, 14336), ("Llama-3-70B", 8192, 28672)):
        for k in (1, 16, 64, 256):
            sizes = {"out": out, "inner": inner, "k": k}
            cases.append(Case("rank_k_update_", f"{model}, W [{out}, {inner}], k {k}", "bfloat16", sizes))
    for model, dtype in (("GPT-2", "float32"), ("Llama-3-8B", "bfloat16"), ("Qwen2.5-7B", "bfloat16")):
        m = MODELS[model]
        sizes = {"rows": 1152, "width": m.hidden, "vocabulary": m.vocabulary}
        for op in ("target_log_probs", "distribution_kl"):
            name = f"{model}, [1152, {m.hidden}] x [{m.vocabulary}, {m.hidden}], forward + backward"
            cases.append(Case(op, name, dtype, sizes))
    h, d = MODELS["Llama-3-8B"].hidden, MODELS["Llama-3-8B"].inner
    sizes, memories = {"h": h, "d": d}, {"h": h, "d": d, "memories": 2, "sequences": 8}
    cases += [
        Case("masked_descent_", f"Llama-3-8B, W [{h}, {d}], 300 tokens, a fifth of the entries, box", "float32",
             {**sizes, "tokens": 300, "share": 20}),
        Case("masked_adam_", f"Llama-3-8B, W [{h}, {d}], box", "float32", sizes),
        Case("activation_distance", "Llama-3-8B, 8 prompts of 25 tokens, 2 memories", "bfloat16",
             {**memories, "tokens": 25}),
        Case("routed_linear", "Llama-3-8B, 8 tokens, 2 memories", "bfloat16", {**memories, "tokens": 1}),
    ]  # fmt: skip
    cases += _grouped(gpu=True) + _solve() + _by_rows_backward(gpu=True)
    return cases + _selections(gpu=True) + _tails(gpu=True)


GPU_OPS = _gpu()

# Odd small shapes that take milliseconds: the harness's own test, and a look at whether everything runs.
SMALL = [
    Case("symmetric_rank_k_update_", "x [130, 65]", "bfloat16", {"rows": 130, "d": 65}),
    Case("symmetric_rank_k_update_", "x [130, 65]", "float32", {"rows": 130, "d": 65}),
    Case("symmetric_rank_k_update_", "x [130, 65], masked, float64 acc", "bfloat16",
         {"rows": 130, "d": 65, "masked": 1, "wide_acc": 1}),
    Case("rank_k_update_", "W [33, 70], k 5", "bfloat16", {"out": 33, "inner": 70, "k": 5}),
    Case("rank_k_update_", "W [33, 70], k 5, transposed", "float32", {"out": 33, "inner": 70, "k": 5, "transposed": 1}),
    Case("rank_k_update_", "W [33, 70], k 5, copy", "float32", {"out": 33, "inner": 70, "k": 5, "copy": 1}),
    Case("grouped_symmetric_rank_k_update_", "3 groups of 9 rows, d 33", "bfloat16", {"groups": 3, "rows": 9, "d": 33}),
    Case("grouped_symmetric_rank_k_update_", "3 groups of 9 rows, d 33, weighted, uneven", "float32",
         {"groups": 3, "rows": 9, "d": 33, "weighted": 1, "uneven": 1}),
    Case("grouped_rank_k_update_", "3 matrices [9, 33], 8 rows each", "bfloat16",
         {"groups": 3, "rows": 8, "out": 9, "inner": 33}),
    Case("grouped_rank_k_update_", "3 matrices [9, 33], 8 rows each, uneven, copy", "float32",
         {"groups": 3, "rows": 8, "out": 9, "inner": 33, "uneven": 1, "copy": 1}),
    Case("target_log_probs", "[5, 16] x [99, 16]", "float32", {"rows": 5, "width": 16, "vocabulary": 99}),
    Case("distribution_kl", "[5, 16] x [99, 16]", "bfloat16", {"rows": 5, "width": 16, "vocabulary": 99}),
    Case("target_log_probs", "[5, 16] x [99, 16], forward", "float32",
         {"rows": 5, "width": 16, "vocabulary": 99, "forward": 1}),
    Case("rms_norm", "[7, 33]", "bfloat16", {"rows": 7, "d": 33}),
    Case("gated_silu", "[7, 33]", "float32", {"rows": 7, "d": 33}),
    Case("gated_gelu", "[7, 33]", "float32", {"rows": 7, "d": 33}),
    Case("rms_norm", "[7, 33], forward + backward", "float32", {"rows": 7, "d": 33, "backward": 1}),
    Case("gated_silu", "[7, 33], forward + backward", "bfloat16", {"rows": 7, "d": 33, "backward": 1}),
    Case("gated_gelu", "[7, 33], forward + backward", "float16", {"rows": 7, "d": 33, "backward": 1}),
    Case("masked_descent_", "W [9, 33], 5 tokens, a fifth of the entries, box", "float32",
         {"h": 9, "d": 33, "tokens": 5, "share": 20}),
    Case("masked_descent_", "W [9, 33], 5 tokens, all entries, box", "float32", {"h": 9, "d": 33, "tokens": 5}),
    Case("masked_adam_", "W [9, 33], box", "float32", {"h": 9, "d": 33}),
    Case("activation_distance", "3 prompts of 5 tokens, 2 memories [9, 33]", "bfloat16",
         {"h": 9, "d": 33, "memories": 2, "sequences": 3, "tokens": 5}),
    Case("routed_linear", "3 tokens, 2 memories [9, 33]", "float32",
         {"h": 9, "d": 33, "memories": 2, "sequences": 3, "tokens": 1}),
    Case("nearest_key", "queries [5, 9], 7 keys", "float32", {"queries": 5, "keys": 7, "d": 9}),
    Case("best_overlap", "masks [3, 24 bits], book of 5", "uint8", {"entries": 5, "bits": 24, "masks": 3}),
    Case("magnitude_bound", "[7, 33]", "bfloat16", {"out": 7, "inner": 33, "divided": 0}),
    Case("magnitude_bound", "[7, 33], divided", "float32", {"out": 7, "inner": 33, "divided": 1}),
    Case("ties_merge_", "2 memories [7, 33]", "float32", {"out": 7, "inner": 33, "memories": 2}),
    Case("tail_attention", "3 rows, prefixes to 4, tails to 3, 4 heads of 8, 2 groups, forward + backward", "float32",
         {"rows": 3, "prefix": 4, "tail": 3, "heads": 4, "groups": 2, "size": 8}),
    Case("tail_attention", "3 rows, prefixes to 0, tails to 5, 2 heads of 9, 2 groups, forward + backward", "bfloat16",
         {"rows": 3, "prefix": 0, "tail": 5, "heads": 2, "groups": 2, "size": 9}),
    Case("spd_solve", "[9, 9], 4 right sides", "float64", {"u": 9, "columns": 4}),
]  # fmt: skip
