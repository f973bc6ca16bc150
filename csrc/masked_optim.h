// One optimizer step for the survivors of many tensors: SGD, Adam, AdamW as in torch.optim.
#pragma once
#include <cstdint>

namespace sl {

// A parameter with its gradient and state: contiguous arrays of rows * columns elements, all of one dtype.
struct OptimTensor {
  void* param;
  const void* grad;
  void* first;           // SGD: momentum buffer (null: no momentum). Adam: exp_avg
  void* second;          // Adam: exp_avg_sq
  void* max_second;      // Adam: max_exp_avg_sq (null: no AMSGrad)
  const int32_t* words;  // the mask, rows of whole words; null: every element survives, then rows == 1
  int64_t rows;
  int64_t columns;
  // The caller's promise that param and state are already 0 wherever the mask is: dead memory is then left alone.
  // Without it zeros are written there.
  bool clean;
  bool fresh;         // SGD: the momentum buffer is used for the first time
  double rate;        // SGD: lr. Adam: lr / (1 - beta1^step)
  double correction;  // Adam: 1 / sqrt(1 - beta2^step)
};

struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct AdamOptions {
  double beta1, beta2, eps;
  double weight_decay;  // added to the gradient (Adam)
  double shrink;        // multiplies the weights first: 1 - lr * weight_decay (AdamW), else 1
  bool maximize;
};

namespace cpu {

// dtype: code of common.h, float32 or float64. Gradients of dead weights are never looked at.
void masked_sgd(const OptimTensor* tensors, int64_t count, const SgdOptions& options, int dtype);
void masked_adam(const OptimTensor* tensors, int64_t count, const AdamOptions& options, int dtype);

}  // namespace cpu
}  // namespace sl
