// Convolutions in a Network: where a filter's taps lie in the layout of Space, and the loops of network_conv_simd.cpp
// over them.
//
// Forward a line is an output channel: y[o, p] = sum of W * x[c, stride p + tap]. Backward it is an input channel at
// one phase (row and column modulo the stride): there the convolution has stride 1, dX[c, q] = sum of W * dY[o, q -
// tap], and one walk over the dY gives dX and dW. Both images have margins of zeros, so that no tap has to ask where it
// is.
#include <cstring>
#include <stdexcept>

#include "../bitmask.h"
#include "network_layers.h"

namespace sl::cpu {
namespace {

constexpr int64_t kPanelBytes = 24 * 1024;  // of an image's rows that stay in the first-level cache
constexpr int64_t kPanelWork = 12;          // survivors of a line in a panel that pay for a second look at the line
constexpr int64_t kPixels = 8;              // that are computed together
constexpr int64_t kMaxPanel = 65536;        // Order counts inside a panel with 16 bits

// One axis.
struct Axis {
  int64_t input, output, kernel, stride, padding, dilation;

  int64_t reach() const { return (kernel - 1) * dilation; }
  int64_t after() const { return std::max<int64_t>(0, (output - 1) * stride + reach() + 1 - input - padding); }
  // Zeros around the gradient of the output: a pixel looks at outputs that do not exist.
  int64_t grad_before() const { return std::max<int64_t>(0, (reach() - padding) / stride); }
  int64_t grad_after() const { return std::max<int64_t>(0, (input - 1 + padding) / stride - (output - 1)); }
  // The input pixels of a phase: first pixel and how many; the first one's place among outputs.
  int64_t first(int64_t phase) const { return (phase - padding % stride + stride) % stride; }
  int64_t count(int64_t phase) const { return first(phase) >= input ? 0 : (input - 1 - first(phase)) / stride + 1; }
  int64_t place(int64_t phase) const { return (first(phase) + padding) / stride; }
};

// An Order with distances for indices.
struct Walk {
  Order order;
  Array<int32_t> place;

  template <class Place>
  void build(int64_t lines, int64_t minors, int64_t block, int64_t panel, const std::vector<uint32_t>& offsets,
             const std::vector<uint32_t>& minor, std::vector<uint32_t>& where, Place distance) {
    where.resize(minor.size());
    order.build(lines, minors, block, std::min(panel, kMaxPanel), offsets, minor.data(), where.data());
    place.reserve(minor.size());
    for (size_t k = 0; k < minor.size(); k++) place[where[k]] = static_cast<int32_t>(distance(k));
  }

  ConvWalk block(int64_t index) const {
    const SparseLayout& m = order.layout;
    const int64_t first = index * m.block;
    return {m.block, m.panels, first, m.begin + first * m.panels, m.line + first * m.panels, place.get(), m.value};
  }
};

struct Taps {
  Array<int32_t> place;
  Array<uint32_t> index;
  int64_t count = 0;

  void reserve(int64_t size) {
    place.reserve(size);
    index.reserve(size);
  }
  void push(int64_t at, int64_t in_weight) {
    place[count] = static_cast<int32_t>(at);
    index[count++] = static_cast<uint32_t>(in_weight);
  }
  ConvTaps get() const { return {count, place.get(), index.get()}; }
};

class Conv : public Layer {
 public:
  Conv(const NetworkLayer& l, Extent extent, double densest, int64_t width)
      : groups_(l.groups), has_bias_(l.bias != nullptr) {
    in = extent;
    const auto axis = [&l](int i, int64_t size) {
      Axis a{size, 0, l.kernel[i], l.stride[i], l.padding[i], l.dilation[i]};
      const bool sane = a.kernel > 0 && a.stride > 0 && a.padding >= 0 && a.dilation > 0;
      const int64_t room = sane ? a.input + 2 * a.padding - a.reach() - 1 : -1;
      if (room < 0) throw std::invalid_argument("conv2d: expected a filter that fits the padded image");
      a.output = room / a.stride + 1;
      return a;
    };
    rows_ = axis(0, in.height);
    columns_ = axis(1, in.width);
    out = {l.outputs, rows_.output, columns_.output};
    if (groups_ < 1 || out.channels < 1 || in.channels % groups_ != 0 || out.channels % groups_ != 0) {
      throw std::invalid_argument("groups: expected a divisor of both numbers of channels");
    }
    taps_ = rows_.kernel * columns_.kernel;
    line_ = in.channels / groups_ * taps_;
    pixel_ = width * static_cast<int64_t>(sizeof(float));
    if (out.channels * line_ >= int64_t{1} << 31 || input_space().group_size(in) * pixel_ >= int64_t{1} << 31 ||
        gradient_space().group_size(out) * pixel_ >= int64_t{1} << 31) {
      throw std::invalid_argument("conv2d: expected images of less than 2 GiB a vector of batch");
    }
    if (l.words != nullptr) {
      survivors_.build(l.words, out.channels, line_);
      sparse_ = survivors_.density() <= densest;
    }
    const int64_t weights = sparse_ ? survivors_.count() : out.channels * line_;
    if (sparse_) {
      build_forward();
      build_backward();
      weight_parameter_.start(backward_.order.value.get(), weights);
    } else {
      build_dense();
      dense_.reserve(weights);
      weight_parameter_.start(dense_.get(), weights);
      if (l.words != nullptr) {
        words_.assign(l.words, l.words + out.channels * words_per_row(line_));
        weight_parameter_.words = words_.data();
        weight_parameter_.rows = out.channels;
      }
    }
    std::fill_n(bias_.reserve(out.channels), out.channels, 0.f);
    if (has_bias_) bias_parameter_.start(bias_.get(), out.channels);
    NetworkTarget from;
    from.weight = const_cast<float*>(l.weight);
    from.bias = const_cast<float*>(l.bias);
    load(from);
    refresh();
  }

  bool is_conv() const override { return true; }
  bool folds() const override { return true; }
  int64_t work() const override { return weight_parameter_.count * out.height * out.width; }
  std::vector<Parameter*> parameters() override { return {&weight_parameter_, &bias_parameter_}; }
  Space input_space() const override {
    return {false, rows_.padding, columns_.padding, rows_.after(), columns_.after()};
  }
  Space gradient_space() const override {
    return {false, rows_.grad_before(), columns_.grad_before(), rows_.grad_after(), columns_.grad_after()};
  }

  void forward(const Pass& p, const View& x, const View& y, bool relu) override {
    ConvArgs a{};
    a.in = corner(x);
    a.in_row = rows_.stride * x.row;
    a.in_pixel = columns_.stride * x.pixel;
    a.height = out.height;
    a.width = out.width;
    a.out = y;
    a.bias = folded_ ? folded_bias_.get() : bias_.get();
    a.relu = relu;
    if (sparse_) {
      a.walk = forward_.block(0);
      p.k->conv_sparse(a);
      return;
    }
    const float* weight = folded_ ? folded_dense_.get() : dense_.get();
    a.taps = forward_taps_.get();
    a.lines = out.channels / groups_;
    a.line_step = line_;
    for (int64_t g = 0; g < groups_; g++) {
      ConvArgs one = a;
      one.in += g * (in.channels / groups_) * x.channel;
      one.weight = weight + g * a.lines * line_;
      one.bias += g * a.lines;
      one.out.data += g * a.lines * y.channel;
      p.k->conv_dense(one);
    }
  }

  void start_gradients(int64_t shares) override {
    shares_ = shares;
    std::fill_n(dw_.reserve(shares * weight_parameter_.count), shares * weight_parameter_.count, 0.f);
    std::fill_n(db_.reserve(shares * out.channels), shares * out.channels, 0.f);
  }

  void backward(const Pass& p, const View& x, const View&, const View& gy, const View& gx) override {
    float* dw = dw_.get() + p.share * weight_parameter_.count;
    if (has_bias_) p.k->sums(gy, out, db_.get() + p.share * out.channels);
    for (int64_t i = 0; i < rows_.stride; i++) {
      for (int64_t j = 0; j < columns_.stride; j++) {
        const int64_t phase = i * columns_.stride + j;
        ConvGradArgs a{};
        a.height = rows_.count(i);
        a.width = columns_.count(j);
        if (a.height == 0 || a.width == 0) continue;
        a.in = gy.data + rows_.place(i) * gy.row + columns_.place(j) * gy.pixel;
        a.in_row = gy.row;
        a.x = at_phase(x, i, j);
        if (gx.data != nullptr) a.dx = at_phase(gx, i, j);
        a.dw = dw;
        if (sparse_) {
          a.walk = backward_.block(phase);
          p.k->conv_sparse_gradients(a);
        } else if (gx.data != nullptr) {
          dense_input(p, a, gy, phase);
        }
      }
    }
    if (!sparse_) dense_weight(p, x, gy, dw);
  }

  void finish_gradients(bool add) override {
    const auto sum = [&](const float* parts, int64_t count, float* to) {
      for (int64_t k = 0; k < count; k++) {
        float s = add ? to[k] : 0.f;
        for (int64_t share = 0; share < shares_; share++) s += parts[share * count + k];
        to[k] = s;
      }
    };
    sum(dw_.get(), weight_parameter_.count, weight_parameter_.grad.get());
    if (has_bias_) sum(db_.get(), out.channels, bias_parameter_.grad.get());
  }

  void refresh() override {
    folded_ = false;
    if (!sparse_) return;
    const float* from = backward_.order.value.get();
    float* to = forward_.order.value.get();
    for (int64_t k = 0; k < survivors_.count(); k++) to[mirrored_[k]] = from[k];
  }

  void fold(const float* scale, const float* shift) override {
    folded_ = true;
    folded_bias_.reserve(out.channels);
    for (int64_t o = 0; o < out.channels; o++) folded_bias_[o] = bias_[o] * scale[o] + shift[o];
    if (sparse_) {
      const SparseLayout& m = forward_.order.layout;
      for (int64_t r = 0; r < m.lines * m.panels; r++) {
        for (uint32_t k = m.begin[r]; k < m.begin[r + 1]; k++) forward_.order.value[k] *= scale[m.line[r]];
      }
      return;
    }
    folded_dense_.reserve(out.channels * line_);
    for (int64_t o = 0; o < out.channels; o++) {
      for (int64_t k = o * line_; k < (o + 1) * line_; k++) folded_dense_[k] = dense_[k] * scale[o];
    }
  }

  void load(const NetworkTarget& from) override {
    if (from.weight != nullptr && sparse_) {
      float* value = backward_.order.value.get();
      for (int64_t k = 0; k < survivors_.count(); k++) value[place_[k]] = from.weight[survivors_.position[k]];
    } else if (from.weight != nullptr) {
      std::memcpy(dense_.get(), from.weight, out.channels * line_ * sizeof(float));
    }
    if (from.bias != nullptr && has_bias_) std::memcpy(bias_.get(), from.bias, out.channels * sizeof(float));
  }

  bool holds(const NetworkTarget& now) const override {
    return now.bias == nullptr || !has_bias_ || std::memcmp(now.bias, bias_.get(), out.channels * sizeof(float)) == 0;
  }

  void store(const NetworkTarget& to) const override {
    write(to, backward_.order.value.get(), dense_.get(), bias_.get());
  }

  void gradients(const NetworkTarget& to) const override {
    if (to.weight != nullptr && sparse_ && !to.clean) std::memset(to.weight, 0, out.channels * line_ * sizeof(float));
    const float* grad = weight_parameter_.grad.get();
    write(to, grad, grad, bias_parameter_.grad.get());
    if (to.weight == nullptr || words_.empty()) return;
    const int64_t sizes[2] = {out.channels, line_}, strides[2] = {line_, 1};
    bitmask_apply(to.weight, sizeof(float), words_.data(), 2, sizes, strides);
  }

 private:
  // Where the first output's first tap lies.
  float* corner(const View& x) const { return x.data - rows_.padding * x.row - columns_.padding * x.pixel; }

  View at_phase(const View& x, int64_t i, int64_t j) const {
    return {x.data + rows_.first(i) * x.row + columns_.first(j) * x.pixel, x.channel, rows_.stride * x.row,
            columns_.stride * x.pixel};
  }

  // In bytes: of an input from the corner; of an output from where an input pixel's own place is.
  int64_t input_place(int64_t channel, int64_t r, int64_t s) const {
    const Space space = input_space();
    return (channel * space.plane(in) + r * rows_.dilation * space.columns(in) + s * columns_.dilation) * pixel_;
  }
  int64_t grad_place(int64_t channel, int64_t r, int64_t s) const {
    const Space space = gradient_space();
    return (channel * space.plane(out) - r * rows_.dilation / rows_.stride * space.columns(out) -
            s * columns_.dilation / columns_.stride) *
           pixel_;
  }
  int64_t phase_of(int64_t r, int64_t s) const {
    return r * rows_.dilation % rows_.stride * columns_.stride + s * columns_.dilation % columns_.stride;
  }

  // Minors per panel: as many channels as stay in the first-level cache, unless a line then has too little work.
  int64_t panel(int64_t channels, double survivors_in_a_line, int64_t step) const {
    const int64_t strip = rows_.kernel * ((kPixels - 1) * step + columns_.reach() + 1) * pixel_;
    const int64_t fits = std::max<int64_t>(1, kPanelBytes / strip);
    const int64_t most = static_cast<int64_t>(survivors_in_a_line / kPanelWork);  // panels
    const int64_t panels = std::max<int64_t>(1, std::min(most, (channels + fits - 1) / fits));
    return (channels + panels - 1) / panels * taps_;
  }

  void build_forward() {
    std::vector<uint32_t> minor(survivors_.count());
    for (int64_t o = 0; o < out.channels; o++) {
      const int64_t base = o / (out.channels / groups_) * line_;  // of the group's channels
      for (uint32_t k = survivors_.offsets[o]; k < survivors_.offsets[o + 1]; k++) {
        minor[k] = static_cast<uint32_t>(survivors_.position[k] - o * line_ + base);
      }
    }
    const double in_a_line = static_cast<double>(survivors_.count()) / static_cast<double>(out.channels);
    forward_.build(out.channels, in.channels * taps_, out.channels, panel(in.channels, in_a_line, columns_.stride),
                   survivors_.offsets, minor, where_, [&](size_t k) {
                     const int64_t tap = minor[k] % taps_;
                     return input_place(minor[k] / taps_, tap / columns_.kernel, tap % columns_.kernel);
                   });
  }

  void build_backward() {
    const int64_t count = survivors_.count(), phases = rows_.stride * columns_.stride, lines = phases * in.channels;
    std::vector<uint32_t> line(count), starts(lines + 1, 0), minor(count), turned(count), place;
    std::vector<int64_t> tap(count);
    for (int64_t o = 0; o < out.channels; o++) {
      const int64_t base = o / (out.channels / groups_) * (in.channels / groups_);
      for (uint32_t k = survivors_.offsets[o]; k < survivors_.offsets[o + 1]; k++) {
        const int64_t column = survivors_.position[k] - o * line_;
        tap[k] = column % taps_;
        const int64_t phase = phase_of(tap[k] / columns_.kernel, tap[k] % columns_.kernel);
        line[k] = static_cast<uint32_t>(phase * in.channels + base + column / taps_);
        starts[line[k] + 1]++;
      }
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<uint32_t> cursor(starts.begin(), starts.end() - 1);
    std::vector<int64_t> distance(count);
    for (int64_t o = 0; o < out.channels; o++) {
      for (uint32_t k = survivors_.offsets[o]; k < survivors_.offsets[o + 1]; k++) {
        const uint32_t at = turned[k] = cursor[line[k]]++;
        minor[at] = static_cast<uint32_t>(o * taps_ + tap[k]);
        distance[at] = grad_place(o, tap[k] / columns_.kernel, tap[k] % columns_.kernel);
      }
    }
    const double in_a_line = static_cast<double>(count) / static_cast<double>(lines);
    backward_.build(lines, out.channels * taps_, in.channels, panel(out.channels, in_a_line, 1), starts, minor, place,
                    [&](size_t k) { return distance[k]; });
    place_.reserve(count);
    mirrored_.reserve(count);
    for (int64_t k = 0; k < count; k++) {
      place_[k] = place[turned[k]];
      mirrored_[place_[k]] = where_[k];
    }
    where_ = {};
  }

  void build_dense() {
    forward_taps_.reserve(line_);
    for (int64_t k = 0; k < line_; k++) {
      const int64_t tap = k % taps_;
      forward_taps_.push(input_place(k / taps_, tap / columns_.kernel, tap % columns_.kernel), k);
    }
    backward_taps_.resize(rows_.stride * columns_.stride);
    const int64_t outputs = out.channels / groups_;
    for (Taps& t : backward_taps_) t.reserve(outputs * taps_);
    for (int64_t o = 0; o < outputs; o++) {
      for (int64_t tap = 0; tap < taps_; tap++) {
        const int64_t r = tap / columns_.kernel, s = tap % columns_.kernel;
        backward_taps_[phase_of(r, s)].push(grad_place(o, r, s), o * line_ + tap);
      }
    }
  }

  void dense_input(const Pass& p, const ConvGradArgs& at, const View& gy, int64_t phase) const {
    ConvArgs a{};
    a.taps = backward_taps_[phase].get();
    a.lines = in.channels / groups_;
    a.line_step = taps_;
    a.in_row = at.in_row;
    a.in_pixel = gy.pixel;
    a.height = at.height;
    a.width = at.width;
    for (int64_t g = 0; g < groups_; g++) {
      a.in = at.in + g * (out.channels / groups_) * gy.channel;
      a.weight = dense_.get() + g * (out.channels / groups_) * line_;
      a.out = at.dx;
      a.out.data += g * a.lines * at.dx.channel;
      p.k->conv_dense(a);
    }
  }

  void dense_weight(const Pass& p, const View& x, const View& gy, float* dw) const {
    ConvWeightArgs a{};
    a.taps = forward_taps_.get();
    a.lines = out.channels / groups_;
    a.line_step = line_;
    a.x_row = rows_.stride * x.row;
    a.x_pixel = columns_.stride * x.pixel;
    a.height = out.height;
    a.width = out.width;
    for (int64_t g = 0; g < groups_; g++) {
      a.x = corner(x) + g * (in.channels / groups_) * x.channel;
      a.g = gy;
      a.g.data += g * a.lines * gy.channel;
      a.dw = dw + g * a.lines * line_;
      p.k->conv_dense_weight(a);
    }
  }

  void write(const NetworkTarget& to, const float* survivors, const float* dense, const float* bias) const {
    if (to.weight != nullptr && sparse_) {
      for (int64_t i = 0; i < survivors_.count(); i++) to.weight[survivors_.position[i]] = survivors[place_[i]];
    } else if (to.weight != nullptr) {
      std::memcpy(to.weight, dense, out.channels * line_ * sizeof(float));
    }
    if (to.bias != nullptr && has_bias_) std::memcpy(to.bias, bias, out.channels * sizeof(float));
  }

  int64_t groups_, taps_ = 0, line_ = 0, pixel_ = 0, shares_ = 0;  // taps of a filter, weights of an output, bytes
  bool has_bias_, sparse_ = false, folded_ = false;
  Axis rows_{}, columns_{};
  Array<float> dense_, bias_, folded_dense_, folded_bias_, dw_, db_;
  std::vector<uint32_t> words_;  // of a masked layer that is kept dense
  Survivors survivors_;
  Walk forward_, backward_;      // the weights that are trained are those of `backward_`
  std::vector<uint32_t> where_;  // [count]: where in `forward_` a survivor stands; while they are built
  Array<uint32_t> place_;        // [count]: where in `backward_` a survivor stands
  Array<uint32_t> mirrored_;     // [count]: where in `forward_` the weights of `backward_` stand
  Taps forward_taps_;
  std::vector<Taps> backward_taps_;  // by phase
  Parameter weight_parameter_, bias_parameter_;
};

}  // namespace

std::unique_ptr<Layer> make_conv(const NetworkLayer& l, Extent in, double densest, int64_t width) {
  return std::make_unique<Conv>(l, in, densest, width);
}

}  // namespace sl::cpu
