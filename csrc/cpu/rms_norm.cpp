#include "rms_norm.h"

#include "by_rows.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

void check_weight(const TensorView& weight, int64_t d, DType dtype) {
  require(weight.ndim == 1 && weight.shape[0] == d && (d <= 1 || weight.stride[0] == 1),
          "weight must be a contiguous vector [d]");
  require(weight.dtype == dtype || weight.dtype == DType::f32, "weight must be float32 or of the dtype of x");
}

}  // namespace

void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, bool round_first,
              int threads, const TensorView& rstd) {
  check_result(out);
  const int64_t rows = out.shape[0], d = out.shape[1];
  check_rows(x, "x", rows, d);
  require(x.dtype == out.dtype, "x must have the dtype of out");
  check_weight(weight, d, out.dtype);
  if (rstd.defined()) check_vector(rstd, "rstd", rows, DType::f32);
  if (rows == 0 || d == 0) return;
  const RmsNormCall call = {x.data,       x.stride[0], out.data, out.dtype,   weight.data,
                            weight.dtype, d,           eps,      round_first, static_cast<float*>(rstd.data)};
  const KernelTable& table = active_table();
  run_by_rows(rows, d, threads, [&](int64_t first, int64_t last) { table.rms_norm(call, first, last); });
}

void rms_norm_backward(const TensorView& out, const TensorView& grad, const TensorView& x, const TensorView& weight,
                       const TensorView& rstd, int threads) {
  check_result(out);
  const int64_t rows = out.shape[0], d = out.shape[1];
  check_rows(grad, "grad", rows, d);
  check_rows(x, "x", rows, d);
  require(x.dtype == out.dtype && grad.dtype == out.dtype, "grad and x must have the dtype of out");
  check_weight(weight, d, out.dtype);
  check_vector(rstd, "rstd", rows, DType::f32);
  if (rows == 0 || d == 0) return;
  const RmsNormBackwardCall call = {grad.data,
                                    grad.stride[0],
                                    x.data,
                                    x.stride[0],
                                    out.data,
                                    out.dtype,
                                    weight.data,
                                    weight.dtype,
                                    static_cast<const float*>(rstd.data),
                                    d};
  const KernelTable& table = active_table();
  run_by_rows(rows, d, threads, [&](int64_t first, int64_t last) { table.rms_norm_backward(call, first, last); });
}

}  // namespace kf::cpu
