// Sizes of entries as integers, and counts of their digits.

constexpr int64_t SIZE_BLOCK = 1024;  // entries at a time: their keys stay in the first-level cache

template <class T, class S>
inline void widen_block(const S* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen<T>(from[i]);
}

inline void widen_block(const Bf16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES<float> <= count; i += LANES<float>) store_vector(to + i, load_vector(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}
inline void widen_block(const F16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES<float> <= count; i += LANES<float>) store_vector(to + i, load_vector(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Entries [first, first + count) as numbers of arithmetic type T: in place where they are stored as T, else in
// `buffer`.
template <class T>
inline const T* block_of(const void* data, DType dtype, int64_t first, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const double*>(data) + first;
  } else {
    switch (dtype) {
      case DType::bf16: widen_block(static_cast<const Bf16*>(data) + first, count, buffer); return buffer;
      case DType::f16: widen_block(static_cast<const F16*>(data) + first, count, buffer); return buffer;
      default: return static_cast<const float*>(data) + first;
    }
  }
}

template <class T>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

template <class T>
struct SizeBody {
  using Key = typename KeyOf<T>::type;
  static constexpr Key MAGNITUDE = ~Key(0) >> 1;

  static Key bits(T v) {
    Key key;
    __builtin_memcpy(&key, &v, sizeof(key));
    return key & MAGNITUDE;
  }

  static void keys_of(const SizeSource& source, int64_t first, int64_t count, Key* keys) {
    T x_buffer[SIZE_BLOCK], y_buffer[SIZE_BLOCK];
    const T* x = block_of(source.x, source.x_dtype, first, count, x_buffer);
    if (source.kind == SizeKind::plain) {
      for (int64_t i = 0; i < count; ++i) keys[i] = bits(x[i]);
      return;
    }
    const T* y = block_of(source.y, source.y_dtype, first, count, y_buffer);
    if (source.kind == SizeKind::quotient) {
      for (int64_t i = 0; i < count; ++i) keys[i] = bits(x[i] / (y[i] + T(1e-8)));
    } else {
      for (int64_t i = 0; i < count; ++i) keys[i] = bits(x[i] - y[i]);
    }
  }

  static void count_digits(const SizeSource& source, int64_t first, int64_t last, const DigitPass& pass,
                           int64_t* histogram, uint64_t* largest) {
    uint32_t counts[2][2048] = {};  // two, so that neighbors of one digit do not wait for each other
    Key keys[SIZE_BLOCK], chosen[SIZE_BLOCK];
    const Key mask = (Key(1) << pass.width) - 1, prefix = Key(pass.prefix);
    Key top = 0;
    for (int64_t begin = first; begin < last; begin += SIZE_BLOCK) {
      int64_t count = last - begin < SIZE_BLOCK ? last - begin : SIZE_BLOCK;
      keys_of(source, begin, count, keys);
      const Key* counted = keys;
      if (pass.all) {
        for (int64_t i = 0; i < count; ++i) top = keys[i] > top ? keys[i] : top;
      } else {
        int64_t matches = 0;
        for (int64_t i = 0; i < count; ++i) {
          chosen[matches] = keys[i];
          matches += (keys[i] >> pass.shift >> pass.width) == prefix;
        }
        counted = chosen;
        count = matches;
      }
      int64_t i = 0;
      for (; i + 1 < count; i += 2) {
        ++counts[0][(counted[i] >> pass.shift) & mask];
        ++counts[1][(counted[i + 1] >> pass.shift) & mask];
      }
      if (i < count) ++counts[0][(counted[i] >> pass.shift) & mask];
    }
    for (int b = 0; b < 1 << pass.width; ++b) histogram[b] += int64_t(counts[0][b]) + counts[1][b];
    if (uint64_t(top) > *largest) *largest = top;
  }

  static int64_t find_equal(const SizeSource& source, int64_t first, int64_t last, uint64_t key, int64_t* nth) {
    Key keys[SIZE_BLOCK];
    for (int64_t begin = first; begin < last; begin += SIZE_BLOCK) {
      const int64_t count = last - begin < SIZE_BLOCK ? last - begin : SIZE_BLOCK;
      keys_of(source, begin, count, keys);
      int64_t matches = 0;
      for (int64_t i = 0; i < count; ++i) matches += keys[i] == Key(key);
      if (matches < *nth) {
        *nth -= matches;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        if (keys[i] == Key(key) && --*nth == 0) return begin + i;
      }
    }
    return -1;
  }
};

struct SizeBodies {
  static void count_digits(const SizeSource& source, int64_t first, int64_t last, const DigitPass& pass,
                           int64_t* histogram, uint64_t* largest) {
    if (source.x_dtype == DType::f64)
      return SizeBody<double>::count_digits(source, first, last, pass, histogram, largest);
    SizeBody<float>::count_digits(source, first, last, pass, histogram, largest);
  }
  static int64_t find_equal(const SizeSource& source, int64_t first, int64_t last, uint64_t key, int64_t* nth) {
    if (source.x_dtype == DType::f64) return SizeBody<double>::find_equal(source, first, last, key, nth);
    return SizeBody<float>::find_equal(source, first, last, key, nth);
  }
};
