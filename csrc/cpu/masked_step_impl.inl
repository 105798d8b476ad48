// One step of descent or of Adam on chosen entries of a matrix, for fp32 and fp64 on the vectors of one instruction
// set.

inline Vec<float> sqrt_vector(Vec<float> v) {
#if KF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif KF_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(KF_NEON)
  return (Vec<float>)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < LANES<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
inline Vec<double> sqrt_vector(Vec<double> v) {
#if KF_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif KF_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(KF_NEON)
  return (Vec<double>)vsqrtq_f64((float64x2_t)v);
#else
  for (int i = 0; i < LANES<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// The sum of all lanes: halves are added until one number is left.
template <class T>
inline T sum_lanes(Vec<T> v) {
  typedef T Quarter __attribute__((vector_size(16)));
  Quarter part[KF_VECTOR_BYTES / 16];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int step = KF_VECTOR_BYTES / 32; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  }
  if constexpr (sizeof(T) == 8) return part[0][0] + part[0][1];
  else return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

template <class T>
struct MaskedStepBody {
  using Mask = decltype(Vec<T>{} < Vec<T>{});
  static constexpr int W = LANES<T>, MR = TILE_ROWS, NR = TILE_COLUMNS<T>;
  static constexpr int64_t CHUNK = 128;  // columns of a row that are stepped together
  static_assert(CHUNK % NR == 0, "tiles fill a chunk");
  static constexpr int64_t RUN = 2048;  // of a row whose numbers are all where they can be used
  static constexpr int64_t FURTHER = 1024 / sizeof(T);
  static constexpr int64_t AHEAD = 2;                     // rows that are asked for before they are stepped
  static constexpr int DOT_ROWS = 16;                     // rows of left whose products with a column share its loads
  static constexpr int64_t DOT_DEPTH = 1536 / sizeof(T);  // of DOT_ROWS rows in the first-level cache
  static constexpr int DOTS = 6;                          // computed at once

  template <class S>
  static void gather(const S* from, int64_t stride, int64_t n, T* to) {
    int64_t e = 0;
    if constexpr (sizeof(T) == 4) {
      if (stride == 1) {
        for (; e + W <= n; e += W) store_vector(to + e, load_vector(from + e));
      }
    }
    for (; e < n; ++e) to[e] = widen<T>(from[e * stride]);
  }
  static void gather(const double* from, int64_t stride, int64_t n, T* to) {
    int64_t e = 0;
    for (; e < n; ++e) to[e] = T(from[e * stride]);
  }

  static bool is_plain(const StepMatrix& m) {
    return m.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && m.column_stride == 1;
  }
  static bool in_place(const StepMatrix& m, int64_t n) { return n % W == 0 && is_plain(m); }

  // n numbers of row i from column j on, where they are or in `buffer`.
  static const T* read_any(const StepMatrix& m, int64_t i, int64_t j, int64_t n, T* buffer) {
    const int64_t at = i * m.row_stride + j * m.column_stride;
    if (is_plain(m)) return static_cast<const T*>(m.data) + at;
    copy_to(m, at, n, buffer);
    return buffer;
  }
  // The same, and filled up to a vector with zeros.
  static const T* read(const StepMatrix& m, int64_t i, int64_t j, int64_t n, T* buffer) {
    const int64_t at = i * m.row_stride + j * m.column_stride;
    if (in_place(m, n)) return static_cast<const T*>(m.data) + at;
    copy_to(m, at, n, buffer);
    for (int64_t e = n; e % W; ++e) buffer[e] = 0;
    return buffer;
  }
  static void copy_to(const StepMatrix& m, int64_t at, int64_t n, T* buffer) {
    switch (m.dtype) {
      case DType::f64: gather(static_cast<const double*>(m.data) + at, m.column_stride, n, buffer); break;
      case DType::f32: gather(static_cast<const float*>(m.data) + at, m.column_stride, n, buffer); break;
      case DType::bf16: gather(static_cast<const Bf16*>(m.data) + at, m.column_stride, n, buffer); break;
      default: gather(static_cast<const F16*>(m.data) + at, m.column_stride, n, buffer); break;
    }
  }

  // The counterpart of `read` for a matrix of T that is written: numbers in `buffer` go back.
  static void write(const StepMatrix& m, int64_t i, int64_t j, int64_t n, const T* numbers) {
    if (in_place(m, n)) return;
    T* to = static_cast<T*>(m.data) + i * m.row_stride + j * m.column_stride;
    for (int64_t e = 0; e < n; ++e) to[e * m.column_stride] = numbers[e];
  }

  template <class S>
  static void write_copy(const StepMatrix& m, int64_t i, int64_t j, int64_t n, const T* numbers) {
    if constexpr (sizeof(T) == 4) {
      S* to = static_cast<S*>(m.data) + i * m.row_stride + j * m.column_stride;
      int64_t e = 0;
      if (m.column_stride == 1) {
        for (; e + W <= n; e += W) store_vector(to + e, load_vector(numbers + e));
      }
      for (; e < n; ++e) from_float(numbers[e], to + e * m.column_stride);
    }
  }

  // At least 16 bits from `bit` on; zeros past the end.
  static uint32_t bits_at(const StepCall& c, int64_t bit) {
    const int64_t byte = bit >> 3;
    uint32_t word = 0;
    if (byte + 4 <= c.entry_bytes) {
      __builtin_memcpy(&word, c.entries + byte, 4);
    } else {
      for (int64_t b = 0; byte + b < c.entry_bytes && b < 4; ++b) word |= uint32_t(c.entries[byte + b]) << (8 * b);
    }
    return word >> (bit & 7);
  }
  static bool bit_of(const StepCall& c, int64_t bit) { return (c.entries[bit >> 3] >> (bit & 7)) & 1; }

  // The bits of row i from column j on, a lane each: all ones where they are set.
  static void expand(const StepCall& c, int64_t i, int64_t j, int64_t n, Mask* out) {
    const int64_t first = i * c.bit_row + j * c.bit_column;
    Mask lane = {};
    for (int l = 0; l < W; ++l) lane[l] = 1 << l;
    for (int64_t e = 0; e < n; e += W) {
      if (c.bit_column == 1) {
        out[e / W] = ((Mask{} + int(bits_at(c, first + e) & 0xffff)) & lane) != 0;
      } else {
        for (int l = 0; l < W; ++l) {
          out[e / W][l] = e + l < n && bit_of(c, first + (e + l) * c.bit_column) ? -1 : 0;
        }
      }
    }
  }

  // Steps n numbers of row i from column j on; `slope` holds their gradients. Whether all were finite before the box.
  template <bool ADAM, bool RUNS>
  static bool step_row(const StepCall& c, const T* slope, int64_t i, int64_t j, int64_t n) {
    alignas(64) T buffer[4][CHUNK];
    alignas(64) Mask chosen[(RUNS ? RUN : CHUNK) / W];
    T* weight = const_cast<T*>(read(c.weight, i, j, n, buffer[0]));
    const T* origin = c.boxed ? read(c.origin, i, j, n, buffer[1]) : nullptr;
    T* mean = ADAM ? const_cast<T*>(read(c.mean, i, j, n, buffer[2])) : nullptr;
    T* square = ADAM ? const_cast<T*>(read(c.square, i, j, n, buffer[3])) : nullptr;
    if (c.entries) expand(c, i, j, n, chosen);
    const T lr = T(c.lr), decay = T(c.decay), bound = T(c.bound), root = T(c.root), eps = T(c.eps);
    const T beta1 = T(c.beta1), rest1 = T(1 - c.beta1), beta2 = T(c.beta2), rest2 = T(1 - c.beta2);
    const bool masked = c.entries, decays = c.decay != 0, active = c.active;
    Vec<T> zeros = {};
    Mask lane = {};
    for (int l = 0; l < W; ++l) lane[l] = l;
    for (int64_t e = 0; e < n; e += W) {
      if (RUNS) {  // over the ends of pages, where the hardware stops
        __builtin_prefetch(weight + e + FURTHER);
        if (origin) __builtin_prefetch(origin + e + FURTHER);
        if (active) __builtin_prefetch(slope + e + FURTHER);
        if (ADAM) {
          __builtin_prefetch(mean + e + FURTHER);
          __builtin_prefetch(square + e + FURTHER);
        }
      }
      const Vec<T> w = load_vector(weight + e);
      Vec<T> moved = w;
      if (active) {
        Vec<T> g = load_vector(slope + e);
        if constexpr (ADAM) {
          if (masked) g = chosen[e / W] ? g : Vec<T>{};
          const Vec<T> m = beta1 * load_vector(mean + e) + rest1 * g;
          const Vec<T> v = beta2 * load_vector(square + e) + rest2 * g * g;
          store_vector(mean + e, m);
          store_vector(square + e, v);
          moved = w - lr * m / (sqrt_vector(v) * root + eps);
        } else {
          const Vec<T> shrunk = decays ? decay * w : Vec<T>{};
          if (decays) g += shrunk;
          if (masked) g = chosen[e / W] ? g : c.decay_all ? shrunk : Vec<T>{};
          moved = w - lr * g;
        }
      }
      Vec<T> zero = moved * T(0);  // NaN where a number is not finite
      if (e + W > n) zero = lane < (Mask{} + int(n - e)) ? zero : Vec<T>{};
      zeros += zero;
      if (origin) {
        const Vec<T> o = load_vector(origin + e), low = o - bound, high = o + bound;
        moved = moved < low ? low : moved;  // no comparison holds for a NaN
        moved = moved > high ? high : moved;
        moved = o == o ? moved : o;
      }
      store_vector(weight + e, moved);
    }
    write(c.weight, i, j, n, weight);
    if (ADAM && active) {
      write(c.mean, i, j, n, mean);
      write(c.square, i, j, n, square);
    }
    if (c.copy.data && c.copy.dtype == DType::bf16) write_copy<Bf16>(c.copy, i, j, n, weight);
    if (c.copy.data && c.copy.dtype == DType::f16) write_copy<F16>(c.copy, i, j, n, weight);
    return sum_lanes<T>(zeros) == 0;
  }
  template <bool RUNS>
  static bool step(const StepCall& c, const T* slope, int64_t i, int64_t j, int64_t n) {
    return c.adam ? step_row<true, RUNS>(c, slope, i, j, n) : step_row<false, RUNS>(c, slope, i, j, n);
  }

  // Asks for n numbers of row i from column j on.
  static void prefetch(const StepMatrix& m, int64_t i, int64_t j, int64_t n) {
    if (!m.data || m.column_stride != 1) return;
    const int64_t item = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
    const char* from = static_cast<const char*>(m.data) + (i * m.row_stride + j) * item;
    for (int64_t byte = 0; byte < n * item; byte += 64) __builtin_prefetch(from + byte);
  }
  static void prefetch(const StepCall& c, int64_t i, int64_t j, int64_t n) {
    prefetch(c.weight, i, j, n);
    if (c.boxed) prefetch(c.origin, i, j, n);
    prefetch(c.mean, i, j, n);
    prefetch(c.square, i, j, n);
  }

  // From a gradient that is there, or none where the step is not active.
  static bool rows(const StepCall& c, const BlockRange& range) {
    alignas(64) T buffer[CHUNK];
    bool finite = true, plain = true;
    for (const StepMatrix* m : {&c.weight, &c.mean, &c.square, &c.grad, &c.origin}) {
      plain = plain && (!m->data || is_plain(*m));
    }
    for (int64_t i = range.i0; i < range.i1; ++i) {
      for (int64_t j = range.j0, n; j < range.j1; j += n) {
        const int64_t rest = range.j1 - j;
        n = rest < CHUNK ? rest : CHUNK;
        if (plain && rest > CHUNK) n = rest < RUN ? rest / W * W : RUN;  // no buffer is needed
        const T* slope = c.active ? read(c.grad, i, j, n, buffer) : nullptr;
        finite &= step<true>(c, slope, i, j, n);
      }
    }
    return finite;
  }

  // Steps `count` rows of a chunk, asking for the rows to come: there are too many streams for the hardware to follow.
  static bool step_chunk(const StepCall& c, const T* slope, int64_t i, int64_t count, int64_t j, int64_t n) {
    bool finite = true;
    for (int64_t r = -AHEAD; r < count; ++r) {
      if (r + AHEAD < count) prefetch(c, i + r + AHEAD, j, n);
      if (r >= 0) finite &= step<false>(c, slope + r * CHUNK, i + r, j, n);
    }
    return finite;
  }

  // The gradients of all entries, by tiles.
  static bool dense_block(const void* left, const void* right, int64_t k, const BlockRange& range, const StepCall& c) {
    alignas(64) T tile[MR * NR];
    alignas(64) T slope[MR * CHUNK];
    const T* a = static_cast<const T*>(left);
    const T* b = static_cast<const T*>(right);
    bool finite = true;
    for (int64_t j = range.j0; j < range.j1; j += CHUNK) {
      const int64_t n = range.j1 - j < CHUNK ? range.j1 - j : CHUNK;
      for (int64_t i = range.i0; i < range.i1; i += MR) {
        const int64_t count = range.i1 - i < MR ? range.i1 - i : MR;
        for (int64_t e = 0; e < n; e += NR) {
          RankKBody<T>::sum_products(a + (i - range.i0) * k, b + (j + e - range.j0) * k, k, tile);
          for (int64_t r = 0; r < count; ++r) __builtin_memcpy(slope + r * CHUNK + e, tile + r * NR, NR * sizeof(T));
        }
        finite &= step_chunk(c, slope, i, count, j, n);
      }
    }
    return finite;
  }
  static void dense_pack(const RankKFactor& f, int64_t first, int width, int64_t, void* out) {
    RankKBody<T>::pack(f, first, width, out);
  }

  // The gradients of chosen entries alone: dot products of rows of `depth` numbers, of which k are not padding.
  template <class S>
  static void pack_rows(const RankKFactor& f, int64_t first, int width, int64_t depth, T* out) {
    const int64_t count = f.rows - first < width ? f.rows - first : width;
    const S* data = static_cast<const S*>(f.data) + first * f.row_stride;
    for (int64_t p = 0; p < f.k; ++p) {
      for (int64_t r = 0; r < count; ++r) {
        if constexpr (sizeof(S) == 8) out[r * depth + p] = T(data[r * f.row_stride + p * f.k_stride]);
        else out[r * depth + p] = widen<T>(data[r * f.row_stride + p * f.k_stride]);
      }
    }
    for (int64_t r = 0; r < width; ++r) {
      for (int64_t p = r < count ? f.k : 0; p < depth; ++p) out[r * depth + p] = 0;
    }
  }
  static void sparse_pack(const RankKFactor& f, int64_t first, int width, int64_t depth, void* out) {
    T* to = static_cast<T*>(out);
    switch (f.dtype) {
      case DType::f64: return pack_rows<double>(f, first, width, depth, to);
      case DType::f32: return pack_rows<float>(f, first, width, depth, to);
      case DType::bf16: return pack_rows<Bf16>(f, first, width, depth, to);
      default: return pack_rows<F16>(f, first, width, depth, to);
    }
  }

  // Adds the products of one column with R rows, k numbers deep, a multiple of W.
  template <int R>
  static void add_dots(const T* left, const T* column, int64_t depth, int64_t k, const int* rows, T* slope) {
    constexpr int U = R <= 2 ? 4 : 2;  // sums of each, so that additions need not wait for one another
    const T* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = left + rows[r] * depth;
    Vec<T> sum[R][U] = {};
    int64_t p = 0;
    for (; p + U * W <= k; p += U * W) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec<T> b = load_vector(column + p + u * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][u] += load_vector(a[r] + p + u * W) * b;
      }
    }
    for (; p < k; p += W) {
      const Vec<T> b = load_vector(column + p);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][0] += load_vector(a[r] + p) * b;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<T> total = sum[r][0] + sum[r][1];
      if constexpr (U == 4) total += sum[r][2] + sum[r][3];
      slope[rows[r] * CHUNK] += sum_lanes<T>(total);
    }
  }

  // R of the `count` products of a column, and the others after them.
  template <int R>
  static void add_first(const T* left, const T* column, int64_t depth, int64_t k, int count, uint32_t chosen,
                        T* slope) {
    int rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, chosen &= chosen - 1) rows[r] = __builtin_ctz(chosen);
    add_dots<R>(left, column, depth, k, rows, slope);
    if (count > R) add_chosen(left, column, depth, k, count - R, chosen, slope);
  }
  static void add_chosen(const T* left, const T* column, int64_t depth, int64_t k, int count, uint32_t chosen,
                         T* slope) {
    switch (count) {
      case 1: return add_first<1>(left, column, depth, k, count, chosen, slope);
      case 2: return add_first<2>(left, column, depth, k, count, chosen, slope);
      case 3: return add_first<3>(left, column, depth, k, count, chosen, slope);
      case 4: return add_first<4>(left, column, depth, k, count, chosen, slope);
      case 5: return add_first<5>(left, column, depth, k, count, chosen, slope);
      default: return add_first<DOTS>(left, column, depth, k, count, chosen, slope);
    }
  }

  // Which of `count` rows from i on are chosen, for every column: bit r is row i + r.
  static void by_column(const StepCall& c, int64_t i, int64_t count, int64_t j, int64_t n, uint32_t* out) {
    if (c.bit_row == 1) {
      for (int64_t e = 0; e < n; ++e) out[e] = bits_at(c, i + (j + e) * c.bit_column) & ((1u << count) - 1);
      return;
    }
    constexpr int L = LANES<float>;
    VecU32 lane = {};
    for (int l = 0; l < L; ++l) lane[l] = 1u << l;
    for (int64_t e = 0; e < n; e += L) {
      VecU32 chosen = {};
      for (int64_t r = 0; r < count; ++r) {
        const VecU32 word = VecU32{} + bits_at(c, (i + r) * c.bit_row + j + e);
        chosen |= (VecU32)((word & lane) != 0) & (1u << r);
      }
      store_unaligned(out + e, chosen);
    }
  }

  // Columns by how many rows are chosen, the fewest first: the same number over and over is what a processor foresees.
  struct Order {
    int64_t column[CHUNK];
    int64_t begin[DOT_ROWS + 2];

    Order(const uint32_t* chosen, int64_t n) : begin{} {
      for (int64_t e = 0; e < n; ++e) ++begin[__builtin_popcount(chosen[e]) + 1];
      for (int b = 1; b <= DOT_ROWS + 1; ++b) begin[b] += begin[b - 1];
      int64_t next[DOT_ROWS + 1];
      for (int b = 0; b <= DOT_ROWS; ++b) next[b] = begin[b];
      for (int64_t e = 0; e < n; ++e) column[next[__builtin_popcount(chosen[e])]++] = e;
    }
  };

  static bool sparse_block(const void* left, const void* right, int64_t depth, const BlockRange& range,
                           const StepCall& c) {
    alignas(64) T slope[DOT_ROWS * CHUNK];
    uint32_t chosen[CHUNK];
    const T* a = static_cast<const T*>(left);
    const T* b = static_cast<const T*>(right);
    bool finite = true;
    const int64_t padded = (c.k + W - 1) / W * W;
    for (int64_t j = range.j0; j < range.j1; j += CHUNK) {
      const int64_t n = range.j1 - j < CHUNK ? range.j1 - j : CHUNK;
      for (int64_t i = range.i0; i < range.i1; i += DOT_ROWS) {
        const int64_t count = range.i1 - i < DOT_ROWS ? range.i1 - i : DOT_ROWS;
        by_column(c, i, count, j, n, chosen);
        const Order order(chosen, n);
        for (T& number : slope) number = 0;
        for (int64_t p = 0; p < padded; p += DOT_DEPTH) {
          const int64_t k = padded - p < DOT_DEPTH ? padded - p : DOT_DEPTH;
          const T* rows = a + (i - range.i0) * depth + p;
          for (int set = 1; set <= DOT_ROWS; ++set) {
            for (int64_t at = order.begin[set]; at < order.begin[set + 1]; ++at) {
              const int64_t e = order.column[at];
              add_chosen(rows, b + (j + e - range.j0) * depth + p, depth, k, set, chosen[e], slope + e);
            }
          }
        }
        finite &= step_chunk(c, slope, i, count, j, n);
      }
    }
    return finite;
  }

  static StepKernel kernel() {
    return {
        rows, {MR, NR, sizeof(T), dense_pack, dense_block}, {DOT_ROWS, DOT_ROWS, sizeof(T), sparse_pack, sparse_block}};
  }
};
