// weight [out, in] += alpha left [out, k] right [in, k]^T on a CUDA device, rounded once.
#pragma once
#include <cstdint>
#include <string>

#include "../common/tensor_view.h"

namespace kf::cuda {

// Launches on `stream` (a cudaStream_t) of `device`; left and right are fp32 with any strides, weight has unit stride
// in one of its dimensions. `copy` (bf16/fp16, beside an fp32 weight, laid out as weight) may be undefined.
// Throws InvalidArgument for what it does not take and std::runtime_error for what CUDA reports.
void rank_k_update(const TensorView& weight, const TensorView& left, const TensorView& right, double alpha,
                   const TensorView& copy, int device, void* stream);

// Empty when a CUDA device can be used, otherwise why not.
std::string refusal();

// Version numbers as CUDA gives them (13000 for 13.0); driver is 0 without one.
int runtime_version();
int driver_version();

}  // namespace kf::cuda
