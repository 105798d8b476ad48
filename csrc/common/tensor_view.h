// A tensor as plain data: what every kernel takes. No torch, no Python.
#pragma once
#include <cstdint>
#include <utility>

namespace kf {

enum class DType : int { f32, f64, bf16, f16, u8, i64 };

constexpr int64_t item_size(DType t) {
  return t == DType::f64 || t == DType::i64 ? 8 : t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2;
}

constexpr int MAX_DIMS = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[MAX_DIMS] = {};
  int64_t stride[MAX_DIMS] = {};  // in elements

  bool defined() const { return ndim > 0; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

// Rows [first, first + count) of a tensor.
inline TensorView rows_of(const TensorView& t, int64_t first, int64_t count) {
  TensorView rows = t;
  rows.data = static_cast<char*>(t.data) + first * t.stride[0] * item_size(t.dtype);
  rows.shape[0] = count;
  return rows;
}

// A matrix of a stack [E, rows, columns]; undefined where the stack is.
inline TensorView matrix_of(const TensorView& stack, int64_t index) {
  TensorView matrix;
  if (!stack.defined()) return matrix;
  matrix = rows_of(stack, index, 1);
  matrix.ndim = 2;
  for (int i = 0; i < 2; ++i) {
    matrix.shape[i] = stack.shape[i + 1];
    matrix.stride[i] = stack.stride[i + 1];
  }
  return matrix;
}

inline TensorView transposed(TensorView matrix) {
  std::swap(matrix.shape[0], matrix.shape[1]);
  std::swap(matrix.stride[0], matrix.stride[1]);
  return matrix;
}

}  // namespace kf
