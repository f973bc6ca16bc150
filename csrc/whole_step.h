// A multilayer perceptron on a CPU, whole training steps and all: forward, cross-entropy, backward and optimizer for
// minibatch after minibatch, without a way back to Python between them. float32. Called by
// sparselottery/training/whole_step.py and, for inference, by sparselottery/nn/compiled_mlp.py.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sl::cpu {

// y = x (W∘M)ᵀ + b, then max(y, 0) where `relu`. Read when the Mlp is made, not kept.
struct MlpLayer {
  int64_t rows, columns;  // outputs, inputs
  const float* weight;    // [rows, columns], contiguous, 0 wherever the mask is
  const uint32_t* words;  // the mask's bits, [rows, words_per_row(columns)]; null: every weight survives
  const float* bias;      // [rows], or null
  bool relu;
};

// As in torch.optim.SGD, Adam (decoupled: AdamW).
struct MlpOptimizer {
  bool adam;
  double momentum, dampening;  // SGD
  bool nesterov;
  double beta1, beta2, eps;  // Adam
  bool decoupled;
  double weight_decay;
  bool trains;  // false: there is no memory for gradients, and `train` must not be called
};

// One call at a time runs (a lock).
class Mlp {
 public:
  // Layers up to this density are kept as survivors alone, the others as dense matrices. Throws std::invalid_argument
  // where layers do not fit together.
  Mlp(const std::vector<MlpLayer>& layers, const MlpOptimizer& optimizer, double densest);
  ~Mlp();

  // `steps` steps. x: rows of floats x_stride apart; y: labels, 0 <= y < outputs of the last layer; order [steps,
  // batch]: which rows each minibatch has; rate [steps]: the learning rates. Returns the sum of the steps' mean losses.
  double train(const float* x, int64_t x_stride, const int64_t* y, const int64_t* order, int64_t steps, int64_t batch,
               const double* rate);

  // The sum of the losses over rows 0 .. count - 1, and how many of them have their label's output as the largest (the
  // first of equals).
  void evaluate(const float* x, int64_t x_stride, const int64_t* y, int64_t count, double* loss, int64_t* right);

  // y [count, outputs of the last layer] of rows 0 .. count - 1.
  void forward(const float* x, int64_t x_stride, int64_t count, float* y);

  // Writes layer i's surviving weights [rows, columns] and bias [rows] (null where it has none) back.
  void store(int64_t layer, float* weight, float* bias) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sl::cpu
