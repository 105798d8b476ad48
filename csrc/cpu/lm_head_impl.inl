// target_log_probs and distribution_kl: a language-model head over blocks of tokens, with an online softmax.
//
// Rows of states lie side by side in the lanes of vectors, so that what is done with the logits of a token is done for
// all rows at once and nothing is summed across lanes. The head is read where it is, number by number for the logits
// and row by row for the gradient: packing it would cost a pass over the largest operand.

// e^x for x <= 0, and NaN of NaN; 0 where fp32 has no normal number for it.
inline Vec<float> exp_down(Vec<float> x) {
  const Vec<float> value = exp_vector(x < -87.0f ? Vec<float>{} - 87.0f : x);
  return x < -87.0f ? Vec<float>{} : value;
}
inline Vec<double> exp_down(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// tanh to 2 ulp: near 0 by the polynomial of Cephes' tanhf (https://www.netlib.org/cephes/).
inline Vec<float> tanh_vector(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> bounded = size > 10.0f ? Vec<float>{} + 10.0f : size;
  const Vec<float> far = 1.0f - 2.0f / (exp_vector(bounded + bounded) + 1.0f);
  const Vec<float> z = x * x;
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> near = p * z * x + x;
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}
inline Vec<double> tanh_vector(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

template <class T>
struct LmHeadBody {
  using Any = MaskedStepBody<T>;
  static constexpr int W = LANES<T>;
  static constexpr int TOKENS = 6;  // of a tile of logits
#if KF_VECTOR_BYTES == 64 || defined(KF_NEON)
  static constexpr int VECTORS = 4;  // of rows, of a tile of logits
  static constexpr int ROWS = 8;     // of a tile of the gradient
#else
  static constexpr int VECTORS = 2;
  static constexpr int ROWS = 4;
#endif
  static constexpr int COLUMNS = 3 * W;  // of a tile of the gradient
  static constexpr int64_t BLOCK = 96;   // tokens whose logits are in memory at a time
  static constexpr int64_t DEPTH = 128;  // columns whose products are summed one after another
  static constexpr int LINE = 64 / sizeof(T);
  static constexpr int LANE = W > ROWS ? W : ROWS;  // the lanes of a call are a multiple of it
  static_assert(BLOCK % TOKENS == 0 && DEPTH % LINE == 0 && LANE % W == 0 && LANE % ROWS == 0);

  static T infinity() { return T(__builtin_inf()); }
  static int64_t padded(int64_t columns) { return (columns + W - 1) / W * W; }

  // Numbers of T that `run` works in.
  static size_t scratch_bytes(int64_t lanes) {
    return sizeof(T) * size_t(BLOCK * lanes + BLOCK * DEPTH + BLOCK * COLUMNS + BLOCK);
  }

  // Rows of states [rows, d] into the lanes from `first` on. Lanes are packed by panels of VECTORS vectors, a panel
  // [d, its lanes].
  static void pack(const StepMatrix& states, int64_t rows, int64_t d, int64_t first, int64_t lanes, void* packed) {
    T buffer[DEPTH];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t lane = first + r, panel = lane / (VECTORS * W) * (VECTORS * W);
      const int64_t width = lanes - panel < VECTORS * W ? lanes - panel : VECTORS * W;
      T* out = static_cast<T*>(packed) + panel * d + (lane - panel);
      for (int64_t p0 = 0; p0 < d; p0 += DEPTH) {
        const int64_t n = d - p0 < DEPTH ? d - p0 : DEPTH;
        const T* from = Any::read_any(states, r, p0, n, buffer);
        for (int64_t p = 0; p < n; ++p) out[(p0 + p) * width] = from[p];
      }
    }
  }

  // tile [TOKENS, lanes] += products of TOKENS rows of the head with N vectors of states, in k columns. Those `ahead`
  // numbers further are asked for.
  template <int N>
  static void add_products(const T* const* rows, int64_t ahead, const T* x, int64_t k, T* tile, int64_t lanes) {
    const T* row[TOKENS];
    for (int i = 0; i < TOKENS; ++i) row[i] = rows[i];
    Vec<T> sum[TOKENS][N] = {};
    for (int64_t p0 = 0; p0 < k; p0 += LINE) {
#pragma GCC unroll 8
      for (int i = 0; i < TOKENS; ++i) __builtin_prefetch(row[i] + p0 + ahead);
      const int64_t end = k - p0 < LINE ? k : p0 + LINE;
      for (int64_t p = p0; p < end; ++p) {
        Vec<T> b[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) b[v] = load_vector(x + (p * N + v) * W);
#pragma GCC unroll 8
        for (int i = 0; i < TOKENS; ++i) {
          const T a = row[i][p];
#pragma GCC unroll 4
          for (int v = 0; v < N; ++v) sum[i][v] += a * b[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TOKENS; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        T* to = tile + i * lanes + v * W;
        store_vector(to, load_vector(to) + sum[i][v]);
      }
    }
  }

  // tile [BLOCK, lanes] = logits of tokens [first, first + count), not capped; rows of tokens past them hold anything.
  static void logits(const HeadCall& call, int64_t first, int64_t count, T* tile, T* buffer, T* shift) {
    const int64_t lanes = call.lanes, d = call.d, tiles = (count + TOKENS - 1) / TOKENS;
    const T* bias = call.bias.data ? Any::read_any(call.bias, 0, first, count, shift) : nullptr;
    for (int64_t t = 0; t < tiles * TOKENS; ++t) {
      const Vec<T> start = Vec<T>{} + (bias && t < count ? bias[t] : T(0));
      for (int64_t l = 0; l < lanes; l += W) store_vector(tile + t * lanes + l, start);
    }
    const bool plain = Any::is_plain(call.head);
    for (int64_t p0 = 0; p0 < d; p0 += DEPTH) {
      const int64_t n = d - p0 < DEPTH ? d - p0 : DEPTH;
      const T* from = buffer;
      int64_t stride = DEPTH;
      if (plain) {
        stride = call.head.row_stride;
        from = static_cast<const T*>(call.head.data) + first * stride + p0;
      } else {
        for (int64_t t = 0; t < count; ++t) {
          const T* numbers = Any::read_any(call.head, first + t, p0, n, buffer + t * DEPTH);
          (void)numbers;  // written to the buffer: the head is not plain
        }
      }
      for (int64_t panel = 0; panel < lanes; panel += VECTORS * W) {
        const int64_t width = lanes - panel < VECTORS * W ? lanes - panel : VECTORS * W;
        const T* x = static_cast<const T*>(call.states) + panel * d + p0 * width;
        for (int64_t t = 0; t < count; t += TOKENS) {
          const T* rows[TOKENS];
          for (int64_t i = 0; i < TOKENS; ++i) rows[i] = from + (t + i < count ? t + i : count - 1) * stride;
          int64_t ahead = 0;
          if (plain &&
              panel == 0) {  // the next tokens, after the last ones the next columns, at their end the next block
            ahead = t + TOKENS < count ? TOKENS * stride : p0 + n < d ? DEPTH - t * stride : TOKENS * stride - p0;
          }
          T* to = tile + t * lanes + panel;
          switch (width / W) {
            case 1: add_products<1>(rows, ahead, x, n, to, lanes); break;
            case 2: add_products<2>(rows, ahead, x, n, to, lanes); break;
            case 3: add_products < VECTORS<3 ? 1 : 3>(rows, ahead, x, n, to, lanes); break;
            default: add_products<VECTORS>(rows, ahead, x, n, to, lanes); break;
          }
        }
      }
    }
  }

  static Vec<T> floor_of(Vec<T> peak) { return peak == -infinity() ? Vec<T>{} : peak; }

  // Caps a column of logits and returns the largest; a NaN is passed over here and comes back with the sums.
  static Vec<T> cap_column(const HeadCall& call, int64_t count, T* column) {
    Vec<T> top = Vec<T>{} - infinity();
    const T cap = T(call.softcap);
    for (int64_t t = 0; t < count; ++t) {
      Vec<T> z = load_vector(column + t * call.lanes);
      if (cap > 0) {
        z = tanh_vector(z / cap) * cap;
        store_vector(column + t * call.lanes, z);
      }
      top = z > top ? z : top;
    }
    return top;
  }

  // Slopes by capped logits -> slopes by raw ones.
  static Vec<T> through_cap(Vec<T> slope, Vec<T> logit, T cap) {
    if (!(cap > 0)) return slope;
    const Vec<T> share = logit / cap;
    return slope * (T(1) - share * share);
  }

  // Where the numbers of a part are: each array is as long as there are lanes.
  struct Numbers {
    T *peak, *sum, *fade, *at, *level;
    Numbers(const HeadPart& part, int64_t lanes)
        : peak(static_cast<T*>(part.numbers)),
          sum(peak + lanes),
          fade(sum + lanes),
          at(fade + lanes),
          level(at + lanes) {}
  };

  // Adds a block's logits to the sums of log probabilities; the tile becomes the weights of the gradient.
  static void add_log_probs(const HeadCall& call, int64_t first, int64_t count, T* tile, const HeadPart& part) {
    const Numbers sums(part, call.lanes);
    const int64_t lanes = call.lanes;
    const T cap = T(call.softcap);
    for (int64_t l = 0; l < lanes; l += W) {
      T* column = tile + l;
      const Vec<T> top = cap_column(call, count, column), old = load_vector(sums.peak + l);
      const Vec<T> peak = top > old ? top : old, floor = floor_of(peak);
      for (int64_t i = 0; i < W; ++i) {
        const int64_t target = call.targets[l + i] - first;
        if (target >= 0 && target < count) sums.at[l + i] = column[target * lanes + i];
        if (!(top[i] > old[i])) continue;
        int64_t t = 0;
        while (column[t * lanes + i] != top[i]) ++t;
        part.best[l + i] = first + t;
      }
      const Vec<T> fade = exp_down(old - floor);
      Vec<T> total = {};
      for (int64_t t = 0; t < count; ++t) {
        const Vec<T> z = load_vector(column + t * lanes), weight = exp_down(z - floor);
        total += weight;
        if (call.gradient) store_vector(column + t * lanes, through_cap(weight, z, cap));
      }
      store_vector(sums.sum + l, load_vector(sums.sum + l) * fade + total);
      store_vector(sums.peak + l, peak);
      store_vector(sums.fade + l, fade);
    }
  }

  // The same for the divergence of lanes [0, half) from lanes [half, lanes). Its weights are those of the mean, and
  // those of the first distribution.
  static void add_divergence(const HeadCall& call, int64_t first, int64_t begin, int64_t count, T* tile,
                             const HeadPart& part) {
    const Numbers sums(part, call.lanes);
    const int64_t lanes = call.lanes, half = lanes / 2;
    const T cap = T(call.softcap);
    for (int64_t l = 0; l < half; l += W) {
      T *column = tile + l, *other = column + half;
      const Vec<T> top = cap_column(call, count, column), top_ref = cap_column(call, count, other);
      const Vec<T> old = load_vector(sums.peak + l), old_ref = load_vector(sums.peak + half + l);
      const Vec<T> peak = top > old ? top : old, peak_ref = top_ref > old_ref ? top_ref : old_ref;
      const Vec<T> floor = floor_of(peak), floor_ref = floor_of(peak_ref);
      if (first == begin) {
        const Vec<T> gap = top - top_ref, size = gap < T(0) ? -gap : gap;
        store_vector(sums.level + l, size < infinity() ? gap : Vec<T>{});
      }
      const Vec<T> level = load_vector(sums.level + l);
      const Vec<T> fade = exp_down(old - floor), fade_ref = exp_down(old_ref - floor_ref);
      Vec<T> total = {}, total_ref = {}, apart = {};
      for (int64_t t = 0; t < count; ++t) {
        const Vec<T> z = load_vector(column + t * lanes), r = load_vector(other + t * lanes);
        const Vec<T> weight = exp_down(z - floor), weight_ref = exp_down(r - floor_ref);
        const Vec<T> weighted = (call.reverse ? weight_ref : weight) * (z - r - level);
        total += weight;
        total_ref += weight_ref;
        apart += weighted;
        if (call.gradient) {
          store_vector(column + t * lanes, through_cap(call.reverse ? weight_ref : weighted, z, cap));
          store_vector(other + t * lanes, through_cap(weight, z, cap));
        }
      }
      const Vec<T> fade_mean = call.reverse ? fade_ref : fade;
      store_vector(sums.at + l, load_vector(sums.at + l) * fade_mean + apart);
      store_vector(sums.sum + l, load_vector(sums.sum + l) * fade + total);
      store_vector(sums.sum + half + l, load_vector(sums.sum + half + l) * fade_ref + total_ref);
      store_vector(sums.peak + l, peak);
      store_vector(sums.peak + half + l, peak_ref);
      store_vector(sums.fade + l, fade_mean);
      store_vector(sums.fade + half + l, fade);
    }
  }

  // ROWS rows of slopes, each faded, += weights [count, lanes] of those rows times a panel [count, COLUMNS] of the
  // head.
  template <int N>
  static void add_slopes(const T* weights, int64_t lanes, const T* panel, int64_t count, const T* fade, T* slopes,
                         int64_t stride, const T* ahead, int64_t ahead_stride) {
    Vec<T> sum[ROWS][N] = {};
    for (int64_t t = 0; t < count; ++t) {
      __builtin_prefetch(ahead + t * ahead_stride);
      Vec<T> b[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) b[v] = load_vector(panel + t * COLUMNS + v * W);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const T a = weights[t * lanes + i];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[i][v] += a * b[v];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        T* to = slopes + i * stride + v * W;
        store_vector(to, load_vector(to) * fade[i] + sum[i][v]);
      }
    }
  }

  // The block's part of the gradient. Columns of the head are copied a few at a time: rows of a power of two would
  // share few lines of the caches.
  static void add_gradient(const HeadCall& call, int64_t first, int64_t count, const T* tile, T* panel,
                           const HeadPart& part) {
    const Numbers sums(part, call.lanes);
    const int64_t lanes = call.lanes, d = call.d, stride = padded(d);
    const bool plain = Any::is_plain(call.head);
    for (int64_t c0 = 0; c0 < d; c0 += COLUMNS) {
      const int64_t n = d - c0 < COLUMNS ? d - c0 : COLUMNS, vectors = (n + W - 1) / W;
      for (int64_t t = 0; t < count; ++t) {
        T* to = panel + t * COLUMNS;
        const T* from = Any::read_any(call.head, first + t, c0, n, to);
        if (from != to && n == COLUMNS) {
#pragma GCC unroll 4
          for (int v = 0; v < 3; ++v) store_vector(to + v * W, load_vector(from + v * W));
        } else if (from != to) {
          for (int64_t c = 0; c < n; ++c) to[c] = from[c];
        }
        for (int64_t c = n; c % W; ++c) to[c] = 0;
      }
      const int64_t further = plain && c0 + 2 * COLUMNS <= d ? COLUMNS : 0;
      const T* next = plain ? static_cast<const T*>(call.head.data) + first * call.head.row_stride + c0 : panel;
      const int64_t next_stride = plain ? call.head.row_stride : 0;
      const int64_t halves = call.pair ? 2 : 1, half = lanes / halves;
      for (int64_t l = 0; l < lanes; l += ROWS) {
        if (l % half >= call.rows) continue;  // no row there
        const T* ahead = next + further + l / ROWS % 3 * (further ? W : 0);
        T* to = static_cast<T*>(part.slopes) + l * stride + c0;
        switch (vectors) {
          case 1: add_slopes<1>(tile + l, lanes, panel, count, sums.fade + l, to, stride, ahead, next_stride); break;
          case 2: add_slopes<2>(tile + l, lanes, panel, count, sums.fade + l, to, stride, ahead, next_stride); break;
          default: add_slopes<3>(tile + l, lanes, panel, count, sums.fade + l, to, stride, ahead, next_stride); break;
        }
      }
    }
  }

  // Tokens [begin, end) of the head into a part.
  static void run(const HeadCall& call, int64_t begin, int64_t end, const HeadPart& part, void* scratch) {
    T* tile = static_cast<T*>(scratch);
    T* buffer = tile + BLOCK * call.lanes;
    T* panel = buffer + BLOCK * DEPTH;
    T* shift = panel + BLOCK * COLUMNS;
    const Numbers sums(part, call.lanes);
    for (int64_t l = 0; l < call.lanes; ++l) {
      sums.peak[l] = -infinity();
      sums.sum[l] = sums.fade[l] = sums.level[l] = 0;
      sums.at[l] = call.pair ? T(0) : T(__builtin_nan(""));
      part.best[l] = 0;
    }
    if (call.gradient) {
      T* slopes = static_cast<T*>(part.slopes);
      for (int64_t e = 0; e < call.lanes * padded(call.d); ++e) slopes[e] = 0;
    }
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t count = end - first < BLOCK ? end - first : BLOCK;
      logits(call, first, count, tile, buffer, shift);
      if (call.pair) add_divergence(call, first, begin, count, tile, part);
      else add_log_probs(call, first, count, tile, part);
      if (call.gradient) add_gradient(call, first, count, tile, panel, part);
    }
  }

  static double down(double peak) { return peak == -__builtin_inf() ? 0 : peak; }

  // What the parts of the vocabulary say together of a lane: their largest logit, and the sum of the exponentials of
  // logits less it.
  static double total_of(const HeadCall& call, const HeadPart* parts, int64_t count, int64_t lane, double* peak,
                         int64_t* best) {
    *peak = -__builtin_inf();
    *best = 0;
    for (int64_t s = 0; s < count; ++s) {
      const double value = Numbers(parts[s], call.lanes).peak[lane];
      if (value > *peak) {
        *peak = value;
        *best = parts[s].best[lane];
      }
    }
    double total = 0;
    for (int64_t s = 0; s < count; ++s) {
      const Numbers sums(parts[s], call.lanes);
      total += sums.sum[lane] * __builtin_exp(sums.peak[lane] - down(*peak));
    }
    return total;
  }

  static void finish_log_probs(const HeadCall& call, const HeadPart* parts, int64_t count, int64_t row,
                               const HeadResult& out) {
    double peak, at = __builtin_nan("");
    int64_t best;
    const double total = total_of(call, parts, count, row, &peak, &best), log_sum = peak + __builtin_log(total);
    for (int64_t s = 0; s < count; ++s) {
      const T here = Numbers(parts[s], call.lanes).at[row];
      if (here == here) at = here;
    }
    static_cast<T*>(out.value)[out.row + row] = T(at - log_sum);
    static_cast<T*>(out.top)[out.row + row] = T(peak - log_sum);
    out.best[out.row + row] = best;
    if (!call.gradient) return;
    const int64_t d = call.d;
    T* slope = static_cast<T*>(out.slope) + (out.row + row) * d;
    T buffer[DEPTH];
    const double share = call.softcap > 0 ? at / call.softcap : 0;
    const T own = T(1 - share * share);
    for (int64_t p0 = 0; p0 < d; p0 += DEPTH) {
      const int64_t n = d - p0 < DEPTH ? d - p0 : DEPTH;
      const T* chosen = Any::read_any(call.head, call.targets[row], p0, n, buffer);
      for (int64_t p = 0; p < n; ++p) slope[p0 + p] = own * chosen[p];
    }
    for (int64_t s = 0; s < count; ++s) {
      const T scale = T(__builtin_exp(Numbers(parts[s], call.lanes).peak[row] - down(peak)) / total);
      const T* from = static_cast<const T*>(parts[s].slopes) + row * padded(d);
      for (int64_t p = 0; p < d; ++p) slope[p] -= scale * from[p];
    }
  }

  static void finish_divergence(const HeadCall& call, const HeadPart* parts, int64_t count, int64_t row,
                                const HeadResult& out) {
    const int64_t half = call.lanes / 2, d = call.d;
    double peak, peak_ref, apart = 0;
    int64_t best;
    const double total = total_of(call, parts, count, row, &peak, &best);
    const double total_ref = total_of(call, parts, count, half + row, &peak_ref, &best);
    const int64_t mean_lane = call.reverse ? half + row : row;
    const double mean_floor = down(call.reverse ? peak_ref : peak), level = Numbers(parts[0], call.lanes).level[row];
    for (int64_t s = 0; s < count; ++s) {
      const Numbers sums(parts[s], call.lanes);
      const double scale = __builtin_exp(sums.peak[mean_lane] - mean_floor);
      apart += (sums.at[row] + (sums.level[row] - level) * sums.sum[mean_lane]) * scale;
    }
    const double mean = apart / (call.reverse ? total_ref : total);
    const double kl = mean - ((peak - peak_ref - level) + (__builtin_log(total) - __builtin_log(total_ref)));
    static_cast<T*>(out.value)[out.row + row] = T(call.reverse ? -kl : kl);
    if (!call.gradient) return;
    T* slope = static_cast<T*>(out.slope) + (out.row + row) * d;
    for (int64_t p = 0; p < d; ++p) slope[p] = 0;
    for (int64_t s = 0; s < count; ++s) {
      const Numbers sums(parts[s], call.lanes);
      const double here = __builtin_exp(sums.peak[row] - down(peak)) / total;
      const double mean_here = __builtin_exp(sums.peak[half + row] - down(peak_ref)) / total_ref;
      const T first = T(call.reverse ? -mean_here : here);
      const T second = T(call.reverse ? here : here * (sums.level[row] - level - mean));
      const T* means = static_cast<const T*>(parts[s].slopes) + row * padded(d);
      const T* weights = means + half * padded(d);
      for (int64_t p = 0; p < d; ++p) slope[p] += first * means[p] + second * weights[p];
    }
  }

  static void finish(const HeadCall& call, const HeadPart* parts, int64_t count, int64_t row, const HeadResult& out) {
    if (call.pair) finish_divergence(call, parts, count, row, out);
    else finish_log_probs(call, parts, count, row, out);
  }

  static HeadKernel kernel() { return {LANE, BLOCK, W, sizeof(T), scratch_bytes, pack, run, finish}; }
};
