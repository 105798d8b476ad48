// best_overlap: numbers of common ones of two rows of bytes.

struct OverlapBody {
  typedef uint8_t Bytes __attribute__((vector_size(KF_VECTOR_BYTES)));
  typedef uint64_t Words __attribute__((vector_size(KF_VECTOR_BYTES)));
  static constexpr int64_t STEPS = 31;  // 8 bits a step: what a byte can count

  // The number of ones of each byte.
  static Bytes ones(Bytes v) {
#if KF_VECTOR_BYTES == 64
    const __m512i half = _mm512_set1_epi8(15);
    const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_and_si512((__m512i)v, half);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), half);
    return (Bytes)_mm512_add_epi8(_mm512_shuffle_epi8(counts, low), _mm512_shuffle_epi8(counts, high));
#elif KF_VECTOR_BYTES == 32
    const __m256i half = _mm256_set1_epi8(15);
    const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_and_si256((__m256i)v, half);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), half);
    return (Bytes)_mm256_add_epi8(_mm256_shuffle_epi8(counts, low), _mm256_shuffle_epi8(counts, high));
#elif defined(KF_NEON)
    return (Bytes)vcntq_u8((uint8x16_t)v);
#else
    Words w = (Words)v;
    w = w - ((w >> 1) & 0x5555555555555555);
    w = (w & 0x3333333333333333) + ((w >> 2) & 0x3333333333333333);
    return (Bytes)((w + (w >> 4)) & 0x0f0f0f0f0f0f0f0f);
#endif
  }

  // The sum of the bytes of every word of 8.
  static Words sum_of_bytes(Bytes v) {
    Words w = (Words)v;
    w = (w & 0x00ff00ff00ff00ff) + ((w >> 8) & 0x00ff00ff00ff00ff);
    w = (w & 0x0000ffff0000ffff) + ((w >> 16) & 0x0000ffff0000ffff);
    return (w & 0xffffffff) + (w >> 32);
  }

  static int64_t common_ones(const uint8_t* a, const uint8_t* b, int64_t bytes) {
    Words total = {};
    int64_t i = 0;
    while (i + KF_VECTOR_BYTES <= bytes) {
      const int64_t left = (bytes - i) / KF_VECTOR_BYTES, steps = left < STEPS ? left : STEPS;
      Bytes counts = {};
      for (int64_t s = 0; s < steps; ++s, i += KF_VECTOR_BYTES) {
        counts += ones(load_unaligned<Bytes>(a + i) & load_unaligned<Bytes>(b + i));
      }
      total += sum_of_bytes(counts);
    }
    if (i < bytes) {
      Bytes x = {}, y = {};
      __builtin_memcpy(&x, a + i, bytes - i);
      __builtin_memcpy(&y, b + i, bytes - i);
      total += sum_of_bytes(ones(x & y));
    }
    int64_t sum = 0;
    for (int lane = 0; lane < KF_VECTOR_BYTES / 8; ++lane) sum += int64_t(total[lane]);
    return sum;
  }

  // Rows [first, last) of the book, in order: a later row replaces the best only with a larger count, or where the best
  // is of a later row still.
  static void rows(const OverlapCall& call, int64_t first, int64_t last, int64_t* count, int64_t* index) {
    for (int64_t j = first; j < last; ++j) {
      const uint8_t* row = call.book + j * call.book_stride;
      for (int64_t r = 0; r < call.rows; ++r) {
        const int64_t found = common_ones(call.masks + r * call.mask_stride, row, call.bytes);
        if (found > count[r] || (found == count[r] && j < index[r])) {
          count[r] = found;
          index[r] = j;
        }
      }
    }
  }
};
