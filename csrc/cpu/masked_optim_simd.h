// What masked_optim.cpp calls in the copies of masked_optim_simd.cpp.
#pragma once
#include "../masked_optim.h"

// Mask words [begin, end) of a tensor, rows one after the other (without a mask: groups of 32 elements).
#define SL_MASKED_OPTIM(ISA)                                                                                      \
  namespace sl::cpu::ISA {                                                                                        \
  void masked_sgd(const OptimTensor& tensor, const SgdOptions& options, int dtype, int64_t begin, int64_t end);   \
  void masked_adam(const OptimTensor& tensor, const AdamOptions& options, int dtype, int64_t begin, int64_t end); \
  }
SL_MASKED_OPTIM(avx512)
SL_MASKED_OPTIM(avx2)
SL_MASKED_OPTIM(portable)
#undef SL_MASKED_OPTIM
