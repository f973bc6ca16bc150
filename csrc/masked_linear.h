// Masked linear layer: y = x (W∘M)ᵀ + b, dX = dY (W∘M), dW∘M, db, float32. Checked by
// sparselottery/ops/masked_linear.py.
#pragma once
#include <cstdint>
#include <memory>

namespace sl::cpu {

// The survivors of one mask, indexed for the CPU kernels, with the weights' values as they were last gathered. Needs
// about 14 bytes per survivor for the forward and 10 more for the backward, built when they are first asked for. Calls
// on one plan run one after the other (a lock); each uses the threads that torch.set_num_threads allows.
class MaskedLinearPlan {
 public:
  // words: [rows, words_per_row(columns)]. packed: weights and their gradients are vectors [count] of the survivors,
  // row by row, in all that follows. Throws std::invalid_argument from 2^32 weights on.
  MaskedLinearPlan(const uint32_t* words, int64_t rows, int64_t columns, bool packed = false);
  ~MaskedLinearPlan();

  int64_t count() const;

  // Whether a sample of the mask's words is still the same: a second line of defence, for writes that leave no trace in
  // a tensor's version counter.
  bool same_words(const uint32_t* words) const;

  // A weight [rows, columns], float32 or (half) bfloat16. It is read where values are missing: the plan keeps those of
  // the last call, if they come from this address at this version, `same` says that it is the same tensor, and a sample
  // of them is still there.
  struct Weight {
    const void* data;
    bool half;
    int64_t version;
    bool same;
  };

  // x [batch, columns] with rows x_stride apart, bias [rows] or null, y [batch, rows]. tile: vectors of batch per
  // feature, 0 to choose, -1 for dense products under the mask. relu: y becomes max(y, 0). trains: the weight changes
  // between calls.
  void forward(const Weight& weight, const float* x, int64_t x_stride, int64_t batch, const float* bias, float* y,
               int64_t tile, bool relu, bool trains = false);

  // grad [batch, rows] with rows grad_stride apart. Every element of dx [batch, columns], dw [rows, columns] and db
  // [rows] is written; null where not wanted (dx and dw not both). dw has the weight's type. dw_is_zero (float32): dw
  // has been written by this plan before and nobody is known to have changed it, so that its dead places need no
  // zeros; a sample of them is looked at all the same.
  void backward(const Weight& weight, const float* grad, int64_t grad_stride, const float* x, int64_t x_stride,
                int64_t batch, float* dx, void* dw, float* db, int64_t tile, bool dw_is_zero);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sl::cpu
