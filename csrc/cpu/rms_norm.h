// out = x / sqrt(mean(x^2) + eps) * weight, row by row, and its gradient in x; see kedit_fast/ops/rms_norm.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// 1 / sqrt(mean(x^2) + eps) goes into `rstd` [rows] where it is defined. Throws InvalidArgument.
void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, bool round_first,
              int threads, const TensorView& rstd = {});

// out = the gradient in x, where `grad` is that in the norm's result. Throws InvalidArgument.
void rms_norm_backward(const TensorView& out, const TensorView& grad, const TensorView& x, const TensorView& weight,
                       const TensorView& rstd, int threads);

}  // namespace kf::cpu
