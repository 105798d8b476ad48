// The module kedit_fast._cuda: links the CUDA runtime statically, so it imports on machines without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/rank_k_update.cuh"
#include "dlpack_tensor.h"

namespace py = pybind11;
using kf::bind::borrow;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "kedit_fast kernels in CUDA C++: plain functions over DLPack capsules.";
  py::register_exception<kf::InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);

  m.def("refusal", &kf::cuda::refusal, "Why no CUDA device can be used; empty when one can.");
  m.def("runtime_version", &kf::cuda::runtime_version);
  m.def("driver_version", &kf::cuda::driver_version);
  m.def("architectures", [] { return std::string(KEDIT_FAST_CUDA_ARCHS); });

  m.def(
      "rank_k_update_",
      [](const py::object& weight, const py::object& left, const py::object& right, double alpha,
         const py::object& copy, uintptr_t stream) {
        auto w = borrow(kDLCUDA, weight, "weight"), l = borrow(kDLCUDA, left, "left");
        auto r = borrow(kDLCUDA, right, "right"), c = borrow(kDLCUDA, copy, "copy");
        for (const auto* other : {&l, &r, &c}) {
          kf::require(!other->view.defined() || other->device_id == w.device_id, "all tensors must be on one device");
        }
        py::gil_scoped_release release;
        kf::cuda::rank_k_update(w.view, l.view, r.view, alpha, c.view, w.device_id, reinterpret_cast<void*>(stream));
      },
      py::arg("weight"), py::arg("left"), py::arg("right"), py::arg("alpha"), py::arg("copy"), py::arg("stream"));
}
