// A Network's passes; what it consists of is in network_plan.h, the layers are in network_*.cpp.
//
// Layers that take one group (vector of the batch) at a time are run depth first: a group goes through all of them
// while it is in the caches. Linear layers take a tile of kTile groups, so that a weight that was read serves them all.
// Batch normalization that learns from the batch waits for all groups.
#include "../network.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "network_plan.h"

namespace sl::cpu {

struct NetworkTape::Impl {
  Memory memory;
  int64_t count = 0;
  bool training = false;
  std::vector<Statistics> statistics;  // by layer
  std::shared_ptr<std::vector<Memory>> free;
  std::shared_ptr<std::mutex> free_lock;
};

NetworkTape::NetworkTape(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

NetworkTape::~NetworkTape() {
  std::lock_guard<std::mutex> guard(*impl_->free_lock);
  if (impl_->free->size() < 2) impl_->free->push_back(std::move(impl_->memory));
}

struct Network::Impl : Blueprint {
  bool trains = false;
  NetworkOptimizer optimizer{};
  int64_t caller_layers = 0;
  std::vector<Parameter*> parameters;
  std::vector<OptimTensor> tensors;
  Memory activation, gradient;
  bool waits = false;   // for batch statistics
  bool folded = false;  // normalization is part of the weights now
  int64_t step = 0;
  std::mutex lock;
  std::shared_ptr<std::vector<Memory>> free = std::make_shared<std::vector<Memory>>();
  std::shared_ptr<std::mutex> free_lock = std::make_shared<std::mutex>();

  // --- passes ---

  void pack(const Memory& m, bool gradient, int64_t node, const Chunk& c, const float* x, int64_t stride,
            const int64_t* order, int64_t first) const {
    for_groups(c, values(node), [&](int64_t g, int64_t, int) {
      Extent e = nodes[node].extent;
      const Space& space = gradient ? nodes[node].gradient : nodes[node].activation;
      if (space.flat) e = {1, 1, e.channels * e.height * e.width};
      const View v = view(m, node, gradient, e, g, g, c.tile(g));
      EdgeArgs a{};
      a.from = x;
      a.stride = stride;
      a.order = order != nullptr ? order + g * k.width : nullptr;
      a.first = first + g * k.width;
      a.count = c.examples(g);
      a.extent = e;
      a.view = v;
      k.pack(a);
    });
  }

  void unpack(const Memory& m, bool gradient, int64_t node, const Chunk& c, float* y, int64_t first) const {
    for_groups(c, values(node), [&](int64_t g, int64_t, int) {
      Extent e = nodes[node].extent;
      const Space& space = gradient ? nodes[node].gradient : nodes[node].activation;
      EdgeArgs a{};
      a.stride = e.channels * e.height * e.width;
      if (space.flat) e = {1, 1, a.stride};
      a.to = y;
      a.first = first + g * k.width;
      a.count = c.examples(g);
      a.extent = e;
      a.view = view(m, node, gradient, e, g, g, c.tile(g));
      k.unpack(a);
    });
  }

  void forward(const Plan& plan, const Memory& m, const Chunk& c, bool reuses, bool batch_statistics, bool update) {
    for (auto& layer : layers) {
      if (layer->is_norm() && !batch_statistics) static_cast<NormLayer&>(*layer).use_running();
    }
    for (const Stage& stage : plan.stages) {
      const Layer& head = *layers[plan.steps[stage.first].layer];
      if (head.is_norm() && batch_statistics) prepare_norm(m, plan.steps[stage.first], c, update);
      const auto run = [&](const Step& s, int64_t group, int64_t share, int thread) {
        Layer& layer = *layers[s.layer];
        const Pass pass{&k, c.tile(group), c.examples(group), share, false, batch_statistics};
        const auto slot = [&](int64_t node) { return reuses && plan.inside[node] ? thread : group; };
        const View x = view(m, s.from, false, layer.in, group, slot(s.from), pass.tile);
        const View y = view(m, s.to, false, layers[s.to - 1]->out, group, slot(s.to), pass.tile);
        layer.forward(pass, x, y, s.relu);
      };
      if (stage.tiles) {
        for (int64_t g = 0; g < c.groups; g += kTile) run(plan.steps[stage.first], g, 0, 0);
        continue;
      }
      for_groups(c, work(plan, stage), [&](int64_t g, int64_t share, int thread) {
        for (int64_t i = stage.first; i < stage.last; i++) run(plan.steps[i], g, share, thread);
      });
    }
  }

  void prepare_norm(const Memory& m, const Step& s, const Chunk& c, bool update) {
    auto& norm = static_cast<NormLayer&>(*layers[s.layer]);
    norm.start_statistics(c.groups);
    for (int round = 0; round < 2; round++) {
      const bool in_order = round == 0 && norm.single_pixel();
      const auto run = [&](int64_t g, int64_t share, int) {
        const Pass pass{&k, c.tile(g), c.examples(g), share, false, true};
        const View x = view(m, s.from, false, norm.in, g, g, pass.tile);
        in_order ? norm.add_in_order(pass, x) : norm.group_statistics(pass, g, x);
      };
      if (in_order) {
        for (int64_t g = 0; g < c.groups; g++) run(g, 0, 0);
      } else {
        for_groups(c, values(s.from), run);
      }
      norm.finish_statistics(c.groups, c.count, update);
    }
  }

  // The gradient of the last node is there. add: to the gradients of this minibatch's earlier chunks.
  void backward(const Memory& m, const Chunk& c, bool add, bool batch_statistics) {
    for (auto& layer : layers) layer->start_gradients(c.shares());
    const Plan& plan = learning;
    for (size_t at = plan.stages.size(); at-- > 0;) {
      const Stage& stage = plan.stages[at];
      const auto run = [&](const Step& s, int64_t group, int64_t share, int thread) {
        Layer& layer = *layers[s.layer];
        const Pass pass{&k, c.tile(group), c.examples(group), share, group == 0 && !add, batch_statistics};
        const auto slot = [&](int64_t node) { return plan.inside[node] ? thread : group; };
        const View x = view(m, s.from, false, layer.in, group, group, pass.tile);
        const View y = view(m, s.to, false, layer.out, group, group, pass.tile);
        const View gy = view(gradient, s.to, true, layer.out, group, slot(s.to), pass.tile);
        const bool wanted = s.from > 0 || wants_dx;
        const View gx =
            wanted ? view(gradient, s.from, true, layer.in, group, slot(s.from), pass.tile) : View{nullptr, 0, 0, 0};
        if (s.relu && !layer.masks_gradient()) k.relu_gradient(y, gy, layer.out);
        if (layer.is_norm()) {
          static_cast<NormLayer&>(layer).products(pass, group, x, gy);
        } else {
          layer.backward(pass, x, y, gy, gx);
        }
      };
      if (stage.tiles) {
        for (int64_t g = 0; g < c.groups; g += kTile) run(plan.steps[stage.first], g, 0, 0);
        continue;
      }
      const Step& head = plan.steps[stage.first];
      Layer& first = *layers[head.layer];
      if (first.is_norm()) static_cast<NormLayer&>(first).start_statistics(c.groups);
      for_groups(c, 2 * work(plan, stage), [&](int64_t g, int64_t share, int thread) {
        for (int64_t i = stage.last; i-- > stage.first;) run(plan.steps[i], g, share, thread);
      });
      if (first.is_norm()) finish_norm(m, head, c, batch_statistics);
    }
    for (auto& layer : layers) layer->finish_gradients(add);
  }

  void finish_norm(const Memory& m, const Step& s, const Chunk& c, bool batch_statistics) {
    auto& norm = static_cast<NormLayer&>(*layers[s.layer]);
    norm.finish_products(c.groups, c.count, batch_statistics);
    if (s.from == 0 && !wants_dx) return;
    for_groups(c, values(s.from), [&](int64_t g, int64_t share, int) {
      const Pass pass{&k, c.tile(g), c.examples(g), share, false, batch_statistics};
      const View x = view(m, s.from, false, norm.in, g, g, pass.tile);
      const View gy = view(gradient, s.to, true, norm.out, g, g, pass.tile);
      norm.backward(pass, x, x, gy, view(gradient, s.from, true, norm.in, g, g, pass.tile));
    });
  }

  // Normalization into the weights before it, or out of them again.
  void fold(bool wish) {
    if (wish == folded) return;
    folded = wish;
    for (const Step& s : inference.steps) {
      if (s.to == s.from + 1) continue;
      Layer& layer = *layers[s.layer];
      layer.refresh();
      if (!wish) continue;
      auto& norm = static_cast<NormLayer&>(*layers[s.layer + 1]);
      norm.use_running();
      std::vector<float> scale, shift;
      norm.scale_and_shift(scale, shift);
      layer.fold(scale.data(), shift.data());
    }
  }

  // --- learning ---

  // Loss of each of `count` lanes from the outputs [class][lane], added up; where asked, also the gradient of their sum
  // times `scale`, and how many are right.
  double losses(const float* z, const int64_t* label, int64_t count, int64_t lanes, float scale, float* gradient,
                int64_t* right) const {
    const int64_t classes = this->classes();
    double total = 0;
    for (int64_t b = 0; b < count; b++) {
      float largest = -std::numeric_limits<float>::infinity();
      int64_t best = 0;
      for (int64_t c = 0; c < classes; c++) {
        const float v = z[c * lanes + b];
        if (v > largest || (std::isnan(v) && !std::isnan(largest))) {
          largest = v;
          best = c;
        }
      }
      float sum = 0;
      for (int64_t c = 0; c < classes; c++) {
        const float e = std::exp(z[c * lanes + b] - largest);
        sum += e;
        if (gradient != nullptr) gradient[c * lanes + b] = e;
      }
      if (gradient != nullptr) {
        for (int64_t c = 0; c < classes; c++) gradient[c * lanes + b] *= scale / sum;
        gradient[label[b] * lanes + b] -= scale;
      }
      total += std::log(sum) - (z[label[b] * lanes + b] - largest);  // large outputs must not swallow the logarithm
      if (right != nullptr) *right += best == label[b];
    }
    if (gradient != nullptr) {
      for (int64_t c = 0; c < classes; c++) std::fill(gradient + c * lanes + count, gradient + (c + 1) * lanes, 0.f);
    }
    return total;
  }

  // Tile by tile: labels of the chunk's examples.
  double losses(const Memory& m, const Chunk& c, const int64_t* label, float scale, bool gradients, int64_t* right) {
    const int64_t last = last_node();
    double total = 0;
    for (int64_t g = 0; g < c.groups; g += kTile) {
      const int64_t tile = c.tile(g), count = std::min(tile * k.width, c.count - g * k.width);
      const Extent flat{classes(), 1, 1};
      const View z = view(m, last, false, flat, g, g, tile);
      float* to = gradients ? view(gradient, last, true, flat, g, g, tile).data : nullptr;
      total += losses(z.data, label + g * k.width, count, tile * k.width, scale, to, right);
    }
    return total;
  }

  void start_optimizer(const NetworkOptimizer& o) {
    optimizer = o;
    for (Parameter* p : parameters) {
      if (p->count == 0) continue;
      p->reserve_gradient();
      p->reserve_state(o);
      OptimTensor t{};
      t.param = p->value;
      t.grad = p->grad.get();
      t.first = p->first.get();
      t.second = p->second.get();
      t.words = reinterpret_cast<const int32_t*>(p->words);
      t.rows = p->rows;
      t.columns = p->count / p->rows;
      t.clean = true;
      tensors.push_back(t);
    }
  }

  void update(double rate) {
    step++;
    const NetworkOptimizer& o = optimizer;
    for (OptimTensor& t : tensors) {
      t.fresh = step == 1;
      t.rate = o.adam ? rate / (1 - std::pow(o.beta1, step)) : rate;
      t.correction = o.adam ? 1 / std::sqrt(1 - std::pow(o.beta2, step)) : 0;
    }
    const int dtype = static_cast<int>(DType::kFloat32);
    const int64_t count = tensors.size();
    if (o.adam) {
      const double shrink = o.decoupled ? 1 - rate * o.weight_decay : 1;
      masked_adam(tensors.data(), count, {o.beta1, o.beta2, o.eps, o.decoupled ? 0 : o.weight_decay, shrink, false},
                  dtype);
    } else {
      masked_sgd(tensors.data(), count, {o.momentum, o.dampening, o.weight_decay, o.nesterov, false}, dtype);
    }
    for (auto& layer : layers) layer->refresh();
  }

  Layer* find(int64_t index) const {
    for (const auto& layer : layers) {
      if (layer->index == index) return layer.get();
    }
    return nullptr;
  }
};

Network::Network(int64_t channels, int64_t height, int64_t width, const std::vector<NetworkLayer>& layers,
                 const NetworkOptimizer* optimizer, double linear_densest, double conv_densest)
    : impl_(new Impl) {
  if (channels < 1 || height < 1 || width < 1) throw std::invalid_argument("input: expected sizes of at least 1");
  impl_->trains = optimizer != nullptr;
  Impl& m = *impl_;
  m.caller_layers = layers.size();
  m.build({channels, height, width}, layers, m.trains, linear_densest, conv_densest);
  for (const auto& layer : m.layers) {
    m.waits = m.waits || layer->is_norm();
    for (Parameter* p : layer->parameters()) m.parameters.push_back(p);
  }
  if (optimizer != nullptr) impl_->start_optimizer(*optimizer);
}

Network::~Network() = default;

void Network::output_shape(int64_t* channels, int64_t* height, int64_t* width) const {
  const Extent& e = impl_->outputs();
  *channels = e.channels;
  *height = e.height;
  *width = e.width;
}

double Network::train(const float* x, int64_t x_stride, const int64_t* y, const int64_t* order, int64_t steps,
                      int64_t batch, const double* rate) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (!m.trains) throw std::invalid_argument("optimizer: expected one that trains");
  m.fold(false);
  m.wants_dx = false;
  const int64_t lanes = m.waits ? batch : std::min(batch, kTile * m.k.width);
  const Chunk whole = m.chunk(lanes);
  m.reserve(m.activation, whole.groups, whole.groups, m.learning.inside, false);
  m.reserve(m.gradient, whole.groups, m.private_slots(whole), m.learning.inside, true);
  std::vector<int64_t> label(lanes);
  double total = 0;
  for (int64_t s = 0; s < steps; s++) {
    double loss = 0;
    for (int64_t first = 0; first < batch; first += lanes) {
      const Chunk c = m.chunk(std::min(lanes, batch - first));
      const int64_t* chosen = order + s * batch + first;
      for (int64_t b = 0; b < c.count; b++) label[b] = y[chosen[b]];
      m.pack(m.activation, false, 0, c, x, x_stride, chosen, 0);
      m.forward(m.learning, m.activation, c, false, true, true);
      loss += m.losses(m.activation, c, label.data(), 1.f / static_cast<float>(batch), true, nullptr);
      m.backward(m.activation, c, first > 0, true);
    }
    m.update(rate[s]);
    total += loss / static_cast<double>(batch);
  }
  return total;
}

void Network::evaluate(const float* x, int64_t x_stride, const int64_t* y, int64_t count, double* loss,
                       int64_t* right) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (!m.nodes.back().activation.flat) throw std::invalid_argument("layers: expected outputs that are classes");
  m.fold(true);
  const int64_t lanes = std::min(count, kTile * m.k.width);
  const Chunk whole = m.chunk(lanes);
  m.reserve(m.activation, whole.groups, m.private_slots(whole), m.inference.inside, false);
  *loss = 0;
  *right = 0;
  for (int64_t first = 0; first < count; first += lanes) {
    const Chunk c = m.chunk(std::min(lanes, count - first));
    m.pack(m.activation, false, 0, c, x, x_stride, nullptr, first);
    m.forward(m.inference, m.activation, c, true, false, false);
    *loss += m.losses(m.activation, c, y + first, 0.f, false, right);
  }
}

void Network::forward(const float* x, int64_t x_stride, int64_t count, float* y) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  m.fold(true);
  const int64_t lanes = std::min(count, kTile * m.k.width);
  const Chunk whole = m.chunk(lanes);
  m.reserve(m.activation, whole.groups, m.private_slots(whole), m.inference.inside, false);
  for (int64_t first = 0; first < count; first += lanes) {
    const Chunk c = m.chunk(std::min(lanes, count - first));
    m.pack(m.activation, false, 0, c, x, x_stride, nullptr, first);
    m.forward(m.inference, m.activation, c, true, false, false);
    m.unpack(m.activation, false, m.last_node(), c, y, first);
  }
}

std::unique_ptr<NetworkTape> Network::record(const float* x, int64_t x_stride, int64_t count, bool training, float* y) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  m.fold(false);
  auto tape = std::make_unique<NetworkTape::Impl>();
  tape->free = m.free;
  tape->free_lock = m.free_lock;
  {
    std::lock_guard<std::mutex> free(*m.free_lock);
    if (!m.free->empty()) {
      tape->memory = std::move(m.free->back());
      m.free->pop_back();
    }
  }
  tape->count = count;
  tape->training = training;
  const Chunk c = m.chunk(count);
  m.reserve(tape->memory, c.groups, c.groups, m.learning.inside, false);
  m.pack(tape->memory, false, 0, c, x, x_stride, nullptr, 0);
  m.forward(m.learning, tape->memory, c, false, training, training);
  m.unpack(tape->memory, false, m.last_node(), c, y, 0);
  for (const auto& layer : m.layers) {
    tape->statistics.push_back(layer->is_norm() ? static_cast<NormLayer&>(*layer).statistics() : Statistics{});
  }
  return std::unique_ptr<NetworkTape>(new NetworkTape(std::move(tape)));
}

void Network::backward(const NetworkTape& tape, const float* grad, float* dx,
                       const std::vector<NetworkTarget>& targets) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  const NetworkTape::Impl& t = *tape.impl_;
  if (t.free != m.free) throw std::invalid_argument("tape: expected one of this network");
  if (static_cast<int64_t>(targets.size()) != m.caller_layers) {
    throw std::invalid_argument("targets: expected one for each layer");
  }
  m.fold(false);
  m.wants_dx = dx != nullptr;
  const Chunk c = m.chunk(t.count);
  m.reserve(m.gradient, c.groups, m.private_slots(c), m.learning.inside, true);
  for (Parameter* p : m.parameters) p->reserve_gradient();
  for (size_t i = 0; i < m.layers.size(); i++) {
    if (m.layers[i]->is_norm()) static_cast<NormLayer&>(*m.layers[i]).use(t.statistics[i]);
  }
  const int64_t outputs = m.classes();
  m.pack(m.gradient, true, m.last_node(), c, grad, outputs, nullptr, 0);
  m.backward(t.memory, c, false, t.training);
  if (dx != nullptr) m.unpack(m.gradient, true, 0, c, dx, 0);
  for (const auto& layer : m.layers) {
    if (layer->index >= 0) layer->gradients(targets[layer->index]);
  }
}

void Network::load(int64_t layer, const NetworkTarget& from) {
  std::lock_guard<std::mutex> guard(impl_->lock);
  if (Layer* found = impl_->find(layer)) {
    impl_->fold(false);
    found->load(from);
    found->refresh();
  }
}

void Network::store(int64_t layer, const NetworkTarget& to) const {
  std::lock_guard<std::mutex> guard(impl_->lock);
  if (const Layer* found = impl_->find(layer)) found->store(to);
}

std::vector<int64_t> Network::changed(const std::vector<NetworkTarget>& now) const {
  std::lock_guard<std::mutex> guard(impl_->lock);
  if (static_cast<int64_t>(now.size()) != impl_->caller_layers) {
    throw std::invalid_argument("now: expected one for each layer");
  }
  std::vector<int64_t> found;
  for (const auto& layer : impl_->layers) {
    if (layer->index >= 0 && !layer->holds(now[layer->index])) found.push_back(layer->index);
  }
  return found;
}

}  // namespace sl::cpu
