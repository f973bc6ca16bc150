// Batch normalization in a Network: y = (x - mean) / sqrt(variance + eps) * weight + bias (Ioffe & Szegedy, arXiv
// 1502.03167), with the statistics of a batch or the running ones.
#include <cstring>

#include "network_layers.h"

namespace sl::cpu {

NormLayer::NormLayer(const NetworkLayer& l, Extent extent)
    : momentum_(l.momentum),
      eps_(l.eps),
      has_weight_(l.weight != nullptr),
      has_bias_(l.bias != nullptr),
      has_running_(l.mean != nullptr && l.variance != nullptr) {
  in = out = extent;
  const int64_t channels = extent.channels;
  const auto values = [channels](const float* from, float otherwise) {
    return from != nullptr ? std::vector<float>(from, from + channels) : std::vector<float>(channels, otherwise);
  };
  weight_ = values(l.weight, 1);
  bias_ = values(l.bias, 0);
  running_mean_ = values(l.mean, 0);
  running_variance_ = values(l.variance, 1);
  zero_.assign(channels, 0);
  for (auto* v : {&a_, &b_, &c_, &now_.mean, &now_.scale}) v->resize(channels);
  if (has_weight_) weight_parameter_.start(weight_.data(), channels);
  if (has_bias_) bias_parameter_.start(bias_.data(), channels);
}

std::vector<Parameter*> NormLayer::parameters() { return {&weight_parameter_, &bias_parameter_}; }

void NormLayer::start_statistics(int64_t groups) {
  const int64_t size = groups * in.channels;
  mean_ = zero_;
  sums_.resize(size);
  others_.resize(size);
  round_ = 0;
}

void NormLayer::add_in_order(const Pass& p, const View& x) {
  for (int64_t c = 0; c < in.channels; c++) {
    for (int64_t b = 0; b < p.count; b++) mean_[c] += x.data[c * x.channel + b];
  }
}

void NormLayer::group_statistics(const Pass& p, int64_t group, const View& x) {
  NormArgs a{};
  a.x = x;
  a.extent = in;
  a.count = p.count;
  a.mean = mean_.data();
  a.sum = sums_.data() + group * in.channels;
  a.other = others_.data() + group * in.channels;
  p.k->norm_sums(a);
}

void NormLayer::finish_statistics(int64_t groups, int64_t examples, bool update) {
  const double count = static_cast<double>(examples) * in.height * in.width;
  for (int64_t c = 0; c < in.channels; c++) {
    if (round_ == 0 && single_pixel()) {
      mean_[c] = static_cast<float>(mean_[c] / count);
      continue;
    }
    double sum = 0, squares = 0;
    for (int64_t g = 0; g < groups; g++) {
      sum += sums_[g * in.channels + c];
      squares += others_[g * in.channels + c];
    }
    if (round_ == 0) {
      mean_[c] = static_cast<float>(sum / count);
      continue;
    }
    // What the second sums are away from 0 corrects the first ones' rounding, and their squares: of a constant channel
    // nothing must remain, because it would be divided by the root of eps.
    const float before = mean_[c];
    if (!single_pixel()) mean_[c] = static_cast<float>(before + sum / count);
    const double moved = static_cast<double>(mean_[c]) - before;
    squares -= moved * (2 * sum - count * moved);
    if (squares < 0) squares = 0;
    now_.mean[c] = mean_[c];
    now_.scale[c] = static_cast<float>(1 / std::sqrt(squares / count + eps_));
    if (update && has_running_) {
      const double unbiased = squares / (count - 1);
      running_mean_[c] = static_cast<float>((1 - momentum_) * running_mean_[c] + momentum_ * mean_[c]);
      running_variance_[c] = static_cast<float>((1 - momentum_) * running_variance_[c] + momentum_ * unbiased);
    }
  }
  round_++;
}

void NormLayer::use_running() {
  for (int64_t c = 0; c < in.channels; c++) {
    now_.mean[c] = running_mean_[c];
    now_.scale[c] = static_cast<float>(1 / std::sqrt(static_cast<double>(running_variance_[c]) + eps_));
  }
}

void NormLayer::scale_and_shift(std::vector<float>& scale, std::vector<float>& shift) const {
  scale.resize(in.channels);
  shift.resize(in.channels);
  for (int64_t c = 0; c < in.channels; c++) {
    scale[c] = now_.scale[c] * weight_[c];
    shift[c] = bias_[c] - now_.mean[c] * scale[c];
  }
}

void NormLayer::forward(const Pass& p, const View& x, const View& y, bool relu) {
  NormArgs a{};
  a.x = x;
  a.y = y;
  a.extent = in;
  std::vector<float> scale(in.channels);
  for (int64_t c = 0; c < in.channels; c++) scale[c] = now_.scale[c] * weight_[c];
  a.mean = now_.mean.data();
  a.a = scale.data();
  a.shift = bias_.data();
  a.relu = relu;
  p.k->norm_apply(a);
}

void NormLayer::products(const Pass& p, int64_t group, const View& x, const View& gy) {
  NormArgs a{};
  a.x = x;
  a.gy = gy;
  a.extent = in;
  a.count = p.count;
  a.mean = now_.mean.data();
  a.sum = sums_.data() + group * in.channels;
  a.other = others_.data() + group * in.channels;
  p.k->norm_products(a);
}

void NormLayer::finish_products(int64_t groups, int64_t examples, bool batch_statistics) {
  const double count = static_cast<double>(examples) * in.height * in.width;
  for (int64_t c = 0; c < in.channels; c++) {
    double sum = 0, product = 0;  // of gy, of gy (x - mean)
    for (int64_t g = 0; g < groups; g++) {
      sum += sums_[g * in.channels + c];
      product += others_[g * in.channels + c];
    }
    const double scale = now_.scale[c], slope = scale * weight_[c];
    if (has_weight_) weight_parameter_.grad[c] = static_cast<float>(product * scale);
    if (has_bias_) bias_parameter_.grad[c] = static_cast<float>(sum);
    // gx = slope (gy - mean of gy - (x - mean) scale^2 mean of gy (x - mean)), the means gone with running statistics.
    const double tilt = batch_statistics ? -slope * scale * scale * product / count : 0;
    a_[c] = static_cast<float>(slope);
    b_[c] = static_cast<float>(tilt);
    c_[c] = static_cast<float>(batch_statistics ? -slope * sum / count : 0);
  }
}

void NormLayer::backward(const Pass& p, const View& x, const View&, const View& gy, const View& gx) {
  if (gx.data == nullptr) return;
  NormArgs a{};
  a.x = x;
  a.gy = gy;
  a.gx = gx;
  a.extent = in;
  a.count = p.count;
  a.mean = now_.mean.data();
  a.a = a_.data();
  a.b = p.batch_statistics ? b_.data() : nullptr;
  a.shift = c_.data();
  p.k->norm_backward(a);
}

namespace {

void copy_to(float* to, const std::vector<float>& from) {
  if (to != nullptr) std::copy(from.begin(), from.end(), to);
}

void copy_from(const float* from, std::vector<float>& to) {
  if (from != nullptr) std::copy_n(from, to.size(), to.begin());
}

bool equal(const float* now, const std::vector<float>& held) {
  return now == nullptr || std::memcmp(now, held.data(), held.size() * sizeof(float)) == 0;
}

}  // namespace

bool NormLayer::holds(const NetworkTarget& now) const {
  return equal(now.weight, weight_) && equal(now.bias, bias_) && equal(now.mean, running_mean_) &&
         equal(now.variance, running_variance_);
}

void NormLayer::load(const NetworkTarget& from) {
  copy_from(has_weight_ ? from.weight : nullptr, weight_);
  copy_from(has_bias_ ? from.bias : nullptr, bias_);
  copy_from(from.mean, running_mean_);
  copy_from(from.variance, running_variance_);
}

void NormLayer::store(const NetworkTarget& to) const {
  copy_to(to.weight, weight_);
  copy_to(to.bias, bias_);
  copy_to(to.mean, running_mean_);
  copy_to(to.variance, running_variance_);
}

void NormLayer::gradients(const NetworkTarget& to) const {
  if (to.weight != nullptr && has_weight_) std::copy_n(weight_parameter_.grad.get(), in.channels, to.weight);
  if (to.bias != nullptr && has_bias_) std::copy_n(bias_parameter_.grad.get(), in.channels, to.bias);
}

}  // namespace sl::cpu
