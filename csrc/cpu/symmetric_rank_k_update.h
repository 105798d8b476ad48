// acc [d, d] lower triangle += alpha x^T diag(w) x for x [n, d]; see kedit_fast/ops/symmetric_rank_k_update.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// row_weights [n] (fp32/fp64) and mask [n] (u8, 0 = leave out) may be undefined. Throws InvalidArgument.
void symmetric_rank_k_update(const TensorView& acc, const TensorView& x, const TensorView& row_weights,
                             const TensorView& mask, double alpha, int threads);

// acc [E, d, d]: rows [offsets[e], offsets[e + 1]) of x go to acc[e]; see
// kedit_fast/ops/grouped_symmetric_rank_k_update.py.
void grouped_symmetric_rank_k_update(const TensorView& acc, const TensorView& x, const TensorView& offsets,
                                     const TensorView& row_weights, double alpha, int threads);

}  // namespace kf::cpu
