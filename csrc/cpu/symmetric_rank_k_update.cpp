#include "symmetric_rank_k_update.h"

#include <algorithm>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

constexpr int64_t DEPTH_STEP = 512;         // rows of x: chunks are multiples of this
constexpr int64_t PACKED_BYTES = 64 << 20;  // of packed operands in one chunk, where one step fits
constexpr int64_t MOST_ROWS = 4096;         // of one chunk: its sums are in fp32 before they join acc

void check(const TensorView& acc, const TensorView& x, const TensorView& w, const TensorView& mask) {
  require(acc.ndim == 2 && acc.shape[0] == acc.shape[1], "acc must be square, [d, d]");
  require(acc.dtype == DType::f32 || acc.dtype == DType::f64, "acc must be float32 or float64");
  require(acc.shape[1] <= 1 || acc.stride[1] == 1, "acc must have contiguous rows (stride 1 in its last dimension)");
  require(acc.shape[0] <= 1 || acc.stride[0] >= acc.shape[1], "acc must not overlap itself (row stride below d)");
  require(x.ndim == 2 && x.shape[1] == acc.shape[0], "x must be [n, d] with the d of acc");
  require(x.dtype != DType::u8, "x must be float32, float64, bfloat16 or float16");
  require(x.dtype != DType::f64 || acc.dtype == DType::f64, "acc must be float64 for float64 rows");
  if (w.defined()) {
    require(w.ndim == 1 && w.shape[0] == x.shape[0], "row_weights must be [n]");
    require(w.dtype == DType::f32 || w.dtype == DType::f64, "row_weights must be float32 or float64");
  }
  if (mask.defined()) {
    require(mask.ndim == 1 && mask.shape[0] == x.shape[0], "mask must be [n]");
    require(mask.dtype == DType::u8, "mask must be bool or uint8");
  }
}

const SymmetricKernel& choose(DType x) {
  const KernelTable& table = active_table();
  if (x == DType::f64) return table.symmetric_f64;
  if (x == DType::bf16 && table.symmetric_bf16.mr) return table.symmetric_bf16;
  return table.symmetric_f32;
}

}  // namespace

void symmetric_rank_k_update(const TensorView& acc, const TensorView& x, const TensorView& row_weights,
                             const TensorView& mask, double alpha, int threads) {
  check(acc, x, row_weights, mask);
  const int64_t n = x.shape[0], d = x.shape[1];
  if (n == 0 || d == 0) return;

  // Rows that the mask or a zero weight leaves out are packed as zeros; weights of 0 and 1 need no products.
  std::vector<double> weight(row_weights.defined() ? n : 0);
  std::vector<uint8_t> counts;
  if (mask.defined() || row_weights.defined()) counts.assign(n, 1);
  if (mask.defined()) {
    const uint8_t* m = static_cast<const uint8_t*>(mask.data);
    for (int64_t i = 0; i < n; ++i) counts[i] = m[i * mask.stride[0]] != 0;
  }
  bool weighted = false;
  for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
    const int64_t at = i * row_weights.stride[0];
    weight[i] = row_weights.dtype == DType::f64 ? static_cast<const double*>(row_weights.data)[at]
                                                : static_cast<const float*>(row_weights.data)[at];
    if (weight[i] == 0) counts[i] = 0;
    if (!counts[i]) weight[i] = 0;  // even if it was NaN: NaN times zero would count
    weighted = weighted || (counts[i] && weight[i] != 1);
  }

  const SymmetricKernel& kernel = choose(x.dtype);
  const Accumulator target = {acc.data, acc.dtype, acc.stride[0]};
  const SymmetricSource source = {x.data,
                                  x.dtype,
                                  d,
                                  x.stride[0],
                                  x.stride[1],
                                  weighted ? weight.data() : nullptr,
                                  counts.empty() ? nullptr : counts.data()};
  const int64_t left_panels = (d + kernel.mr - 1) / kernel.mr, right_panels = (d + kernel.nr - 1) / kernel.nr;
  const int64_t step_bytes =
      left_panels * kernel.left_panel_bytes(DEPTH_STEP, weighted) + right_panels * kernel.right_panel_bytes(DEPTH_STEP);
  const int64_t steps_that_fit = std::max<int64_t>(1, PACKED_BYTES / step_bytes);
  const int64_t depth = std::min({n, steps_that_fit * DEPTH_STEP, MOST_ROWS});
  AlignedBuffer left(left_panels * kernel.left_panel_bytes(depth, weighted));
  AlignedBuffer right(right_panels * kernel.right_panel_bytes(depth));

  // Macro blocks that touch the lower triangle.
  const int64_t side = kernel.side;
  const int64_t blocks = (d + side - 1) / side, tasks = blocks * (blocks + 1) / 2;
  const double work = double(n) * d * d;
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 4e6, threads), tasks));
  AlignedBuffer scratch(members * kernel.scratch_bytes);
  Counter pack_next, block_next;

  run_team(members, [&](int member, Team& team) {
    if (kernel.enter) kernel.enter();
    for (int64_t k0 = 0; k0 < n; k0 += depth) {
      const int64_t rows = std::min(depth, n - k0);
      const int64_t steps = (rows + PACK_STEP - 1) / PACK_STEP;
      for (int64_t p; (p = pack_next.take()) < steps;) {
        const int64_t k = p * PACK_STEP;
        kernel.pack(source, k0, rows, k, std::min(PACK_STEP, rows - k), left.get(), right.get());
      }
      team.barrier();
      if (member == 0) pack_next.reset();
      for (int64_t t; (t = block_next.take()) < tasks;) {
        int64_t bi = 0, bj = t;  // rows of blocks, each one longer than the last
        while (bj > bi) bj -= ++bi;
        const PackedChunk chunk = {left.get(), right.get(), rows, weighted, d};
        const BlockRange range = {bi * side, std::min(d, (bi + 1) * side), bj * side, std::min(d, (bj + 1) * side)};
        kernel.block(chunk, range, alpha, target, scratch.get<char>() + member * kernel.scratch_bytes);
      }
      team.barrier();
      if (member == 0) block_next.reset();
      if (k0 + depth < n) team.barrier();
    }
    if (kernel.leave) kernel.leave();
  });
}

}  // namespace kf::cpu
