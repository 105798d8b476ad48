#include "rank_k_update.h"

#include <algorithm>
#include <utility>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "kernel_table.h"
#include "written_matrix.h"

namespace kf::cpu {
namespace {

constexpr int64_t STRIP_BYTES = 1 << 20;  // of packed right panels: they stay in a core's second-level cache

bool is_float(DType t) { return t != DType::u8; }

void check(const TensorView& weight, const TensorView& left, const TensorView& right, const TensorView& copy) {
  require(weight.ndim == 2 && is_float(weight.dtype), "weight must be a floating point matrix [out, in]");
  require(left.ndim == 2 && is_float(left.dtype) && left.shape[0] == weight.shape[0], "left must be [out, k]");
  require(right.ndim == 2 && is_float(right.dtype) && right.shape[0] == weight.shape[1], "right must be [in, k]");
  require(left.shape[1] == right.shape[1], "left and right must have the same k");
  check_written(weight, "weight");
  if (copy.defined()) {
    require(weight.dtype == DType::f32, "copy needs a float32 weight");
    require(copy.ndim == 2 && copy.shape[0] == weight.shape[0] && copy.shape[1] == weight.shape[1],
            "copy must have the shape of weight");
    require(copy.dtype == DType::bf16 || copy.dtype == DType::f16, "copy must be bfloat16 or float16");
    check_written(copy, "copy");
  }
}

}  // namespace

void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int threads) {
  check(weight, left, right, copy);
  int64_t rows = weight.shape[0], columns = weight.shape[1];
  const int64_t k = left.shape[1];
  if (rows == 0 || columns == 0) return;

  RankKTarget target = {weight.data, weight.dtype, weight.stride[0], weight.stride[1],
                        copy.data,   copy.dtype,   copy.stride[0],   copy.stride[1]};
  RankKFactor a = {left.data, left.dtype, rows, k, left.stride[0], left.stride[1], alpha};
  RankKFactor b = {right.data, right.dtype, columns, k, right.stride[0], right.stride[1], 1.0};
  if (weight.stride[1] != 1 && weight.stride[0] == 1) {  // a transposed weight: update its transpose
    std::swap(rows, columns);
    std::swap(target.row_stride, target.column_stride);
    std::swap(target.copy_row_stride, target.copy_column_stride);
    std::swap(a, b);
  }
  const RankKKernel& kernel = weight.dtype == DType::f64 ? active_table().rank_k_f64 : active_table().rank_k_f32;
  const int64_t packed_k = std::max<int64_t>(k, 1);
  const int64_t panel = kernel.nr * packed_k * static_cast<int64_t>(kernel.element);
  const int64_t left_panels = (rows + kernel.mr - 1) / kernel.mr, right_panels = (columns + kernel.nr - 1) / kernel.nr;
  const int64_t strip = std::min(right_panels, std::max<int64_t>(1, STRIP_BYTES / panel));
  const int64_t left_panel = kernel.mr * packed_k * static_cast<int64_t>(kernel.element);
  AlignedBuffer packed_left(left_panels * left_panel), packed_right(strip * panel);

  const double work = double(rows) * columns * (8 + k);
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 4e6, threads), left_panels));
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(8, left_panels / (4 * members)));
  const int64_t groups = (left_panels + group - 1) / group;
  Counter left_next, right_next, block_next;

  run_team(members, [&](int member, Team& team) {
    for (int64_t p; (p = left_next.take()) < left_panels;) {
      kernel.pack(a, p * kernel.mr, kernel.mr, packed_left.get<char>() + p * left_panel);
    }
    for (int64_t s0 = 0; s0 < right_panels; s0 += strip) {
      const int64_t panels = std::min(strip, right_panels - s0);
      for (int64_t p; (p = right_next.take()) < panels;) {
        kernel.pack(b, (s0 + p) * kernel.nr, kernel.nr, packed_right.get<char>() + p * panel);
      }
      team.barrier();
      if (member == 0) right_next.reset();
      const int64_t j0 = s0 * kernel.nr, j1 = std::min(columns, (s0 + panels) * kernel.nr);
      for (int64_t g; (g = block_next.take()) < groups;) {
        const int64_t i0 = g * group * kernel.mr, i1 = std::min(rows, (g + 1) * group * kernel.mr);
        const BlockRange range = {i0, i1, j0, j1};
        kernel.block(packed_left.get<char>() + g * group * left_panel, packed_right.get(), k, range, target);
      }
      team.barrier();
      if (member == 0) block_next.reset();
      if (s0 + strip < right_panels) team.barrier();
    }
  });
}

}  // namespace kf::cpu
