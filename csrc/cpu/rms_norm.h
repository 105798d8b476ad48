// out = x / sqrt(mean(x^2) + eps) * weight, row by row; see kedit_fast/ops/rms_norm.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// Throws InvalidArgument.
void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, bool round_first,
              int threads);

}  // namespace kf::cpu
