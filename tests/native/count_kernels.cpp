// Runs every CPU kernel once per instruction set inside counted(), which benchmarks/instructions.py has callgrind
// count: one line for each call, in order. Arguments: the instruction sets.
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/best_overlap.h"
#include "../../csrc/cpu/gated.h"
#include "../../csrc/cpu/kernel_table.h"
#include "../../csrc/cpu/lm_head.h"
#include "../../csrc/cpu/magnitude_bound.h"
#include "../../csrc/cpu/masked_step.h"
#include "../../csrc/cpu/nearest_key.h"
#include "../../csrc/cpu/rank_k_update.h"
#include "../../csrc/cpu/rms_norm.h"
#include "../../csrc/cpu/routed_linear.h"
#include "../../csrc/cpu/symmetric_rank_k_update.h"
#include "../../csrc/cpu/tail_attention.h"
#include "../../csrc/cpu/ties_merge.h"
#include "operands.h"

using namespace kf::cpu;
using kf::Isa;
using kf::TensorView;
using operands::DType;
using operands::Matrix;
using operands::Random;

using Case = std::pair<std::string, std::function<void()>>;

// The function that callgrind is told: its name must stand in the program, and be called.
extern "C" __attribute__((noinline)) void counted(const Case& one) {
  one.second();
  __asm__ volatile("" : : : "memory");
}

namespace {

TensorView bytes_view(std::vector<uint8_t>& bytes, int64_t rows, int64_t columns) {
  TensorView v;
  v.data = bytes.data();
  v.dtype = DType::u8;
  v.ndim = 2;
  v.shape[0] = rows, v.shape[1] = columns;
  v.stride[0] = columns, v.stride[1] = 1;
  return v;
}

TensorView integers_view(std::vector<int64_t>& numbers) {
  TensorView v;
  v.data = numbers.data();
  v.dtype = DType::i64;
  v.ndim = 1;
  v.shape[0] = int64_t(numbers.size()), v.stride[0] = 1;
  return v;
}

// The columns of a matrix as [rows, heads, size].
TensorView by_heads(const Matrix& m, int64_t heads) {
  TensorView v = m.view;
  v.ndim = 3;
  v.shape[2] = v.shape[1] / heads, v.stride[2] = v.stride[1];
  v.shape[1] = heads, v.stride[1] = v.shape[2] * v.stride[2];
  return v;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    default: return "float16";
  }
}

}  // namespace

int main(int count, char** arguments) {
  Random random(1);
  const int64_t n = 93, d = 205, k = 37;  // neither fills tiles or vectors
  Matrix left(DType::f32, n, k), right(DType::f32, d, k), copy(DType::bf16, n, d), none(DType::f32, 0, 0);
  left.fill(random), right.fill(random), copy.fill(random);
  std::vector<Matrix*> wide, tall, square, norm_weight;  // one for each dtype
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  for (DType dtype : dtypes) {
    for (auto* list : {&wide, &tall}) list->push_back(&(new Matrix(dtype, n, d))->fill(random));
    square.push_back(&(new Matrix(dtype == DType::f64 ? dtype : DType::f32, d, d))->fill(random));
    norm_weight.push_back(&(new Matrix(dtype, 1, d))->fill(random));
  }
  Matrix out_f32(DType::f32, n, d), out_bf16(DType::bf16, n, d), out_f16(DType::f16, n, d);
  Matrix* out[] = {&out_f32, nullptr, &out_bf16, &out_f16};
  Matrix mean(DType::f32, n, d), moment(DType::f32, n, d), bound(DType::f32, 1, 1);
  Matrix gradient_left(DType::f32, 7, n), gradient_right(DType::f32, 7, d), keys(DType::f32, 41, d);
  mean.fill(random, 1e-2), gradient_left.fill(random, 1e-2), gradient_right.fill(random, 1e-2), keys.fill(random);
  for (int64_t i = 0; i < n * d; ++i) moment.set(i / d, i % d, 1e-3 * random.uniform());
  Matrix step_weight(DType::f32, n, d), distance(DType::f32, 1, n), layer(DType::f32, 61, d);
  step_weight.fill(random), layer.fill(random);
  Matrix layer_out(DType::f32, n, 61), flat(DType::f32, 1, n * d), changed(DType::f32, 2, n * d);
  Matrix merged(DType::f32, 1, n * d);
  flat.fill(random), changed.fill(random);
  std::vector<int64_t> index(n), overlap(n), best(n), route(n, -1);
  std::vector<uint8_t> masks(n * 128), book(41 * 128), entries((n * d + 7) / 8);
  for (auto* bytes : {&masks, &book, &entries}) {
    for (uint8_t& byte : *bytes) byte = uint8_t(random.bits() >> 32) & uint8_t(random.bits() >> 40);
  }
  TensorView chosen = bytes_view(entries, 1, int64_t(entries.size()));
  chosen.ndim = 1, chosen.shape[0] = int64_t(entries.size()), chosen.stride[0] = 1;
  TensorView memories;  // none: rows go through the layer itself
  memories.data = layer.view.data, memories.dtype = DType::f32, memories.ndim = 3;
  memories.shape[0] = 1, memories.shape[1] = 61, memories.shape[2] = d;
  memories.stride[0] = 61 * d, memories.stride[1] = d, memories.stride[2] = 1;
  for (int64_t i = 0; i < n; i += 3) route[i] = 0;

  std::vector<Case> cases;
  for (int t = 0; t < 4; ++t) {
    const std::string dtype = name_of(dtypes[t]);
    const Matrix *w = wide[t], *x = tall[t], *acc = square[t], *scale = norm_weight[t], *to = out[t];
    cases.emplace_back("rank_k_update " + dtype,
                       [=, &left, &right] { rank_k_update(w->view, left.view, right.view, 1e-3, {}, 1); });
    cases.emplace_back("symmetric_rank_k_update " + dtype,
                       [=] { symmetric_rank_k_update(acc->view, x->view, {}, {}, 1e-3, 1); });
    if (!to) continue;
    cases.emplace_back("rms_norm " + dtype, [=] { rms_norm(to->view, x->view, scale->vector(), 1e-6, true, 1); });
    cases.emplace_back("gated_silu " + dtype, [=] { gated(Gate::silu, to->view, x->view, x->view, 1); });
  }
  cases.emplace_back("rank_k_update float32 with a bfloat16 copy",
                     [&] { rank_k_update(wide[0]->view, left.view, right.view, 1e-3, copy.view, 1); });
  const StepInput by_factors = {{}, gradient_left.view, gradient_right.view, {}, {}, -1.0};
  const StepInput by_entries = {{}, gradient_left.view, gradient_right.view, chosen, {}, -1.0};
  cases.emplace_back("masked_descent all entries",
                     [&] { masked_descent(step_weight.view, by_factors, {1e-3, 0.0, false}, {}, 1); });
  cases.emplace_back("masked_adam chosen entries", [&] {
    masked_adam(step_weight.view, mean.view, moment.view, by_entries, {1e-3, 1.0, 0.9, 0.99, 1e-8, true}, {}, 1);
  });
  cases.emplace_back("nearest_key float32",
                     [&] { nearest_key(integers_view(index), distance.vector(), wide[0]->view, keys.view, {}, 1); });
  cases.emplace_back("best_overlap", [&] {
    best_overlap(integers_view(best), integers_view(overlap), bytes_view(masks, n, 128), bytes_view(book, 41, 128), 1);
  });
  cases.emplace_back("magnitude_bound float32", [&] { magnitude_bound(bound.vector(), flat.vector(), {}, n, 1); });
  cases.emplace_back("ties_merge float32",
                     [&] { ties_merge(merged.vector(), flat.vector(), changed.view, {1.0, 0.5}, n * d / 5, 1); });
  cases.emplace_back("routed_linear float32",
                     [&] { routed_linear(layer_out.view, tall[0]->view, layer.view, memories, route.data(), {}, 1); });

  const int64_t states = 16, vocabulary = 301;
  Matrix hidden(DType::f32, states, d), head(DType::f32, vocabulary, d), slope(DType::f32, states, d);
  Matrix log_prob(DType::f32, 1, states), top1_log_prob(DType::f32, 1, states), rstd(DType::f32, 1, n);
  hidden.fill(random), head.fill(random), rstd.fill(random);
  std::vector<int64_t> targets(states, 7), top1(states), starts = {0, 5, 6, 40, n};
  const LogProbs probabilities = {log_prob.vector(), integers_view(top1), top1_log_prob.vector(), slope.view};
  cases.emplace_back("rms_norm_backward float32", [&] {
    rms_norm_backward(out_f32.view, wide[0]->view, tall[0]->view, norm_weight[0]->vector(), rstd.vector(), 1);
  });
  cases.emplace_back("gated_gelu float32",
                     [&] { gated(Gate::gelu_tanh, out_f32.view, tall[0]->view, wide[0]->view, 1); });
  cases.emplace_back("gated_silu_backward float32", [&] {
    gated_backward(Gate::silu, out_f32.view, mean.view, wide[0]->view, tall[0]->view, wide[0]->view, 1);
  });
  cases.emplace_back("target_log_probs float32", [&] {
    target_log_probs(probabilities, hidden.view, head.view, integers_view(targets), {}, 0.0, 1);
  });
  Matrix query(DType::f32, n, 160), key(DType::f32, n, 80), value(DType::f32, n, 80), attended(DType::f32, n, 160);
  Matrix of_query(DType::f32, n, 160), of_key(DType::f32, n, 80), of_value(DType::f32, n, 80);
  Matrix normalizer(DType::f32, n, 8);
  query.fill(random), key.fill(random), value.fill(random), attended.fill(random);
  TailAttentionInputs tails = {};
  tails.query = by_heads(query, 4), tails.key = by_heads(key, 2), tails.value = by_heads(value, 2);
  tails.starts = integers_view(starts), tails.scale = 0.15;
  cases.emplace_back("tail_attention float32",
                     [&] { tail_attention(by_heads(attended, 4), by_heads(normalizer, 4), tails, 1); });
  cases.emplace_back("tail_attention_backward float32", [&] {
    tail_attention_backward(by_heads(of_query, 4), by_heads(of_key, 2), by_heads(of_value, 2), by_heads(query, 4),
                            by_heads(normalizer, 4), tails, 1);
  });

  for (int i = 1; i < count; ++i) {
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::neon}) {
      if (kf::isa_name(isa) == std::string(arguments[i])) select_isa(isa);
    }
    if (kf::isa_name(active_isa()) != std::string(arguments[i])) return 2;
    for (const Case& one : cases) {
      one.second();  // what happens in a first call alone is not counted
      counted(one);
      std::printf("%s %s\n", arguments[i], one.first.c_str());
    }
  }
  return 0;
}
