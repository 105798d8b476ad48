// What csrc/cuda takes from CUDA, for one processor: the threads of a block are contexts that run one after another, in
// an order drawn anew at every __syncthreads(). Blocks run in a drawn order, too.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../operands.h"

#define __global__
#define __device__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return float(operands::read(kf::DType::bf16, &v.bits)); }
inline float __half2float(__half v) { return float(operands::read(kf::DType::f16, &v.bits)); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  __nv_bfloat16 out;
  operands::write(kf::DType::bf16, &out.bits, v);
  return out;
}
inline __half __float2half_rn(float v) {
  __half out;
  operands::write(kf::DType::f16, &out.bits, v);
  return out;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

namespace cuda_on_cpu {

constexpr size_t STACK_BYTES = 64 << 10;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  bool finished = false;
};

inline ucontext_t scheduler;
inline Thread* running = nullptr;
inline const std::function<void()>* kernel = nullptr;
inline operands::Random order(1);
inline int64_t launches = 0, barriers = 0;

inline void enter() {
  (*kernel)();
  running->finished = true;
  swapcontext(&running->context, &scheduler);
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[size_t(order.below(int64_t(i)))]);
}

inline void run_block(unsigned threads) {
  static std::vector<Thread> all;
  if (all.size() < threads) all = std::vector<Thread>(threads);
  std::vector<unsigned> turns(threads);
  for (unsigned t = 0; t < threads; ++t) {
    turns[t] = t;
    all[t].finished = false;
    getcontext(&all[t].context);
    all[t].context.uc_stack.ss_sp = all[t].stack.data();
    all[t].context.uc_stack.ss_size = STACK_BYTES;
    all[t].context.uc_link = nullptr;
    makecontext(&all[t].context, enter, 0);
  }
  for (unsigned finished = 0; finished == 0; ++barriers) {
    shuffle(turns);
    for (unsigned t : turns) {
      threadIdx = dim3(t, 0, 0);
      running = &all[t];
      swapcontext(&scheduler, &running->context);
      finished += running->finished;
    }
    if (finished != 0 && finished != threads) {
      std::printf("%u of %u threads do not reach a barrier that the others wait at\n", finished, threads);
      std::exit(1);
    }
  }
}

inline void launch(dim3 grid, unsigned threads, const std::function<void()>& body) {
  kernel = &body;
  gridDim = grid, blockDim = dim3(threads);
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, 0);
  }
  shuffle(blocks);
  for (const dim3& block : blocks) {
    blockIdx = block;
    run_block(threads);
  }
  ++launches;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { swapcontext(&cuda_on_cpu::running->context, &cuda_on_cpu::scheduler); }
