// Scratch memory for one call, aligned to a page. Freed blocks are pooled for later calls, up to KEPT_BYTES in all:
// fresh pages cost more to fault in than the kernels take to fill them. Throws std::bad_alloc when there is none.
#pragma once
#include <cstddef>

namespace kf {

constexpr size_t KEPT_BYTES = size_t(128) << 20;

class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  template <class T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

// Returns the pooled blocks to the system.
void release_scratch();

}  // namespace kf
