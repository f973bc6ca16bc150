// Linear layers in a Network: sparse ones by masked_linear's loops, others by those of network_dense_simd.cpp.
#include <omp.h>

#include <cstring>

#include "../bitmask.h"
#include "isa.h"
#include "network_layers.h"

namespace sl::cpu {
namespace {

constexpr int64_t kBlock = 1024;         // lines of a small sparse layer that are walked panel by panel
constexpr int64_t kLargeWork = 1 << 17;  // weights of a layer whose lines are dealt out to threads
constexpr int64_t kParts = 16;           // as so many blocks

class Linear : public Layer {
 public:
  Linear(const NetworkLayer& l, Extent extent, double densest, int64_t width) : width_(width) {
    in = extent;
    out = {l.outputs, 1, 1};
    rows_ = l.outputs;
    columns_ = in.channels;
    has_bias_ = l.bias != nullptr;
    if (l.words != nullptr) {
      survivors_.build(l.words, rows_, columns_);
      sparse_ = survivors_.density() <= densest;
    }
    const int64_t weights = sparse_ ? survivors_.count() : rows_ * columns_;
    large_ = weights >= kLargeWork;
    const auto block = [this](int64_t lines) { return large_ ? ((lines + kParts - 1) / kParts + 7) / 8 * 8 : kBlock; };
    row_block_ = block(rows_);
    column_block_ = block(columns_);
    if (sparse_) {
      Array<uint32_t> in_forward;
      survivors_.build_rows(forward_, row_block_, survivors_.row_panel(), &in_forward);
      survivors_.build_columns(backward_, column_block_, place_);
      mirrored_.reserve(weights);
      for (int64_t k = 0; k < weights; k++) mirrored_[place_[k]] = in_forward[k];
      weight_parameter_.start(backward_.value.get(), weights);
    } else {
      dense_.reserve(weights);
      weight_parameter_.start(dense_.get(), weights);
      if (l.words != nullptr) {
        words_.assign(l.words, l.words + rows_ * words_per_row(columns_));
        weight_parameter_.words = words_.data();
        weight_parameter_.rows = rows_;
      }
    }
    std::fill_n(bias_.reserve(rows_), rows_, 0.f);
    if (has_bias_) bias_parameter_.start(bias_.get(), rows_);
    NetworkTarget from;
    from.weight = const_cast<float*>(l.weight);
    from.bias = const_cast<float*>(l.bias);
    load(from);
    refresh();
  }

  bool takes_tiles() const override { return true; }
  bool folds() const override { return true; }
  int64_t work() const override { return weight_parameter_.count; }
  std::vector<Parameter*> parameters() override { return {&weight_parameter_, &bias_parameter_}; }
  bool masks_gradient() const override { return true; }
  Space input_space() const override {
    Space s;
    s.flat = true;
    return s;
  }
  Space gradient_space() const override { return input_space(); }

  void forward(const Pass& p, const View& x, const View& y, bool relu) override {
    const int64_t lanes = p.tile * width_;
    const float* bias = folded_ ? folded_bias_.get() : bias_.get();
    const float* dense = folded_ ? folded_dense_.get() : dense_.get();
    in_parts(rows_, row_block_, [&](int64_t part, int64_t first, int64_t last) {
      if (sparse_) {
        ForwardArgs a{};
        a.rows = slice(forward_.layout, part, first, last);
        a.tile = p.tile;
        a.bias = bias;
        a.x_tile = x.data;
        a.y_tile = y.data;
        p.k->sparse_forward(a);
      } else {
        DenseArgs a{};
        a.rows = last - first;
        a.columns = a.stride = columns_;
        a.tile = p.tile;
        a.weight = dense + first * columns_;
        a.bias = bias + first;
        a.x = x.data;
        a.y = y.data + first * lanes;
        p.k->dense_forward(a);
      }
      if (relu) p.k->tile_relu(y.data + first * lanes, (last - first) * lanes);
    });
  }

  void backward(const Pass& p, const View& x, const View& y, const View& gy, const View& gx) override {
    const int64_t lanes = p.tile * width_;
    if (relu) p.k->tile_relu_gradient(y.data, gy.data, rows_ * lanes);
    if (has_bias_) p.k->tile_sums(gy.data, rows_, p.tile, bias_parameter_.grad.get(), !p.first_tile);
    if (sparse_) {
      in_parts(columns_, column_block_, [&](int64_t part, int64_t first, int64_t last) {
        BackwardArgs a{};
        a.columns = slice(backward_.layout, part, first, last);
        a.tile = p.tile;
        a.x_tile = x.data;
        a.g_tile = gy.data;
        a.dx_tile = gx.data;
        a.dw = weight_parameter_.grad.get();
        a.add = !p.first_tile;
        p.k->sparse_backward(a);
      });
      return;
    }
    DenseArgs all{};
    all.rows = rows_;
    all.columns = all.stride = columns_;
    all.tile = p.tile;
    all.weight = dense_.get();
    all.x = x.data;
    all.grad = gy.data;
    all.dx = gx.data;
    all.dw = weight_parameter_.grad.get();
    all.add = !p.first_tile;
    in_parts(rows_, row_block_, [&](int64_t, int64_t first, int64_t last) {
      DenseArgs a = all;
      a.rows = last - first;
      a.grad += first * lanes;
      a.dw += first * columns_;
      p.k->dense_weight(a);
    });
    if (gx.data == nullptr) return;
    in_parts(columns_, column_block_, [&](int64_t, int64_t first, int64_t last) {
      DenseArgs a = all;
      a.columns = last - first;
      a.weight += first;
      a.dx += first * lanes;
      p.k->dense_input(a);
    });
  }

  void refresh() override {
    folded_ = false;
    if (!sparse_) return;
    const float* from = backward_.value.get();
    float* to = forward_.value.get();
    for (int64_t k = 0; k < survivors_.count(); k++) to[mirrored_[k]] = from[k];
  }

  void fold(const float* scale, const float* shift) override {
    folded_ = true;
    folded_bias_.reserve(rows_);
    for (int64_t i = 0; i < rows_; i++) folded_bias_[i] = bias_[i] * scale[i] + shift[i];
    if (sparse_) {
      const SparseLayout& m = forward_.layout;
      for (int64_t r = 0; r < m.lines * m.panels; r++) {
        for (uint32_t k = m.begin[r]; k < m.begin[r + 1]; k++) forward_.value[k] *= scale[m.line[r]];
      }
      return;
    }
    folded_dense_.reserve(rows_ * columns_);
    for (int64_t i = 0; i < rows_; i++) {
      for (int64_t j = i * columns_; j < (i + 1) * columns_; j++) folded_dense_[j] = dense_[j] * scale[i];
    }
  }

  void load(const NetworkTarget& from) override {
    if (from.weight != nullptr && sparse_) {
      for (int64_t k = 0; k < survivors_.count(); k++) {
        backward_.value[place_[k]] = from.weight[survivors_.position[k]];
      }
    } else if (from.weight != nullptr) {
      std::memcpy(dense_.get(), from.weight, rows_ * columns_ * sizeof(float));
    }
    if (from.bias != nullptr && has_bias_) std::memcpy(bias_.get(), from.bias, rows_ * sizeof(float));
  }

  bool holds(const NetworkTarget& now) const override {
    return now.bias == nullptr || !has_bias_ || std::memcmp(now.bias, bias_.get(), rows_ * sizeof(float)) == 0;
  }

  void store(const NetworkTarget& to) const override { write(to, backward_.value.get(), dense_.get(), bias_.get()); }

  void gradients(const NetworkTarget& to) const override {
    if (to.weight != nullptr && sparse_ && !to.clean) std::memset(to.weight, 0, rows_ * columns_ * sizeof(float));
    const float* grad = weight_parameter_.grad.get();
    write(to, grad, grad, bias_parameter_.grad.get());
    if (to.weight != nullptr && !words_.empty()) {
      const int64_t sizes[2] = {rows_, columns_}, strides[2] = {columns_, 1};
      bitmask_apply(to.weight, sizeof(float), words_.data(), 2, sizes, strides);
    }
  }

 private:
  // Calls f(part, first line, last line) in parallel where the layer is large; otherwise once, for part -1: all lines.
  template <class F>
  void in_parts(int64_t lines, int64_t block, F f) const {
    const int64_t parts = (lines + block - 1) / block;
    const int threads = large_ && !omp_in_parallel() ? std::min<int>(max_threads(), static_cast<int>(parts)) : 1;
    if (threads <= 1) return f(-1, 0, lines);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < parts; i++) f(i, i * block, std::min((i + 1) * block, lines));
  }

  // One block of an order as an order of its own.
  static SparseLayout slice(const SparseLayout& all, int64_t part, int64_t first, int64_t last) {
    if (part < 0) return all;
    SparseLayout one = all;
    one.lines = one.block = last - first;
    one.blocks = 1;
    one.begin += part * all.block * all.panels;
    one.line += part * all.block * all.panels;
    return one;
  }

  void write(const NetworkTarget& to, const float* survivors, const float* dense, const float* bias) const {
    if (to.weight != nullptr && sparse_) {
      for (int64_t i = 0; i < survivors_.count(); i++) to.weight[survivors_.position[i]] = survivors[place_[i]];
    } else if (to.weight != nullptr) {
      std::memcpy(to.weight, dense, rows_ * columns_ * sizeof(float));
    }
    if (to.bias != nullptr && has_bias_) std::memcpy(to.bias, bias, rows_ * sizeof(float));
  }

  int64_t rows_, columns_, width_, row_block_, column_block_;
  bool sparse_ = false, large_ = false, has_bias_, folded_ = false;
  Array<float> dense_, bias_, folded_dense_, folded_bias_;
  std::vector<uint32_t> words_;  // of a masked layer that is kept dense
  Survivors survivors_;
  Order forward_, backward_;  // the weights that are trained are those of `backward_`
  Array<uint32_t> place_;     // [count]: where in `backward_` a survivor stands
  Array<uint32_t> mirrored_;  // [count]: where in `forward_` the weights of `backward_` stand
  Parameter weight_parameter_, bias_parameter_;
};

}  // namespace

std::unique_ptr<Layer> make_linear(const NetworkLayer& l, Extent in, double densest, int64_t width) {
  return std::make_unique<Linear>(l, in, densest, width);
}

}  // namespace sl::cpu
