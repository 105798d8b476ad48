// weight [out, in] += alpha left [out, k] right [in, k]^T, rounded once; see kedit_fast/ops/rank_k_update.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// `copy` (bf16/fp16, beside an fp32 weight) may be undefined. Throws InvalidArgument.
void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int threads);

// weight [E, out, in]: weight[e] += alpha left[:, columns_e] right_e for rows [offsets[e], offsets[e + 1]) of right
// [n, in] and columns [n]; weight[e] and copy[e] are left as they are where e has no rows. See
// kedit_fast/ops/grouped_rank_k_update.py.
void grouped_rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right,
                           const TensorView& columns, const TensorView& offsets, double alpha, const TensorView& copy,
                           int threads);

}  // namespace kf::cpu
