// Operands of the programs in this folder: matrices of any layout between canaries, and plain conversions of 16-bit
// numbers, written apart from those of the kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/common/tensor_view.h"

namespace operands {

using kf::DType;
using kf::TensorView;

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15 + 1) {}
  uint64_t bits() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
  }
  double uniform() { return double(bits() >> 11) / 9007199254740992.0; }  // [0, 1)
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  double normal() { return uniform() + uniform() + uniform() + uniform() + uniform() + uniform() - 3.0; }  // nearly
};

// The nearest number with `digits` binary digits, ties to even, and no bits below 2^lowest; infinity from `limit` on.
inline double nearest(double v, int digits, int lowest, double limit) {
  if (!std::isfinite(v) || v == 0) return v;
  int exponent;
  std::frexp(v, &exponent);
  const double unit = std::ldexp(1.0, exponent - digits > lowest ? exponent - digits : lowest);
  const double rounded = std::nearbyint(v / unit) * unit;
  return std::fabs(rounded) >= limit ? std::copysign(std::numeric_limits<double>::infinity(), v) : rounded;
}

inline double rounded_to(DType dtype, double v) {
  switch (dtype) {
    case DType::f32: return double(float(v));
    case DType::bf16: return nearest(v, 8, -133, 0x1p128);
    case DType::f16: return nearest(v, 11, -24, 0x1p16);
    default: return v;
  }
}

inline double read(DType dtype, const void* p) {
  uint16_t half;
  switch (dtype) {
    case DType::f64: {
      double v;
      std::memcpy(&v, p, 8);
      return v;
    }
    case DType::f32: {
      float v;
      std::memcpy(&v, p, 4);
      return v;
    }
    case DType::bf16: {
      std::memcpy(&half, p, 2);
      const uint32_t wide = uint32_t(half) << 16;
      float v;
      std::memcpy(&v, &wide, 4);
      return v;
    }
    default: {
      std::memcpy(&half, p, 2);
      const int exponent = (half >> 10) & 31, fraction = half & 1023;
      double v = exponent == 0 ? std::ldexp(fraction, -24)
                 : exponent == 31
                     ? (fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
                     : std::ldexp(fraction + 1024, exponent - 25);
      return half & 0x8000 ? -v : v;
    }
  }
}

inline void write(DType dtype, void* p, double v) {
  if (dtype == DType::f64) {
    std::memcpy(p, &v, 8);
  } else if (dtype == DType::f32) {
    const float narrow = float(v);
    std::memcpy(p, &narrow, 4);
  } else if (dtype == DType::bf16) {
    const float narrow = float(rounded_to(dtype, v));
    uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    const uint16_t half = std::isnan(v) ? 0x7fc0 : uint16_t(wide >> 16);
    std::memcpy(p, &half, 2);
  } else {
    const double narrow = rounded_to(dtype, v), size = std::fabs(narrow);
    uint16_t half = 0;
    if (std::isnan(v)) {
      half = 0x7e00;
    } else if (std::isinf(narrow)) {
      half = 0x7c00;
    } else if (size < 0x1p-14) {
      half = uint16_t(std::ldexp(size, 24));
    } else {
      int exponent;
      const double fraction = std::frexp(size, &exponent);  // [0.5, 1)
      half = uint16_t(((exponent + 14) << 10) + (int(std::ldexp(fraction, 11)) - 1024));
    }
    if (std::signbit(v)) half |= 0x8000;
    std::memcpy(p, &half, 2);
  }
}

enum class Layout { rows, padded, transposed, strided, count };

// A matrix whose memory is all NaN (every bit is one) but for its numbers: what is read beside them spoils a result,
// and what is written there is noticed. Its first number is at no multiple of more than its size.
struct Matrix {
  DType dtype;
  int64_t rows, columns;
  std::vector<unsigned char> memory;
  TensorView view;

  Matrix(DType type, int64_t row_count, int64_t column_count, Layout layout = Layout::rows)
      : dtype(type), rows(row_count), columns(column_count) {
    const int64_t item = kf::item_size(type);
    int64_t row_stride = columns > 0 ? columns : 1, column_stride = 1;
    if (layout == Layout::padded) row_stride = columns + 5;
    if (layout == Layout::transposed) row_stride = 1, column_stride = rows + 3;
    if (layout == Layout::strided) row_stride = 2 * columns + 3, column_stride = 2;
    const int64_t before = 64 / item + 1, after = 64 / item + 1;
    const int64_t span = (rows > 0 && columns > 0) ? (rows - 1) * row_stride + (columns - 1) * column_stride + 1 : 0;
    memory.assign(size_t((before + span + after) * item), 0xff);
    view.data = memory.data() + before * item;
    view.dtype = type;
    view.ndim = 2;
    view.shape[0] = rows, view.shape[1] = columns;
    view.stride[0] = row_stride, view.stride[1] = column_stride;
  }
  Matrix(const Matrix&) = delete;

  void* at(int64_t i, int64_t j) const {
    return static_cast<char*>(view.data) + (i * view.stride[0] + j * view.stride[1]) * kf::item_size(dtype);
  }
  double get(int64_t i, int64_t j) const { return read(dtype, at(i, j)); }
  void set(int64_t i, int64_t j, double v) { write(dtype, at(i, j), v); }
  Matrix& fill(Random& random, double scale = 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) set(i, j, scale * random.normal());
    }
    return *this;
  }
  TensorView vector() const {  // a matrix of one row, with contiguous numbers
    TensorView v = view;
    v.ndim = 1;
    v.shape[0] = columns, v.stride[0] = view.stride[1];
    return v;
  }
  std::vector<double> numbers() const {
    std::vector<double> all;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) all.push_back(get(i, j));
    }
    return all;
  }
  // Whether nothing was written beside the numbers.
  bool intact() const {
    std::vector<unsigned char> seen(memory);
    const unsigned char* start = memory.data();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        std::memset(seen.data() + (static_cast<unsigned char*>(at(i, j)) - start), 0xff, kf::item_size(dtype));
      }
    }
    for (unsigned char byte : seen) {
      if (byte != 0xff) return false;
    }
    return true;
  }
};

}  // namespace operands
