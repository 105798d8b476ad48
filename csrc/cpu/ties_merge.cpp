#include "ties_merge.h"

#include "by_rows.h"
#include "size_selection.h"

namespace kf::cpu {
namespace {

constexpr int64_t CHUNK = 1 << 16;  // entries merged by one task

}  // namespace

bool ties_merge(const TensorView& out, const TensorView& base, const TensorView& memories,
                const std::vector<double>& coefficients, int64_t count, int threads) {
  check_floats(out, "out");
  check_floats(base, "base");
  check_floats(memories, "memories");
  const int64_t n = base.shape[0], m = memories.shape[0];
  check_vector(base, "base", n, base.dtype);
  check_vector(out, "out", n, out.dtype);
  require(memories.ndim == 2 && memories.shape[1] == n && (n <= 1 || memories.stride[1] == 1),
          "memories must be [M, n] with contiguous rows");
  require(m >= 1 && m <= MOST_MEMORIES && int64_t(coefficients.size()) == m,
          "there must be 1 to 16 memories, and a coefficient for each");
  const bool wide = base.dtype == DType::f64;
  require((out.dtype == DType::f64) == wide && (memories.dtype == DType::f64) == wide,
          "out, base and memories must all be float64, or none");
  require(count >= 0 && count <= n, "count must be from 0 to the entries of base");
  if (n == 0) return true;
  MergeCall call = {};
  call.base = base.data;
  call.base_dtype = base.dtype;
  call.memory_dtype = memories.dtype;
  call.out = out.data;
  call.out_dtype = out.dtype;
  call.memories = int(m);
  for (int64_t i = 0; i < m; ++i) {
    const void* memory = static_cast<const char*>(memories.data) + i * memories.stride[0] * item_size(memories.dtype);
    const SizeSource source = {memory, memories.dtype, base.data, base.dtype, n, SizeKind::difference};
    const Selection selection = select_size(source, count > 0 ? count : 1, threads);
    if (selection.largest >= infinity_key(source)) return false;
    MergeCall::Memory& part = call.of[i];
    part.data = memory;
    part.coefficient = coefficients[i];
    part.bound = count > 0 ? selection.key : infinity_key(source);
    part.last_equal = n;
    const int64_t room = count - selection.above;
    if (count > 0 && selection.key > 0 && room < selection.equal) {
      part.last_equal = position_of_equal(source, selection.key, room);
    }
  }
  const KernelTable& table = active_table();
  const int members = worthwhile_threads(double(n) * double(m), 1 << 16, threads);
  Counter next;
  run_team(members, [&](int, Team&) {
    for (int64_t t; (t = next.take()) * CHUNK < n;) table.ties_merge(call, t * CHUNK, std::min(n, (t + 1) * CHUNK));
  });
  return true;
}

}  // namespace kf::cpu
