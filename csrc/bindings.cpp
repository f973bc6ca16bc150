// The only file that knows pybind11. Pointers arrive as integers: sparselottery/ops checks device, dtype, shape,
// strides and alignment before an address leaves Python. One section per op, in alphabetical order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common.h"
#include "cpu/isa.h"

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

  // isa
  m.def("cpu_isa", [] { return sl::cpu::isa_name(sl::cpu::isa()); });
  m.def("cpu_set_isa", &sl::cpu::set_isa, py::arg("name"));
  m.def("cpu_isas", [] {  // what this CPU can run, best first
    std::vector<std::string> names;
    for (auto isa : {sl::cpu::Isa::kAvx512, sl::cpu::Isa::kAvx2, sl::cpu::Isa::kPortable}) {
      if (sl::cpu::has_isa(isa)) names.push_back(sl::cpu::isa_name(isa));
    }
    return names;
  });
}
