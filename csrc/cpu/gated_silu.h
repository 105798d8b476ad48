// out = silu(gate) * up; see kedit_fast/ops/gated_silu.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// Throws InvalidArgument.
void gated_silu(const TensorView& out, const TensorView& gate, const TensorView& up, int threads);

}  // namespace kf::cpu
