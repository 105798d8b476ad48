// One step of descent or of Adam on chosen entries of a weight [h, d], then held within a box; see
// kedit_fast/ops/masked_descent.py and masked_adam.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// The gradient, `grad` [h, d] or left [n, h]^T right [n, d], and the box: none where bound is negative. `entries` may
// be undefined.
struct StepInput {
  const TensorView &grad, &left, &right, &entries, &origin;
  double bound;
};

struct DescentNumbers {
  double lr, decay;
  bool decay_all;
};

// step: lr / (1 - beta1^count); root: 1 / sqrt(1 - beta2^count).
struct AdamNumbers {
  double step, root, beta1, beta2, eps;
  bool active;
};

// `copy` (bf16/fp16, beside an fp32 weight) may be undefined. Both return whether all entries were finite before the
// box and throw InvalidArgument.
bool masked_descent(const TensorView& weight, const StepInput& input, const DescentNumbers& numbers,
                    const TensorView& copy, int threads);
bool masked_adam(const TensorView& weight, const TensorView& mean, const TensorView& square, const StepInput& input,
                 const AdamNumbers& numbers, const TensorView& copy, int threads);

}  // namespace kf::cpu
