// ties_merge: blocks of entries, one memory after another, then the merge of each vector.

template <class T>
struct TiesMergeBody {
  static constexpr int64_t BLOCK = 512;
  using Key = typename SizeBody<T>::Key;

  // Weighted trimmed differences of entries [first, first + count); zeros after them. Not inlined: a product that is
  // stored cannot become part of a fused multiply-add, which would leave a sign where c a + c (-a) is 0.
  __attribute__((noinline)) static void weigh(const T* memory, const T* base, int64_t count, T coefficient, Key bound,
                                              int64_t inclusive, T* out) {
    int64_t i = 0;
    for (int64_t end : {inclusive < count ? (inclusive > 0 ? inclusive : 0) : count, count}) {
      for (; i < end; ++i) {
        const T delta = memory[i] - base[i];
        out[i] = SizeBody<T>::bits(delta) >= bound ? coefficient * delta : T(0);
      }
      ++bound;
    }
    for (; i < BLOCK; ++i) out[i] = T(0);
  }

  template <class S>
  static void store_block(S* out, const T* block, int64_t count) {
    int64_t i = 0;
    if constexpr (sizeof(T) == 4) {
      for (; i + LANES<T> <= count; i += LANES<T>) store_vector(out + i, load_vector(block + i));
    }
    for (; i < count; ++i) narrow(block[i], out + i);
  }

  static void run(const MergeCall& call, int64_t first, int64_t last) {
    T weighted[MOST_MEMORIES][BLOCK], base_buffer[BLOCK], memory_buffer[BLOCK], start[BLOCK] = {}, merged[BLOCK];
    for (int64_t begin = first; begin < last; begin += BLOCK) {
      const int64_t count = last - begin < BLOCK ? last - begin : BLOCK;
      const T* base = block_of(call.base, call.base_dtype, begin, count, base_buffer);
      __builtin_memcpy(start, base, count * sizeof(T));
      for (int m = 0; m < call.memories; ++m) {
        const MergeCall::Memory& part = call.of[m];
        const T* memory = block_of(part.data, call.memory_dtype, begin, count, memory_buffer);
        weigh(memory, base, count, T(part.coefficient), Key(part.bound), part.last_equal + 1 - begin, weighted[m]);
      }
      for (int64_t i = 0; i < BLOCK; i += LANES<T>) {
        Vec<T> total = load_vector(weighted[0] + i);
        for (int m = 1; m < call.memories; ++m) total += load_vector(weighted[m] + i);
        Vec<T> sum = {}, share = {};
        for (int m = 0; m < call.memories; ++m) {
          const Vec<T> part = load_vector(weighted[m] + i);
          const Vec<T> along = total >= T(0) ? part : -part;
          sum += along > T(0) ? part : Vec<T>{};
          share += along > T(0) ? Vec<T>{} + T(call.of[m].coefficient) : Vec<T>{};
        }
        share = share == T(0) ? Vec<T>{} + T(1) : share;
        store_vector(merged + i, load_vector(start + i) + sum / share);
      }
      if constexpr (sizeof(T) == 8) {
        store_block(static_cast<double*>(call.out) + begin, merged, count);
      } else {
        switch (call.out_dtype) {
          case DType::bf16: store_block(static_cast<Bf16*>(call.out) + begin, merged, count); break;
          case DType::f16: store_block(static_cast<F16*>(call.out) + begin, merged, count); break;
          default: store_block(static_cast<float*>(call.out) + begin, merged, count);
        }
      }
    }
  }
};

struct TiesMergeBodies {
  static void run(const MergeCall& call, int64_t first, int64_t last) {
    if (call.base_dtype == DType::f64) return TiesMergeBody<double>::run(call, first, last);
    TiesMergeBody<float>::run(call, first, last);
  }
};
