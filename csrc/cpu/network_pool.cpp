// Pooling in a Network, and the copy between two layouts.
#include <stdexcept>

#include "network_layers.h"

namespace sl::cpu {
namespace {

class Pool : public Layer {
 public:
  Pool(const NetworkLayer& l, Extent extent) : maximum_(l.kind == NetworkLayer::Kind::kMaxPool2d) {
    in = out = extent;
    args_.in = in;
    args_.count_include_pad = l.count_include_pad;
    int64_t size[2] = {in.height, in.width};
    for (int i = 0; i < 2; i++) {
      args_.kernel[i] = l.kernel[i];
      args_.stride[i] = l.stride[i];
      args_.padding[i] = l.padding[i];
      const int64_t room = size[i] + 2 * l.padding[i] - l.kernel[i];
      if (l.kernel[i] < 1 || l.stride[i] < 1 || l.padding[i] < 0 || 2 * l.padding[i] > l.kernel[i] || room < 0) {
        throw std::invalid_argument("pooling: expected windows that fit the image and are at most half padding");
      }
      size[i] = room / l.stride[i] + 1;
    }
    out.height = args_.height = size[0];
    out.width = args_.width = size[1];
  }

  bool masks_gradient() const override { return true; }

  void forward(const Pass& p, const View& x, const View& y, bool relu) override {
    PoolArgs a = args_;
    a.x = x;
    a.y = y;
    a.relu = relu;
    (maximum_ ? p.k->max_pool : p.k->avg_pool)(a);
  }

  void backward(const Pass& p, const View& x, const View& y, const View& gy, const View& gx) override {
    if (gx.data == nullptr) return;
    PoolArgs a = args_;
    a.x = x;
    a.y = y;
    a.gy = gy;
    a.gx = gx;
    a.relu = relu;
    (maximum_ ? p.k->max_pool_backward : p.k->avg_pool_backward)(a);
  }

 private:
  bool maximum_;
  PoolArgs args_{};
};

class Copy : public Layer {
 public:
  explicit Copy(Extent extent) { in = out = extent; }
  void forward(const Pass& p, const View& x, const View& y, bool relu) override { p.k->copy(x, y, in, relu); }
  void backward(const Pass& p, const View&, const View&, const View& gy, const View& gx) override {
    if (gx.data != nullptr) p.k->copy(gy, gx, in, false);
  }
};

}  // namespace

std::unique_ptr<Layer> make_pool(const NetworkLayer& l, Extent in) { return std::make_unique<Pool>(l, in); }
std::unique_ptr<Layer> make_copy(Extent extent) { return std::make_unique<Copy>(extent); }

}  // namespace sl::cpu
