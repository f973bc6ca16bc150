// Convolution with an unstructured mask: y = conv2d(x, W∘M) + b and its gradients.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sl::cpu {

// One spatial direction of a convolution, in pixels.
struct ConvAxis {
  int64_t input, kernel, stride, padding, dilation;
};

// A four-dimensional view: element (n, c, h, w) lies at data[n * stride[0] + c * stride[1] + h * stride[2] + w *
// stride[3]].
struct ConvView {
  const float* data;
  int64_t stride[4];
};

// Where the survivors of one mask act for one shape of image. Build it once per mask; it does not depend on the
// weights.
class ConvPlan {
 public:
  // words [out, ceil(channels / groups * kernel_h * kernel_w / 32)]. Throws std::invalid_argument for what a plan
  // cannot hold (scratch of 4 GiB for one image).
  ConvPlan(const int32_t* words, int64_t out, int64_t channels, int64_t groups, ConvAxis rows, ConvAxis columns);
  ~ConvPlan();
  int64_t survivors() const;

  struct Parts;
  std::unique_ptr<Parts> parts;
};

// y [batch, out, H', W'], contiguous, every element written. weight: contiguous. bias may be null.
void masked_conv2d_forward(const ConvPlan& plan, int64_t batch, ConvView x, const float* weight, const float* bias,
                           float* y);

// dx [batch, channels, H, W], dweight (shape of weight, zero off the mask) and dbias [out]: contiguous, every element
// written; any of them may be null.
void masked_conv2d_backward(const ConvPlan& plan, int64_t batch, ConvView grad, ConvView x, const float* weight,
                            float* dx, float* dweight, float* dbias);

}  // namespace sl::cpu
