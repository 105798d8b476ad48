// What a matrix that a kernel writes must be.
#pragma once
#include <string>

#include "../common/error.h"
#include "../common/tensor_view.h"

namespace kf::cpu {

// Throws InvalidArgument where two entries of a matrix share memory.
inline void check_written(const TensorView& m, const std::string& name) {
  const int64_t rows = m.shape[0], columns = m.shape[1];
  const bool by_rows = m.stride[1] > 0 && m.stride[0] >= (columns - 1) * m.stride[1] + 1;
  const bool by_columns = m.stride[0] > 0 && m.stride[1] >= (rows - 1) * m.stride[0] + 1;
  const bool single = rows <= 1 || columns <= 1;
  const bool single_ok = (rows <= 1 || m.stride[0] > 0) && (columns <= 1 || m.stride[1] > 0);
  require(single ? single_ok : by_rows || by_columns, name + " must not overlap itself");
}

}  // namespace kf::cpu
