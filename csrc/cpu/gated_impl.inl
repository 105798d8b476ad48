// Gated activations and their gradients for the vectors of one instruction set: arithmetic in fp32, storage in fp32,
// bf16 or fp16.

// Both activations are x sigmoid(z): silu with z = x, and gelu in its tanh form with z = 2 sqrt(2 / pi) (x + a x^3),
// because 1 + tanh(z / 2) = 2 sigmoid(z).
struct Silu {
  static Vec<float> z(Vec<float> x) { return x; }
  static Vec<float> dz(Vec<float>) { return Vec<float>{} + 1.0f; }
};

struct GeluTanh {
  static constexpr float linear = 1.5957691216057308f, cubic = 1.5957691216057308f * 0.044715f;
  static Vec<float> z(Vec<float> x) { return x * (x * x * cubic + linear); }
  static Vec<float> dz(Vec<float> x) { return x * x * (3 * cubic) + linear; }
};

template <class Activation>
struct GatedBody {
  static constexpr int W = LANES<float>;

  // e^-z, of z in [-88, 87].
  static inline __attribute__((always_inline)) Vec<float> decline(Vec<float> z) {
    const Vec<float> minus = -z;
    Vec<float> exponent = minus > 88.0f ? Vec<float>{} + 88.0f : minus;
    exponent = exponent > -87.0f ? exponent : Vec<float>{} - 87.0f;
    return exp_vector(exponent);
  }

  // NaN stays NaN: it is divided by a number.
  static inline __attribute__((always_inline)) Vec<float> active(Vec<float> x) {
    const Vec<float> z = Activation::z(x);
    const Vec<float> value = x / (decline(z) + 1.0f);
    return z < -88.0f ? x * 0.0f : value;  // -0, and NaN of minus infinity, as torch has it
  }

  // The activation and its derivative s + x z' s (1 - s), whose second term is nothing where sigmoid s is 0 or 1.
  static inline __attribute__((always_inline)) void with_slope(Vec<float> x, Vec<float>* value, Vec<float>* slope) {
    const Vec<float> z = Activation::z(x), e = decline(z);
    const Vec<float> s = 1.0f / (e + 1.0f);
    const Vec<float> bend = x * Activation::dz(x) * s * (e * s), none = x * 0.0f;
    *value = z < -88.0f ? none : x * s;
    *slope = z < -88.0f ? none : s + (z > 87.0f ? none : bend);
  }

  template <class S>
  static void rows_as(const GatedCall& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const S* gate = static_cast<const S*>(call.gate) + row * call.gate_stride;
      const S* up = static_cast<const S*>(call.up) + row * call.up_stride;
      S* out = static_cast<S*>(call.out) + row * call.d;
      int64_t j = 0;
      for (; j + W <= call.d; j += W) {
        store_vector(out + j, rounded(gate, active(load_vector(gate + j))) * load_vector(up + j));
      }
      if (const int64_t rest = call.d - j; rest > 0) {
        const Vec<float> opened = rounded(gate, active(load_part(gate + j, rest)));
        store_part(out + j, opened * load_part(up + j, rest), rest);
      }
    }
  }

  template <class S>
  static void slopes_as(const GatedBackwardCall& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const S* grad = static_cast<const S*>(call.grad) + row * call.grad_stride;
      const S* gate = static_cast<const S*>(call.gate) + row * call.gate_stride;
      const S* up = static_cast<const S*>(call.up) + row * call.up_stride;
      S* d_gate = static_cast<S*>(call.d_gate) + row * call.d;
      S* d_up = static_cast<S*>(call.d_up) + row * call.d;
      Vec<float> value, slope;
      int64_t j = 0;
      for (; j + W <= call.d; j += W) {
        const Vec<float> g = load_vector(grad + j);
        with_slope(load_vector(gate + j), &value, &slope);
        store_vector(d_gate + j, g * load_vector(up + j) * slope);
        store_vector(d_up + j, g * rounded(gate, value));
      }
      if (const int64_t rest = call.d - j; rest > 0) {
        const Vec<float> g = load_part(grad + j, rest);
        with_slope(load_part(gate + j, rest), &value, &slope);
        store_part(d_gate + j, g * load_part(up + j, rest) * slope, rest);
        store_part(d_up + j, g * rounded(gate, value), rest);
      }
    }
  }

  static void rows(const GatedCall& call, int64_t first, int64_t last) {
    switch (call.dtype) {
      case DType::f32: return rows_as<float>(call, first, last);
      case DType::bf16: return rows_as<Bf16>(call, first, last);
      default: return rows_as<F16>(call, first, last);
    }
  }

  static void slopes(const GatedBackwardCall& call, int64_t first, int64_t last) {
    switch (call.dtype) {
      case DType::f32: return slopes_as<float>(call, first, last);
      case DType::bf16: return slopes_as<Bf16>(call, first, last);
      default: return slopes_as<F16>(call, first, last);
    }
  }
};

struct GatedBodies {
  static void rows(const GatedCall& call, int64_t first, int64_t last) {
    if (call.activation == Gate::silu) return GatedBody<Silu>::rows(call, first, last);
    return GatedBody<GeluTanh>::rows(call, first, last);
  }
  static void slopes(const GatedBackwardCall& call, int64_t first, int64_t last) {
    if (call.activation == Gate::silu) return GatedBody<Silu>::slopes(call, first, last);
    return GatedBody<GeluTanh>::slopes(call, first, last);
  }
};
