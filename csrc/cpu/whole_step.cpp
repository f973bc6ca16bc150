// The steps of a multilayer perceptron, layer by layer on one tile of batch after another; the loops are in
// masked_linear_simd.cpp (sparse layers), whole_step_simd.cpp (dense ones) and masked_optim_simd.cpp.
#include "../whole_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../masked_optim.h"
#include "isa.h"
#include "masked_linear_simd.h"
#include "sparse_order.h"
#include "whole_step_simd.h"

namespace sl::cpu {
namespace {

constexpr int64_t kTile = 4;      // vectors of batch that go through all layers together
constexpr int64_t kBlock = 1024;  // lines of a sparse layer that are walked panel by panel

struct Kernels {
  int64_t width;
  void (*pack)(const PackArgs&);
  void (*dense_forward)(const DenseArgs&);
  void (*dense_input)(const DenseArgs&);
  void (*dense_weight)(const DenseArgs&);
  void (*relu)(float*, int64_t);
  void (*relu_gradient)(const float*, float*, int64_t);
  void (*sums)(const float*, int64_t, int64_t, float*, bool);
  void (*sparse_forward)(const ForwardArgs&);
  void (*sparse_backward)(const BackwardArgs&);
};

#define SL_KERNELS(ns)                                                                                             \
  Kernels {                                                                                                        \
    ns::mlp_width(), ns::mlp_pack, ns::mlp_dense_forward, ns::mlp_dense_input, ns::mlp_dense_weight, ns::mlp_relu, \
        ns::mlp_relu_gradient, ns::mlp_sums, ns::masked_linear_tile_forward, ns::masked_linear_tile_backward       \
  }

Kernels kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return SL_KERNELS(avx512);
  if (isa() == Isa::kAvx2) return SL_KERNELS(avx2);
#endif
  return SL_KERNELS(portable);
}

// One parameter as the optimizer sees it: a sparse layer's has no dead weights.
struct Parameter {
  int64_t count = 0;
  float* value = nullptr;
  Array<float> grad, first, second;

  void start(float* at, int64_t size, const MlpOptimizer& o) {
    count = size;
    value = at;
    if (!o.trains) return;
    std::fill_n(grad.reserve(size), size, 0.f);
    if (o.adam || o.momentum != 0) std::fill_n(first.reserve(size), size, 0.f);
    if (o.adam) std::fill_n(second.reserve(size), size, 0.f);
  }
};

struct Layer {
  int64_t rows, columns;
  bool relu, sparse, has_bias;
  Array<float> dense, bias;
  std::vector<uint32_t> words;  // of a masked layer that is kept dense
  Survivors survivors;
  Order forward, backward;   // the weights that are trained are those of `backward`
  Array<uint32_t> place;     // [count]: where in `backward` a survivor stands
  Array<uint32_t> mirrored;  // [count]: where in `forward` the weights of `backward` stand
  Parameter weight_parameter, bias_parameter;

  void start(const MlpLayer& l, const MlpOptimizer& optimizer, double densest) {
    rows = l.rows;
    columns = l.columns;
    relu = l.relu;
    has_bias = l.bias != nullptr;
    sparse = false;
    if (l.words != nullptr) {
      survivors.build(l.words, rows, columns);
      sparse = survivors.density() <= densest;
    }
    if (sparse) {
      Array<uint32_t> in_forward;
      survivors.build_rows(forward, kBlock, survivors.panel(), &in_forward);
      survivors.build_columns(backward, kBlock, place);
      mirrored.reserve(survivors.count());
      for (int64_t k = 0; k < survivors.count(); k++) {
        mirrored[place[k]] = in_forward[k];
        backward.value[place[k]] = l.weight[survivors.position[k]];
      }
      mirror();
      weight_parameter.start(backward.value.get(), survivors.count(), optimizer);
    } else {
      if (l.words != nullptr) words.assign(l.words, l.words + rows * words_per_row(columns));
      std::memcpy(dense.reserve(rows * columns), l.weight, rows * columns * sizeof(float));
      weight_parameter.start(dense.get(), rows * columns, optimizer);
    }
    std::fill_n(bias.reserve(rows), rows, 0.f);
    if (has_bias) {
      std::memcpy(bias.get(), l.bias, rows * sizeof(float));
      bias_parameter.start(bias.get(), rows, optimizer);
    }
  }

  void mirror() const {
    const float* from = backward.value.get();
    float* to = forward.value.get();
    for (int64_t k = 0; k < survivors.count(); k++) to[mirrored[k]] = from[k];
  }
};

}  // namespace

struct Mlp::Impl {
  MlpOptimizer optimizer;
  std::deque<Layer> layers;
  std::vector<OptimTensor> parameters;
  std::vector<Array<float>> activation;  // [layers + 1]: what goes into layer i
  Array<float> grad, other;              // of a layer's output, of its input
  int64_t step = 0;
  std::mutex lock;  // activations are shared by all calls

  int64_t inputs() const { return layers.front().columns; }
  int64_t classes() const { return layers.back().rows; }

  void reserve(int64_t lanes) {
    int64_t widest = 0;
    for (size_t i = 0; i <= layers.size(); i++) {
      const int64_t features = i == 0 ? inputs() : layers[i - 1].rows;
      activation[i].reserve(features * lanes);
      widest = std::max(widest, features);
    }
    grad.reserve(widest * lanes);
    other.reserve(widest * lanes);
  }

  void forward(const Kernels& k, int64_t tile) {
    for (size_t i = 0; i < layers.size(); i++) {
      Layer& l = layers[i];
      const float* x = activation[i].get();
      float* y = activation[i + 1].get();
      if (l.sparse) {
        ForwardArgs a{};
        a.rows = l.forward.layout;
        a.tile = tile;
        a.bias = l.bias.get();
        a.x_tile = activation[i].get();
        a.y_tile = y;
        k.sparse_forward(a);
      } else {
        DenseArgs a{};
        a.rows = l.rows;
        a.columns = a.stride = l.columns;
        a.tile = tile;
        a.weight = l.dense.get();
        a.bias = l.bias.get();
        a.x = x;
        a.y = y;
        k.dense_forward(a);
      }
      if (l.relu) k.relu(y, l.rows * tile * k.width);
    }
  }

  // grad holds the gradient of the last layer's output. add: to the gradients of this minibatch's earlier tiles.
  void backward(const Kernels& k, int64_t tile, bool add) {
    const int64_t lanes = tile * k.width;
    for (size_t i = layers.size(); i-- > 0;) {
      Layer& l = layers[i];
      if (l.relu) k.relu_gradient(activation[i + 1].get(), grad.get(), l.rows * lanes);
      if (l.has_bias) k.sums(grad.get(), l.rows, tile, l.bias_parameter.grad.get(), add);
      if (l.sparse) {
        BackwardArgs a{};
        a.columns = l.backward.layout;
        a.tile = tile;
        a.x_tile = activation[i].get();
        a.g_tile = grad.get();
        a.dx_tile = i > 0 ? other.get() : nullptr;
        a.dw = l.weight_parameter.grad.get();
        a.add = add;
        k.sparse_backward(a);
      } else {
        DenseArgs a{};
        a.rows = l.rows;
        a.columns = a.stride = l.columns;
        a.tile = tile;
        a.weight = l.dense.get();
        a.x = activation[i].get();
        a.grad = grad.get();
        a.dx = other.get();
        a.dw = l.weight_parameter.grad.get();
        a.add = add;
        k.dense_weight(a);
        if (i > 0) k.dense_input(a);
      }
      std::swap(grad, other);
    }
  }

  // Loss of each of `count` lanes from the outputs [class][lane], added up; where asked, also the gradient of their sum
  // times `scale`, and how many are right.
  double losses(const int64_t* label, int64_t count, int64_t lanes, float scale, float* gradient, int64_t* right) {
    const float* z = activation.back().get();
    double total = 0;
    for (int64_t b = 0; b < count; b++) {
      float largest = -std::numeric_limits<float>::infinity();
      int64_t best = 0;
      for (int64_t c = 0; c < classes(); c++) {
        const float v = z[c * lanes + b];
        if (v > largest || (std::isnan(v) && !std::isnan(largest))) {
          largest = v;
          best = c;
        }
      }
      float sum = 0;
      for (int64_t c = 0; c < classes(); c++) {
        const float e = std::exp(z[c * lanes + b] - largest);
        sum += e;
        if (gradient != nullptr) gradient[c * lanes + b] = e;
      }
      if (gradient != nullptr) {
        for (int64_t c = 0; c < classes(); c++) gradient[c * lanes + b] *= scale / sum;
        gradient[label[b] * lanes + b] -= scale;
      }
      total += std::log(sum) - (z[label[b] * lanes + b] - largest);  // large outputs must not swallow the logarithm
      if (right != nullptr) *right += best == label[b];
    }
    if (gradient != nullptr) {
      for (int64_t c = 0; c < classes(); c++) std::fill(gradient + c * lanes + count, gradient + (c + 1) * lanes, 0.f);
    }
    return total;
  }

  void update(double rate) {
    step++;
    const MlpOptimizer& o = optimizer;
    for (OptimTensor& p : parameters) {
      p.fresh = step == 1;
      p.rate = o.adam ? rate / (1 - std::pow(o.beta1, step)) : rate;
      p.correction = o.adam ? 1 / std::sqrt(1 - std::pow(o.beta2, step)) : 0;
    }
    const int dtype = static_cast<int>(DType::kFloat32);
    const int64_t count = parameters.size();
    if (o.adam) {
      const double shrink = o.decoupled ? 1 - rate * o.weight_decay : 1;
      masked_adam(parameters.data(), count, {o.beta1, o.beta2, o.eps, o.decoupled ? 0 : o.weight_decay, shrink, false},
                  dtype);
    } else {
      masked_sgd(parameters.data(), count, {o.momentum, o.dampening, o.weight_decay, o.nesterov, false}, dtype);
    }
    for (const Layer& l : layers) {
      if (l.sparse) l.mirror();
    }
  }
};

Mlp::Mlp(const std::vector<MlpLayer>& layers, const MlpOptimizer& optimizer, double densest) : impl_(new Impl) {
  if (layers.empty()) throw std::invalid_argument("layers: expected at least one");
  for (size_t i = 0; i < layers.size(); i++) {
    const MlpLayer& l = layers[i];
    const bool fits = l.rows > 0 && l.columns > 0 && l.rows < (int64_t{1} << 32) / l.columns &&
                      (i == 0 || l.columns == layers[i - 1].rows);
    if (!fits) throw std::invalid_argument("layers[" + std::to_string(i) + "]: does not fit the one before");
  }
  Impl& m = *impl_;
  m.optimizer = optimizer;
  m.activation = std::vector<Array<float>>(layers.size() + 1);
  for (const MlpLayer& l : layers) m.layers.emplace_back().start(l, optimizer, densest);
  for (Layer& l : m.layers) {
    for (Parameter* p : {&l.weight_parameter, &l.bias_parameter}) {
      if (p->count == 0) continue;
      OptimTensor t{};
      t.param = p->value;
      t.grad = p->grad.get();
      t.first = p->first.get();
      t.second = p->second.get();
      t.rows = 1;
      t.columns = p->count;
      if (p == &l.weight_parameter && !l.words.empty()) {
        t.words = reinterpret_cast<const int32_t*>(l.words.data());
        t.rows = l.rows;
        t.columns = l.columns;
      }
      t.clean = true;
      m.parameters.push_back(t);
    }
  }
}

Mlp::~Mlp() = default;

double Mlp::train(const float* x, int64_t x_stride, const int64_t* y, const int64_t* order, int64_t steps,
                  int64_t batch, const double* rate) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (!m.optimizer.trains) throw std::invalid_argument("optimizer: expected one that trains");
  const Kernels k = kernels();
  const int64_t lanes = kTile * k.width;
  m.reserve(lanes);
  std::vector<int64_t> label(lanes);
  double total = 0;
  for (int64_t s = 0; s < steps; s++) {
    double loss = 0;
    for (int64_t first = 0; first < batch; first += lanes) {
      const int64_t count = std::min(lanes, batch - first), tile = (count + k.width - 1) / k.width;
      const int64_t* chosen = order + s * batch + first;
      for (int64_t b = 0; b < count; b++) label[b] = y[chosen[b]];
      k.pack({x, x_stride, chosen, 0, count, m.inputs(), tile, m.activation[0].get()});
      m.forward(k, tile);
      loss += m.losses(label.data(), count, tile * k.width, 1.f / static_cast<float>(batch), m.grad.get(), nullptr);
      m.backward(k, tile, first > 0);
    }
    m.update(rate[s]);
    total += loss / static_cast<double>(batch);
  }
  return total;
}

void Mlp::evaluate(const float* x, int64_t x_stride, const int64_t* y, int64_t count, double* loss, int64_t* right) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  const Kernels k = kernels();
  const int64_t lanes = kTile * k.width;
  m.reserve(lanes);
  *loss = 0;
  *right = 0;
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t part = std::min(lanes, count - first), tile = (part + k.width - 1) / k.width;
    k.pack({x, x_stride, nullptr, first, part, m.inputs(), tile, m.activation[0].get()});
    m.forward(k, tile);
    *loss += m.losses(y + first, part, tile * k.width, 0.f, nullptr, right);
  }
}

void Mlp::forward(const float* x, int64_t x_stride, int64_t count, float* y) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  const Kernels k = kernels();
  m.reserve(kTile * k.width);
  const int64_t outputs = m.classes();
  for (int64_t first = 0; first < count; first += kTile * k.width) {
    const int64_t part = std::min(kTile * k.width, count - first), tile = (part + k.width - 1) / k.width;
    k.pack({x, x_stride, nullptr, first, part, m.inputs(), tile, m.activation[0].get()});
    m.forward(k, tile);
    const float* z = m.activation.back().get();
    for (int64_t b = 0; b < part; b++) {
      for (int64_t c = 0; c < outputs; c++) y[(first + b) * outputs + c] = z[c * tile * k.width + b];
    }
  }
}

void Mlp::store(int64_t layer, float* weight, float* bias) const {
  const Layer& l = impl_->layers.at(layer);
  if (l.sparse) {
    for (int64_t i = 0; i < l.survivors.count(); i++) weight[l.survivors.position[i]] = l.backward.value[l.place[i]];
  } else {
    std::memcpy(weight, l.dense.get(), l.rows * l.columns * sizeof(float));
  }
  if (bias != nullptr && l.has_bias) std::memcpy(bias, l.bias.get(), l.rows * sizeof(float));
}

}  // namespace sl::cpu
