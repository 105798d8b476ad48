// weight [out, in] += alpha left [out, k] right [in, k]^T on a CUDA device, rounded once.
#pragma once
#include <cstdint>
#include <string>

#include "../common/tensor_view.h"

namespace kf::cuda {

// Launches on `stream` (a cudaStream_t) of `device`; left and right are fp32, all tensors have any strides. `copy`
// (bf16/fp16, beside an fp32 weight) may be undefined. Rows that begin at multiples of 16 bytes are read and written 16
// bytes at a time.
// Throws InvalidArgument for what it does not take and std::runtime_error for what CUDA reports.
void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int device, void* stream);

// Empty when a CUDA device can be used, otherwise why not.
std::string refusal();

// Version numbers as CUDA gives them (13000 for 13.0); driver is 0 without one.
int runtime_version();
int driver_version();

}  // namespace kf::cuda
