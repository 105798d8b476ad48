#include "magnitude_bound.h"

#include <cstring>
#include <limits>

#include "by_rows.h"
#include "size_selection.h"

namespace kf::cpu {

void magnitude_bound(const TensorView& out, const TensorView& x, const TensorView& divisor, int64_t count,
                     int threads) {
  check_floats(x, "x");
  const int64_t n = x.shape[0];
  const bool wide = x.dtype == DType::f64;
  check_vector(x, "x", n, x.dtype);
  check_vector(out, "out", 1, wide ? DType::f64 : DType::f32);
  require(count >= 1 && count <= n, "count must be from 1 to the entries of x");
  SizeSource source = {x.data, x.dtype, nullptr, x.dtype, n, SizeKind::plain};
  if (divisor.defined()) {
    check_floats(divisor, "divisor");
    check_vector(divisor, "divisor", n, divisor.dtype);
    require((divisor.dtype == DType::f64) == wide, "divisor must be float64 where x is, and only there");
    source = {x.data, x.dtype, divisor.data, divisor.dtype, n, SizeKind::quotient};
  }
  const Selection selection = select_size(source, count, threads);
  const bool nan = selection.largest > infinity_key(source);
  if (wide) {
    double value;
    std::memcpy(&value, &selection.key, 8);
    *static_cast<double*>(out.data) = nan ? std::numeric_limits<double>::quiet_NaN() : value;
  } else {
    const auto bits = static_cast<uint32_t>(selection.key);
    float value;
    std::memcpy(&value, &bits, 4);
    *static_cast<float*>(out.data) = nan ? std::numeric_limits<float>::quiet_NaN() : value;
  }
}

}  // namespace kf::cpu
