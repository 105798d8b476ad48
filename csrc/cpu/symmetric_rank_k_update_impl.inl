// symmetric_rank_k_update for fp32 and fp64 arithmetic on the vectors of one instruction set.

template <class T>
struct SymmetricBody {
#if KF_VECTOR_BYTES == 64
  // 27 sums in 32 registers, 12 loads for 27 products: 14 x 2 vectors take 16 for 28, and loads are the scarcer.
  static constexpr int MR = 9, NR = 3 * LANES<T>;
  static constexpr int64_t DEPTH = 192;  // rows of x whose right panel stays in the first-level cache
#else
  static constexpr int MR = TILE_ROWS, NR = TILE_COLUMNS<T>;
  static constexpr int64_t DEPTH = 256;
#endif
  static constexpr int64_t FEW = 24;  // terms of a sum that take less time than memory to answer
  static constexpr int SIDE = 256 / (MR * NR / gcd(MR, NR)) * (MR * NR / gcd(MR, NR));
  static_assert(SIDE > 0 && SIDE % MR == 0 && SIDE % NR == 0);

  static size_t left_bytes(int64_t depth, bool) { return size_t(depth) * MR * sizeof(T); }
  static size_t right_bytes(int64_t depth) { return size_t(depth) * NR * sizeof(T); }

  // Rows [k, k + rows) of one panel of WIDTH columns from c0; `out` is the panel.
  template <class S, int WIDTH>
  static void pack_panel(const SymmetricSource& s, int64_t k0, int64_t k, int64_t rows, int64_t c0, bool weighted,
                         T* out) {
    const int64_t width = s.d - c0 < WIDTH ? s.d - c0 : WIDTH;
    out += k * WIDTH;
    for (int64_t r = k0 + k; r < k0 + k + rows; ++r, out += WIDTH) {
      if (s.mask && !s.mask[r]) {
        for (int c = 0; c < WIDTH; ++c) out[c] = 0;
        continue;
      }
      const S* x = static_cast<const S*>(s.x) + r * s.row_stride + c0 * s.column_stride;
      if (s.column_stride == 1 && c0 + 8 * WIDTH < s.d) __builtin_prefetch(x + 7 * WIDTH);
      if (s.column_stride == 1 && width == WIDTH) {
        if constexpr (WIDTH % LANES<T> == 0) {
          for (int c = 0; c < WIDTH; c += LANES<T>) store_vector(out + c, load_vector(x + c));
        } else {
          for (int c = 0; c < WIDTH; ++c) out[c] = widen<T>(x[c]);
        }
      } else {
        for (int64_t c = 0; c < width; ++c) out[c] = widen<T>(x[c * s.column_stride]);
        for (int64_t c = width; c < WIDTH; ++c) out[c] = 0;
      }
      if (weighted) {
        const T w = T(s.weight[r]);
        for (int c = 0; c < WIDTH; ++c) out[c] *= w;
      }
    }
  }

  template <class S>
  static void pack_as(const SymmetricSource& s, int64_t k0, int64_t depth, int64_t k, int64_t rows, T* left, T* right) {
    for (int64_t c = 0; c < s.d; c += MR) {
      pack_panel<S, MR>(s, k0, k, rows, c, s.weight != nullptr, left + c * depth);
    }
    for (int64_t c = 0; c < s.d; c += NR) pack_panel<S, NR>(s, k0, k, rows, c, false, right + c * depth);
  }

  static void pack(const SymmetricSource& s, int64_t k0, int64_t depth, int64_t k, int64_t rows, void* left,
                   void* right) {
    T *l = static_cast<T*>(left), *r = static_cast<T*>(right);
    if constexpr (sizeof(T) == 8) {
      pack_as<double>(s, k0, depth, k, rows, l, r);
    } else {
      if (s.dtype == DType::f32) pack_as<float>(s, k0, depth, k, rows, l, r);
      else if (s.dtype == DType::bf16) pack_as<Bf16>(s, k0, depth, k, rows, l, r);
      else pack_as<F16>(s, k0, depth, k, rows, l, r);
    }
  }

  // A whole tile below the diagonal: its sums go from registers to acc.
  static void add_products(const T* left, const T* right, int64_t k, T alpha, T* acc, int64_t stride) {
    constexpr int columns = NR / LANES<T>;
    multiply_panels_to<T, MR, NR>(left, right, k, [=](int i, const Vec<T>(&sums)[columns]) {
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        T* at = acc + i * stride + v * LANES<T>;
        store_vector(at, load_vector(at) + alpha * sums[v]);
      }
    });
  }

  // Depth is outside: the block of acc and the panels of one step stay in the second-level cache.
  static void block(const PackedChunk& chunk, const BlockRange& range, double alpha, const Accumulator& acc, void*) {
    alignas(64) T tile[MR * NR];
    const T *left = static_cast<const T*>(chunk.left), *right = static_cast<const T*>(chunk.right);
    const int64_t depth = chunk.depth;
    const bool whole = acc.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
      const int64_t k = depth - k0 < DEPTH ? depth - k0 : DEPTH;
      for (int64_t j = range.j0; j < range.j1; j += NR) {
        const T* b = right + j / NR * (depth * NR) + k0 * NR;
        const int64_t reaching = j / MR * MR;  // the first tile whose last row is on or below row j
        for (int64_t i = reaching > range.i0 ? reaching : range.i0; i < range.i1; i += MR) {
          const int64_t rows = range.i1 - i < MR ? range.i1 - i : MR;
          const int64_t columns = range.j1 - j < NR ? range.j1 - j : NR;
          const T* a = left + i / MR * (depth * MR) + k0 * MR;
          const int64_t ahead = k < FEW ? 4 * MR : 0;
          if (i + ahead + MR <= range.i1) prefetch_tile(MR, columns, i + ahead, j, acc);
          if (whole && rows == MR && columns == NR && i - j >= NR - 1) {
            add_products(a, b, k, T(alpha), static_cast<T*>(acc.data) + i * acc.stride + j, acc.stride);
            continue;
          }
          multiply_panels<T, MR, NR>(a, b, k, tile);
          add_lower_tile(tile, NR, rows, columns, i, j, alpha, acc);
        }
      }
    }
  }

  static SymmetricKernel kernel() { return {MR, NR, SIDE, 0, left_bytes, right_bytes, pack, block, nullptr, nullptr}; }
};
