// acc[i, j] += alpha * tile[i - i0, j - j0] for j <= i: the strict upper triangle is neither read nor written.

template <class T, class A>
inline void add_lower_rows(const T* tile, int tile_stride, int64_t rows, int64_t columns, int64_t i0, int64_t j0,
                           double alpha, A* acc, int64_t acc_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t below = i0 + i - j0 + 1;
    const int64_t n = below < columns ? below : columns;
    A* __restrict to = acc + (i0 + i) * acc_stride + j0;
    const T* __restrict from = tile + i * tile_stride;
    const A scale = A(alpha);
    for (int64_t j = 0; j < n; ++j) to[j] += scale * A(from[j]);
  }
}

template <class T>
inline void add_lower_tile(const T* tile, int tile_stride, int64_t rows, int64_t columns, int64_t i0, int64_t j0,
                           double alpha, const Accumulator& acc) {
  if (acc.dtype == DType::f64) {
    add_lower_rows(tile, tile_stride, rows, columns, i0, j0, alpha, static_cast<double*>(acc.data), acc.stride);
  } else {
    add_lower_rows(tile, tile_stride, rows, columns, i0, j0, alpha, static_cast<float*>(acc.data), acc.stride);
  }
}

// Asks for the part of acc that a tile will be added to, while the tile is still being computed.
inline void prefetch_tile(int64_t rows, int64_t columns, int64_t i0, int64_t j0, const Accumulator& acc) {
  const int64_t item = acc.dtype == DType::f64 ? 8 : 4;
  for (int64_t i = 0; i < rows; ++i) {
    const char* row = static_cast<const char*>(acc.data) + ((i0 + i) * acc.stride + j0) * item;
    for (int64_t byte = 0; byte < columns * item; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}
