#include "aligned_buffer.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kf {
namespace {

constexpr size_t PAGE_BYTES = 4096, HUGE_PAGE_BYTES = 2 << 20;

// Large buffers ask for large pages: panels are read from more places at once than there are entries for small ones.
void* allocate(size_t bytes) {
  if (bytes < HUGE_PAGE_BYTES) return std::aligned_alloc(PAGE_BYTES, bytes);
  void* data = std::aligned_alloc(HUGE_PAGE_BYTES, bytes);
#if defined(__linux__)
  if (data) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

struct Block {
  void* data;
  size_t bytes;
};

// Never destroyed: buffers may outlive static destruction in threads that are still running at exit.
struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) {
  const size_t unit = bytes < HUGE_PAGE_BYTES ? PAGE_BYTES : HUGE_PAGE_BYTES;
  bytes_ = bytes == 0 ? PAGE_BYTES : (bytes + unit - 1) / unit * unit;
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.blocks.size();
    for (size_t i = 0; i < p.blocks.size(); ++i) {
      const bool fits = p.blocks[i].bytes >= bytes_;
      if (fits && (best == p.blocks.size() || p.blocks[i].bytes < p.blocks[best].bytes)) best = i;
    }
    if (best < p.blocks.size()) {
      data_ = p.blocks[best].data;
      bytes_ = p.blocks[best].bytes;
      p.bytes -= bytes_;
      p.blocks.erase(p.blocks.begin() + static_cast<std::ptrdiff_t>(best));
      return;
    }
  }
  data_ = allocate(bytes_);
  if (!data_) throw std::bad_alloc();
}

AlignedBuffer::~AlignedBuffer() {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (bytes_ <= KEPT_BYTES) {
      while (!p.blocks.empty() && p.bytes + bytes_ > KEPT_BYTES) {  // the oldest goes first
        std::free(p.blocks.front().data);
        p.bytes -= p.blocks.front().bytes;
        p.blocks.erase(p.blocks.begin());
      }
      p.blocks.push_back({data_, bytes_});
      p.bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

void release_scratch() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (const Block& block : p.blocks) std::free(block.data);
  p.blocks.clear();
  p.bytes = 0;
}

}  // namespace kf
