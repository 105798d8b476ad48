#include "gated.h"

#include "by_rows.h"

namespace kf::cpu {

void gated(Gate activation, const TensorView& out, const TensorView& gate, const TensorView& up, int threads) {
  check_result(out);
  const int64_t rows = out.shape[0], d = out.shape[1];
  check_rows(gate, "gate", rows, d);
  check_rows(up, "up", rows, d);
  require(gate.dtype == out.dtype && up.dtype == out.dtype, "gate and up must have the dtype of out");
  if (rows == 0 || d == 0) return;
  const GatedCall call = {gate.data, gate.stride[0], up.data, up.stride[0], out.data, out.dtype, d, activation};
  const KernelTable& table = active_table();
  run_by_rows(rows, d, threads, [&](int64_t first, int64_t last) { table.gated(call, first, last); });
}

void gated_backward(Gate activation, const TensorView& d_gate, const TensorView& d_up, const TensorView& grad,
                    const TensorView& gate, const TensorView& up, int threads) {
  check_result(d_gate);
  check_result(d_up);
  const int64_t rows = d_gate.shape[0], d = d_gate.shape[1];
  check_rows(d_up, "d_up", rows, d);
  check_rows(grad, "grad", rows, d);
  check_rows(gate, "gate", rows, d);
  check_rows(up, "up", rows, d);
  for (const TensorView* part : {&d_up, &grad, &gate, &up}) {
    require(part->dtype == d_gate.dtype, "d_up, grad, gate and up must have the dtype of d_gate");
  }
  if (rows == 0 || d == 0) return;
  const GatedBackwardCall call = {grad.data,    grad.stride[0], gate.data, gate.stride[0], up.data,
                                  up.stride[0], d_gate.data,    d_up.data, d_gate.dtype,   d,
                                  activation};
  const KernelTable& table = active_table();
  run_by_rows(rows, d, threads, [&](int64_t first, int64_t last) { table.gated_backward(call, first, last); });
}

}  // namespace kf::cpu
