// The nearest key of every query; see kedit_fast/ops/nearest_key.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// queries [N, d] of float32 or float64, keys [K, d] of float64 with such queries and of float32, bfloat16 or float16
// otherwise, K > 0; index [N] of int64 and distance [N] of the dtype of queries are written. `product` is undefined, or
// queries keys^T [N, K] in the dtype of queries, with which most distances need not be computed; it is overwritten. It
// never changes the result. Throws InvalidArgument.
void nearest_key(const TensorView& index, const TensorView& distance, const TensorView& queries, const TensorView& keys,
                 const TensorView& product, int threads);

// The share of pairs that the first columns leave open: where it is large, nearest_key is faster with a product.
double nearest_open_share(const TensorView& queries, const TensorView& keys, int threads);

}  // namespace kf::cpu
