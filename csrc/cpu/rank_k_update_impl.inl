// rank_k_update for fp32 and fp64 arithmetic on the vectors of one instruction set.

template <class T>
struct RankKBody {
  static constexpr int MR = TILE_ROWS, NR = TILE_COLUMNS<T>;
  static constexpr int64_t DEPTH = 256;
  static constexpr int64_t PACKED_COLUMNS = 16;
  static constexpr int64_t FEW = 24;  // terms of a sum that take less time than memory to answer
  static_assert(NR == 2 * LANES<T>);

  static int64_t column(const RankKFactor& f, int64_t p) { return f.order ? f.order[p] : p; }

  // The factor's numbers in the arithmetic's dtype. Factors wider than it are rounded to it, as torch's own conversion
  // does.
  template <class S>
  static T number(S v) {
    if constexpr (sizeof(S) == 8) return T(v);
    else return widen<T>(v);
  }

  // Columns whose WIDTH numbers lie side by side.
  template <int WIDTH, class S>
  static void pack_columns(const RankKFactor& f, const S* data, T* __restrict out) {
    const T scale = T(f.scale);
    for (int64_t p = 0; p < f.k; ++p, out += WIDTH) {
      const S* from = data + column(f, p) * f.k_stride;
      for (int r = 0; r < WIDTH; ++r) out[r] = scale * number(from[r]);
    }
  }

  template <class S>
  static void pack_as(const RankKFactor& f, int64_t first, int width, T* out) {
    const S* data = static_cast<const S*>(f.data) + first * f.row_stride;
    const int64_t rows = f.rows - first < width ? f.rows - first : width;
    const T scale = T(f.scale);
    if (f.row_stride == 1 && rows == MR && width == MR) return pack_columns<MR>(f, data, out);
    if (f.row_stride == 1 && rows == NR && width == NR) return pack_columns<NR>(f, data, out);
    // A few columns at a time: whole cache lines are read where rows are contiguous, and what is written is near.
    for (int64_t p0 = 0; p0 < f.k; p0 += PACKED_COLUMNS) {
      const int64_t p1 = f.k - p0 < PACKED_COLUMNS ? f.k : p0 + PACKED_COLUMNS;
      for (int64_t r = 0; r < rows; ++r) {
        const S* from = data + r * f.row_stride;
        for (int64_t p = p0; p < p1; ++p) out[p * width + r] = scale * number(from[column(f, p) * f.k_stride]);
      }
      for (int64_t p = p0; p < p1; ++p) {
        for (int64_t r = rows; r < width; ++r) out[p * width + r] = 0;
      }
    }
  }
  static void pack(const RankKFactor& f, int64_t first, int width, void* out) {
    T* to = static_cast<T*>(out);
    switch (f.dtype) {
      case DType::f64: return pack_as<double>(f, first, width, to);
      case DType::f32: return pack_as<float>(f, first, width, to);
      case DType::bf16: return pack_as<Bf16>(f, first, width, to);
      default: return pack_as<F16>(f, first, width, to);
    }
  }

  template <class W, class C>
  static void add_row(const T* tile, int64_t n, W* weight, int64_t stride, C* copy, int64_t copy_stride) {
    int64_t j = 0;
    if (stride == 1 && (!copy || copy_stride == 1)) {
      for (; j + LANES<T> <= n; j += LANES<T>) {
        const Vec<T> sum = load_vector(weight + j) + load_vector(tile + j);
        store_vector(weight + j, sum);
        if constexpr (sizeof(T) == 4) {
          if (copy) store_vector(copy + j, sum);
        }
      }
    }
    for (; j < n; ++j) {
      const T sum = widen<T>(weight[j * stride]) + tile[j];
      narrow(sum, weight + j * stride);
      if constexpr (sizeof(T) == 4) {
        if (copy) from_float(sum, copy + j * copy_stride);
      }
    }
  }

  // Long sums go by blocks of DEPTH terms, which keeps their rounding near that of a pairwise sum.
  static void sum_products(const T* left, const T* right, int64_t k, T* tile) {
    multiply_panels<T, MR, NR>(left, right, k < DEPTH ? k : DEPTH, tile);
    alignas(64) T part[MR * NR];
    for (int64_t p = DEPTH; p < k; p += DEPTH) {
      multiply_panels<T, MR, NR>(left + p * MR, right + p * NR, k - p < DEPTH ? k - p : DEPTH, part);
      for (int e = 0; e < MR * NR; ++e) tile[e] += part[e];
    }
  }

  // A whole tile of contiguous rows: its sums go from registers to the weight.
  template <bool COPIED, class W, class C>
  static void add_products(const T* left, const T* right, int64_t k, W* weight, int64_t stride, C* copy,
                           int64_t copy_stride) {
    constexpr int columns = NR / LANES<T>;
    multiply_panels_to<T, MR, NR>(left, right, k, [=](int i, const Vec<T>(&sums)[columns]) {
      Vec<T> total[columns];
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) total[v] = load_vector(weight + i * stride + v * LANES<T>) + sums[v];
      store_pair(weight + i * stride, total[0], total[1]);
      if constexpr (COPIED) store_pair(copy + i * copy_stride, total[0], total[1]);
    });
  }

  template <class W>
  static void ask_for(const W* tile, int64_t stride) {
    for (int r = 0; r < MR; ++r) {
      for (int e = 0; e < NR; e += 64 / sizeof(W)) __builtin_prefetch(tile + r * stride + e);
    }
  }

  template <class W, class C>
  static void block_as(const T* left, const T* right, int64_t k, const BlockRange& range, const RankKTarget& t) {
    const auto [i0, i1, j0, j1] = range;
    alignas(64) T tile[MR * NR];
    W* weight = static_cast<W*>(t.weight);
    C* copy = static_cast<C*>(t.copy);
    const bool contiguous = t.column_stride == 1 && (!copy || t.copy_column_stride == 1);
    const int64_t ahead = NR * (k < FEW ? 4 : 1);
    for (int64_t i = i0; i < i1; i += MR) {
      const int64_t rows = i1 - i < MR ? i1 - i : MR;
      const T* a = left + (i - i0) * k;
      for (int64_t j = j0; j < j1; j += NR) {
        const int64_t columns = j1 - j < NR ? j1 - j : NR;
        const T* b = right + (j - j0) * k;
        W* to = weight + i * t.row_stride + j * t.column_stride;
        C* beside = copy ? copy + i * t.copy_row_stride + j * t.copy_column_stride : nullptr;
        if (contiguous && rows == MR) {
          if (j + ahead + NR <= j1) {
            ask_for(to + ahead, t.row_stride);
            if (beside) ask_for(beside + ahead, t.copy_row_stride);
          }
          if (columns == NR && k <= DEPTH) {
            if constexpr (sizeof(W) == 4) {
              if (beside) {
                add_products<true>(a, b, k, to, t.row_stride, beside, t.copy_row_stride);
                continue;
              }
            }
            add_products<false>(a, b, k, to, t.row_stride, beside, 0);
            continue;
          }
        }
        sum_products(a, b, k, tile);
        for (int64_t r = 0; r < rows; ++r) {
          add_row(tile + r * NR, columns, to + r * t.row_stride, t.column_stride,
                  beside ? beside + r * t.copy_row_stride : nullptr, t.copy_column_stride);
        }
      }
    }
  }

  static void block(const void* left, const void* right, int64_t k, const BlockRange& range, const RankKTarget& t) {
    const T* a = static_cast<const T*>(left);
    const T* b = static_cast<const T*>(right);
    if constexpr (sizeof(T) == 8) {
      block_as<double, Bf16>(a, b, k, range, t);
    } else {
      const bool half = t.copy && t.copy_dtype == DType::f16;
      switch (t.dtype) {
        case DType::f32:
          return half ? block_as<float, F16>(a, b, k, range, t) : block_as<float, Bf16>(a, b, k, range, t);
        case DType::bf16: return block_as<Bf16, Bf16>(a, b, k, range, t);
        default: return block_as<F16, F16>(a, b, k, range, t);
      }
    }
  }

  static RankKKernel kernel() { return {MR, NR, sizeof(T), pack, block}; }
};
