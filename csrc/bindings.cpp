// The only file that knows pybind11. Pointers arrive as integers: sparselottery/ops checks device, dtype, shape,
// strides and alignment before an address leaves Python. One section per op, in alphabetical order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bitmask.h"
#include "common.h"
#include "cpu/isa.h"
#include "decode_cpu.h"
#include "decode_linear.h"
#include "global_topk.h"
#include "masked_conv2d.h"
#include "masked_linear.h"
#include "masked_optim.h"
#include "network.h"
#include "packed.h"
#include "sparse_linear.h"

namespace py = pybind11;

namespace {

template <class T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

sl::CpuDecodeWeight cpu_decode_weight(int format, int64_t rows, int64_t columns, uintptr_t starts, uintptr_t codes,
                                      uintptr_t values, int dtype) {
  return {static_cast<sl::CpuFormat>(format),
          rows,
          columns,
          as<const int32_t>(starts),
          as<const uint8_t>(codes),
          as<const void>(values),
          static_cast<sl::DType>(dtype)};
}

// decode_linear: format, rows, columns, units, starts, codes, values.
using DecodeArguments = std::tuple<int, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;

#ifdef SPARSELOTTERY_CUDA
sl::DecodeWeight decode_weight(const DecodeArguments& arguments) {
  const auto& [format, rows, columns, units, starts, codes, values] = arguments;
  return {static_cast<sl::DecodeFormat>(format),
          rows,
          columns,
          units,
          as<const int32_t>(starts),
          as<const uint8_t>(codes),
          as<const uint16_t>(values)};
}
#endif

// Network: one layer as {"kind": "conv2d", "outputs": 64, ...}: the fields of network.h by name.
sl::cpu::NetworkLayer network_layer(const py::dict& fields) {
  using Layer = sl::cpu::NetworkLayer;
  static const std::map<std::string, Layer::Kind> kinds = {
      {"linear", Layer::Kind::kLinear},
      {"conv2d", Layer::Kind::kConv2d},
      {"relu", Layer::Kind::kReLU},
      {"max_pool2d", Layer::Kind::kMaxPool2d},
      {"avg_pool2d", Layer::Kind::kAvgPool2d},
      {"batch_norm", Layer::Kind::kBatchNorm},
      {"flatten", Layer::Kind::kFlatten},
  };
  Layer layer;
  for (const auto& [key, value] : fields) {
    const std::string name = py::cast<std::string>(key);
    const auto pair = [&value = value](int64_t (&to)[2]) {
      const auto [rows, columns] = py::cast<std::pair<int64_t, int64_t>>(value);
      to[0] = rows;
      to[1] = columns;
    };
    const auto address = [&value = value] { return py::cast<uintptr_t>(value); };
    if (name == "kind") {
      const auto found = kinds.find(py::cast<std::string>(value));
      if (found == kinds.end()) throw std::invalid_argument("kind: unknown layer " + py::cast<std::string>(value));
      layer.kind = found->second;
    } else if (name == "outputs") {
      layer.outputs = py::cast<int64_t>(value);
    } else if (name == "kernel") {
      pair(layer.kernel);
    } else if (name == "stride") {
      pair(layer.stride);
    } else if (name == "padding") {
      pair(layer.padding);
    } else if (name == "dilation") {
      pair(layer.dilation);
    } else if (name == "groups") {
      layer.groups = py::cast<int64_t>(value);
    } else if (name == "count_include_pad") {
      layer.count_include_pad = py::cast<bool>(value);
    } else if (name == "weight") {
      layer.weight = as<const float>(address());
    } else if (name == "words") {
      layer.words = as<const uint32_t>(address());
    } else if (name == "bias") {
      layer.bias = as<const float>(address());
    } else if (name == "mean") {
      layer.mean = as<const float>(address());
    } else if (name == "variance") {
      layer.variance = as<const float>(address());
    } else if (name == "momentum") {
      layer.momentum = py::cast<double>(value);
    } else if (name == "eps") {
      layer.eps = py::cast<double>(value);
    } else {
      throw std::invalid_argument("layer: unknown field " + name);
    }
  }
  return layer;
}

// Addresses of weight, bias, running mean and variance; 0: none.
using NetworkAddresses = std::array<uintptr_t, 4>;

sl::cpu::NetworkTarget network_target(const NetworkAddresses& addresses) {
  return {as<float>(addresses[0]), as<float>(addresses[1]), as<float>(addresses[2]), as<float>(addresses[3])};
}

// global_topk: data, dtype, sizes, strides, eligible words (0: all), words. The tensors point into the arguments.
using TopkArguments = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, uintptr_t, uintptr_t>;

std::vector<sl::TopkTensor> topk_tensors(const std::vector<TopkArguments>& arguments) {
  std::vector<sl::TopkTensor> tensors;
  for (const auto& [data, dtype, sizes, strides, eligible, words] : arguments) {
    tensors.push_back({as<const void>(data), static_cast<sl::DType>(dtype), static_cast<int64_t>(sizes.size()),
                       sizes.data(), strides.data(), as<const uint32_t>(eligible), as<uint32_t>(words)});
  }
  return tensors;
}

// masked_conv2d: an address and four strides.
sl::cpu::ConvView conv_view(uintptr_t data, const std::array<int64_t, 4>& stride) {
  return {as<const float>(data), {stride[0], stride[1], stride[2], stride[3]}};
}

// masked_optim: ten integers a tensor (ops/masked_optim.py, _Table) and two numbers.
std::vector<sl::OptimTensor> optim_tensors(const std::vector<int64_t>& table, const std::vector<double>& numbers) {
  constexpr size_t kFields = 10;
  const size_t count = table.size() / kFields;
  if (table.size() % kFields || numbers.size() != 2 * count)
    throw std::invalid_argument("masked_optim: expected 10 integers and 2 numbers a tensor");
  std::vector<sl::OptimTensor> tensors(count);
  for (size_t i = 0; i < count; i++) {
    const int64_t* f = table.data() + i * kFields;
    tensors[i] = {as<void>(f[0]), as<void>(f[1]), as<void>(f[2]), as<void>(f[3]), as<void>(f[4]), as<int32_t>(f[5]),
                  f[6],           f[7],           f[8] != 0,      f[9] != 0,      numbers[2 * i], numbers[2 * i + 1]};
  }
  return tensors;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sparselottery; called through sparselottery.ops only.";
#ifdef SPARSELOTTERY_CUDA
  m.attr("cuda_archs") = SPARSELOTTERY_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = py::none();
#endif

  // bitmask
  m.def("cpu_bitmask_pack", [](uintptr_t dense, int64_t rows, int64_t columns, uintptr_t words) {
    py::gil_scoped_release release;
    sl::cpu::bitmask_pack(as<const uint8_t>(dense), rows, columns, as<uint32_t>(words));
  });
  m.def("cpu_bitmask_unpack", [](uintptr_t words, int64_t rows, int64_t columns, uintptr_t dense) {
    py::gil_scoped_release release;
    sl::cpu::bitmask_unpack(as<const uint32_t>(words), rows, columns, as<uint8_t>(dense));
  });
  m.def("cpu_bitmask_count", [](uintptr_t words, int64_t count) {
    int64_t total;
    py::gil_scoped_release release;
    sl::cpu::bitmask_count(as<const uint32_t>(words), count, &total);
    return total;
  });
  m.def("cpu_bitmask_hamming", [](uintptr_t a, uintptr_t b, int64_t count) {
    int64_t total;
    py::gil_scoped_release release;
    sl::cpu::bitmask_hamming(as<const uint32_t>(a), as<const uint32_t>(b), count, &total);
    return total;
  });
  m.def("cpu_bitmask_apply", [](uintptr_t weights, int64_t item_size, uintptr_t words,
                                const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    py::gil_scoped_release release;
    sl::cpu::bitmask_apply(as<void>(weights), item_size, as<const uint32_t>(words), sizes.size(), sizes.data(),
                           strides.data());
  });
#ifdef SPARSELOTTERY_CUDA
  m.def("cuda_bitmask_pack", [](uintptr_t dense, int64_t rows, int64_t columns, uintptr_t words, uintptr_t stream) {
    sl::cuda::bitmask_pack(as<const uint8_t>(dense), rows, columns, as<uint32_t>(words), as<void>(stream));
  });
  m.def("cuda_bitmask_unpack", [](uintptr_t words, int64_t rows, int64_t columns, uintptr_t dense, uintptr_t stream) {
    sl::cuda::bitmask_unpack(as<const uint32_t>(words), rows, columns, as<uint8_t>(dense), as<void>(stream));
  });
  m.def("cuda_bitmask_count", [](uintptr_t words, int64_t count, uintptr_t out, uintptr_t stream) {
    sl::cuda::bitmask_count(as<const uint32_t>(words), count, as<int64_t>(out), as<void>(stream));
  });
  m.def("cuda_bitmask_hamming", [](uintptr_t a, uintptr_t b, int64_t count, uintptr_t out, uintptr_t stream) {
    sl::cuda::bitmask_hamming(as<const uint32_t>(a), as<const uint32_t>(b), count, as<int64_t>(out), as<void>(stream));
  });
  m.def("cuda_bitmask_apply",
        [](uintptr_t weights, int64_t item_size, uintptr_t words, const std::vector<int64_t>& sizes,
           const std::vector<int64_t>& strides, uintptr_t stream) {
          sl::cuda::bitmask_apply(as<void>(weights), item_size, as<const uint32_t>(words), sizes.size(), sizes.data(),
                                  strides.data(), as<void>(stream));
        });
#endif

  // decode_cpu
  m.def("cpu_decode_cpu_slices", [](int format, int64_t rows, int64_t columns) {
    return sl::cpu::decode_cpu_slices(static_cast<sl::CpuFormat>(format), rows, columns);
  });
  m.def("cpu_decode_cpu_layout", [](int format, uintptr_t words, int64_t rows, int64_t columns, uintptr_t starts) {
    py::gil_scoped_release release;
    int64_t codes = 0, values = 0;
    sl::cpu::decode_cpu_layout(static_cast<sl::CpuFormat>(format), as<const uint32_t>(words), rows, columns,
                               as<int32_t>(starts), &codes, &values);
    return std::make_pair(codes, values);
  });
  m.def("cpu_decode_cpu_pack", [](int format, int64_t rows, int64_t columns, int dtype, uintptr_t dense,
                                  uintptr_t words, uintptr_t starts, uintptr_t codes, uintptr_t values) {
    py::gil_scoped_release release;
    const auto weight = cpu_decode_weight(format, rows, columns, starts, codes, values, dtype);
    sl::cpu::decode_cpu_pack(weight, as<const void>(dense), as<const uint32_t>(words), as<uint8_t>(codes),
                             as<void>(values));
  });
  m.def("cpu_decode_cpu", [](int format, int64_t rows, int64_t columns, int dtype, uintptr_t starts, uintptr_t codes,
                             uintptr_t values, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t batch) {
    const auto weight = cpu_decode_weight(format, rows, columns, starts, codes, values, dtype);
    py::gil_scoped_release release;
    sl::cpu::decode_cpu(weight, as<const float>(x), as<const float>(bias), as<float>(y), batch);
  });

  // decode_linear
  m.def("cpu_decode_linear_layout", [](int format, uintptr_t words, int64_t rows, int64_t columns, uintptr_t starts) {
    py::gil_scoped_release release;
    return sl::cpu::decode_linear_layout(static_cast<sl::DecodeFormat>(format), as<const uint32_t>(words), rows,
                                         columns, as<int32_t>(starts));
  });
  m.def("cpu_decode_linear_pack", [](int format, uintptr_t weight, uintptr_t words, int64_t rows, int64_t columns,
                                     uintptr_t starts, uintptr_t codes, uintptr_t values) {
    py::gil_scoped_release release;
    sl::cpu::decode_linear_pack(static_cast<sl::DecodeFormat>(format), as<const uint16_t>(weight),
                                as<const uint32_t>(words), rows, columns, as<const int32_t>(starts), as<uint8_t>(codes),
                                as<uint16_t>(values));
  });
#ifdef SPARSELOTTERY_CUDA
  m.def("cuda_decode_linear_max_columns", &sl::cuda::decode_linear_max_columns);
  m.def("cuda_decode_linear_scratch", [](const DecodeArguments& weight, int64_t batch) {
    return sl::cuda::decode_linear_scratch(decode_weight(weight), batch);
  });
  m.def("cuda_decode_linear", [](const DecodeArguments& weight, int dtype, uintptr_t x, uintptr_t bias, uintptr_t y,
                                 int64_t batch, uintptr_t scratch, uintptr_t stream) {
    sl::cuda::decode_linear(decode_weight(weight), static_cast<sl::DType>(dtype), as<const void>(x),
                            as<const void>(bias), as<void>(y), batch, as<void>(scratch), as<void>(stream));
  });
#endif

  // global_topk
  m.def("cpu_global_topk", [](const std::vector<TopkArguments>& arguments, int64_t keep, bool by_value) {
    const auto tensors = topk_tensors(arguments);
    py::gil_scoped_release release;
    const sl::TopkResult result = sl::cpu::global_topk(tensors.data(), tensors.size(), keep, by_value);
    return std::make_pair(result.nan_tensor, result.threshold);
  });
#ifdef SPARSELOTTERY_CUDA
  m.def("cuda_global_topk_scratch", [](const std::vector<TopkArguments>& arguments) {
    const auto tensors = topk_tensors(arguments);
    return sl::cuda::global_topk_scratch(tensors.data(), tensors.size());
  });
  m.def("cuda_global_topk", [](const std::vector<TopkArguments>& arguments, int64_t keep, bool by_value,
                               uintptr_t scratch, uintptr_t result, uintptr_t stream) {
    const auto tensors = topk_tensors(arguments);
    sl::cuda::global_topk(tensors.data(), tensors.size(), keep, by_value, as<void>(scratch), as<sl::TopkResult>(result),
                          as<void>(stream));
  });
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
  m.def("cpu_set_gathers", &sl::cpu::set_gathers, py::arg("wish"));
  m.def("cpu_threads", &sl::cpu::max_threads);

  // masked_conv2d
  py::class_<sl::cpu::ConvPlan>(m, "CpuMaskedConv2dPlan")
      .def(py::init([](uintptr_t words, int64_t out, int64_t channels, int64_t groups, std::array<int64_t, 5> rows,
                       std::array<int64_t, 5> columns) {
        py::gil_scoped_release release;
        return std::make_unique<sl::cpu::ConvPlan>(
            as<const int32_t>(words), out, channels, groups,
            sl::cpu::ConvAxis{rows[0], rows[1], rows[2], rows[3], rows[4]},
            sl::cpu::ConvAxis{columns[0], columns[1], columns[2], columns[3], columns[4]});
      }))
      .def_property_readonly("survivors", &sl::cpu::ConvPlan::survivors);
  m.def("cpu_masked_conv2d_forward",
        [](const sl::cpu::ConvPlan& plan, int64_t batch, uintptr_t x, std::array<int64_t, 4> x_stride, uintptr_t weight,
           uintptr_t bias, uintptr_t y) {
          py::gil_scoped_release release;
          sl::cpu::masked_conv2d_forward(plan, batch, conv_view(x, x_stride), as<const float>(weight),
                                         as<const float>(bias), as<float>(y));
        });
  m.def(
      "cpu_masked_conv2d_backward",
      [](const sl::cpu::ConvPlan& plan, int64_t batch, uintptr_t grad, std::array<int64_t, 4> grad_stride, uintptr_t x,
         std::array<int64_t, 4> x_stride, uintptr_t weight, uintptr_t dx, uintptr_t dweight, uintptr_t dbias) {
        py::gil_scoped_release release;
        sl::cpu::masked_conv2d_backward(plan, batch, conv_view(grad, grad_stride), conv_view(x, x_stride),
                                        as<const float>(weight), as<float>(dx), as<float>(dweight), as<float>(dbias));
      });

  // masked_linear
  using sl::cpu::MaskedLinearPlan;
  using sl::cpu::Network;
  using sl::cpu::NetworkTape;
  py::class_<MaskedLinearPlan>(m, "CpuMaskedLinearPlan")
      .def(py::init([](uintptr_t words, int64_t rows, int64_t columns, bool packed) {
             py::gil_scoped_release release;
             return std::make_unique<MaskedLinearPlan>(as<const uint32_t>(words), rows, columns, packed);
           }),
           py::arg("words"), py::arg("rows"), py::arg("columns"), py::arg("packed") = false)
      .def("count", &MaskedLinearPlan::count)
      .def("same_words",
           [](const MaskedLinearPlan& plan, uintptr_t words) { return plan.same_words(as<const uint32_t>(words)); })
      .def("forward",
           [](MaskedLinearPlan& plan, uintptr_t weight, bool half, int64_t version, bool same, uintptr_t x,
              int64_t x_stride, int64_t batch, uintptr_t bias, uintptr_t y, int64_t tile, bool relu, bool trains) {
             py::gil_scoped_release release;
             plan.forward({as<const void>(weight), half, version, same}, as<const float>(x), x_stride, batch,
                          as<const float>(bias), as<float>(y), tile, relu, trains);
           })
      .def("backward", [](MaskedLinearPlan& plan, uintptr_t weight, bool half, int64_t version, bool same,
                          uintptr_t grad, int64_t grad_stride, uintptr_t x, int64_t x_stride, int64_t batch,
                          uintptr_t dx, uintptr_t dw, uintptr_t db, int64_t tile, bool dw_is_zero) {
        py::gil_scoped_release release;
        plan.backward({as<const void>(weight), half, version, same}, as<const float>(grad), grad_stride,
                      as<const float>(x), x_stride, batch, as<float>(dx), as<void>(dw), as<float>(db), tile,
                      dw_is_zero);
      });

  // masked_optim
  m.def("cpu_masked_optim_sgd", [](const std::vector<int64_t>& table, const std::vector<double>& numbers, int dtype,
                                   double momentum, double dampening, double weight_decay, bool nesterov,
                                   bool maximize) {
    const auto tensors = optim_tensors(table, numbers);
    py::gil_scoped_release release;
    sl::cpu::masked_sgd(tensors.data(), tensors.size(), {momentum, dampening, weight_decay, nesterov, maximize}, dtype);
  });
  m.def("cpu_masked_optim_adam", [](const std::vector<int64_t>& table, const std::vector<double>& numbers, int dtype,
                                    double beta1, double beta2, double eps, double weight_decay, double shrink,
                                    bool maximize) {
    const auto tensors = optim_tensors(table, numbers);
    py::gil_scoped_release release;
    sl::cpu::masked_adam(tensors.data(), tensors.size(), {beta1, beta2, eps, weight_decay, shrink, maximize}, dtype);
  });

  // network
  py::class_<NetworkTape>(m, "CpuNetworkTape");
  py::class_<Network>(m, "CpuNetwork")
      .def(py::init([](const std::array<int64_t, 3>& input, const std::vector<py::dict>& layers, double linear_densest,
                       double conv_densest, const std::optional<std::map<std::string, double>>& optimizer) {
             std::vector<sl::cpu::NetworkLayer> all;
             for (const py::dict& layer : layers) all.push_back(network_layer(layer));
             sl::cpu::NetworkOptimizer options{};
             if (optimizer) {
               const auto number = [&](const char* name) { return optimizer->at(name); };
               options = {number("adam") != 0,     number("momentum"),       number("dampening"),
                          number("nesterov") != 0, number("beta1"),          number("beta2"),
                          number("eps"),           number("decoupled") != 0, number("weight_decay")};
             }
             py::gil_scoped_release release;
             return std::make_unique<Network>(input[0], input[1], input[2], all, optimizer ? &options : nullptr,
                                              linear_densest, conv_densest);
           }),
           py::arg("input"), py::arg("layers"), py::kw_only(), py::arg("linear_densest"), py::arg("conv_densest"),
           py::arg("optimizer") = py::none())
      .def("output_shape",
           [](const Network& network) {
             std::array<int64_t, 3> shape;
             network.output_shape(&shape[0], &shape[1], &shape[2]);
             return py::make_tuple(shape[0], shape[1], shape[2]);
           })
      .def("forward",
           [](Network& network, uintptr_t x, int64_t x_stride, int64_t count, uintptr_t y) {
             py::gil_scoped_release release;
             network.forward(as<const float>(x), x_stride, count, as<float>(y));
           })
      .def("record",
           [](Network& network, uintptr_t x, int64_t x_stride, int64_t count, bool training, uintptr_t y) {
             py::gil_scoped_release release;
             return network.record(as<const float>(x), x_stride, count, training, as<float>(y));
           })
      .def(
          "backward",
          [](Network& network, const NetworkTape& tape, uintptr_t grad, uintptr_t dx,
             const std::vector<NetworkAddresses>& targets, const std::vector<int64_t>& clean) {
            std::vector<sl::cpu::NetworkTarget> all;
            for (const NetworkAddresses& target : targets) all.push_back(network_target(target));
            for (const int64_t layer : clean) all.at(layer).clean = true;
            py::gil_scoped_release release;
            network.backward(tape, as<const float>(grad), as<float>(dx), all);
          },
          py::arg("tape"), py::arg("grad"), py::arg("dx"), py::arg("targets"),
          py::arg("clean") = std::vector<int64_t>{})
      .def("train",
           [](Network& network, uintptr_t x, int64_t x_stride, uintptr_t y, uintptr_t order, int64_t batch,
              const std::vector<double>& rates) {
             py::gil_scoped_release release;
             return network.train(as<const float>(x), x_stride, as<const int64_t>(y), as<const int64_t>(order),
                                  rates.size(), batch, rates.data());
           })
      .def("evaluate",
           [](Network& network, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t count) {
             double loss;
             int64_t right;
             {
               py::gil_scoped_release release;
               network.evaluate(as<const float>(x), x_stride, as<const int64_t>(y), count, &loss, &right);
             }
             return std::make_pair(loss, right);
           })
      .def("load", [](Network& network, int64_t layer,
                      const NetworkAddresses& from) { network.load(layer, network_target(from)); })
      .def("store", [](const Network& network, int64_t layer,
                       const NetworkAddresses& to) { network.store(layer, network_target(to)); })
      .def("changed", [](const Network& network, const std::vector<NetworkAddresses>& now) {
        std::vector<sl::cpu::NetworkTarget> all;
        for (const NetworkAddresses& one : now) all.push_back(network_target(one));
        return network.changed(all);
      });

  // packed
  m.def("cpu_packed_expand", [](uintptr_t values, int64_t count, int64_t item_size, uintptr_t words, int64_t rows,
                                int64_t columns, uintptr_t dense) {
    py::gil_scoped_release release;
    sl::cpu::packed_expand(as<const void>(values), count, item_size, as<const uint32_t>(words), rows, columns,
                           as<void>(dense));
  });
  m.def("cpu_packed_gather", [](uintptr_t dense, int64_t item_size, uintptr_t words, const std::vector<int64_t>& sizes,
                                const std::vector<int64_t>& strides, uintptr_t values, int64_t count) {
    py::gil_scoped_release release;
    sl::cpu::packed_gather(as<const void>(dense), item_size, as<const uint32_t>(words), sizes.size(), sizes.data(),
                           strides.data(), as<void>(values), count);
  });
#ifdef SPARSELOTTERY_CUDA
  m.def("cuda_packed_counts", [](uintptr_t words, int64_t count, uintptr_t counts, uintptr_t stream) {
    sl::cuda::packed_counts(as<const uint32_t>(words), count, as<int64_t>(counts), as<void>(stream));
  });
  m.def("cuda_packed_expand", [](uintptr_t values, int64_t count, int64_t item_size, uintptr_t words, uintptr_t offsets,
                                 int64_t rows, int64_t columns, uintptr_t dense, uintptr_t stream) {
    sl::cuda::packed_expand(as<const void>(values), count, item_size, as<const uint32_t>(words),
                            as<const int64_t>(offsets), rows, columns, as<void>(dense), as<void>(stream));
  });
  m.def("cuda_packed_gather", [](uintptr_t dense, int64_t item_size, uintptr_t words, uintptr_t offsets,
                                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                 uintptr_t values, int64_t count, uintptr_t stream) {
    sl::cuda::packed_gather(as<const void>(dense), item_size, as<const uint32_t>(words), as<const int64_t>(offsets),
                            sizes.size(), sizes.data(), strides.data(), as<void>(values), count, as<void>(stream));
  });
#endif

  // sparse_linear
#ifdef SPARSELOTTERY_CUDA
  m.def("cuda_sparse_linear_fill",
        [](uintptr_t weight, uintptr_t places, int64_t count, uintptr_t entries, uintptr_t stream) {
          sl::cuda::sparse_linear_fill(as<const float>(weight), as<const int64_t>(places), count,
                                       as<sl::cuda::SparseEntry>(entries), as<void>(stream));
        });
  m.def("cuda_sparse_linear_product", [](uintptr_t entries, uintptr_t starts, uintptr_t x, uintptr_t bias, int64_t rows,
                                         int64_t columns, int64_t batch, uintptr_t target, uintptr_t stream) {
    sl::cuda::sparse_linear_product(as<const sl::cuda::SparseEntry>(entries), as<const int32_t>(starts),
                                    as<const float>(x), as<const float>(bias), rows, columns, batch, as<float>(target),
                                    as<void>(stream));
  });
  m.def("cuda_sparse_linear_half_fill",
        [](uintptr_t weight, uintptr_t words, uintptr_t columns, uintptr_t strips, uintptr_t order, uintptr_t starts,
           int64_t groups, int64_t weight_columns, bool transposed, uintptr_t values, uintptr_t stream) {
          const sl::cuda::HalfIndex index{as<const int32_t>(columns), as<const int32_t>(strips),
                                          as<const int32_t>(order), as<const int32_t>(starts), groups};
          sl::cuda::sparse_linear_half_fill(as<const uint16_t>(weight), as<const uint32_t>(words), index,
                                            weight_columns, transposed, as<uint16_t>(values), as<void>(stream));
        });
  m.def("cuda_sparse_linear_half_product",
        [](int dtype, uintptr_t columns, uintptr_t strips, uintptr_t order, uintptr_t starts, int64_t groups,
           uintptr_t values, uintptr_t x, uintptr_t bias, int64_t rows, int64_t inputs, int64_t batch,
           int64_t padded_batch, uintptr_t y, uintptr_t stream) {
          const sl::cuda::HalfIndex index{as<const int32_t>(columns), as<const int32_t>(strips),
                                          as<const int32_t>(order), as<const int32_t>(starts), groups};
          sl::cuda::sparse_linear_half_product(static_cast<sl::DType>(dtype), index, as<const uint16_t>(values),
                                               as<const uint16_t>(x), as<const uint16_t>(bias), rows, inputs, batch,
                                               padded_batch, as<uint16_t>(y), as<void>(stream));
        });
#endif
}
