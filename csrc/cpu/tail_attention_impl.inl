// tail_attention for the vectors of one instruction set: numbers in fp32, bf16 or fp16, all arithmetic in fp32.
//
// A task is one row of tokens and one group of heads: tail * share queries, share heads for each key. Scores are dot
// products of rows, results are sums of rows, so nothing is transposed, and rows of fp32 are read where they are. What
// a query does not attend to is never computed, but for a tile's corner above the diagonal, which is overwritten.
// Sums are in an order that shapes alone fix.

#if defined(__clang__) || __GNUC__ >= 12
#define KF_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define KF_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

struct TailAttentionBody {
  static constexpr int W = LANES<float>;
  static constexpr int64_t BLOCK = 32;  // queries whose scores are on hand
  static constexpr int KEYS = 4;        // of a tile of scores
#if KF_VECTOR_BYTES == 64 || defined(KF_NEON)
  static constexpr int QUERIES = 4, WIDTH = 4;  // 32 registers
#else
  static constexpr int QUERIES = 2, WIDTH = 2;
#endif
  static constexpr float INF = __builtin_inff();

  typedef float Quad __attribute__((vector_size(16)));
  typedef int32_t QuadIndex __attribute__((vector_size(16)));

  static int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

  static Quad quarter_sums(Vec<float> v) {
#if KF_VECTOR_BYTES == 64
    // With a mask of ones: GCC warns of the undefined register in those without.
    const __m512d wide = _mm512_castps_pd((__m512)v);
    const __m256 half = _mm256_add_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(255, wide, 0)),
                                      _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(255, wide, 1)));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif KF_VECTOR_BYTES == 32
    return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    return (Quad)v;
#endif
  }

  // The sum of the lanes of each of four vectors.
  static Quad lane_sums(const Vec<float>* v) {
    const Quad a = quarter_sums(v[0]), b = quarter_sums(v[1]), c = quarter_sums(v[2]), d = quarter_sums(v[3]);
    const Quad ab = KF_SHUFFLE(a, b, 0, 4, 1, 5) + KF_SHUFFLE(a, b, 2, 6, 3, 7);  // a02, b02, a13, b13
    const Quad cd = KF_SHUFFLE(c, d, 0, 4, 1, 5) + KF_SHUFFLE(c, d, 2, 6, 3, 7);
    return KF_SHUFFLE(ab, cd, 0, 1, 4, 5) + KF_SHUFFLE(ab, cd, 2, 3, 6, 7);
  }

  static float lane_sum(Vec<float> v) {
    const Quad q = quarter_sums(v);
    return (q[0] + q[2]) + (q[1] + q[3]);
  }

  // tanh to 3 ulp: its series where 1 - 2 / (e^2x + 1) would cancel. NaN stays NaN.
  static Vec<float> tanh_vector(Vec<float> x) {
    const Vec<float> size = x < 0.0f ? -x : x, square = x * x;
    const Vec<float> series =
        x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
    const Vec<float> bounded = size < 15.0f ? size : Vec<float>{} + 15.0f;
    const Vec<float> big = 1.0f - 2.0f / (exp_vector(2.0f * bounded) + 1.0f);
    const Vec<float> near = size < 0.25f ? series : (x < 0.0f ? -big : big);
    return x == x ? near : x;
  }

  // exp of a number that is 0 or less: 0 below e^-87, and NaN stays NaN.
  static Vec<float> exp_below(Vec<float> x) {
    const Vec<float> power = exp_vector(x > -87.0f ? x : Vec<float>{} - 87.0f);
    const Vec<float> value = x < -87.0f ? Vec<float>{} : power;
    return x == x ? value : x;
  }

  // out [QB, 4] = dot products of QB rows of q with four rows.
  template <int QB>
  static void dot_tile(const float* q, int64_t q_stride, const float* const* k, int64_t depth, float* out,
                       int64_t stride) {
    Vec<float> sum[QB][KEYS] = {};
    const float *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
    for (int64_t p = 0; p < depth; p += W) {
      const Vec<float> b[KEYS] = {load_vector(k0 + p), load_vector(k1 + p), load_vector(k2 + p), load_vector(k3 + p)};
#pragma GCC unroll 4
      for (int i = 0; i < QB; ++i) {
        const Vec<float> a = load_vector(q + i * q_stride + p);
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; ++j) sum[i][j] += a * b[j];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < QB; ++i) store_unaligned(out + i * stride, lane_sums(sum[i]));
  }

  static void dot_rows(int64_t count, const float* q, int64_t q_stride, const float* const* k, int64_t depth,
                       float* out, int64_t stride) {
    if constexpr (QUERIES == 4) {
      if (count >= 4) return dot_tile<4>(q, q_stride, k, depth, out, stride);
      if (count == 3) return dot_tile<3>(q, q_stride, k, depth, out, stride);
    }
    if (count >= 2) return dot_tile<2>(q, q_stride, k, depth, out, stride);
    dot_tile<1>(q, q_stride, k, depth, out, stride);
  }

  // Coefficient n of result i is factor[i * row + n * term].
  struct Coefficients {
    const float* factor;
    int64_t row, term;
  };

  // out [MR, NV vectors], += or =: the sum over n of coefficient n times rows[n], from number `at` on.
  template <int MR, int NV>
  static void sum_tile(const Coefficients& c, const float* const* rows, int64_t count, int64_t at, float* out,
                       int64_t stride, bool add) {
    Vec<float> sum[MR][NV] = {};
    for (int64_t n = 0; n < count; ++n) {
      Vec<float> b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = load_vector(rows[n] + at + v * W);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const float a = c.factor[i * c.row + n * c.term];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] += a * b[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* to = out + i * stride + at + v * W;
        store_vector(to, add ? load_vector(to) + sum[i][v] : sum[i][v]);
      }
    }
  }

  template <int MR>
  static void sum_rows(const Coefficients& c, const float* const* rows, int64_t count, int64_t depth, float* out,
                       int64_t stride, bool add) {
    int64_t at = 0;
    for (; at + WIDTH * W <= depth; at += WIDTH * W) sum_tile<MR, WIDTH>(c, rows, count, at, out, stride, add);
    for (; at < depth; at += W) sum_tile<MR, 1>(c, rows, count, at, out, stride, add);
  }

  static void sum_rows(int64_t results, const Coefficients& c, const float* const* rows, int64_t count, int64_t depth,
                       float* out, int64_t stride, bool add) {
    switch (results) {
      case 1: return sum_rows<1>(c, rows, count, depth, out, stride, add);
      case 2: return sum_rows<2>(c, rows, count, depth, out, stride, add);
      case 3: return sum_rows<3>(c, rows, count, depth, out, stride, add);
      default: return sum_rows<4>(c, rows, count, depth, out, stride, add);
    }
  }

  template <class S>
  static void read_row(const S* from, int64_t size, float* to) {
    int64_t j = 0;
    for (; j + W <= size; j += W) store_vector(to + j, load_vector(from + j));
    if (j < size) store_vector(to + j, load_part(from + j, size - j));  // zeros behind
  }

  template <class S>
  static void write_row(const float* from, float factor, int64_t size, S* to) {
    int64_t j = 0;
    for (; j + W <= size; j += W) store_vector(to + j, load_vector(from + j) * factor);
    if (j < size) store_part(to + j, load_vector(from + j) * factor, size - j);
  }

  template <class S>
  static S* row_at(const HeadRows& rows, int64_t token, int64_t head) {
    return static_cast<S*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
  }

  // Working memory of a thread, in floats; pointers lie at its end.
  struct Sizes {
    int64_t depth, columns, keys, tail;

    Sizes(const TailAttentionCall& call, int64_t longest_tail, int64_t longest_keys)
        : depth(rounded_up(call.size, W)),
          columns(rounded_up(longest_keys + W + KEYS, W)),
          keys(longest_keys),
          tail(longest_tail) {}
    int64_t floats() const { return 3 * BLOCK * depth + 3 * BLOCK * columns + 2 * (keys + tail) * depth; }
    int64_t pointers() const { return 2 * (keys + KEYS) + 2 * BLOCK; }
  };

  static size_t scratch_bytes(const TailAttentionCall& call, int64_t longest_tail, int64_t longest_keys) {
    const Sizes sizes(call, longest_tail, longest_keys);
    return size_t(rounded_up(sizes.floats() * 4 + sizes.pointers() * 8, 4096));
  }

  // One task: where its keys and values are, and its working memory.
  template <class S>
  struct Task {
    const TailAttentionCall& call;
    const int64_t group, share, first_token, tail, prefix, depth, columns;
    float *queries, *grads, *results, *weights, *slopes, *bends, *of_keys, *of_values;
    const float **keys, **values, **query_rows, **grad_rows;

    Task(const TailAttentionCall& c, int64_t row, int64_t g, int64_t longest_tail, int64_t longest_keys, void* scratch)
        : call(c),
          group(g),
          share(c.heads / c.groups),
          first_token(c.starts[row]),
          tail(c.starts[row + 1] - c.starts[row]),
          prefix(c.spans ? c.spans[2 * row + 1] - c.spans[2 * row] : 0),
          depth(rounded_up(c.size, W)),
          columns(Sizes(c, longest_tail, longest_keys).columns) {
      const Sizes sizes(c, longest_tail, longest_keys);
      float* memory = static_cast<float*>(scratch);
      keys = reinterpret_cast<const float**>(memory + sizes.floats());
      values = keys + longest_keys + KEYS;
      query_rows = values + longest_keys + KEYS;
      grad_rows = query_rows + BLOCK;
      float** parts[] = {&queries, &grads, &results, &weights, &slopes, &bends, &of_keys, &of_values};
      const int64_t lengths[] = {BLOCK * depth,   BLOCK * depth,   BLOCK * depth, BLOCK * columns,
                                 BLOCK * columns, BLOCK * columns, tail * depth,  tail * depth};
      for (int i = 0; i < 8; ++i) {
        *parts[i] = memory;
        memory += lengths[i];
      }
      for (int64_t i = 0; i < BLOCK; ++i) {
        query_rows[i] = queries + i * depth;
        grad_rows[i] = grads + i * depth;
      }
      const int64_t stored = c.prefix_rows ? c.prefix_rows[row] : row;
      const int64_t begin = c.spans ? c.spans[2 * row] : 0;
      memory = point(c.key, c.prefix_keys, stored, begin, keys, memory);
      point(c.value, c.prefix_values, stored, begin, values, memory);
    }

    // Rows of the prefix and the tail: their own memory where it holds whole vectors of fp32, else copies.
    float* point(const HeadRows& packed, const PrefixRows& prefixes, int64_t stored, int64_t begin, const float** rows,
                 float* memory) {
      const S* base = static_cast<const S*>(prefixes.data);
      if (base) base += stored * prefixes.row_stride + group * prefixes.group_stride + begin * prefixes.place_stride;
      const int64_t count = prefix + tail;
      for (int64_t j = 0; j < count; ++j) {
        const S* from =
            j < prefix ? base + j * prefixes.place_stride : row_at<const S>(packed, first_token + j - prefix, group);
        if constexpr (sizeof(S) == 4) {
          if (call.size % W == 0) {
            rows[j] = from;
            continue;
          }
        }
        read_row(from, call.size, memory);
        rows[j] = memory;
        memory += depth;
      }
      for (int64_t j = count; j < count + KEYS; ++j) rows[j] = rows[count - 1];
      return memory;
    }

    int64_t queries_in_all() const { return tail * share; }
    int64_t token(int64_t query) const { return first_token + query / share; }
    int64_t head(int64_t query) const { return group * share + query % share; }
    // Keys [begin, end) that a query attends to.
    int64_t end(int64_t query) const { return prefix + query / share + 1; }
    int64_t begin(int64_t query) const {
      const int64_t last = end(query);
      return call.window > 0 && last > call.window ? last - call.window : 0;
    }

    void read_block(const HeadRows& from, int64_t q0, int64_t count, float* to) const {
      for (int64_t i = 0; i < count; ++i) {
        read_row(row_at<const S>(from, token(q0 + i), head(q0 + i)), call.size, to + i * depth);
      }
    }

    // products [count, columns]: of rows [count, depth] with key `low` and those behind it, up to each tile's last.
    void multiply(const float* rows, int64_t q0, int64_t count, int64_t low, const float* const* with,
                  float* products) const {
      for (int64_t i = 0; i < count; i += QUERIES) {
        const int64_t tile = count - i < QUERIES ? count - i : QUERIES;
        const int64_t last = end(q0 + i + tile - 1) - low, first = (begin(q0 + i) - low) / KEYS * KEYS;
        for (int64_t c = first; c < last; c += KEYS) {
          dot_rows(tile, rows + i * depth, depth, with + low + c, depth, products + i * columns + c, columns);
        }
      }
    }

    // Fills a query's row of numbers where it does not attend, as far as tiles and vectors read.
    void fill(float* row, int64_t query, int64_t low, float with) const {
      const int64_t first = begin(query) - low, last = end(query) - low;
      for (int64_t c = 0; c < first; ++c) row[c] = with;
      for (int64_t c = last; c < last + W + KEYS; ++c) row[c] = with;
    }

    // Products -> scores, minus infinity where a query does not attend.
    void score(float* row, float* bend, int64_t query, int64_t low) const {
      const int64_t last = end(query) - low;
      const float scale = call.scale, cap = call.softcap, of_cap = cap > 0 ? call.scale / cap : 0;
      for (int64_t c = 0; c < last; c += W) {
        const Vec<float> product = load_vector(row + c);
        if (cap > 0) {
          const Vec<float> bent = tanh_vector(product * of_cap);
          store_vector(row + c, bent * cap);
          if (bend) store_vector(bend + c, 1.0f - bent * bent);
        } else {
          store_vector(row + c, product * scale);
        }
      }
      fill(row, query, low, -INF);
    }

    // results [count, depth] = coefficients [count, columns] times the rows that any of a tile's queries attends to.
    void combine(const float* coefficients, int64_t q0, int64_t count, int64_t low, const float* const* with) const {
      for (int64_t i = 0; i < count; i += 4) {
        const int64_t tile = count - i < 4 ? count - i : 4;
        const int64_t first = begin(q0 + i) - low, last = end(q0 + i + tile - 1) - low;
        sum_rows(tile, {coefficients + i * columns + first, columns, 1}, with + low + first, last - first, depth,
                 results + i * depth, depth, false);
      }
    }

    // of_tail [tail, depth] += transposed coefficients [count, columns] times rows [count, depth].
    void add_to_tail(const float* coefficients, int64_t q0, int64_t count, int64_t low, const float* const* rows,
                     float* of_tail) const {
      const int64_t last = end(q0 + count - 1);
      for (int64_t j = low > prefix ? low : prefix; j < last; j += 4) {
        const int64_t tile = last - j < 4 ? last - j : 4;
        const int64_t before = (j - prefix) * share - q0, i = before > 0 ? before : 0;
        sum_rows(tile, {coefficients + i * columns + j - low, 1, columns}, rows + i, count - i, depth,
                 of_tail + (j - prefix) * depth, depth, true);
      }
    }

    void forward() {
      const int64_t all = queries_in_all();
      for (int64_t q0 = 0; q0 < all; q0 += BLOCK) {
        const int64_t count = all - q0 < BLOCK ? all - q0 : BLOCK, low = begin(q0);
        read_block(call.query, q0, count, queries);
        multiply(queries, q0, count, low, keys, weights);
        float inverse[BLOCK];
        for (int64_t i = 0; i < count; ++i) {
          float* row = weights + i * columns;
          score(row, nullptr, q0 + i, low);
          const int64_t last = end(q0 + i) - low;
          Vec<float> peaks = Vec<float>{} - INF, sums = {};
          for (int64_t c = 0; c < last; c += W) {
            const Vec<float> s = load_vector(row + c);
            peaks = s > peaks ? s : peaks;
          }
          float peak = peaks[0];
          for (int l = 1; l < W; ++l) peak = peaks[l] > peak ? peaks[l] : peak;
          for (int64_t c = 0; c < last; c += W) {
            const Vec<float> power = exp_below(load_vector(row + c) - peak);
            store_vector(row + c, power);
            sums += power;
          }
          inverse[i] = 1.0f / lane_sum(sums);
          float* normalizer = call.normalizer + 2 * (token(q0 + i) * call.heads + head(q0 + i));
          normalizer[0] = peak;
          normalizer[1] = inverse[i];
          fill(row, q0 + i, low, 0.0f);
        }
        combine(weights, q0, count, low, values);
        for (int64_t i = 0; i < count; ++i) {
          write_row(results + i * depth, inverse[i], call.size, row_at<S>(call.out, token(q0 + i), head(q0 + i)));
        }
      }
    }

    void backward() {
      const int64_t all = queries_in_all();
      for (int64_t e = 0; e < tail * depth; ++e) of_keys[e] = of_values[e] = 0;
      for (int64_t q0 = 0; q0 < all; q0 += BLOCK) {
        const int64_t count = all - q0 < BLOCK ? all - q0 : BLOCK, low = begin(q0);
        read_block(call.query, q0, count, queries);
        read_block(call.grad, q0, count, grads);
        multiply(queries, q0, count, low, keys, weights);
        multiply(grads, q0, count, low, values, slopes);
        for (int64_t i = 0; i < count; ++i) slope(q0 + i, low, i);
        combine(slopes, q0, count, low, keys);
        for (int64_t i = 0; i < count; ++i) {
          write_row(results + i * depth, 1.0f, call.size, row_at<S>(call.of_query, token(q0 + i), head(q0 + i)));
        }
        add_to_tail(slopes, q0, count, low, query_rows, of_keys);
        add_to_tail(weights, q0, count, low, grad_rows, of_values);
      }
      for (int64_t j = 0; j < tail; ++j) {
        write_row(of_keys + j * depth, 1.0f, call.size, row_at<S>(call.of_key, first_token + j, group));
        write_row(of_values + j * depth, 1.0f, call.size, row_at<S>(call.of_value, first_token + j, group));
      }
    }

    // Row i: products -> weights, and slopes by weights -> slopes by products.
    void slope(int64_t query, int64_t low, int64_t i) {
      float *row = weights + i * columns, *slope = slopes + i * columns;
      float* bend = call.softcap > 0 ? bends + i * columns : nullptr;
      score(row, bend, query, low);
      fill(slope, query, low, 0.0f);
      const float* normalizer = call.normalizer + 2 * (token(query) * call.heads + head(query));
      const float peak = normalizer[0], inverse = normalizer[1];
      const int64_t last = end(query) - low;
      Vec<float> sums = {};
      for (int64_t c = 0; c < last; c += W) {
        const Vec<float> weight = exp_below(load_vector(row + c) - peak) * inverse;
        store_vector(row + c, weight);
        sums += weight * load_vector(slope + c);
      }
      const float mean = lane_sum(sums);
      for (int64_t c = 0; c < last; c += W) {
        Vec<float> v = load_vector(row + c) * (load_vector(slope + c) - mean) * call.scale;
        if (bend) v *= load_vector(bend + c);
        store_vector(slope + c, v);
      }
      fill(row, query, low, 0.0f);
      fill(slope, query, low, 0.0f);
    }
  };

  template <class S>
  static void run_as(const TailAttentionCall& call, int64_t row, int64_t group, const TailAttentionScratch& scratch) {
    if (call.starts[row + 1] == call.starts[row]) return;
    Task<S> task(call, row, group, scratch.longest_tail, scratch.longest_keys, scratch.memory);
    if (call.backward) return task.backward();
    task.forward();
  }

  static void run(const TailAttentionCall& call, int64_t row, int64_t group, const TailAttentionScratch& scratch) {
    switch (call.dtype) {
      case DType::f32: return run_as<float>(call, row, group, scratch);
      case DType::bf16: return run_as<Bf16>(call, row, group, scratch);
      default: return run_as<F16>(call, row, group, scratch);
    }
  }

  static TailAttentionKernel kernel() { return {scratch_bytes, run}; }
};

#undef KF_SHUFFLE
