// A feed-forward network on a CPU in a layout of its own ("resident"): linear layers, convolutions, pooling, batch
// normalization and ReLU, forward, backward and whole training steps. float32. Activations lie batch last, so that a
// survivor of a mask is one multiply-add of whole vectors; the layout is converted at the edges of the network only.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sl::cpu {

// One layer, as the torch module of the same name. Pointers are read when a Network is made (or by `load`), not kept.
struct NetworkLayer {
  enum class Kind { kLinear, kConv2d, kReLU, kMaxPool2d, kAvgPool2d, kBatchNorm, kFlatten };
  Kind kind;
  int64_t outputs = 0;  // linear, conv2d: features or channels that go out
  // Rows, columns. Pooling: dilation is 1.
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t groups = 1;
  bool count_include_pad = true;  // average pooling
  // Linear: [outputs, inputs]; conv2d: [outputs, channels / groups, kernel rows, kernel columns]: contiguous, 0
  // wherever the mask is. Batch normalization: [channels] or null.
  const float* weight = nullptr;
  const uint32_t* words = nullptr;  // the mask, [outputs, words_per_row(weights of one output)]; null: all survive
  const float* bias = nullptr;      // [outputs] or [channels], or null
  const float *mean = nullptr, *variance = nullptr;  // batch normalization: running statistics, [channels]
  double momentum = 0.1, eps = 1e-5;                 // batch normalization
};

// As in torch.optim.SGD, Adam (decoupled: AdamW).
struct NetworkOptimizer {
  bool adam;
  double momentum, dampening;  // SGD
  bool nesterov;
  double beta1, beta2, eps;  // Adam
  bool decoupled;
  double weight_decay;
};

// Where a layer's parameters, or their gradients, are written to or read from; null: not wanted. Shapes of
// NetworkLayer.
struct NetworkTarget {
  float *weight = nullptr, *bias = nullptr;
  float *mean = nullptr, *variance = nullptr;
  bool clean = false;  // gradients: the weight's place is 0 off the mask already
};

// What a forward pass leaves for its backward pass. Its memory goes back to the network, which it may outlive.
class NetworkTape {
 public:
  ~NetworkTape();

 private:
  friend class Network;
  struct Impl;
  explicit NetworkTape(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// One call at a time runs (a lock). Results do not depend on the number of threads.
class Network {
 public:
  // channels, height, width: of one example; vectors of features are [features, 1, 1]. optimizer: null where `train`
  // will not be called. A linear layer up to the density `linear_densest`, a convolution up to `conv_densest`, is kept
  // as survivors alone, others as dense matrices. Throws std::invalid_argument where layers do not fit together; the
  // message names layers[i].
  Network(int64_t channels, int64_t height, int64_t width, const std::vector<NetworkLayer>& layers,
          const NetworkOptimizer* optimizer, double linear_densest, double conv_densest);
  ~Network();

  // Of one example that comes out.
  void output_shape(int64_t* channels, int64_t* height, int64_t* width) const;

  // `steps` training steps of softmax cross-entropy. x: examples, each contiguous, x_stride floats apart; y: labels,
  // 0 <= y < outputs; order [steps, batch]: which examples each minibatch has; rate [steps]: the learning rates.
  // Returns the sum of the steps' mean losses.
  double train(const float* x, int64_t x_stride, const int64_t* y, const int64_t* order, int64_t steps, int64_t batch,
               const double* rate);

  // The sum of the losses over examples 0 .. count - 1, and how many of them have their label's output as the largest
  // (the first of equals). Batch normalization uses its running statistics, here and in `forward`.
  void evaluate(const float* x, int64_t x_stride, const int64_t* y, int64_t count, double* loss, int64_t* right);

  // y [count, output shape], contiguous, of examples 0 .. count - 1.
  void forward(const float* x, int64_t x_stride, int64_t count, float* y);

  // The same, and keeps what `backward` needs. training: batch normalization uses the statistics of these examples and
  // updates its running ones.
  std::unique_ptr<NetworkTape> record(const float* x, int64_t x_stride, int64_t count, bool training, float* y);

  // From grad [count, output shape], contiguous: dx [count, input shape] (may be null), and each layer's gradients
  // (targets: one for each layer). Gradients of weights are written in full, 0 wherever the mask is (unless
  // `clean` promises that). The parameters
  // must be those of the forward pass.
  void backward(const NetworkTape& tape, const float* grad, float* dx, const std::vector<NetworkTarget>& targets);

  // Takes new values from, or writes them to, the places named. A masked weight keeps its mask; store writes survivors
  // only. Running statistics count as values of batch normalization.
  void load(int64_t layer, const NetworkTarget& from);
  void store(int64_t layer, const NetworkTarget& to) const;

  // The layers whose bias, or values of batch normalization, are not to the bit what stands at the places named (now:
  // one for each layer). Weights are not looked at.
  std::vector<int64_t> changed(const std::vector<NetworkTarget>& now) const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace sl::cpu
