#include "network_plan.h"

#include <stdexcept>
#include <string>

namespace sl::cpu {
namespace {

#define SL_KERNELS(ns)                                                                                               \
  NetworkKernels {                                                                                                   \
    ns::net_width(), ns::net_pack, ns::net_unpack, ns::net_copy, ns::net_relu_gradient, ns::net_sums,                \
        ns::net_max_pool, ns::net_max_pool_backward, ns::net_avg_pool, ns::net_avg_pool_backward, ns::net_norm_sums, \
        ns::net_norm_apply, ns::net_norm_products, ns::net_norm_backward, ns::net_conv_sparse,                       \
        ns::net_conv_sparse_gradients, ns::net_conv_dense, ns::net_conv_dense_weight, ns::net_dense_forward,         \
        ns::net_dense_input, ns::net_dense_weight, ns::net_tile_relu, ns::net_tile_relu_gradient, ns::net_tile_sums, \
        ns::masked_linear_tile_forward, ns::masked_linear_tile_backward                                              \
  }

NetworkKernels kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return SL_KERNELS(avx512);
  if (isa() == Isa::kAvx2) return SL_KERNELS(avx2);
#endif
  return SL_KERNELS(portable);
}

}  // namespace

Blueprint::Blueprint() : k(kernels()) {}

void Blueprint::add(std::unique_ptr<Layer> layer, int64_t index, Node& at, bool& flattened) {
  layer->index = index;
  if (layer->takes_tiles()) at.activation.flat = at.gradient.flat = true;
  if (layer->is_conv()) at.activation = layer->input_space();
  Node next;
  next.extent = layer->out;
  next.gradient = layer->gradient_space();
  if (layer->takes_tiles()) next.activation.flat = flattened = true;
  nodes.push_back(at);
  at = next;
  layers.push_back(std::move(layer));
}

void Blueprint::build(Extent input, const std::vector<NetworkLayer>& all, bool trains, double linear_densest,
                      double conv_densest) {
  using Kind = NetworkLayer::Kind;
  Node at;
  at.extent = input;
  bool flattened = false;
  const auto after_conv = [this] { return !layers.empty() && layers.back()->is_conv(); };
  for (size_t i = 0; i < all.size(); i++) {
    const NetworkLayer& l = all[i];
    const auto fail = [i](const std::string& why) {
      throw std::invalid_argument("layers[" + std::to_string(i) + "]: " + why);
    };
    const bool single = at.extent.height == 1 && at.extent.width == 1;
    try {
      switch (l.kind) {
        case Kind::kLinear:
          if (!single) fail("linear: expected a flatten before it");
          if (l.outputs < 1 || l.outputs >= (int64_t{1} << 32) / at.extent.channels) fail("linear: too large");
          if (after_conv()) add(make_copy(at.extent), -1, at, flattened);
          add(make_linear(l, at.extent, linear_densest, k.width), i, at, flattened);
          break;
        case Kind::kConv2d:
          if (flattened) fail("conv2d: expected images, got vectors");
          add(make_conv(l, at.extent, conv_densest, k.width), i, at, flattened);
          break;
        case Kind::kMaxPool2d:
        case Kind::kAvgPool2d:
          if (flattened) fail("pooling: expected images, got vectors");
          add(make_pool(l, at.extent), i, at, flattened);
          break;
        case Kind::kBatchNorm:
          add(std::make_unique<NormLayer>(l, at.extent), i, at, flattened);
          if (flattened) at.activation.flat = true;
          break;
        case Kind::kReLU:
          if (layers.empty()) add(make_copy(at.extent), i, at, flattened);
          layers.back()->relu = true;
          break;
        case Kind::kFlatten:
          if (!single) {
            if (after_conv()) add(make_copy(at.extent), -1, at, flattened);
            flattened = at.activation.flat = at.gradient.flat = true;
            at.extent = {at.extent.channels * at.extent.height * at.extent.width, 1, 1};
          }
          break;
      }
    } catch (const std::invalid_argument& error) {
      const std::string what = error.what();
      if (what.rfind("layers[", 0) == 0) throw;
      fail(what);
    }
  }
  if (trains && after_conv()) add(make_copy(at.extent), -1, at, flattened);
  if (layers.empty()) add(make_copy(at.extent), -1, at, flattened);
  if (!layers.back()->is_conv()) at.activation.flat = at.gradient.flat = true;
  nodes.push_back(at);
  plan(learning, false);
  plan(inference, true);
}

void Blueprint::plan(Plan& plan, bool folds) const {
  for (size_t i = 0; i < layers.size(); i++) {
    Step s{static_cast<int64_t>(i), static_cast<int64_t>(i), static_cast<int64_t>(i) + 1, layers[i]->relu};
    if (folds && !s.relu && layers[i]->folds() && i + 1 < layers.size() && layers[i + 1]->is_norm()) {
      s.to++;
      s.relu = layers[++i]->relu;
    }
    plan.steps.push_back(s);
  }
  plan.inside.assign(nodes.size(), 0);
  for (size_t i = 0; i < plan.steps.size(); i++) {
    const Step& s = plan.steps[i];
    const Layer& layer = *layers[s.layer];
    const bool tiles = layer.takes_tiles();
    const bool joins = i > 0 && !tiles && !plan.stages.back().tiles && !(layer.is_norm() && !folds);
    if (joins) {
      plan.stages.back().last++;
      plan.stages.back().work += layer.work();
      // The gradient behind a normalization is read once more when those of all groups are there.
      const Layer& before = *layers[plan.steps[i - 1].layer];
      plan.inside[s.from] = folds || !before.is_norm();
    } else {
      const auto at = static_cast<int64_t>(i);
      plan.stages.push_back({at, at + 1, tiles, layer.work()});
    }
  }
}

void Blueprint::reserve(Memory& m, int64_t slots, int64_t private_slots, const std::vector<char>& inside,
                        bool gradients) const {
  m.node.resize(nodes.size());
  m.slots.resize(nodes.size(), 0);
  const auto space = [&](size_t i) { return gradients ? nodes[i].gradient : nodes[i].activation; };
  std::vector<int64_t> most = m.slots;
  for (size_t i = gradients && !wants_dx ? 1 : 0; i < nodes.size(); i++) {
    const bool flat = space(i).flat, own = inside[i] && !flat;
    const int64_t wanted = own ? private_slots : flat ? (slots + kTile - 1) / kTile * kTile : slots;
    most[i] = std::max(most[i], wanted);
  }
  if (most == m.slots) return;
  // Nodes a power of two of bytes apart would push each other out of the caches.
  const int64_t apart = kPlaneRest * k.width;
  const auto size = [&](size_t i) { return most[i] * space(i).group_size(nodes[i].extent) * k.width; };
  int64_t total = 0;
  for (size_t i = 0; i < nodes.size(); i++) total += size(i) + apart;
  m.slots.assign(nodes.size(), 0);  // without room for more, what there was is gone too: a smaller batch reserves anew
  float* next = m.all.reserve(total);
  std::fill_n(next, total, 0.f);  // margins stay as they are from here on
  for (size_t i = 0; i < nodes.size(); i++) {
    m.node[i] = most[i] > 0 ? next : nullptr;
    next += size(i) + apart;
  }
  m.slots = std::move(most);
}

View Blueprint::view(const Memory& m, int64_t node, bool gradient, const Extent& extent, int64_t group, int64_t slot,
                     int64_t tile) const {
  const Node& n = nodes[node];
  const Space& space = gradient ? n.gradient : n.activation;
  if (m.node[node] == nullptr) return {nullptr, 0, 0, 0};
  const int64_t size = space.group_size(n.extent) * k.width;
  float* base = m.node[node] + (space.flat ? group / kTile * kTile : slot) * size;
  return space.view(base, extent, tile, group % kTile, k.width);
}

}  // namespace sl::cpu
