// The only file that knows pybind11. Pointers arrive as integers: sparselottery/ops checks device, dtype, shape, strides and
// alignment before an address leaves Python. One section per op, in alphabetical order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common.h"

namespace py = pybind11;

namespace {

template <class T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sparselottery; called through sparselottery.ops only.";
#ifdef SPARSELOTTERY_CUDA
  m.attr("cuda_archs") = SPARSELOTTERY_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = py::none();
#endif
}
