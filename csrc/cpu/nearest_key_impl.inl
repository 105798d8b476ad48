// nearest_key: sums of squared differences of two queries and four keys at a time.

#if defined(__x86_64__)
#define KF_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define KF_IN_REGISTER(v) (void)(v)
#endif

template <class T>
struct NearestBody {
  static constexpr int Q = 2, K = 4;
  static constexpr int W = LANES<T>;

  static T sum_of(Vec<T> v) {
    T even = v[0], odd = v[1];
#pragma GCC unroll 8
    for (int i = 2; i < W; i += 2) {
      even += v[i];
      odd += v[i + 1];
    }
    return even + odd;
  }

  static Vec<T> load_rest(const T* p, int64_t count) {
    T part[W] = {};
    __builtin_memcpy(part, p, count * sizeof(T));
    return load_vector(part);
  }

  static void tile(const T* const* q, const T* const* k, int64_t depth, T (*sums)[K]) {
    Vec<T> sum[Q][K] = {};
    int64_t p = 0;
#pragma GCC unroll 2
    for (; p + W <= depth; p += W) {
      Vec<T> a[Q];
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) a[i] = load_vector(q[i] + p);
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) {
        Vec<T> b = load_vector(k[j] + p);
        if (j % 2 == 0) KF_IN_REGISTER(b);  // else it is read again for every query: too many loads, where all are
#pragma GCC unroll 4
        for (int i = 0; i < Q; ++i) {
          const Vec<T> gap = a[i] - b;
          sum[i][j] += gap * gap;
        }
      }
    }
    if (p < depth) {
      for (int i = 0; i < Q; ++i) {
        for (int j = 0; j < K; ++j) {
          const Vec<T> gap = load_rest(q[i] + p, depth - p) - load_rest(k[j] + p, depth - p);
          sum[i][j] += gap * gap;
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) sums[i][j] = sum_of(sum[i][j]);
    }
  }

  // Pairs at the border are computed with the last row again. A tile in which every sum exceeds its limit stays as it
  // is.
  static void add_squares(const NearestBlock<T>& block) {
    constexpr int64_t QUERIES = 8;  // of a part of the columns in the first-level cache, beside four keys
    for (int64_t q0 = 0; q0 < block.query_count; q0 += QUERIES) {
      const int64_t q1 = q0 + QUERIES < block.query_count ? q0 + QUERIES : block.query_count;
      for (int64_t j0 = 0; j0 < block.key_count; j0 += K) {
        const int columns = int(block.key_count - j0 < K ? block.key_count - j0 : K);
        const T* k[K];
        for (int j = 0; j < K; ++j) k[j] = block.keys + (j0 + (j < columns ? j : columns - 1)) * block.key_stride;
        for (int64_t i0 = q0; i0 < q1; i0 += Q) {
          const int rows = int(q1 - i0 < Q ? q1 - i0 : Q);
          const T* q[Q];
          bool open = false;
          for (int i = 0; i < Q; ++i) q[i] = block.queries + (i0 + (i < rows ? i : rows - 1)) * block.query_stride;
          for (int i = 0; i < rows; ++i) {
            const T* sums = block.sums + (i0 + i) * block.sum_stride + j0;
            for (int j = 0; j < columns; ++j) open |= !(sums[j] > block.limits[i0 + i]);
          }
          if (!open) continue;
          T part[Q][K];
          tile(q, k, block.depth, part);
          for (int i = 0; i < rows; ++i) {
            T* sums = block.sums + (i0 + i) * block.sum_stride + j0;
            for (int j = 0; j < columns; ++j) sums[j] += part[i][j];
          }
        }
      }
    }
  }
};

struct WidenBody {
  static void row(const void* data, DType dtype, int64_t count, float* out) {
    if (dtype == DType::bf16) return widen_block(static_cast<const Bf16*>(data), count, out);
    widen_block(static_cast<const F16*>(data), count, out);
  }
};
