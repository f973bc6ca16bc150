// The layers of a Network (network.cpp) and what they work on.
#pragma once
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../masked_optim.h"
#include "../network.h"
#include "network_dense_simd.h"
#include "network_simd.h"
#include "sparse_order.h"

namespace sl::cpu {

constexpr int64_t kTile = 4;    // groups (vectors of the batch) that pass through a linear layer together
constexpr int64_t kShares = 8;  // parts of a batch whose gradients are summed apart, whatever the number of threads

constexpr int64_t kPlaneRest = 9;  // of a plane's size modulo 16

// The loops for one instruction set.
struct NetworkKernels {
  int64_t width;
  decltype(&portable::net_pack) pack, unpack;
  decltype(&portable::net_copy) copy;
  decltype(&portable::net_relu_gradient) relu_gradient;
  decltype(&portable::net_sums) sums;
  decltype(&portable::net_max_pool) max_pool, max_pool_backward, avg_pool, avg_pool_backward;
  decltype(&portable::net_norm_sums) norm_sums, norm_apply, norm_products, norm_backward;
  decltype(&portable::net_conv_sparse) conv_sparse;
  decltype(&portable::net_conv_sparse_gradients) conv_sparse_gradients;
  decltype(&portable::net_conv_dense) conv_dense;
  decltype(&portable::net_conv_dense_weight) conv_dense_weight;
  decltype(&portable::net_dense_forward) dense_forward, dense_input, dense_weight;
  decltype(&portable::net_tile_relu) tile_relu;
  decltype(&portable::net_tile_relu_gradient) tile_relu_gradient;
  decltype(&portable::net_tile_sums) tile_sums;
  decltype(&portable::masked_linear_tile_forward) sparse_forward;
  decltype(&portable::masked_linear_tile_backward) sparse_backward;
};

// Between layers. Flat: [feature][lane of the whole tile], as linear layers want it. Otherwise one group after the
// other, [channel][row][pixel][lane], with a margin of zeros around the image.
struct Space {
  bool flat = false;
  int64_t top = 0, left = 0, bottom = 0, right = 0;

  int64_t rows(const Extent& e) const { return flat ? e.height : top + e.height + bottom; }
  int64_t columns(const Extent& e) const { return flat ? e.width : left + e.width + right; }
  // In vectors. Channels must not lie a power of two apart: they would push each other out of the caches.
  int64_t plane(const Extent& e) const {
    const int64_t size = rows(e) * columns(e);
    return flat || size == 1 ? size : size + ((kPlaneRest - size) % 16 + 16) % 16;
  }
  int64_t group_size(const Extent& e) const { return e.channels * plane(e); }

  // base: of the tile where flat, else of the group.
  View view(float* base, const Extent& e, int64_t tile, int64_t group, int64_t width) const {
    const int64_t pixel = flat ? tile * width : width, row = columns(e) * pixel;
    return {flat ? base + group * width : base + top * row + left * pixel, plane(e) * pixel, row, pixel};
  }
};

// Where a pass stands.
struct Pass {
  const NetworkKernels* k;
  int64_t tile;           // vectors in this tile
  int64_t count;          // examples in this group
  int64_t share;          // whose sums a gradient is added to
  bool first_tile;        // linear layers: gradients are written, not added to
  bool batch_statistics;  // batch normalization
};

// One parameter as the optimizer sees it: that of a sparse layer has no dead weights.
struct Parameter {
  int64_t count = 0;
  float* value = nullptr;
  Array<float> grad, first, second;
  const uint32_t* words = nullptr;  // of a dense layer with a mask
  int64_t rows = 1;

  void start(float* at, int64_t size) {
    value = at;
    count = size;
  }
  void reserve_gradient() {
    if (count > 0 && grad.get() == nullptr) std::fill_n(grad.reserve(count), count, 0.f);
  }
  void reserve_state(const NetworkOptimizer& o) {
    if (count == 0) return;
    if (o.adam || o.momentum != 0) std::fill_n(first.reserve(count), count, 0.f);
    if (o.adam) std::fill_n(second.reserve(count), count, 0.f);
  }
};

class Layer {
 public:
  int64_t index = 0;  // in the caller's list
  Extent in{}, out{};
  bool relu = false;

  virtual ~Layer() = default;
  // A linear layer takes a whole tile at a time, with views of its first group; others take group by group.
  virtual bool takes_tiles() const { return false; }
  virtual bool is_norm() const { return false; }
  virtual bool is_conv() const { return false; }
  virtual Space input_space() const { return {}; }
  virtual Space gradient_space() const { return {}; }  // of the gradient of its output
  virtual int64_t work() const { return 0; }           // multiply-adds forward for one example
  virtual std::vector<Parameter*> parameters() { return {}; }

  virtual void forward(const Pass& p, const View& x, const View& y, bool relu) = 0;
  // The gradient of the ReLU is in gy already, except for layers that say so. gx.data null: not wanted.
  virtual bool masks_gradient() const { return false; }
  virtual void backward(const Pass& p, const View& x, const View& y, const View& gy, const View& gx) = 0;

  virtual void start_gradients(int64_t shares) { (void)shares; }
  virtual void finish_gradients(bool add) { (void)add; }  // to those of earlier tiles

  // Makes forward passes compute with the present parameters, or with each output times scale plus shift.
  virtual void refresh() {}
  virtual bool folds() const { return false; }
  virtual void fold(const float* scale, const float* shift) { (void)scale, (void)shift; }

  virtual void load(const NetworkTarget& from) { (void)from; }
  virtual void store(const NetworkTarget& to) const { (void)to; }
  // Whether these are its values to the bit, weights of products left out.
  virtual bool holds(const NetworkTarget& now) const { return (void)now, true; }
  virtual void gradients(const NetworkTarget& to) const { (void)to; }
};

// The statistics of batch normalization: those of a batch are part of what a backward pass needs.
struct Statistics {
  std::vector<float> mean, scale;  // scale: 1 / sqrt(variance + eps)
};

class NormLayer : public Layer {
 public:
  NormLayer(const NetworkLayer& l, Extent extent);
  bool is_norm() const override { return true; }
  std::vector<Parameter*> parameters() override;
  void forward(const Pass& p, const View& x, const View& y, bool relu) override;
  // In three parts: products of each group, then their sums, then the gradient of each group.
  void backward(const Pass& p, const View& x, const View& y, const View& gy, const View& gx) override;
  void products(const Pass& p, int64_t group, const View& x, const View& gy);
  void finish_products(int64_t groups, int64_t examples, bool batch_statistics);
  // Of a whole batch: the sums of each group, twice (for the mean, then about it), then the result and the running
  // statistics. With one value a channel and example, the first sums are taken by `add_in_order` instead, example
  // after example in float: as torch does, whose rounding is all that there is of a constant channel.
  bool single_pixel() const { return in.height * in.width == 1; }
  void start_statistics(int64_t groups);
  void add_in_order(const Pass& p, const View& x);
  void group_statistics(const Pass& p, int64_t group, const View& x);
  void finish_statistics(int64_t groups, int64_t examples, bool update);
  void use_running();
  void use(const Statistics& s) { now_ = s; }
  const Statistics& statistics() const { return now_; }
  void scale_and_shift(std::vector<float>& scale, std::vector<float>& shift) const;
  void load(const NetworkTarget& from) override;
  void store(const NetworkTarget& to) const override;
  bool holds(const NetworkTarget& now) const override;
  void gradients(const NetworkTarget& to) const override;

 private:
  double momentum_, eps_;
  bool has_weight_, has_bias_, has_running_;
  int round_ = 0;
  std::vector<float> weight_, bias_, running_mean_, running_variance_, zero_;
  Statistics now_;
  std::vector<float> mean_, sums_, others_;  // [groups, channels]
  std::vector<float> a_, b_, c_;
  Parameter weight_parameter_, bias_parameter_;
};

std::unique_ptr<Layer> make_linear(const NetworkLayer& l, Extent in, double densest, int64_t width);
std::unique_ptr<Layer> make_conv(const NetworkLayer& l, Extent in, double densest, int64_t width);
std::unique_ptr<Layer> make_pool(const NetworkLayer& l, Extent in);
std::unique_ptr<Layer> make_copy(Extent extent);

}  // namespace sl::cpu
