// What a memory routes by, and rows through the matrices that their routes name; see
// kedit_fast/ops/activation_distance.py and routed_linear.py.
#pragma once
#include <string>

#include "../common/tensor_view.h"

namespace kf::cpu {

// distances [m, r], contiguous, of sequences of x [n, d] that begin at `starts` [r + 1]. `bias` may be undefined.
// Throws InvalidArgument.
void activation_distance(const TensorView& distances, const TensorView& x, const TensorView& reference,
                         const TensorView& weights, const int64_t* starts, int64_t sequences,
                         const std::string& activation, int64_t long_from, const TensorView& bias, int threads);

// Rows of out [n, h], contiguous, whose route is not -1, and those too where `weight` is defined. `bias` may be
// undefined. Throws InvalidArgument.
void routed_linear(const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView& memories,
                   const int64_t* route, const TensorView& bias, int threads);

}  // namespace kf::cpu
