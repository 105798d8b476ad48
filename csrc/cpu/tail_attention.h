#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// The arguments of both passes: packed queries [N, heads, size], keys and values [N, groups, size], where each row's
// tokens begin (starts [R + 1]), and the rows' prefixes: keys and values [rows, groups, places, size] with spans
// [R, 2] of places and, where they are defined, prefix_rows [R]. A window of 0 is none.
struct TailAttentionInputs {
  TensorView query, key, value, starts, prefix_keys, prefix_values, spans, prefix_rows;
  double scale, softcap;
  int64_t window;
};

// out [N, heads, size] and normalizer [N, heads, 2] float32, which the backward pass reads.
void tail_attention(const TensorView& out, const TensorView& normalizer, const TailAttentionInputs&, int threads);

// Gradients by query, key and value, from that by out.
void tail_attention_backward(const TensorView& of_query, const TensorView& of_key, const TensorView& of_value,
                             const TensorView& grad, const TensorView& normalizer, const TailAttentionInputs&,
                             int threads);

}  // namespace kf::cpu
