// rank_k_update for fp32 and fp64 arithmetic on the vectors of one instruction set.

template <class T>
struct RankKBody {
  static constexpr int MR = TILE_ROWS, NR = TILE_COLUMNS<T>;
  static constexpr int64_t DEPTH = 256;

  static int64_t column(const RankKFactor& f, int64_t p) { return f.order ? f.order[p] : p; }

  template <class S>
  static void pack_as(const RankKFactor& f, int64_t first, int width, T* out) {
    const S* data = static_cast<const S*>(f.data);
    const int64_t rows = f.rows - first < width ? f.rows - first : width;
    const T scale = T(f.scale);
    for (int64_t p = 0; p < f.k; ++p, out += width) {
      const S* from = data + first * f.row_stride + column(f, p) * f.k_stride;
      for (int64_t r = 0; r < rows; ++r) out[r] = scale * T(widen<T>(from[r * f.row_stride]));
      for (int64_t r = rows; r < width; ++r) out[r] = 0;
    }
  }
  static void pack(const RankKFactor& f, int64_t first, int width, void* out) {
    T* to = static_cast<T*>(out);
    switch (f.dtype) {
      case DType::f64:
        // Factors wider than the arithmetic are rounded to it, as torch's own conversion does.
        if constexpr (sizeof(T) == 8) return pack_as<double>(f, first, width, to);
        else return pack_rounded(f, first, width, to);
      case DType::f32: return pack_as<float>(f, first, width, to);
      case DType::bf16: return pack_as<Bf16>(f, first, width, to);
      default: return pack_as<F16>(f, first, width, to);
    }
  }
  static void pack_rounded(const RankKFactor& f, int64_t first, int width, T* out) {
    const double* data = static_cast<const double*>(f.data);
    const int64_t rows = f.rows - first < width ? f.rows - first : width;
    for (int64_t p = 0; p < f.k; ++p, out += width) {
      for (int64_t r = 0; r < rows; ++r) {
        out[r] = T(f.scale) * T(data[(first + r) * f.row_stride + column(f, p) * f.k_stride]);
      }
      for (int64_t r = rows; r < width; ++r) out[r] = 0;
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

  template <class W, class C>
  static void block_as(const T* left, const T* right, int64_t k, const BlockRange& range, const RankKTarget& t) {
    const auto [i0, i1, j0, j1] = range;
    alignas(64) T tile[MR * NR];
    W* weight = static_cast<W*>(t.weight);
    C* copy = static_cast<C*>(t.copy);
    for (int64_t i = i0; i < i1; i += MR) {
      const int64_t rows = i1 - i < MR ? i1 - i : MR;
      for (int64_t j = j0; j < j1; j += NR) {
        sum_products(left + (i - i0) * k, right + (j - j0) * k, k, tile);
        const int64_t columns = j1 - j < NR ? j1 - j : NR;
        for (int64_t r = 0; r < rows; ++r) {
          add_row(tile + r * NR, columns, weight + (i + r) * t.row_stride + j * t.column_stride, t.column_stride,
                  copy ? copy + (i + r) * t.copy_row_stride + j * t.copy_column_stride : nullptr, t.copy_column_stride);
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
