// gated_silu for the vectors of one instruction set: arithmetic in fp32, storage in fp32, bf16 or fp16.

// exp of numbers in [-87, 88], to 2 ulp: e^x = 2^n e^r with |r| <= ln(2) / 2 and the polynomial of Cephes' expf
// (https://www.netlib.org/cephes/).
inline Vec<float> exp_vector(Vec<float> x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  const Vec<float> shifted = x * 1.44269504088896341f + shift;
  const Vec<float> n = shifted - shift;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecU32 scale = ((VecU32)shifted << 23) + 0x3f800000;
  return p * (Vec<float>)scale;
}

struct GatedSiluBody {
  static constexpr int W = LANES<float>;

  // NaN stays NaN: it is divided by a number.
  static Vec<float> silu(Vec<float> x) {
    const Vec<float> minus = -x;
    Vec<float> exponent = minus > 88.0f ? Vec<float>{} + 88.0f : minus;
    exponent = exponent > -87.0f ? exponent : Vec<float>{} - 87.0f;
    const Vec<float> value = x / (exp_vector(exponent) + 1.0f);
    return x < -88.0f ? x * 0.0f : value;  // -0, and NaN of minus infinity, as torch has it
  }

  template <class S>
  static void rows_as(const GatedSiluCall& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const S* gate = static_cast<const S*>(call.gate) + row * call.gate_stride;
      const S* up = static_cast<const S*>(call.up) + row * call.up_stride;
      S* out = static_cast<S*>(call.out) + row * call.d;
      int64_t j = 0;
      for (; j + W <= call.d; j += W) {
        store_vector(out + j, rounded(gate, silu(load_vector(gate + j))) * load_vector(up + j));
      }
      if (const int64_t rest = call.d - j; rest > 0) {
        const Vec<float> active = rounded(gate, silu(load_part(gate + j, rest)));
        store_part(out + j, active * load_part(up + j, rest), rest);
      }
    }
  }

  static void rows(const GatedSiluCall& call, int64_t first, int64_t last) {
    switch (call.dtype) {
      case DType::f32: return rows_as<float>(call, first, last);
      case DType::bf16: return rows_as<Bf16>(call, first, last);
      default: return rows_as<F16>(call, first, last);
    }
  }
};
