#include "masked_step.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <utility>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "kernel_table.h"
#include "written_matrix.h"

namespace kf::cpu {
namespace {

constexpr int64_t STRIP_BYTES = 1 << 25;  // of packed right panels: long rows of the weight cost fewer pages
constexpr int64_t PACK_ROWS = 128;        // of the left factor packed by one task
constexpr double SPARSE_SHARE = 0.4;      // of chosen entries, below which their products alone are computed
constexpr int64_t ROW_WORK = 32768;       // entries of one task where the gradient is there
constexpr int64_t DEPTH_STEP = 16;

bool is_float(DType t) { return t != DType::u8; }

void check_like(const TensorView& m, const char* name, const TensorView& weight) {
  require(m.ndim == 2 && is_float(m.dtype) && m.shape[0] == weight.shape[0] && m.shape[1] == weight.shape[1],
          std::string(name) + " must be a floating point matrix of the shape of weight");
}

void check(const TensorView& weight, const StepInput& input, const TensorView& copy) {
  require(weight.ndim == 2 && (weight.dtype == DType::f32 || weight.dtype == DType::f64),
          "weight must be a matrix [h, d] of float32 or float64");
  check_written(weight, "weight");
  const int64_t h = weight.shape[0], d = weight.shape[1];
  const bool factors = input.left.defined() && input.right.defined();
  require(factors != input.grad.defined() && input.left.defined() == input.right.defined(),
          "either grad, or left and right, must be given");
  if (factors) {
    const TensorView &left = input.left, &right = input.right;
    require(left.ndim == 2 && is_float(left.dtype) && left.shape[1] == h, "left must be [n, h]");
    require(right.ndim == 2 && is_float(right.dtype) && right.shape[1] == d, "right must be [n, d]");
    require(left.shape[0] == right.shape[0], "left and right must have the same n");
  } else {
    check_like(input.grad, "grad", weight);
  }
  if (input.entries.defined()) {
    const TensorView& bits = input.entries;
    require(bits.dtype == DType::u8 && bits.ndim == 1 && bits.shape[0] == (h * d + 7) / 8,
            "entries must be bytes [ceil(h d / 8)]");
    require(bits.shape[0] <= 1 || bits.stride[0] == 1, "entries must be contiguous");
  }
  if (input.bound >= 0) {
    require(input.origin.defined(), "a box needs its origin");
    check_like(input.origin, "origin", weight);
  }
  if (copy.defined()) {
    require(weight.dtype == DType::f32, "copy needs a float32 weight");
    check_like(copy, "copy", weight);
    require(copy.dtype == DType::bf16 || copy.dtype == DType::f16, "copy must be bfloat16 or float16");
    check_written(copy, "copy");
  }
}

StepMatrix matrix_of(const TensorView& m) { return {m.data, m.dtype, m.stride[0], m.stride[1]}; }

double share_of(const TensorView& bits, int64_t entries) {
  const uint8_t* bytes = static_cast<const uint8_t*>(bits.data);
  int64_t set = 0;
  for (int64_t b = 0; b < bits.shape[0]; b += 8) {
    uint64_t v = 0;
    std::memcpy(&v, bytes + b, std::min<int64_t>(8, bits.shape[0] - b));
    v -= (v >> 1) & 0x5555555555555555;
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333);
    set += (((v + (v >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101) >> 56;
  }
  return double(set) / double(entries);
}

bool step_from_products(const StepProducts& products, const StepCall& call, RankKFactor a, RankKFactor b, bool sparse,
                        int threads) {
  const int64_t rows = a.rows, columns = b.rows;
  // An odd number of lines for every row: rows of a power of two would share their place in the caches.
  const int64_t depth = sparse ? ((a.k + DEPTH_STEP - 1) / DEPTH_STEP | 1) * DEPTH_STEP : std::max<int64_t>(a.k, 1);
  const int64_t mr = products.mr, nr = products.nr, item = static_cast<int64_t>(products.element);
  const int64_t left_panel = mr * depth * item, right_panel = nr * depth * item;
  const int64_t left_panels = (rows + mr - 1) / mr, right_panels = (columns + nr - 1) / nr;
  const int64_t strip = std::min(right_panels, std::max<int64_t>(1, STRIP_BYTES / right_panel));
  AlignedBuffer packed_left(left_panels * left_panel), packed_right(strip * right_panel);

  const double work = double(rows) * columns * (8 + a.k);
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 4e6, threads), left_panels));
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(8, left_panels / (4 * members)));
  const int64_t groups = (left_panels + group - 1) / group;
  const int64_t packed_at_once = sparse ? PACK_ROWS / mr : 1;  // panels of rows join to one
  Counter left_next, right_next, block_next;
  std::atomic<bool> finite{true};

  run_team(members, [&](int member, Team& team) {
    for (int64_t t; (t = left_next.take()) * packed_at_once < left_panels;) {
      const int64_t p = t * packed_at_once, count = std::min(packed_at_once, left_panels - p);
      products.pack(a, p * mr, static_cast<int>(count * mr), depth, packed_left.get<char>() + p * left_panel);
    }
    for (int64_t s0 = 0; s0 < right_panels; s0 += strip) {
      const int64_t panels = std::min(strip, right_panels - s0);
      for (int64_t t; (t = right_next.take()) * packed_at_once < panels;) {
        const int64_t p = t * packed_at_once, count = std::min(packed_at_once, panels - p);
        products.pack(b, (s0 + p) * nr, static_cast<int>(count * nr), depth,
                      packed_right.get<char>() + p * right_panel);
      }
      team.barrier();
      if (member == 0) right_next.reset();
      const int64_t j0 = s0 * nr, j1 = std::min(columns, (s0 + panels) * nr);
      for (int64_t g; (g = block_next.take()) < groups;) {
        const BlockRange range = {g * group * mr, std::min(rows, (g + 1) * group * mr), j0, j1};
        const char* left = packed_left.get<char>() + g * group * left_panel;
        if (!products.block(left, packed_right.get(), depth, range, call)) {
          finite.store(false, std::memory_order_relaxed);
        }
      }
      team.barrier();
      if (member == 0) block_next.reset();
      if (s0 + strip < right_panels) team.barrier();
    }
  });
  return finite;
}

bool run(const TensorView& weight, const StepInput& input, StepCall call, int threads) {
  int64_t rows = weight.shape[0], columns = weight.shape[1];
  if (rows == 0 || columns == 0) return true;
  RankKFactor a = {}, b = {};
  bool sparse = false;
  if (input.left.defined()) {
    const TensorView &left = input.left, &right = input.right;
    call.k = left.shape[0];
    a = {left.data, left.dtype, rows, call.k, left.stride[1], left.stride[0], 1.0};
    b = {right.data, right.dtype, columns, call.k, right.stride[1], right.stride[0], 1.0};
    sparse = input.entries.defined() && share_of(input.entries, rows * columns) < SPARSE_SHARE;
  }
  if (weight.stride[1] != 1 && weight.stride[0] == 1) {  // a transposed weight: step its transpose
    std::swap(rows, columns);
    std::swap(a, b);
    std::swap(call.bit_row, call.bit_column);
    for (StepMatrix* m : {&call.weight, &call.mean, &call.square, &call.grad, &call.origin, &call.copy}) {
      std::swap(m->row_stride, m->column_stride);
    }
  }
  const StepKernel& kernel = weight.dtype == DType::f64 ? active_table().step_f64 : active_table().step_f32;
  if (call.active && input.left.defined()) {
    return step_from_products(sparse ? kernel.sparse : kernel.dense, call, a, b, sparse, threads);
  }
  const int64_t step = std::max<int64_t>(1, ROW_WORK / columns);
  const int members = worthwhile_threads(double(rows) * columns, double(ROW_WORK), threads);
  Counter next;
  std::atomic<bool> finite{true};
  run_team(members, [&](int, Team&) {
    for (int64_t t; (t = next.take()) * step < rows;) {
      const BlockRange range = {t * step, std::min(rows, (t + 1) * step), 0, columns};
      if (!kernel.rows(call, range)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

StepCall call_of(const TensorView& weight, const StepInput& input, const TensorView& copy) {
  StepCall call = {};
  call.weight = matrix_of(weight);
  if (input.grad.defined()) call.grad = matrix_of(input.grad);
  call.boxed = input.bound >= 0;
  if (call.boxed) call.origin = matrix_of(input.origin);
  if (copy.defined()) call.copy = matrix_of(copy);
  call.bound = input.bound;
  if (input.entries.defined()) {
    call.entries = static_cast<const uint8_t*>(input.entries.data);
    call.entry_bytes = input.entries.shape[0];
  }
  call.bit_row = weight.shape[1];
  call.bit_column = 1;
  call.active = true;
  return call;
}

}  // namespace

bool masked_descent(const TensorView& weight, const StepInput& input, const DescentNumbers& numbers,
                    const TensorView& copy, int threads) {
  check(weight, input, copy);
  StepCall call = call_of(weight, input, copy);
  call.lr = numbers.lr;
  call.decay = numbers.decay;
  call.decay_all = numbers.decay_all;
  return run(weight, input, call, threads);
}

bool masked_adam(const TensorView& weight, const TensorView& mean, const TensorView& square, const StepInput& input,
                 const AdamNumbers& numbers, const TensorView& copy, int threads) {
  check(weight, input, copy);
  for (const auto& [state, name] : {std::pair(&mean, "mean"), std::pair(&square, "square")}) {
    check_like(*state, name, weight);
    require(state->dtype == weight.dtype, std::string(name) + " must have the dtype of weight");
    check_written(*state, name);
  }
  StepCall call = call_of(weight, input, copy);
  call.adam = true;
  call.mean = matrix_of(mean);
  call.square = matrix_of(square);
  call.active = numbers.active;
  call.lr = numbers.step;
  call.root = numbers.root;
  call.beta1 = numbers.beta1;
  call.beta2 = numbers.beta2;
  call.eps = numbers.eps;
  return run(weight, input, call, threads);
}

}  // namespace kf::cpu
