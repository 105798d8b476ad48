#include "rank_k_update.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "groups.h"
#include "kernel_table.h"
#include "written_matrix.h"

namespace kf::cpu {
namespace {

constexpr int64_t STRIP_BYTES = 512 << 10;       // of packed right panels: they stay in a core's second-level cache
constexpr int64_t GROUP = 8;                     // left panels that are multiplied at a time
constexpr size_t COLUMN_BYTES = KEPT_BYTES / 2;  // of a left factor by columns, at most

constexpr size_t PAGE = 4096;  // packed panels of a side begin at one
constexpr double GRAIN = 4e6;  // of work that is worth a thread

bool is_float(DType t) { return t != DType::u8; }

void check(const TensorView& weight, const TensorView& left, const TensorView& right, const TensorView& copy) {
  require(weight.ndim == 2 && is_float(weight.dtype), "weight must be a floating point matrix [out, in]");
  require(left.ndim == 2 && is_float(left.dtype) && left.shape[0] == weight.shape[0], "left must be [out, k]");
  require(right.ndim == 2 && is_float(right.dtype) && right.shape[0] == weight.shape[1], "right must be [in, k]");
  if (copy.defined()) {
    require(weight.dtype == DType::f32, "copy needs a float32 weight");
    require(copy.ndim == 2 && copy.shape[0] == weight.shape[0] && copy.shape[1] == weight.shape[1],
            "copy must have the shape of weight");
    require(copy.dtype == DType::bf16 || copy.dtype == DType::f16, "copy must be bfloat16 or float16");
  }
}

const RankKKernel& choose(DType weight) {
  const KernelTable& table = active_table();
  return weight == DType::f64 ? table.rank_k_f64 : table.rank_k_f32;
}

// Whether the roles of the factors change: of a weight that is stored by columns the transpose is updated.
bool is_by_columns(const TensorView& weight) { return weight.stride[1] != 1 && weight.stride[0] == 1; }

// A factor as it was given, or, where block > 0, packed by blocks of so many rows.
struct Side {
  RankKFactor factor;
  int64_t block = 0, block_bytes = 0;

  void pack(const RankKKernel& kernel, int64_t first, int width, void* out) const {
    RankKFactor part = factor;
    if (block > 0) {
      part.data = static_cast<const char*>(factor.data) + first / block * block_bytes;
      part.rows = block;
      first %= block;
    }
    kernel.pack(part, first, width, out);
  }
};

// The left factor of all groups. Its columns are gathered for every group; where a group would read them number by
// number, each from a cache line of its own, blocks of rows are first stored by columns.
class Columns {
 public:
  Columns(const TensorView& left, double alpha, const TensorView& weight, int64_t columns_read, int threads)
      : memory_(bytes_if_worthwhile(left, weight, columns_read)) {
    const int64_t rows = left.shape[0], u = left.shape[1];
    side_.factor = {left.data, left.dtype, rows, u, left.stride[0], left.stride[1], alpha};
    if (block_ == 0) return;
    const RankKKernel& kernel = choose(weight.dtype);
    Counter next;
    const int64_t blocks = (rows + block_ - 1) / block_;
    const int members =
        static_cast<int>(std::min<int64_t>(worthwhile_threads(double(rows) * u, GRAIN, threads), blocks));
    const int64_t block_bytes = block_ * u * static_cast<int64_t>(kernel.element);
    run_team(members, [&](int, Team&) {
      for (int64_t g; (g = next.take()) < blocks;) {
        kernel.pack(side_.factor, g * block_, static_cast<int>(block_), memory_.get<char>() + g * block_bytes);
      }
    });
    side_ = {{memory_.get(), weight.dtype == DType::f64 ? DType::f64 : DType::f32, rows, u, 1, block_, 1.0},
             block_,
             block_bytes};
  }

  // `count` columns in the order given.
  Side select(const int64_t* order, int64_t count) const {
    Side side = side_;
    side.factor.order = order;
    side.factor.k = count;
    return side;
  }

 private:
  int64_t block_ = 0;  // rows
  AlignedBuffer memory_;
  Side side_;

  size_t bytes_if_worthwhile(const TensorView& left, const TensorView& weight, int64_t columns_read) {
    const int64_t rows = left.shape[0], u = left.shape[1];
    if (left.stride[0] == 1 || rows == 0 || 2 * columns_read < u) return 0;
    const RankKKernel& kernel = choose(weight.dtype);
    const int64_t block = GROUP * (is_by_columns(weight) ? kernel.nr : kernel.mr);
    const size_t bytes = (rows + block - 1) / block * block * u * kernel.element;
    if (bytes > COLUMN_BYTES) return 0;
    block_ = block;
    return bytes;
  }
};

// One write: weight += left right^T.
struct Job {
  const RankKKernel& kernel;
  RankKTarget target;
  Side a, b;
  int64_t rows, columns, k;
  int64_t panel, left_panel;  // bytes
  int64_t left_panels, right_panels, strip;
  size_t left_bytes, packed_bytes;
  int64_t tasks;
  double work;

  Job(const TensorView& weight, const Side& left, const TensorView& right, const TensorView& copy)
      : kernel(choose(weight.dtype)),
        target{weight.data, weight.dtype, weight.stride[0], weight.stride[1],
               copy.data,   copy.dtype,   copy.stride[0],   copy.stride[1]},
        a(left),
        b{{right.data, right.dtype, right.shape[0], right.shape[1], right.stride[0], right.stride[1], 1.0}},
        rows(weight.shape[0]),
        columns(weight.shape[1]),
        k(right.shape[1]) {
    if (is_by_columns(weight)) {
      std::swap(rows, columns);
      std::swap(target.row_stride, target.column_stride);
      std::swap(target.copy_row_stride, target.copy_column_stride);
      std::swap(a, b);
    }
    const int64_t packed_k = std::max<int64_t>(k, 1), element = static_cast<int64_t>(kernel.element);
    panel = kernel.nr * packed_k * element;
    left_panel = kernel.mr * packed_k * element;
    left_panels = (rows + kernel.mr - 1) / kernel.mr;
    right_panels = (columns + kernel.nr - 1) / kernel.nr;
    const int64_t widest = std::min(right_panels, std::max<int64_t>(1, STRIP_BYTES / panel));
    const int64_t strips = (right_panels + widest - 1) / widest;
    strip = (right_panels + strips - 1) / strips;
    left_bytes = (left_panels * left_panel + PAGE - 1) / PAGE * PAGE;
    packed_bytes = (left_bytes + strip * panel + PAGE - 1) / PAGE * PAGE;
    tasks = left_panels;
    work = double(rows) * columns * (8 + k);
  }

  void pack_left(int64_t p, char* memory) const { a.pack(kernel, p * kernel.mr, kernel.mr, memory + p * left_panel); }
  // Panel p of the strip that starts at panel s0.
  void pack_right(int64_t s0, int64_t p, char* memory) const {
    b.pack(kernel, (s0 + p) * kernel.nr, kernel.nr, memory + left_bytes + p * panel);
  }
  // Left panels [first, last) times the strip.
  void multiply(int64_t s0, int64_t panels, int64_t first, int64_t last, const char* memory) const {
    const BlockRange range = {first * kernel.mr, std::min(rows, last * kernel.mr), s0 * kernel.nr,
                              std::min(columns, (s0 + panels) * kernel.nr)};
    kernel.block(memory + first * left_panel, memory + left_bytes, k, range, target);
  }
};

void run(const std::vector<Job>& jobs, int threads) {
  if (jobs.empty()) return;
  const Division division(jobs, GRAIN, threads);
  Counter left_next, right_next, block_next;

  const auto together = [&](const Job& job, char* memory, int member, Team& team) {
    const int64_t group = std::max<int64_t>(1, std::min(GROUP, job.left_panels / (4 * division.members)));
    const int64_t groups = (job.left_panels + group - 1) / group;
    for (int64_t p; (p = left_next.take()) < job.left_panels;) job.pack_left(p, memory);
    for (int64_t s0 = 0; s0 < job.right_panels; s0 += job.strip) {
      const int64_t panels = std::min(job.strip, job.right_panels - s0);
      for (int64_t p; (p = right_next.take()) < panels;) job.pack_right(s0, p, memory);
      team.barrier();
      if (member == 0) right_next.reset();
      for (int64_t g; (g = block_next.take()) < groups;) {
        job.multiply(s0, panels, g * group, std::min(job.left_panels, (g + 1) * group), memory);
      }
      team.barrier();
      if (member == 0) {
        block_next.reset();
        left_next.reset();
      }
      team.barrier();
    }
  };
  const auto alone = [&](const Job& job, char* memory, int) {
    for (int64_t s0 = 0; s0 < job.right_panels; s0 += job.strip) {
      const int64_t panels = std::min(job.strip, job.right_panels - s0);
      for (int64_t p = 0; p < panels; ++p) job.pack_right(s0, p, memory);
      for (int64_t i = 0; i < job.left_panels; i += GROUP) {
        const int64_t end = std::min(job.left_panels, i + GROUP);
        for (int64_t p = i; s0 == 0 && p < end; ++p) job.pack_left(p, memory);
        job.multiply(s0, panels, i, end, memory);
      }
    }
  };
  run_jobs(jobs, division, [] {}, together, alone, [] {});
}

}  // namespace

void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int threads) {
  check(weight, left, right, copy);
  require(left.shape[1] == right.shape[1], "left and right must have the same k");
  check_written(weight, "weight");
  if (copy.defined()) check_written(copy, "copy");
  if (weight.size() == 0) return;
  const Side side = {{left.data, left.dtype, left.shape[0], left.shape[1], left.stride[0], left.stride[1], alpha}};
  run({Job(weight, side, right, copy)}, threads);
}

void grouped_rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right,
                           const TensorView& columns, const TensorView& offsets, double alpha, const TensorView& copy,
                           int threads) {
  require(weight.ndim == 3, "weight must be [E, out, in]");
  require(right.ndim == 2, "right must be [n, in]");
  require(!copy.defined() || (copy.ndim == 3 && copy.shape[0] == weight.shape[0]), "copy must be [E, out, in]");
  check(matrix_of(weight, 0), left, transposed(right), matrix_of(copy, 0));
  check_written(weight, "weight");
  if (copy.defined()) check_written(copy, "copy");
  const int64_t n = right.shape[0];
  const int64_t* begin = check_offsets(offsets, weight.shape[0], n);
  check_vector(columns, "columns", n, DType::i64);
  const int64_t* order = static_cast<const int64_t*>(columns.data);
  const bool inside = std::all_of(order, order + n, [&](int64_t c) { return c >= 0 && c < left.shape[1]; });
  require(inside, "columns must be those of left");
  if (weight.size() == 0) return;
  const Columns gathered(left, alpha, matrix_of(weight, 0), n, threads);
  std::vector<Job> jobs;
  for (int64_t g = 0; g < weight.shape[0]; ++g) {
    const int64_t rows = begin[g + 1] - begin[g];
    if (rows == 0) continue;
    const TensorView part = transposed(rows_of(right, begin[g], rows));
    jobs.emplace_back(matrix_of(weight, g), gathered.select(order + begin[g], rows), part, matrix_of(copy, g));
  }
  run(jobs, threads);
}

}  // namespace kf::cpu
