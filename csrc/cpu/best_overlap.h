// The row of a book of bits that shares most bits with each mask; see kedit_fast/ops/best_overlap.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// masks [R, b] and book [K, b] of bytes, K > 0; index and count [R] of int64 are written. Throws InvalidArgument.
void best_overlap(const TensorView& index, const TensorView& count, const TensorView& masks, const TensorView& book,
                  int threads);

}  // namespace kf::cpu
