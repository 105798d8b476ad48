// Python objects to TensorView: DLPack capsules, or anything with __dlpack__ (NumPy arrays). Only bind/ knows Python.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "../common/dlpack_abi.h"
#include "../common/error.h"
#include "../common/tensor_view.h"

namespace kf::bind {

namespace py = pybind11;

// A view of a tensor of the caller; keeps its capsule alive.
struct BorrowedTensor {
  py::object owner;
  TensorView view;
  int32_t device_type = kDLCPU;
  int32_t device_id = 0;
};

inline DType dtype_of(const DLDataType& t, const std::string& name) {
  if (t.lanes == 1) {
    if (t.code == kDLFloat && t.bits == 32) return DType::f32;
    if (t.code == kDLFloat && t.bits == 64) return DType::f64;
    if (t.code == kDLFloat && t.bits == 16) return DType::f16;
    if (t.code == kDLBfloat && t.bits == 16) return DType::bf16;
    if (t.code == kDLInt && t.bits == 64) return DType::i64;
    if ((t.code == kDLUInt || t.code == kDLBool) && t.bits == 8) return DType::u8;
  }
  throw InvalidArgument(name + " has an unsupported dtype (DLPack code " + std::to_string(t.code) + ", " +
                        std::to_string(t.bits) + " bits)");
}

inline BorrowedTensor borrow_anywhere(const py::object& object, const std::string& name) {
  BorrowedTensor tensor;
  if (object.is_none()) return tensor;
  py::object capsule = object;
  if (!PyCapsule_CheckExact(object.ptr())) {
    require(py::hasattr(object, "__dlpack__"), name + " must be a DLPack capsule or have __dlpack__");
    capsule = object.attr("__dlpack__")();
  }
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const DLTensor& t = managed->dl_tensor;
  require(t.ndim >= 1 && t.ndim <= MAX_DIMS, name + " has " + std::to_string(t.ndim) + " dimensions");
  tensor.owner = py::reinterpret_steal<py::object>(py::make_tuple(object, capsule).release());
  tensor.device_type = t.device.device_type;
  tensor.device_id = t.device.device_id;
  tensor.view.dtype = dtype_of(t.dtype, name);
  tensor.view.ndim = t.ndim;
  tensor.view.data = static_cast<char*>(t.data) + t.byte_offset;
  int64_t packed = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    tensor.view.shape[i] = t.shape[i];
    tensor.view.stride[i] = t.strides ? t.strides[i] : packed;
    packed *= t.shape[i];
  }
  return tensor;
}

inline BorrowedTensor borrow(int32_t device_type, const py::object& object, const std::string& name) {
  BorrowedTensor tensor = borrow_anywhere(object, name);
  require(!tensor.view.defined() || tensor.device_type == device_type, name + " is on DLPack device type " +
                                                                           std::to_string(tensor.device_type) +
                                                                           ", expected " + std::to_string(device_type));
  return tensor;
}

}  // namespace kf::bind
