#include "best_overlap.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "by_rows.h"
#include "kernel_table.h"

namespace kf::cpu {
namespace {

constexpr int64_t CHUNK_BYTES = 128 << 10;  // of the book, read by one task for all masks

}  // namespace

void best_overlap(const TensorView& index, const TensorView& count, const TensorView& masks, const TensorView& book,
                  int threads) {
  require(masks.ndim == 2 && masks.dtype == DType::u8, "masks must be a matrix of bytes");
  require(book.ndim == 2 && book.dtype == DType::u8 && book.shape[1] == masks.shape[1],
          "book must be a matrix of bytes, as wide as masks");
  const int64_t rows = masks.shape[0], bytes = masks.shape[1], entries = book.shape[0];
  require(entries > 0, "book must have rows");
  require(bytes <= 1 || (masks.stride[1] == 1 && book.stride[1] == 1), "masks and book must have contiguous rows");
  check_vector(index, "index", rows, DType::i64);
  check_vector(count, "count", rows, DType::i64);
  if (rows == 0) return;
  const OverlapCall call = {static_cast<const uint8_t*>(masks.data), masks.stride[0], rows,
                            static_cast<const uint8_t*>(book.data),  book.stride[0],  bytes};
  auto* best_index = static_cast<int64_t*>(index.data);
  auto* best_count = static_cast<int64_t*>(count.data);
  std::fill(best_index, best_index + rows, 0);
  std::fill(best_count, best_count + rows, -1);
  const int64_t step = std::max<int64_t>(1, CHUNK_BYTES / std::max<int64_t>(1, bytes));
  const int members = worthwhile_threads(double(rows) * double(entries) * double(bytes), 1 << 20, threads);
  const KernelTable& table = active_table();
  Counter next;
  std::mutex mutex;
  run_team(members, [&](int, Team&) {
    std::vector<int64_t> mine(2 * rows, -1);  // counts, then indices
    for (int64_t t; (t = next.take()) * step < entries;) {
      table.best_overlap(call, t * step, std::min(entries, (t + 1) * step), mine.data(), mine.data() + rows);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t found = mine[r], at = mine[rows + r];
      if (found > best_count[r] || (found == best_count[r] && at < best_index[r])) {
        best_count[r] = found;
        best_index[r] = at;
      }
    }
  });
}

}  // namespace kf::cpu
