// A tensor as plain data: what every kernel takes. No torch, no Python.
#pragma once
#include <cstdint>

namespace kf {

enum class DType : int { f32, f64, bf16, f16, u8, i64 };

constexpr int64_t item_size(DType t) {
  return t == DType::f64 || t == DType::i64 ? 8 : t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2;
}

constexpr int MAX_DIMS = 3;

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

}  // namespace kf
