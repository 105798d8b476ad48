// The count-th largest size of an entry; see kedit_fast/ops/magnitude_bound.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// x [n] and divisor [n] or undefined; out [1], float64 where x is and float32 otherwise, is written. Throws
// InvalidArgument.
void magnitude_bound(const TensorView& out, const TensorView& x, const TensorView& divisor, int64_t count, int threads);

}  // namespace kf::cpu
