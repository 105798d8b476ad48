// rms_norm for the vectors of one instruction set: arithmetic in fp32, storage in fp32, bf16 or fp16.

struct RmsNormBody {
  static constexpr int W = LANES<float>;

  template <class S>
  static double sum_of_squares(const S* x, int64_t d) {
    Vec<float> sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= d; j += 4 * W) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec<float> here = load_vector(x + j + v * W);
        sums[v] += here * here;
      }
    }
    for (; j < d; j += W) {
      const Vec<float> here = d - j < W ? load_part(x + j, d - j) : load_vector(x + j);
      sums[0] += here * here;
    }
    const Vec<float> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int i = 0; i < W; ++i) total += all[i];
    return total;
  }

  template <class S, class T>
  static void rows_as(const RmsNormCall& call, int64_t first, int64_t last) {
    const int64_t d = call.d;
    const T* weight = static_cast<const T*>(call.weight);
    for (int64_t row = first; row < last; ++row) {
      const S* x = static_cast<const S*>(call.x) + row * call.row_stride;
      S* out = static_cast<S*>(call.out) + row * d;
      const float scale = float(1.0 / __builtin_sqrt(sum_of_squares(x, d) / double(d) + call.eps));
      if (call.rstd != nullptr) call.rstd[row] = scale;
      int64_t j = 0;
      for (; j + W <= d; j += W) {
        Vec<float> v = load_vector(x + j) * scale;
        if (call.round_first) v = rounded(x, v);
        store_vector(out + j, v * load_vector(weight + j));
      }
      if (j < d) {
        Vec<float> v = load_part(x + j, d - j) * scale;
        if (call.round_first) v = rounded(x, v);
        store_part(out + j, v * load_part(weight + j, d - j), d - j);
      }
    }
  }

  static void rows(const RmsNormCall& call, int64_t first, int64_t last) {
    const bool wide = call.weight_dtype == DType::f32;
    switch (call.dtype) {
      case DType::f32: return rows_as<float, float>(call, first, last);
      case DType::bf16: return wide ? rows_as<Bf16, float>(call, first, last) : rows_as<Bf16, Bf16>(call, first, last);
      default: return wide ? rows_as<F16, float>(call, first, last) : rows_as<F16, F16>(call, first, last);
    }
  }

  // The sum of grad * weight * x over a row, in the order of sum_of_squares.
  template <class S, class T>
  static double weighted_sum(const S* grad, const T* weight, const S* x, int64_t d) {
    Vec<float> sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= d; j += 4 * W) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t at = j + v * W;
        sums[v] += load_vector(grad + at) * load_vector(weight + at) * load_vector(x + at);
      }
    }
    for (; j + W <= d; j += W) sums[0] += load_vector(grad + j) * load_vector(weight + j) * load_vector(x + j);
    if (const int64_t rest = d - j; rest > 0) {
      sums[1] += load_part(grad + j, rest) * load_part(weight + j, rest) * load_part(x + j, rest);
    }
    const Vec<float> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int i = 0; i < W; ++i) total += all[i];
    return total;
  }

  // With r = rstd: d x = r grad weight - x r^3 mean(grad weight x).
  template <class S, class T>
  static void slopes_as(const RmsNormBackwardCall& call, int64_t first, int64_t last) {
    const int64_t d = call.d;
    const T* weight = static_cast<const T*>(call.weight);
    for (int64_t row = first; row < last; ++row) {
      const S* grad = static_cast<const S*>(call.grad) + row * call.grad_stride;
      const S* x = static_cast<const S*>(call.x) + row * call.x_stride;
      S* out = static_cast<S*>(call.out) + row * d;
      const double wide = call.rstd[row];
      const float scale = call.rstd[row];
      const float back = float(wide * wide * wide * weighted_sum(grad, weight, x, d) / double(d));
      int64_t j = 0;
      for (; j + W <= d; j += W) {
        const Vec<float> straight = load_vector(grad + j) * load_vector(weight + j) * scale;
        store_vector(out + j, straight - load_vector(x + j) * back);
      }
      if (const int64_t rest = d - j; rest > 0) {
        const Vec<float> straight = load_part(grad + j, rest) * load_part(weight + j, rest) * scale;
        store_part(out + j, straight - load_part(x + j, rest) * back, rest);
      }
    }
  }

  static void slopes(const RmsNormBackwardCall& call, int64_t first, int64_t last) {
    const bool wide = call.weight_dtype == DType::f32;
    switch (call.dtype) {
      case DType::f32: return slopes_as<float, float>(call, first, last);
      case DType::bf16:
        return wide ? slopes_as<Bf16, float>(call, first, last) : slopes_as<Bf16, Bf16>(call, first, last);
      default: return wide ? slopes_as<F16, float>(call, first, last) : slopes_as<F16, F16>(call, first, last);
    }
  }
};
