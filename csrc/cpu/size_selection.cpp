#include "size_selection.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "../common/parallel.h"

namespace kf::cpu {
namespace {

constexpr int64_t CHUNK = 1 << 18;  // entries counted by one task

// The digits of 31 or 63 bits, highest first.
struct Digits {
  int levels;
  int shift[6], width[6];
};
constexpr Digits DIGITS_32 = {3, {20, 10, 0}, {11, 10, 10}};
constexpr Digits DIGITS_64 = {6, {52, 42, 32, 22, 11, 0}, {11, 10, 10, 10, 11, 11}};

bool is_wide(const SizeSource& source) { return source.x_dtype == DType::f64; }

}  // namespace

uint64_t infinity_key(const SizeSource& source) {
  return is_wide(source) ? uint64_t(0x7ff) << 52 : uint64_t(0x7f800000);
}

Selection select_size(const SizeSource& source, int64_t count, int threads) {
  const Digits& digits = is_wide(source) ? DIGITS_64 : DIGITS_32;
  const KernelTable& table = active_table();
  const int members = worthwhile_threads(double(source.n), 1 << 17, threads);
  Selection selection = {};
  int64_t wanted = count;  // among the entries whose higher digits are those of the key
  for (int level = 0; level < digits.levels; ++level) {
    const int bins = 1 << digits.width[level];
    const DigitPass pass = {digits.shift[level], digits.width[level], selection.key, level == 0};
    std::vector<int64_t> histogram(bins, 0);
    Counter next;
    std::mutex mutex;
    run_team(members, [&](int, Team&) {
      std::vector<int64_t> mine(bins, 0);
      uint64_t largest = 0;
      for (int64_t t; (t = next.take()) * CHUNK < source.n;) {
        table.count_digits(source, t * CHUNK, std::min(source.n, (t + 1) * CHUNK), pass, mine.data(), &largest);
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int b = 0; b < bins; ++b) histogram[b] += mine[b];
      selection.largest = std::max(selection.largest, largest);
    });
    if (level == 0 && selection.largest > infinity_key(source)) return selection;
    int bin = bins - 1;
    for (; bin > 0 && histogram[bin] < wanted; --bin) wanted -= histogram[bin];
    selection.key = selection.key << digits.width[level] | uint64_t(bin);
    selection.equal = histogram[bin];
  }
  selection.above = count - wanted;
  return selection;
}

int64_t position_of_equal(const SizeSource& source, uint64_t key, int64_t nth) {
  const KernelTable& table = active_table();
  for (int64_t first = 0; first < source.n; first += CHUNK) {
    const int64_t at = table.find_equal(source, first, std::min(source.n, first + CHUNK), key, &nth);
    if (at >= 0) return at;
  }
  return source.n - 1;  // not reached: there are that many
}

}  // namespace kf::cpu
