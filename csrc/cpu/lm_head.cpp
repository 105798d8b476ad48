// Rows go by groups, the vocabulary by parts: a task takes one part for one group. Both are divided by shapes alone,
// and the parts of a row are put together in their order, so the number of threads changes no bit.
#include "lm_head.h"

#include <algorithm>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "by_rows.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

constexpr int64_t MOST_LANES = 128;                 // of a group: its logits of a block stay near the processor
constexpr int64_t PART = 3072;                      // tokens of a part, at least
constexpr int64_t MOST_TASKS = 32;                  // that more parts are made for
constexpr int64_t SLOPE_BYTES = int64_t(64) << 20;  // of gradients by parts, at most; one part is always made
constexpr int64_t NUMBERS = 5;                      // arrays of a part

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

StepMatrix matrix(const TensorView& m) { return {m.data, m.dtype, m.stride[0], m.stride[1]}; }

struct Inputs {
  const TensorView& hidden;
  const TensorView& head;
  const TensorView& bias;
  double softcap;
};

const HeadKernel& checked_kernel(const Inputs& in, const TensorView& value, const TensorView& slope) {
  check_floats(in.hidden, "hidden");
  check_floats(in.head, "head");
  require(in.hidden.ndim == 2 && in.head.ndim == 2 && in.head.shape[1] == in.hidden.shape[1] && in.head.shape[0] > 0,
          "hidden must be [rows, d] and head [V, d], V > 0");
  const bool wide = in.hidden.dtype == DType::f64;
  require(wide == (in.head.dtype == DType::f64), "head must be float64 where hidden is, and nowhere else");
  if (in.bias.defined()) {
    check_floats(in.bias, "bias");
    require(in.bias.ndim == 1 && in.bias.shape[0] == in.head.shape[0], "bias must be [V]");
  }
  require(in.softcap >= 0, "softcap must not be negative");
  const DType arithmetic = wide ? DType::f64 : DType::f32;
  const int64_t rows = in.hidden.shape[0], d = in.hidden.shape[1];
  check_vector(value, "the result", rows, arithmetic);
  if (slope.defined()) {
    require(slope.dtype == arithmetic && slope.ndim == 2 && slope.shape[0] == rows && slope.shape[1] == d,
            "slope must be [rows, d] of the dtype of the sums");
    require(slope.size() == 0 || ((rows == 1 || slope.stride[0] == d) && (d == 1 || slope.stride[1] == 1)),
            "slope must be contiguous");
  }
  return wide ? active_table().head_f64 : active_table().head_f32;
}

// Runs a call whose groups differ only in their rows; `other` is hidden_ref or undefined.
void run_head(const HeadKernel& kernel, const Inputs& in, const TensorView& other, const int64_t* targets, bool reverse,
              const HeadResult& result, int threads) {
  const int64_t rows = in.hidden.shape[0], d = in.hidden.shape[1], vocabulary = in.head.shape[0];
  if (rows == 0) return;
  const int64_t halves = other.defined() ? 2 : 1, item = static_cast<int64_t>(kernel.element);
  const int64_t groups = (rows * halves + MOST_LANES - 1) / MOST_LANES;
  const int64_t group_rows = (rows + groups - 1) / groups, half = up(group_rows, kernel.lane), lanes = half * halves;
  const int64_t slope_bytes = result.slope ? lanes * up(d, kernel.vector) * item : 0;
  int64_t parts = std::min((vocabulary + PART - 1) / PART, std::max<int64_t>(1, MOST_TASKS / groups));
  if (slope_bytes) parts = std::min(parts, std::max<int64_t>(1, SLOPE_BYTES / (groups * slope_bytes)));
  const int64_t step = up((vocabulary + parts - 1) / parts, kernel.block);
  parts = (vocabulary + step - 1) / step;

  const int64_t packed_bytes = up(std::max<int64_t>(1, lanes * d) * item, 64);
  const int64_t number_bytes = up(NUMBERS * lanes * item, 64), best_bytes = up(lanes * 8, 64);
  const int64_t part_bytes = number_bytes + best_bytes + up(slope_bytes, 64);
  AlignedBuffer packed(groups * packed_bytes), made(groups * parts * part_bytes);
  std::vector<HeadPart> part(groups * parts);
  for (int64_t p = 0; p < groups * parts; ++p) {
    char* at = made.get<char>() + p * part_bytes;
    part[p] = {at, reinterpret_cast<int64_t*>(at + number_bytes),
               slope_bytes ? at + number_bytes + best_bytes : nullptr};
  }
  std::vector<int64_t> target(targets ? groups * lanes : 0, -1);
  std::vector<HeadCall> call(groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group_rows, count = std::max<int64_t>(0, std::min(group_rows, rows - first));
    if (targets) std::copy(targets + first, targets + first + count, target.begin() + g * lanes);
    const StepMatrix bias = in.bias.defined() ? StepMatrix{in.bias.data, in.bias.dtype, 0, in.bias.stride[0]}
                                              : StepMatrix{nullptr, DType::f32, 0, 0};
    call[g] = {matrix(in.head),
               bias,
               packed.get<char>() + g * packed_bytes,
               d,
               count,
               lanes,
               targets ? target.data() + g * lanes : nullptr,
               in.softcap,
               result.slope != nullptr,
               halves == 2,
               reverse};
  }

  const double work = double(rows) * halves * d * vocabulary;
  const int members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, 4e6, threads), groups * parts));
  AlignedBuffer scratch(members * up(static_cast<int64_t>(kernel.scratch_bytes(lanes)), 64));
  const int64_t scratch_bytes = up(static_cast<int64_t>(kernel.scratch_bytes(lanes)), 64);
  Counter next_group, next_task, next_row;
  run_team(members, [&](int member, Team& team) {
    for (int64_t g; (g = next_group.take()) < groups;) {
      char* to = packed.get<char>() + g * packed_bytes;
      std::fill(to, to + packed_bytes, 0);
      const int64_t first = g * group_rows, count = call[g].rows;
      kernel.pack(matrix(rows_of(in.hidden, first, count)), count, d, 0, lanes, to);
      if (halves == 2) kernel.pack(matrix(rows_of(other, first, count)), count, d, half, lanes, to);
    }
    team.barrier();
    for (int64_t t; (t = next_task.take()) < groups * parts;) {
      const int64_t begin = t % parts * step;
      kernel.run(call[t / parts], begin, std::min(begin + step, vocabulary), part[t],
                 scratch.get<char>() + member * scratch_bytes);
    }
    team.barrier();
    for (int64_t row; (row = next_row.take()) < rows;) {
      const int64_t g = row / group_rows;
      HeadResult to = result;
      to.row = g * group_rows;
      kernel.finish(call[g], part.data() + g * parts, parts, row - to.row, to);
    }
  });
}

}  // namespace

void target_log_probs(const LogProbs& out, const TensorView& hidden, const TensorView& head, const TensorView& targets,
                      const TensorView& bias, double softcap, int threads) {
  const Inputs in = {hidden, head, bias, softcap};
  const HeadKernel& kernel = checked_kernel(in, out.log_prob, out.slope);
  const int64_t rows = hidden.shape[0];
  check_vector(out.top1_log_prob, "top1_log_prob", rows, out.log_prob.dtype);
  check_vector(out.top1, "top1", rows, DType::i64);
  check_vector(targets, "targets", rows, DType::i64);
  const auto* target = static_cast<const int64_t*>(targets.data);
  for (int64_t r = 0; r < rows; ++r) {
    require(target[r] >= 0 && target[r] < head.shape[0], "targets must be in [0, V)");
  }
  const HeadResult result = {0, out.log_prob.data, out.top1_log_prob.data, static_cast<int64_t*>(out.top1.data),
                             out.slope.defined() ? out.slope.data : nullptr};
  run_head(kernel, in, {}, target, false, result, threads);
}

void distribution_kl(const TensorView& kl, const TensorView& slope, const TensorView& hidden,
                     const TensorView& hidden_ref, const TensorView& head, const TensorView& bias, double softcap,
                     bool reverse, int threads) {
  const Inputs in = {hidden, head, bias, softcap};
  const HeadKernel& kernel = checked_kernel(in, kl, slope);
  require(hidden_ref.ndim == 2 && hidden_ref.dtype == hidden.dtype && hidden_ref.shape[0] == hidden.shape[0] &&
              hidden_ref.shape[1] == hidden.shape[1],
          "hidden_ref must have the shape and dtype of hidden");
  const HeadResult result = {0, kl.data, nullptr, nullptr, slope.defined() ? slope.data : nullptr};
  run_head(kernel, in, hidden_ref, nullptr, reverse, result, threads);
}

}  // namespace kf::cpu
