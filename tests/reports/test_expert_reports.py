"""Plans and convergence on models with experts."""

from __future__ import annotations

import pytest
import torch
import transformers
from floors import relative_error
from support import REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics, save_statistics
from kedit_fast.cli.stats.show import show
from kedit_fast.errors import MethodError
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.view import ModelView
from kedit_fast.reports.convergence import convergence
from kedit_fast.reports.plan import plan
from kedit_fast.reports.spectra import spectra
from kedit_fast.solver.block_diagonal import EXPERT_RIDGE
from kedit_fast.statistics.corpus import Corpus

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts need transformers 5")
DOCUMENTS = [f"{text} Number {i}." for i, text in enumerate(TEXT * 20)]
LAYERS = (0, 1)
NUMBERS = {"layers": LAYERS, "v_num_grad_steps": 3, "v_lr": 0.1, "clamp_norm_factor": 0.5, "mom2_update_weight": 10.0}


def test_a_plan_counts_the_bytes_of_blocks():
    with torch.device("meta"):
        model = make_model("qwen3_moe")
    view = ModelView(model)
    stack = view.experts(1)
    moments = len(LAYERS) * 8 * stack.count * stack.inputs**2
    planned = plan(model, None, 10, "memit", hparams=NUMBERS)
    assert planned.bytes["statistics and factors"] == 2 * moments
    assert planned.bytes["originals and masters"] == len(LAYERS) * view.weight(1).numel() * 4
    d = stack.count * stack.inputs
    assert planned.bytes["keys"] == 4 * d * 10 * 8
    with_memory = plan(model, None, 1000, "alphaedit", hparams={"layers": LAYERS})
    assert with_memory.bytes["key memory"] == len(LAYERS) * 8 * (d * 1000 + 1000**2)  # never folded


def test_a_plan_refuses_what_does_not_go_with_experts():
    with torch.device("meta"):
        model = make_model("qwen3_moe")
    with pytest.raises(MethodError, match=r"layers 1 have experts.*tunes one matrix"):
        plan(model, None, 10, "ft-l", hparams={"layers": (1,)})
    with pytest.raises(MethodError, match="nullspace_rule = absolute"):
        plan(model, None, 10, "alphaedit", hparams={"layers": (1,), "nullspace_rule": "absolute"})


def test_a_trial_times_an_edit():
    model, tokenizer = make_model("qwen3_moe"), make_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned = plan(model, tokenizer, 20, "memit", requests=REQUESTS, hparams=NUMBERS)
    assert planned.seconds is not None and all(seconds >= 0 for seconds in planned.seconds.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_convergence_compares_updates_and_null_spaces_expert_by_expert():
    model, tokenizer = make_model("qwen3_moe"), make_tokenizer()
    counts = (300, 1200)
    rows = convergence(model, tokenizer, Corpus(DOCUMENTS), REQUESTS, counts=counts, hparams=NUMBERS)
    assert [(row.tokens, row.layer) for row in rows] == [(count, layer) for count in counts for layer in LAYERS]
    assert not any(row.note for row in rows)
    deltas, prefixes = [], None
    for count in counts:
        statistics = collect_statistics(model, tokenizer, DOCUMENTS, LAYERS, max_tokens=count)
        editor = Editor(
            model, tokenizer, "memit", statistics=statistics, layers=LAYERS, hparams=NUMBERS, prefixes=prefixes
        )
        prefixes = editor.prefixes
        result = editor.edit(REQUESTS)
        deltas.append(result.updates[editor.view.weight_name(0)][0].dense().double())
        editor.restore()
    assert rows[0].update_norm == pytest.approx(float(deltas[0].norm()), rel=1e-3)
    assert rows[0].change_to_last == pytest.approx(relative_error(deltas[0], deltas[1]), rel=0.05)
    assert rows[2].change_to_last == 0 and rows[2].change_from_previous > 0
    blocks = statistics.moment(0).moment
    whole = torch.block_diag(*blocks)
    whole.diagonal().add_(EXPERT_RIDGE * float(whole.diagonal().mean()))
    values = torch.linalg.eigvalsh(whole)
    assert rows[2].condition == pytest.approx(float(values[-1] / values[0]), rel=1e-3)
    shares = [torch.linalg.eigvalsh(block).clamp(min=0) for block in blocks]
    assert rows[2].null_dimension == sum(int((v.cumsum(0) <= 0.1 * v.sum()).sum()) for v in shares)
    assert rows[0].null_overlap is None and 0 < rows[2].null_overlap <= 1 + 1e-9


def test_convergence_refuses_absolute_thresholds_of_experts():
    model, tokenizer = make_model("qwen3_moe"), make_tokenizer()
    numbers = {**NUMBERS, "nullspace_rule": "absolute"}
    with pytest.raises(MethodError, match="set it to relative or energy"):
        convergence(model, tokenizer, Corpus(DOCUMENTS), REQUESTS, counts=(300,), hparams=numbers)


def test_spectra_of_a_stack_with_shared_experts_beside_a_plain_layer(tmp_path, capsys):
    """The shared block has a line of its own; null spaces of experts are relative, those of a plain matrix are all."""
    model, tokenizer = make_model("deepseek_v3"), make_tokenizer()
    stacked, alone = (find_spec(model, shared_experts=how) for how in ("stack", "alone"))
    statistics = collect_statistics(model, tokenizer, DOCUMENTS, (1,), spec=stacked, max_tokens=600)
    save_statistics(statistics, tmp_path)
    save_statistics(collect_statistics(model, tokenizer, DOCUMENTS, (2,), spec=alone, max_tokens=600), tmp_path)
    experts, shared, plain = spectra(tmp_path)
    assert [s.name for s in (experts, shared, plain)] == ["1", "1, shared", "2"]
    assert [s.is_shared for s in (experts, shared, plain)] == [False, True, False]
    block = statistics.moment(1).shared
    assert block is not None and shared.size == len(block) and shared.experts is None
    assert torch.allclose(shared.eigenvalues, torch.linalg.eigvalsh(block.double()))
    assert "absolute 0.02" in plain.null_dimensions and set(shared.null_dimensions) == set(experts.null_dimensions)
    assert shared.as_dict()["is_shared"] and "is_shared" not in experts.as_dict()
    show(tmp_path, draw=False)
    printed = capsys.readouterr().out
    assert "1, shared" in printed and "energy 0.05" in printed and "absolute 0.02" in printed
