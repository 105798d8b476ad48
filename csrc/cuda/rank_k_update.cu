#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <utility>

#include "../common/error.h"
#include "rank_k_update.cuh"

namespace kf::cuda {
namespace {

// A block of 8 warps owns 64 rows x 256 columns of the weight: a warp 8 rows, a lane 8 neighboring columns, so that a
// lane reads and writes 16 bytes of a 16-bit weight at once. Factors pass through shared memory DEPTH columns at a
// time.
constexpr int WARPS = 8, ROWS_PER_WARP = 8, LANE_COLUMNS = 8, DEPTH = 16;
constexpr int BLOCK_ROWS = WARPS * ROWS_PER_WARP, BLOCK_COLUMNS = 32 * LANE_COLUMNS;
// A lane's columns of the right factor are in two halves of four, so that lanes that read together read neighbors: no
// two of them the same bank. 16 more than the columns, so that threads that write neighbors write different banks, too.
constexpr int HALF = BLOCK_COLUMNS / 2 + 16;

__device__ inline int right_place(int column) { return column % 8 / 4 * HALF + column / 8 * 4 + column % 4; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline void from_float(float v, float* out) { *out = v; }
__device__ inline void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ inline void from_float(float v, __half* out) { *out = __float2half_rn(v); }

using Word = uint32_t __attribute__((may_alias));

template <class T>
struct alignas(16) Pack {
  T item[16 / sizeof(T)];
};

// Eight neighbors, as they are in memory.
template <class T>
struct Eight {
  static constexpr int PACKS = LANE_COLUMNS * sizeof(T) / 16;
  Pack<T> pack[PACKS];

  __device__ inline void load(const T* from) {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) pack[p] = reinterpret_cast<const Pack<T>*>(from)[p];
  }
  __device__ inline float get(int i) const {
    constexpr int n = 16 / sizeof(T);
    return to_float(pack[i / n].item[i % n]);
  }
  // Numbers are converted after this: earlier, 16 bits would take a register of 32 until then.
  __device__ inline void stay_as_they_are() {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      auto* word = reinterpret_cast<Word*>(&pack[p]);
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(word[i]));
    }
  }
};

template <class T>
__device__ inline void store_eight(T* to, const float* from) {
  constexpr int n = 16 / sizeof(T);
#pragma unroll
  for (int p = 0; p < LANE_COLUMNS / n; ++p) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) from_float(from[p * n + i], &pack.item[i]);
    reinterpret_cast<Pack<T>*>(to)[p] = pack;
  }
}

struct Factor {
  const float* data;
  int64_t row_stride, k_stride;
};

// A matrix that is written. Strides are in elements; `step` is that between columns.
template <class T>
struct Target {
  T* data;
  int64_t row_stride, step;
};

// ALIGNED: neighboring columns are neighbors in memory and rows begin at multiples of 16 bytes.
// Of 16-bit weights two blocks share a multiprocessor: one stores while the other loads.
template <class W, class C, bool ALIGNED>
__global__ void __launch_bounds__(WARPS * 32, sizeof(W) == 2 ? 2 : 1)
    rank_k_update_kernel(Target<W> weight, Target<C> copy, Factor left, Factor right, float alpha, int64_t rows,
                         int64_t columns, int64_t k) {
  __shared__ float left_part[DEPTH][BLOCK_ROWS];
  __shared__ __align__(16) float right_part[DEPTH][2 * HALF];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t(blockIdx.y) * BLOCK_ROWS, column0 = int64_t(blockIdx.x) * BLOCK_COLUMNS;

  const int64_t column = column0 + lane * LANE_COLUMNS, first_row = row0 + warp * ROWS_PER_WARP;

  // All of the weight that this lane changes is on its way before anything waits: a store after each load would hold
  // back the next load, because the compiler cannot know that they are of different addresses.
  const bool whole = ALIGNED && column + LANE_COLUMNS <= columns;
  Eight<W> before[ROWS_PER_WARP];
  if (whole) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; ++r) {
      if (first_row + r < rows) before[r].load(weight.data + (first_row + r) * weight.row_stride + column);
    }
  }

  float sum[ROWS_PER_WARP][LANE_COLUMNS] = {};
  for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
    const int depth = k - k0 < DEPTH ? int(k - k0) : DEPTH;
    for (int i = threadIdx.x; i < DEPTH * BLOCK_ROWS; i += blockDim.x) {
      const int p = i / BLOCK_ROWS, r = i % BLOCK_ROWS;
      const bool inside = p < depth && row0 + r < rows;
      left_part[p][r] = inside ? alpha * left.data[(row0 + r) * left.row_stride + (k0 + p) * left.k_stride] : 0.0f;
    }
    for (int i = threadIdx.x; i < DEPTH * BLOCK_COLUMNS; i += blockDim.x) {
      const int p = i / BLOCK_COLUMNS, c = i % BLOCK_COLUMNS;
      const bool inside = p < depth && column0 + c < columns;
      right_part[p][right_place(c)] =
          inside ? right.data[(column0 + c) * right.row_stride + (k0 + p) * right.k_stride] : 0.0f;
    }
    __syncthreads();
    for (int p = 0; p < depth; ++p) {
      Eight<float> b;
      b.pack[0] = *reinterpret_cast<const Pack<float>*>(&right_part[p][lane * 4]);
      b.pack[1] = *reinterpret_cast<const Pack<float>*>(&right_part[p][HALF + lane * 4]);
#pragma unroll
      for (int r = 0; r < ROWS_PER_WARP; ++r) {
        const float a = left_part[p][warp * ROWS_PER_WARP + r];
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; ++c) sum[r][c] = fmaf(a, b.get(c), sum[r][c]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < ROWS_PER_WARP; ++r) before[r].stay_as_they_are();
#pragma unroll
  for (int r = 0; r < ROWS_PER_WARP; ++r) {
    const int64_t row = first_row + r;
    if (row >= rows || column >= columns) continue;
    const int64_t w_step = ALIGNED ? 1 : weight.step, c_step = ALIGNED ? 1 : copy.step;
    W* w = weight.data + row * weight.row_stride + column * w_step;
    C* c = copy.data ? copy.data + row * copy.row_stride + column * c_step : nullptr;
    if (whole) {
      float value[LANE_COLUMNS];
#pragma unroll
      for (int i = 0; i < LANE_COLUMNS; ++i) value[i] = before[r].get(i) + sum[r][i];
      store_eight(w, value);
      if (c) store_eight(c, value);
    } else {
      for (int i = 0; i < LANE_COLUMNS && column + i < columns; ++i) {
        const float value = to_float(w[i * w_step]) + sum[r][i];
        from_float(value, w + i * w_step);
        if (c) from_float(value, c + i * c_step);
      }
    }
  }
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current and restores the previous one when the call ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

template <class T>
bool aligned16(const Target<T>& t) {
  return t.step == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride * int64_t(sizeof(T)) % 16 == 0;
}

struct Problem {
  Factor left, right;
  float alpha;
  int64_t rows, columns, k;
  bool transposed;  // rows and columns are those of the transposed weight
};

template <class T>
Target<T> target_of(const TensorView& t, const Problem& p) {
  T* data = static_cast<T*>(t.data);
  return p.transposed ? Target<T>{data, t.stride[1], t.stride[0]} : Target<T>{data, t.stride[0], t.stride[1]};
}

template <class W, class C>
void launch(const TensorView& weight, const TensorView& copy, const Problem& p, cudaStream_t stream) {
  const int64_t grid_y = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  require(grid_y <= 65535, "weight has more rows than the CUDA kernel takes (4,194,240)");
  const dim3 grid((p.columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, grid_y);
  const Target<W> w = target_of<W>(weight, p);
  const Target<C> c = target_of<C>(copy, p);
  if (aligned16(w) && (!copy.defined() || aligned16(c))) {
    rank_k_update_kernel<W, C, true>
        <<<grid, WARPS * 32, 0, stream>>>(w, c, p.left, p.right, p.alpha, p.rows, p.columns, p.k);
  } else {
    rank_k_update_kernel<W, C, false>
        <<<grid, WARPS * 32, 0, stream>>>(w, c, p.left, p.right, p.alpha, p.rows, p.columns, p.k);
  }
  check_cuda(cudaGetLastError(), "rank_k_update launch");
}

}  // namespace

void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int device, void* stream) {
  require(weight.ndim == 2 && weight.dtype != DType::f64 && weight.dtype != DType::u8,
          "weight must be a float32, bfloat16 or float16 matrix [out, in]");
  require(left.ndim == 2 && left.dtype == DType::f32 && left.shape[0] == weight.shape[0],
          "left must be float32 [out, k]");
  require(right.ndim == 2 && right.dtype == DType::f32 && right.shape[0] == weight.shape[1],
          "right must be float32 [in, k]");
  require(left.shape[1] == right.shape[1], "left and right must have the same k");
  if (copy.defined()) {
    require(weight.dtype == DType::f32, "copy needs a float32 weight");
    require(copy.dtype == DType::bf16 || copy.dtype == DType::f16, "copy must be bfloat16 or float16");
    require(copy.ndim == 2 && copy.shape[0] == weight.shape[0] && copy.shape[1] == weight.shape[1],
            "copy must have the shape of weight");
  }
  if (weight.shape[0] == 0 || weight.shape[1] == 0) return;
  Problem p = {{static_cast<const float*>(left.data), left.stride[0], left.stride[1]},
               {static_cast<const float*>(right.data), right.stride[0], right.stride[1]},
               static_cast<float>(alpha),
               weight.shape[0],
               weight.shape[1],
               left.shape[1],
               weight.stride[0] < weight.stride[1]};
  if (p.transposed) {  // neighbors in memory should be neighboring columns: update the transpose
    std::swap(p.rows, p.columns);
    std::swap(p.left, p.right);
  }

  DeviceGuard guard(device);
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (weight.dtype == DType::bf16) {
    launch<__nv_bfloat16, __nv_bfloat16>(weight, {}, p, on);
  } else if (weight.dtype == DType::f16) {
    launch<__half, __half>(weight, {}, p, on);
  } else if (copy.defined() && copy.dtype == DType::f16) {
    launch<float, __half>(weight, copy, p, on);
  } else {
    launch<float, __nv_bfloat16>(weight, copy, p, on);
  }
}

std::string refusal() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? "" : "no CUDA device";
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace kf::cuda
