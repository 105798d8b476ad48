// Vectors of the instruction set being compiled, as GCC/Clang vector types, and exact conversions to and from them.
// Included by isa_*.cpp inside an anonymous namespace; KF_VECTOR_BYTES is 16, 32 or 64.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(KF_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int LANES = KF_VECTOR_BYTES / sizeof(T);

typedef uint32_t VecU32 __attribute__((vector_size(KF_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(KF_VECTOR_BYTES / 2)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float v) { return v; }
inline float to_float(Bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float to_float(F16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(KF_NEON)
  __fp16 half;
  __builtin_memcpy(&half, &v.bits, 2);
  return float(half);
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1f, fraction = v.bits & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = float(fraction) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}
inline double to_double(double v) { return v; }
template <class T>
inline double to_double(T v) {
  return to_float(v);
}

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, Bf16* out) {
  const uint32_t u = float_to_bits(v);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float v, F16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(v, 0);
#elif defined(KF_NEON)
  const __fp16 half = __fp16(v);
  __builtin_memcpy(&out->bits, &half, 2);
#else
  const uint32_t u = float_to_bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, rounded by adding 0.5
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  }
#endif
}
inline void from_double(double v, double* out) { *out = v; }

// Numbers of arithmetic type T (float or double) from and to storage type S.
template <class T, class S>
inline T widen(S v) {
  if constexpr (sizeof(T) == 8) return to_double(v);
  else return to_float(v);
}
template <class T, class S>
inline void narrow(T v, S* out) {
  if constexpr (sizeof(T) == 8) from_double(v, out);
  else from_float(v, out);
}

template <class V, class P>
inline V load_unaligned(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P>
inline void store_unaligned(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline Vec<float> load_vector(const float* p) { return load_unaligned<Vec<float>>(p); }
inline Vec<double> load_vector(const double* p) { return load_unaligned<Vec<double>>(p); }
inline Vec<float> load_vector(const Bf16* p) {
  const VecU32 wide = __builtin_convertvector(load_unaligned<VecU16>(p), VecU32) << 16;
  return (Vec<float>)wide;
}
inline Vec<float> load_vector(const F16* p) {
#if KF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif KF_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(KF_NEON)
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  Vec<float> v;
  for (int i = 0; i < LANES<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store_vector(float* p, Vec<float> v) { store_unaligned(p, v); }
inline void store_vector(double* p, Vec<double> v) { store_unaligned(p, v); }
// The nearest bf16 numbers, in the upper halves; the lower halves are not cleared.
inline VecU32 nearest_bf16(Vec<float> v) {
  const VecU32 u = (VecU32)v;
  const VecU32 rounded = u + 0x7fff + ((u >> 16) & 1);
  return v == v ? rounded : VecU32{} + 0x7fc00000;
}
inline void store_vector(Bf16* p, Vec<float> v) {
  store_unaligned(p, __builtin_convertvector(nearest_bf16(v) >> 16, VecU16));
}
inline void store_vector(F16* p, Vec<float> v) {
#if KF_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif KF_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(KF_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < LANES<float>; ++i) from_float(v[i], p + i);
#endif
}

// Two vectors side by side.
template <class S, class V>
inline void store_pair(S* p, V a, V b) {
  store_vector(p, a);
  store_vector(p + sizeof(V) / sizeof(a[0]), b);
}
#if KF_VECTOR_BYTES == 64
inline void store_pair(Bf16* p, Vec<float> a, Vec<float> b) {
  alignas(64) static constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  store_unaligned(
      p, _mm512_permutex2var_epi16((__m512i)nearest_bf16(a), _mm512_load_si512(UPPER), (__m512i)nearest_bf16(b)));
}
#endif

// fp32 numbers rounded to the dtype of the pointer.
inline Vec<float> rounded(const float*, Vec<float> v) { return v; }
inline Vec<float> rounded(const Bf16*, Vec<float> v) { return (Vec<float>)(nearest_bf16(v) & 0xffff0000); }
inline Vec<float> rounded(const F16*, Vec<float> v) {
  F16 stored[LANES<float>];
  store_vector(stored, v);
  return load_vector(stored);
}

// The first `count` numbers of a vector; the others are zeros.
template <class S>
inline Vec<float> load_part(const S* p, int64_t count) {
  S part[LANES<float>] = {};
  __builtin_memcpy(part, p, count * sizeof(S));
  return load_vector(part);
}
template <class S>
inline void store_part(S* p, Vec<float> v, int64_t count) {
  S part[LANES<float>];
  store_vector(part, v);
  __builtin_memcpy(p, part, count * sizeof(S));
}

// exp of numbers in [-87, 88], to 2 ulp: e^x = 2^n e^r with |r| <= ln(2) / 2 and the polynomial of Cephes' expf
// (https://www.netlib.org/cephes/).
inline __attribute__((always_inline)) Vec<float> exp_vector(Vec<float> x) {
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

// Left panel [k, MR] times right panel [k, NR]: write(i, sums) is called for each row of the product, whose NR numbers
// are still in registers.
template <class T, int MR, int NR, class Write>
inline __attribute__((always_inline)) void multiply_panels_to(const T* __restrict left, const T* __restrict right,
                                                              int64_t k, const Write& write) {
  constexpr int columns = NR / LANES<T>;
  Vec<T> sum[MR][columns] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> b[columns];
#pragma GCC unroll 4
    for (int v = 0; v < columns; ++v) b[v] = load_vector(right + p * NR + v * LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T a = left[p * MR + i];
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) sum[i][v] += a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) write(i, sum[i]);
}

// tile [MR, NR] (row-major) = left panel [k, MR] times right panel [k, NR].
template <class T, int MR, int NR>
inline void multiply_panels(const T* __restrict left, const T* __restrict right, int64_t k, T* __restrict tile) {
  constexpr int columns = NR / LANES<T>;
  multiply_panels_to<T, MR, NR>(left, right, k, [tile](int i, const Vec<T>(&sums)[columns]) {
#pragma GCC unroll 4
    for (int v = 0; v < columns; ++v) store_vector(tile + i * NR + v * LANES<T>, sums[v]);
  });
}

#if KF_VECTOR_BYTES == 64
constexpr int TILE_ROWS = 14;
#elif KF_VECTOR_BYTES == 32
constexpr int TILE_ROWS = 6;
#elif defined(KF_NEON)
constexpr int TILE_ROWS = 12;  // 24 sums in 32 registers
#else
constexpr int TILE_ROWS = 4;
#endif
template <class T>
constexpr int TILE_COLUMNS = 2 * LANES<T>;

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }
