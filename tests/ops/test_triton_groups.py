"""The Triton kernels of stacks against float64, as in test_triton.py."""

from __future__ import annotations

import pytest
import test_grouped_rank_k_update as grouped_write
import test_grouped_symmetric_rank_k_update as grouped_moment
import torch
from floors import SYMMETRIC, relative_error
from groups_of_rows import SIZES, offsets_of

from kedit_fast import grouped_rank_k_update_, grouped_symmetric_rank_k_update_
from kedit_fast.backends import probe
from kedit_fast.errors import BackendUnavailableError

pytest.importorskip("triton")
from kedit_fast.kernels.triton import grouped_rank_k_update as write_kernel
from kedit_fast.kernels.triton import grouped_symmetric_rank_k_update as moment_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(bool(probe("triton").reason), reason=f"triton: {probe('triton').reason}"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton.*"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("plain", "weighted", "transposed"))
@pytest.mark.parametrize("acc_dtype", (torch.float32, torch.float64), ids=str)
def test_the_moments_add_each_groups_lower_triangle(dtype, mode, acc_dtype):
    for name, sizes in SIZES.items():
        grouped_moment.run_case(sizes, 7 if "128" in name else 45, dtype, acc_dtype, mode, "triton", DEVICE)


def test_rows_beyond_one_fp32_sum(monkeypatch):
    monkeypatch.setattr(moment_kernel, "SUMMED_ROWS", 320)  # deeper than one sum of the matrix unit
    for acc_dtype in (torch.float32, torch.float64):
        grouped_moment.run_case((3, 700, 0, 320), 40, torch.float32, acc_dtype, "weighted", "triton", DEVICE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("few", (False, True))
def test_the_write_adds_each_groups_product(dtype, few):
    """The kernel multiplies and adds where groups have few rows, and multiplies tiles where they have many."""
    sizes = (0, 3, 17, 0, 1) if few else (0, 3, 190, 0, 40)
    assert write_kernel.shape_class(torch.empty(sum(sizes), 1), len(sizes)) == ("grouped_fma" if few else "dot")
    for out, inner in ((1, 1), (40, 70)):
        for weight in grouped_write.layouts(len(sizes), out, inner, dtype):
            grouped_write.check(weight, sizes, 5, "triton", with_copy=dtype == torch.float32, device=DEVICE)


@pytest.mark.parametrize("rows", (2, 40))
def test_a_column_that_left_does_not_have_is_not_read_and_shows_as_nan(rows, monkeypatch):
    """On a GPU the host does not see the columns; here the check of a CPU is passed by."""
    for stored in ("rows", "columns"):
        weight = torch.zeros(2, 5, 6, device=DEVICE) if stored == "rows" else torch.zeros(2, 6, 5, device=DEVICE).mT
        left, right = torch.ones(5, 3, device=DEVICE), torch.ones(2 * rows, 6, device=DEVICE)
        columns = torch.zeros(2 * rows, dtype=torch.int64, device=DEVICE)
        columns[-1] = 3
        offsets = torch.tensor([0, rows, 2 * rows], device=DEVICE)
        write_kernel.grouped_rank_k_update_(weight, left, right, columns, offsets, 1.0, None)
        assert bool((weight[0] == rows).all()) and bool(weight[1].isnan().all())


def test_offsets_outside_of_the_rows_are_cut_off():
    """As above: nothing outside of the operands is read."""
    offsets = torch.tensor([-3, 2, 9], device=DEVICE)
    x = torch.randn(5, 4, device=DEVICE)
    acc = torch.zeros(2, 4, 4, device=DEVICE)
    moment_kernel.grouped_symmetric_rank_k_update_(acc, x, offsets, None, 1.0)
    assert relative_error(acc.cpu(), grouped_moment.oracle(torch.zeros(2, 4, 4), x.cpu(), (2, 3), None, 1.0)) < 1e-6
    weight, columns = torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    write_kernel.grouped_rank_k_update_(weight, torch.ones(3, 1, device=DEVICE), x, columns, offsets, 1.0, None)
    torch.testing.assert_close(weight[0], x[:2].sum(0).expand(3, 4))
    torch.testing.assert_close(weight[1], x[2:].sum(0).expand(3, 4))


def test_the_same_bits_at_every_run():
    x, offsets = torch.randn(300, 48, device=DEVICE).bfloat16(), offsets_of((100, 0, 200)).to(DEVICE)
    first, second = (
        grouped_symmetric_rank_k_update_(torch.zeros(3, 48, 48, device=DEVICE), x, offsets, backend="triton")
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_what_triton_does_not_take_is_said():
    offsets = torch.tensor([0, 2], device=DEVICE)
    wide = torch.zeros(1, 3, 3, dtype=torch.float64, device=DEVICE)
    rows, columns = torch.ones(2, 3, dtype=torch.float64, device=DEVICE), offsets[:1].repeat(2)
    with pytest.raises(BackendUnavailableError, match="float64 rows"):
        grouped_symmetric_rank_k_update_(wide, rows, offsets, backend="triton")
    with pytest.raises(BackendUnavailableError, match="float64 tensors"):
        grouped_rank_k_update_(wide, rows.T.clone(), rows, columns, offsets, backend="triton")


def test_the_moment_of_a_stack_is_as_exact_as_that_of_one_matrix():
    x, offsets = torch.randn(700, 40), offsets_of((500, 200))
    acc = grouped_symmetric_rank_k_update_(
        torch.zeros(2, 40, 40, device=DEVICE), x.to(DEVICE), offsets.to(DEVICE), backend="triton"
    )
    expected = grouped_moment.oracle(torch.zeros(2, 40, 40), x, (500, 200), None, 1.0)
    assert relative_error(acc.cpu(), expected) <= SYMMETRIC[torch.float32]
