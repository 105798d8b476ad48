// What a matrix, or a stack of them, that a kernel writes must be.
#pragma once
#include <string>

#include "../common/error.h"
#include "../common/tensor_view.h"

namespace kf::cpu {

// Throws InvalidArgument where two entries share memory.
inline void check_written(const TensorView& m, const std::string& name) {
  int order[MAX_DIMS], count = 0;  // dimensions of more than one entry, by stride
  for (int i = 0; i < m.ndim; ++i) {
    if (m.shape[i] <= 1) continue;
    int at = count++;
    for (; at > 0 && m.stride[order[at - 1]] > m.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  int64_t reach = 1;  // entries that the dimensions before take up
  for (int i = 0; i < count; ++i) {
    const int64_t stride = m.stride[order[i]];
    require(stride >= reach, name + " must not overlap itself");
    reach += stride * (m.shape[order[i]] - 1);
  }
}

}  // namespace kf::cpu
