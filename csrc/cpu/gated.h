// out = activation(gate) * up, and its gradients; see kedit_fast/ops/gated_silu.py and gated_gelu.py.
#pragma once
#include "../common/tensor_view.h"
#include "kernel_table.h"

namespace kf::cpu {

// Throws InvalidArgument.
void gated(Gate activation, const TensorView& out, const TensorView& gate, const TensorView& up, int threads);

// d_gate and d_up = the gradients in both, where `grad` is that in the result. Throws InvalidArgument.
void gated_backward(Gate activation, const TensorView& d_gate, const TensorView& d_up, const TensorView& grad,
                    const TensorView& gate, const TensorView& up, int threads);

}  // namespace kf::cpu
