// Log probabilities and divergences from a language-model head, without the matrix of all logits; see
// kedit_fast/ops/target_log_probs.py and distribution_kl.py.
#pragma once
#include "../common/tensor_view.h"

namespace kf::cpu {

// What target_log_probs fills, all contiguous: log_prob, top1 and top1_log_prob [rows], slope [rows, d] or undefined.
struct LogProbs {
  TensorView log_prob, top1, top1_log_prob, slope;
};

// States [rows, d], a head [V, d], targets [rows] in [0, V). `bias` [V] may be undefined. The same bits for any number
// of threads. Throws InvalidArgument.
void target_log_probs(const LogProbs& out, const TensorView& hidden, const TensorView& head, const TensorView& targets,
                      const TensorView& bias, double softcap, int threads);

// kl [rows] of the distributions of hidden and hidden_ref [rows, d], with `reverse` the other way round; slope [rows,
// d] or undefined. Throws InvalidArgument.
void distribution_kl(const TensorView& kl, const TensorView& slope, const TensorView& hidden,
                     const TensorView& hidden_ref, const TensorView& head, const TensorView& bias, double softcap,
                     bool reverse, int threads);

}  // namespace kf::cpu
