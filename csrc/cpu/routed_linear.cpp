#include "routed_linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

bool is_float(DType t) { return t != DType::u8; }

StepMatrix matrix_of(const TensorView& m) { return {m.data, m.dtype, m.stride[0], m.stride[1]}; }

// A vector as a matrix of one row.
StepMatrix row_of(const TensorView& v) {
  if (!v.defined()) return {};
  return {v.data, v.dtype, 0, v.stride[0]};
}

void check(const TensorView& x, const TensorView& memories, const TensorView& bias) {
  require(x.ndim == 2 && is_float(x.dtype), "x must be a floating point matrix [n, d]");
  require(memories.ndim == 3 && is_float(memories.dtype) && memories.shape[2] == x.shape[1],
          "memories must be [m, h, d] of a floating dtype");
  if (bias.defined()) {
    require(bias.ndim == 1 && is_float(bias.dtype) && bias.shape[0] == memories.shape[1], "bias must be [h]");
  }
}

const RowProductsKernel& kernel_for(DType x) {
  return x == DType::f64 ? active_table().row_products_f64 : active_table().row_products_f32;
}

// x with contiguous rows of the arithmetic's dtype: its own memory where it is that already.
class WideRows {
 public:
  WideRows(const TensorView& x, const RowProductsKernel& kernel, int threads)
      : in_place_(item_size(x.dtype) == static_cast<int64_t>(kernel.element) && x.stride[1] == 1),
        buffer_(in_place_ ? 1 : x.shape[0] * x.shape[1] * kernel.element) {
    data = in_place_ ? x.data : buffer_.get();
    stride = in_place_ ? x.stride[0] : x.shape[1];
    if (in_place_) return;
    const int64_t d = x.shape[1];
    Counter next;
    run_team(worthwhile_threads(double(x.shape[0]) * d, 65536, threads), [&](int, Team&) {
      for (int64_t i; (i = next.take()) < x.shape[0];) {
        kernel.widen_row(matrix_of(x), i, d, buffer_.get<char>() + i * d * kernel.element);
      }
    });
  }
  const void* data;
  int64_t stride;

 private:
  bool in_place_;
  AlignedBuffer buffer_;
};

Activation activation_of(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  require(name == "gelu_tanh", "activation must be identity, relu, silu, gelu or gelu_tanh");
  return Activation::gelu_tanh;
}

// The distance of a sequence whose tokens are [begin, end), from its tokens' squared ones.
template <class T>
T of_sequence(const T* squares, int64_t begin, int64_t end, int64_t long_from) {
  T sum = 0, largest = 0;
  for (int64_t t = begin; t < end; ++t) {
    const T distance = std::sqrt(squares[t]);
    sum += distance;
    largest = distance > largest || distance != distance ? distance : largest;
  }
  if (end == begin) return 0;
  return long_from && end - begin > long_from ? largest : sum / T(end - begin);
}

template <class T>
void reduce(const TensorView& distances, const T* partial, int64_t tasks, int64_t rows, const int64_t* starts,
            int64_t long_from) {
  T* out = static_cast<T*>(distances.data);
  const int64_t memories = distances.shape[0], sequences = distances.shape[1];
  std::vector<T> squares(rows);
  for (int64_t m = 0; m < memories; ++m) {
    std::fill(squares.begin(), squares.end(), T(0));
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t n = 0; n < rows; ++n) squares[n] += partial[(m * tasks + t) * rows + n];
    }
    for (int64_t r = 0; r < sequences; ++r) {
      out[m * sequences + r] = of_sequence(squares.data(), starts[r], starts[r + 1], long_from);
    }
  }
}

}  // namespace

void activation_distance(const TensorView& distances, const TensorView& x, const TensorView& reference,
                         const TensorView& weights, const int64_t* starts, int64_t sequences,
                         const std::string& activation, int64_t long_from, const TensorView& bias, int threads) {
  check(x, weights, bias);
  const int64_t rows = x.shape[0], d = x.shape[1], memories = weights.shape[0], h = weights.shape[1];
  require(reference.ndim == 2 && is_float(reference.dtype) && reference.shape[0] == rows && reference.shape[1] == h,
          "reference must be [n, h]");
  require(distances.ndim == 2 && distances.shape[0] == memories && distances.shape[1] == sequences,
          "distances must be [m, r]");
  require(distances.dtype == (x.dtype == DType::f64 ? DType::f64 : DType::f32), "distances have a wrong dtype");
  for (int64_t r = 0; r < sequences; ++r) {
    require(starts[r] >= 0 && starts[r] <= starts[r + 1] && starts[r + 1] <= rows, "starts must rise from 0 to n");
  }
  const Activation kind = activation_of(activation);
  if (memories == 0 || sequences == 0) return;
  const RowProductsKernel& kernel = kernel_for(x.dtype);
  const WideRows wide(x, kernel, threads);
  const int64_t tasks = (h + kernel.outputs - 1) / kernel.outputs, item = static_cast<int64_t>(kernel.element);
  const DistanceCall call = {wide.data,
                             wide.stride,
                             rows,
                             d,
                             h,
                             {weights.data, weights.dtype, weights.stride[1], weights.stride[2]},
                             weights.stride[0] * item_size(weights.dtype),
                             matrix_of(reference),
                             row_of(bias),
                             kind};
  AlignedBuffer partial(std::max<int64_t>(1, memories * tasks * rows * item));
  const double work = double(memories) * rows * h * d;
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 1e6, threads), memories * tasks));
  Counter next;
  run_team(std::max(members, 1), [&](int, Team&) {
    for (int64_t t; (t = next.take()) < memories * tasks;) {
      kernel.differences(call, t / tasks, t % tasks * kernel.outputs, partial.get<char>() + t * rows * item);
    }
  });
  if (x.dtype == DType::f64) reduce(distances, partial.get<double>(), tasks, rows, starts, long_from);
  else reduce(distances, partial.get<float>(), tasks, rows, starts, long_from);
}

void routed_linear(const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView& memories,
                   const int64_t* route, const TensorView& bias, int threads) {
  check(x, memories, bias);
  const int64_t rows = x.shape[0], d = x.shape[1], count = memories.shape[0], h = memories.shape[1];
  require(out.ndim == 2 && out.shape[0] == rows && out.shape[1] == h && out.dtype == x.dtype,
          "out must be [n, h] of the dtype of x");
  require(rows == 0 || h == 0 || (out.stride[1] == 1 || h == 1), "out must be contiguous");
  require(rows <= 1 || out.stride[0] == h, "out must be contiguous");
  if (weight.defined()) {
    require(weight.ndim == 2 && is_float(weight.dtype) && weight.shape[0] == h && weight.shape[1] == d,
            "weight must be [h, d]");
  }
  // Rows by route, in their order: begin[m + 1] is where those of memory m are, begin[0] those of -1.
  std::vector<int64_t> begin(count + 2, 0), sorted(rows);
  for (int64_t n = 0; n < rows; ++n) {
    require(route[n] >= -1 && route[n] < count, "route must be -1 to m - 1");
    ++begin[route[n] + 2];
  }
  for (int64_t m = 1; m < count + 2; ++m) begin[m] += begin[m - 1];
  std::vector<int64_t> next_of(begin.begin(), begin.end() - 1);
  for (int64_t n = 0; n < rows; ++n) sorted[next_of[route[n] + 1]++] = n;
  if (rows == 0 || h == 0) return;

  const RowProductsKernel& kernel = kernel_for(x.dtype);
  const WideRows wide(x, kernel, threads);
  const RoutedCall call = {wide.data, wide.stride, d, h, row_of(bias), out.data, out.dtype};
  const int64_t tasks = (h + kernel.outputs - 1) / kernel.outputs;
  const double work = double(rows) * h * d;
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 1e6, threads), tasks));
  Counter next;
  run_team(std::max(members, 1), [&](int, Team&) {
    for (int64_t t; (t = next.take()) < tasks;) {
      for (int64_t m = weight.defined() ? -1 : 0; m < count; ++m) {
        const int64_t first = begin[m + 1], size = begin[m + 2] - first;
        if (size == 0) continue;
        StepMatrix matrix =
            m < 0 ? matrix_of(weight)
                  : StepMatrix{static_cast<char*>(memories.data) + m * memories.stride[0] * item_size(memories.dtype),
                               memories.dtype, memories.stride[1], memories.stride[2]};
        kernel.routed(call, matrix, sorted.data() + first, size, t * kernel.outputs);
      }
    }
  });
}

}  // namespace kf::cpu
