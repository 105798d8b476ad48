// Products of rows of x with rows of matrices, both along d, and what is done with them: activation_distance and
// routed_linear. A number of the result is summed the same way whatever rows are beside it.

template <class T>
struct RowProductsBody {
  static constexpr int W = LANES<T>;
  static constexpr int64_t OUTPUTS = 48;  // rows of a matrix that one task multiplies
  static constexpr int64_t ROWS = 64;     // rows of x whose results are on hand
  static constexpr int64_t DEPTH = 256;   // of both that stays in the caches
  static constexpr int R = 4, C = 3;      // a tile of products

  // out[r * OUTPUTS + c] += x[r] w[c] for n numbers of each.
  template <int ROW_COUNT, int COLUMN_COUNT>
  static void add_tile(const T* const* x, const T* const* w, int64_t n, T* out) {
    Vec<T> sum[ROW_COUNT][COLUMN_COUNT] = {};
    int64_t p = 0;
    for (; p + W <= n; p += W) {
      Vec<T> b[COLUMN_COUNT];
#pragma GCC unroll 4
      for (int c = 0; c < COLUMN_COUNT; ++c) b[c] = load_vector(w[c] + p);
#pragma GCC unroll 4
      for (int r = 0; r < ROW_COUNT; ++r) {
        const Vec<T> a = load_vector(x[r] + p);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMN_COUNT; ++c) sum[r][c] += a * b[c];
      }
    }
    for (int r = 0; r < ROW_COUNT; ++r) {
      for (int c = 0; c < COLUMN_COUNT; ++c) {
        T total = sum_lanes<T>(sum[r][c]);
        for (int64_t q = p; q < n; ++q) total += x[r][q] * w[c][q];
        out[r * OUTPUTS + c] += total;
      }
    }
  }

  template <int COLUMN_COUNT>
  static void add_rows(const T* const* x, int64_t rows, const T* const* w, int64_t n, T* out) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) add_tile<R, COLUMN_COUNT>(x + r, w, n, out + r * OUTPUTS);
    for (; r < rows; ++r) add_tile<1, COLUMN_COUNT>(x + r, w, n, out + r * OUTPUTS);
  }

  // out [rows, OUTPUTS] = x [rows, d] times rows [first, first + count) of a matrix [h, d].
  static void multiply(const T* const* x, int64_t rows, const StepMatrix& matrix, int64_t first, int64_t count,
                       int64_t d, T* out) {
    alignas(64) T buffer[C][DEPTH];
    const T *from[ROWS], *w[C];
    for (int64_t e = 0; e < rows * OUTPUTS; ++e) out[e] = 0;
    for (int64_t p = 0; p < d; p += DEPTH) {
      const int64_t n = d - p < DEPTH ? d - p : DEPTH;
      for (int64_t r = 0; r < rows; ++r) from[r] = x[r] + p;
      for (int64_t c = 0; c < count; c += C) {
        const int64_t width = count - c < C ? count - c : C;
        for (int64_t k = 0; k < width; ++k) w[k] = MaskedStepBody<T>::read_any(matrix, first + c + k, p, n, buffer[k]);
        if (width == C) {
          add_rows<C>(from, rows, w, n, out + c);
        } else {
          for (int64_t k = 0; k < width; ++k) add_rows<1>(from, rows, w + k, n, out + c + k);
        }
      }
    }
  }

  static T activate(Activation kind, T x) {
    const double v = x;
    switch (kind) {
      case Activation::identity: return x;
      case Activation::relu: return x < 0 ? T(0) : x;
      case Activation::silu: return T(v / (1 + __builtin_exp(-v)));
      case Activation::gelu: return T(0.5 * v * (1 + __builtin_erf(v * 0.70710678118654752440)));
      default: return T(0.5 * v * (1 + __builtin_tanh(0.79788456080286535588 * (v + 0.044715 * v * v * v))));
    }
  }

  // Sums, over one task's outputs, of the squared differences of activations: one for each row of x.
  static void differences(const DistanceCall& call, int64_t memory, int64_t first, void* partial) {
    alignas(64) T out[ROWS * OUTPUTS];
    alignas(64) T before[OUTPUTS], shift[OUTPUTS];
    const T* from[ROWS];
    T* sums = static_cast<T*>(partial);
    const int64_t count = call.h - first < OUTPUTS ? call.h - first : OUTPUTS;
    StepMatrix matrix = call.weights;
    matrix.data = static_cast<char*>(matrix.data) + memory * call.memory_bytes;
    const T* bias = call.bias.data ? MaskedStepBody<T>::read_any(call.bias, 0, first, count, shift) : nullptr;
    for (int64_t n0 = 0; n0 < call.rows; n0 += ROWS) {
      const int64_t rows = call.rows - n0 < ROWS ? call.rows - n0 : ROWS;
      for (int64_t r = 0; r < rows; ++r) from[r] = static_cast<const T*>(call.x) + (n0 + r) * call.x_stride;
      multiply(from, rows, matrix, first, count, call.d, out);
      for (int64_t r = 0; r < rows; ++r) {
        const T* old = MaskedStepBody<T>::read_any(call.reference, n0 + r, first, count, before);
        T total = 0;
        for (int64_t c = 0; c < count; ++c) {
          const T now = out[r * OUTPUTS + c] + (bias ? bias[c] : T(0));
          const T gap = activate(call.activation, now) - activate(call.activation, old[c]);
          total += gap * gap;
        }
        sums[n0 + r] = total;
      }
    }
  }

  template <class S>
  static void store_row(const T* numbers, const T* bias, int64_t count, S* to) {
    for (int64_t c = 0; c < count; ++c) narrow(numbers[c] + (bias ? bias[c] : T(0)), to + c);
  }

  // One task's outputs of every row that goes through one matrix.
  static void routed(const RoutedCall& call, const StepMatrix& matrix, const int64_t* rows, int64_t row_count,
                     int64_t first) {
    alignas(64) T out[ROWS * OUTPUTS];
    alignas(64) T shift[OUTPUTS];
    const T* from[ROWS];
    const int64_t count = call.h - first < OUTPUTS ? call.h - first : OUTPUTS;
    const T* bias = call.bias.data ? MaskedStepBody<T>::read_any(call.bias, 0, first, count, shift) : nullptr;
    for (int64_t n0 = 0; n0 < row_count; n0 += ROWS) {
      const int64_t block = row_count - n0 < ROWS ? row_count - n0 : ROWS;
      for (int64_t r = 0; r < block; ++r) from[r] = static_cast<const T*>(call.x) + rows[n0 + r] * call.x_stride;
      multiply(from, block, matrix, first, count, call.d, out);
      for (int64_t r = 0; r < block; ++r) {
        const T* numbers = out + r * OUTPUTS;
        const int64_t at = rows[n0 + r] * call.h + first;
        if constexpr (sizeof(T) == 8) {
          store_row(numbers, bias, count, static_cast<double*>(call.out) + at);
        } else {
          switch (call.out_dtype) {
            case DType::f32: store_row(numbers, bias, count, static_cast<float*>(call.out) + at); break;
            case DType::bf16: store_row(numbers, bias, count, static_cast<Bf16*>(call.out) + at); break;
            default: store_row(numbers, bias, count, static_cast<F16*>(call.out) + at); break;
          }
        }
      }
    }
  }

  // Row i of x [rows, d] as numbers of T.
  static void widen_row(const StepMatrix& x, int64_t i, int64_t d, void* out) {
    T* to = static_cast<T*>(out);
    const T* from = MaskedStepBody<T>::read_any(x, i, 0, d, to);
    if (from != to) __builtin_memcpy(to, from, d * sizeof(T));
  }

  static RowProductsKernel kernel() { return {OUTPUTS, sizeof(T), widen_row, differences, routed}; }
};
