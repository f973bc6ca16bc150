// Exactly `keep` survivors over a list of tensors: the largest keys, equal keys by the lowest flat index in list order.
#pragma once
#include <cstdint>

#include "common.h"

namespace sl {

// One tensor of the list, as [rows, columns] in logical (not memory) order.
struct TopkTensor {
  const void* data;
  DType dtype;
  int64_t dims;              // >= 2; a vector or a scalar comes as sizes {1, n}
  const int64_t* sizes;      // host memory, [dims]
  const int64_t* strides;    // in elements
  const uint32_t* eligible;  // words [rows, words_per_row(columns)], padding bits 0, or null: all are eligible
  uint32_t* words;           // out, the same shape; every word is written, padding bits 0
};

struct TopkResult {
  int64_t nan_tensor =
      -1;  // the first tensor that holds a NaN (eligible or not), -1 without one; then the words are garbage
  double threshold = 0;  // the key of the smallest survivor, +inf when keep is 0
};

namespace cpu {

// Keys are |value|, or the value itself if by_value; -0 equals +0. dtypes may be mixed: keys are compared exactly.
// The caller has checked 0 <= keep <= number of eligible weights.
TopkResult global_topk(const TopkTensor* tensors, int64_t count, int64_t keep, bool by_value);

}  // namespace cpu

namespace cuda {

// `data`, `eligible` and `words` are device memory of one device. All tensors contiguous (the op sees to it); dtypes
// may be mixed. Scratch is device memory of at least global_topk_scratch(...) bytes, 256-byte aligned, contents
// arbitrary: 2 % of the weights' bytes and about 0.6 MB. `result` is device memory. Nothing waits for the device or
// copies from the host, so that a call can be captured in a CUDA graph.
int64_t global_topk_scratch(const TopkTensor* tensors, int64_t count);
void global_topk(const TopkTensor* tensors, int64_t count, int64_t keep, bool by_value, void* scratch,
                 TopkResult* result, void* stream);

}  // namespace cuda
}  // namespace sl
