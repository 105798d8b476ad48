// The entry of a given rank among sizes |x|, |x / (y + 1e-8)| or |x - y|, by the digits of their bits: sizes are not
// negative, so their bits as integers have their order.
#pragma once
#include <cstdint>

#include "kernel_table.h"

namespace kf::cpu {

struct Selection {
  uint64_t key;      // the bits of the count-th largest size
  int64_t above;     // entries that are larger
  int64_t equal;     // entries that are as large
  uint64_t largest;  // the bits of the largest size; of a NaN where there is one
};

// The bits of infinity: those of a NaN are larger.
uint64_t infinity_key(const SizeSource& source);

// count is from 1 to source.n. Where a size is NaN only `largest` means something.
Selection select_size(const SizeSource& source, int64_t count, int threads);

// Where the nth (from 1) of the entries with this key is.
int64_t position_of_equal(const SizeSource& source, uint64_t key, int64_t nth);

}  // namespace kf::cpu
