// Matrices whose rows are computed one by one, and the threads that share them.
#pragma once
#include <algorithm>
#include <string>

#include "../common/error.h"
#include "../common/parallel.h"
#include "../common/tensor_view.h"

namespace kf::cpu {

inline void check_rows(const TensorView& m, const std::string& name, int64_t rows, int64_t columns) {
  require(m.ndim == 2 && m.shape[0] == rows && m.shape[1] == columns, name + " must be a matrix of the shape of out");
  require(columns <= 1 || m.stride[1] == 1, name + " must have contiguous rows");
}

inline void check_vector(const TensorView& v, const std::string& name, int64_t size, DType dtype) {
  require(v.ndim == 1 && v.shape[0] == size && (size <= 1 || v.stride[0] == 1) && v.dtype == dtype,
          name + " must be a contiguous vector of the right size and dtype");
}

inline void check_floats(const TensorView& t, const std::string& name) {
  require(t.ndim >= 1 && t.dtype != DType::u8 && t.dtype != DType::i64,
          name + " must be of float32, float64, bfloat16 or float16");
}

inline void check_result(const TensorView& out) {
  require(out.ndim == 2 && (out.dtype == DType::f32 || out.dtype == DType::bf16 || out.dtype == DType::f16),
          "out must be a matrix of float32, bfloat16 or float16");
  require(out.size() == 0 || out.shape[0] == 1 || out.stride[0] == out.shape[1], "out must be contiguous");
  require(out.shape[1] <= 1 || out.stride[1] == 1, "out must be contiguous");
}

// Calls body(first, last) on ranges that cover all rows, on as many threads as they are worth.
template <class Body>
void run_by_rows(int64_t rows, int64_t columns, int threads, Body&& body) {
  const int64_t step = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
  const int members = worthwhile_threads(double(rows) * double(columns), 32768, threads);
  Counter next;
  run_team(members, [&](int, Team&) {
    for (int64_t t; (t = next.take()) * step < rows;) body(t * step, std::min(rows, (t + 1) * step));
  });
}

}  // namespace kf::cpu
