#include "gated_silu.h"

#include "by_rows.h"
#include "kernel_table.h"

namespace kf::cpu {

void gated_silu(const TensorView& out, const TensorView& gate, const TensorView& up, int threads) {
  check_result(out);
  const int64_t rows = out.shape[0], d = out.shape[1];
  check_rows(gate, "gate", rows, d);
  check_rows(up, "up", rows, d);
  require(gate.dtype == out.dtype && up.dtype == out.dtype, "gate and up must have the dtype of out");
  if (rows == 0 || d == 0) return;
  const GatedSiluCall call = {gate.data, gate.stride[0], up.data, up.stride[0], out.data, out.dtype, d};
  const KernelTable& table = active_table();
  run_by_rows(rows, d, threads, [&](int64_t first, int64_t last) { table.gated_silu(call, first, last); });
}

}  // namespace kf::cpu
