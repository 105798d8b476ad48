#include "symmetric_rank_k_update.h"

#include <algorithm>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "groups.h"
#include "kernel_table.h"
#include "written_matrix.h"

namespace kf::cpu {
namespace {

constexpr int64_t DEPTH_STEP = 512;         // rows of x: chunks are multiples of this
constexpr int64_t PACKED_BYTES = 64 << 20;  // of packed operands in one chunk, where one step fits
constexpr int64_t MOST_ROWS = 4096;         // of one chunk: its sums are in fp32 before they join acc

constexpr size_t PAGE = 4096;  // packed operands begin at one
constexpr double GRAIN = 4e6;  // of work that is worth a thread

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

// Which rows count and what they weigh: a row that the mask or a zero weight leaves out is packed as zeros.
struct RowChoice {
  std::vector<double> weight;
  std::vector<uint8_t> counts;

  RowChoice(const TensorView& row_weights, const TensorView& mask, int64_t n)
      : weight(row_weights.defined() ? n : 0), counts(row_weights.defined() || mask.defined() ? n : 0, 1) {
    if (mask.defined()) {
      const uint8_t* m = static_cast<const uint8_t*>(mask.data);
      for (int64_t i = 0; i < n; ++i) counts[i] = m[i * mask.stride[0]] != 0;
    }
    for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
      const int64_t at = i * row_weights.stride[0];
      weight[i] = row_weights.dtype == DType::f64 ? static_cast<const double*>(row_weights.data)[at]
                                                  : static_cast<const float*>(row_weights.data)[at];
      if (weight[i] == 0) counts[i] = 0;
      if (!counts[i]) weight[i] = 0;  // even if it was NaN: NaN times zero would count
    }
  }

  // Weights of 0 and 1 need no products.
  const double* weights(int64_t first, int64_t rows) const {
    if (weight.empty()) return nullptr;
    for (int64_t i = first; i < first + rows; ++i) {
      if (counts[i] && weight[i] != 1) return weight.data() + first;
    }
    return nullptr;
  }
  const uint8_t* mask(int64_t first) const { return counts.empty() ? nullptr : counts.data() + first; }
};

// One product: rows [first, first + n) of x and the matrix that it is added to.
struct Job {
  const SymmetricKernel& kernel;
  SymmetricSource source;
  Accumulator target;
  double alpha;
  int64_t n, depth;  // rows, and those of them that are packed at a time
  size_t left_bytes, packed_bytes;
  int64_t tasks;  // macro blocks that touch the lower triangle
  double work;

  Job(const TensorView& acc, const TensorView& x, const RowChoice& choice, int64_t first, int64_t rows, double factor)
      : kernel(choose(x.dtype)), target{acc.data, acc.dtype, acc.stride[0]}, alpha(factor), n(rows) {
    const int64_t d = x.shape[1];
    source = {rows_of(x, first, n).data, x.dtype,           d, x.stride[0], x.stride[1],
              choice.weights(first, n),  choice.mask(first)};
    const bool weighted = source.weight != nullptr;
    const int64_t left_panels = (d + kernel.mr - 1) / kernel.mr, right_panels = (d + kernel.nr - 1) / kernel.nr;
    const int64_t step_bytes = left_panels * kernel.left_panel_bytes(DEPTH_STEP, weighted) +
                               right_panels * kernel.right_panel_bytes(DEPTH_STEP);
    const int64_t steps_that_fit = std::max<int64_t>(1, PACKED_BYTES / step_bytes);
    depth = std::min({n, steps_that_fit * DEPTH_STEP, MOST_ROWS});
    left_bytes = (left_panels * kernel.left_panel_bytes(depth, weighted) + PAGE - 1) / PAGE * PAGE;
    packed_bytes = (left_bytes + right_panels * kernel.right_panel_bytes(depth) + PAGE - 1) / PAGE * PAGE;
    const int64_t blocks = (d + kernel.side - 1) / kernel.side;
    tasks = blocks * (blocks + 1) / 2;
    work = double(n) * d * d;
  }

  // Packs part of the chunk of `rows` rows that starts at k0.
  void pack(int64_t k0, int64_t rows, int64_t step, char* memory) const {
    const int64_t k = step * PACK_STEP;
    kernel.pack(source, k0, rows, k, std::min(PACK_STEP, rows - k), memory, memory + left_bytes);
  }

  void multiply(int64_t task, int64_t rows, const char* memory, char* scratch) const {
    int64_t bi = 0, bj = task;  // rows of blocks, each one longer than the last
    while (bj > bi) bj -= ++bi;
    const int64_t d = source.d, side = kernel.side;
    const PackedChunk chunk = {memory, memory + left_bytes, rows, source.weight != nullptr, d};
    const BlockRange range = {bi * side, std::min(d, (bi + 1) * side), bj * side, std::min(d, (bj + 1) * side)};
    kernel.block(chunk, range, alpha, target, scratch);
  }
};

void run(const std::vector<Job>& jobs, int threads) {
  if (jobs.empty()) return;
  const SymmetricKernel& kernel = jobs[0].kernel;
  const Division division(jobs, GRAIN, threads);
  AlignedBuffer scratch(division.members * kernel.scratch_bytes);
  Counter pack_next, block_next;

  const auto together = [&](const Job& job, char* memory, int member, Team& team) {
    for (int64_t k0 = 0; k0 < job.n; k0 += job.depth) {
      const int64_t rows = std::min(job.depth, job.n - k0);
      const int64_t steps = (rows + PACK_STEP - 1) / PACK_STEP;
      for (int64_t p; (p = pack_next.take()) < steps;) job.pack(k0, rows, p, memory);
      team.barrier();
      if (member == 0) pack_next.reset();
      for (int64_t t; (t = block_next.take()) < job.tasks;) {
        job.multiply(t, rows, memory, scratch.get<char>() + member * kernel.scratch_bytes);
      }
      team.barrier();
      if (member == 0) block_next.reset();
      team.barrier();
    }
  };
  const auto alone = [&](const Job& job, char* memory, int member) {
    for (int64_t k0 = 0; k0 < job.n; k0 += job.depth) {
      const int64_t rows = std::min(job.depth, job.n - k0);
      for (int64_t p = 0; p * PACK_STEP < rows; ++p) job.pack(k0, rows, p, memory);
      for (int64_t t = 0; t < job.tasks; ++t) {
        job.multiply(t, rows, memory, scratch.get<char>() + member * kernel.scratch_bytes);
      }
    }
  };
  const auto enter = [&] {
    if (kernel.enter) kernel.enter();
  };
  const auto leave = [&] {
    if (kernel.leave) kernel.leave();
  };
  run_jobs(jobs, division, enter, together, alone, leave);
}

}  // namespace

void symmetric_rank_k_update(const TensorView& acc, const TensorView& x, const TensorView& row_weights,
                             const TensorView& mask, double alpha, int threads) {
  check(acc, x, row_weights, mask);
  const int64_t n = x.shape[0], d = x.shape[1];
  if (n == 0 || d == 0) return;
  const RowChoice choice(row_weights, mask, n);
  run({Job(acc, x, choice, 0, n, alpha)}, threads);
}

void grouped_symmetric_rank_k_update(const TensorView& acc, const TensorView& x, const TensorView& offsets,
                                     const TensorView& row_weights, double alpha, int threads) {
  require(acc.ndim == 3, "acc must be [E, d, d]");
  const int64_t groups = acc.shape[0];
  check(matrix_of(acc, 0), x, row_weights, {});
  check_written(acc, "acc");
  const int64_t n = x.shape[0];
  const int64_t* begin = check_offsets(offsets, groups, n);
  if (x.shape[1] == 0) return;
  const RowChoice choice(row_weights, {}, n);
  std::vector<Job> jobs;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = begin[g + 1] - begin[g];
    if (rows > 0) jobs.emplace_back(matrix_of(acc, g), x, choice, begin[g], rows, alpha);
  }
  run(jobs, threads);
}

}  // namespace kf::cpu
