// Changed copies of a matrix merged into one; see kedit_fast/ops/ties_merge.py.
#pragma once
#include <vector>

#include "../common/tensor_view.h"

namespace kf::cpu {

// out [n], base [n], memories [M, n], all float64 or none; `count` entries of each memory stay. Returns false, with
// nothing written, where a difference is not finite. Throws InvalidArgument.
bool ties_merge(const TensorView& out, const TensorView& base, const TensorView& memories,
                const std::vector<double>& coefficients, int64_t count, int threads);

}  // namespace kf::cpu
