#include "../masked_optim.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../common.h"
#include "isa.h"
#include "masked_optim_simd.h"

namespace sl::cpu {
namespace {

constexpr int64_t kChunkWords = 64;            // what one thread takes at a time
constexpr int64_t kParallelElements = 131072;  // below, waking threads costs more than they save

template <class Options>
using ChunkStep = void (*)(const OptimTensor&, const Options&, int, int64_t, int64_t);

template <class Options>
void each_chunk(const OptimTensor* tensors, int64_t count, const Options& options, int dtype, ChunkStep<Options> step) {
  if (dtype != static_cast<int>(DType::kFloat32) && dtype != static_cast<int>(DType::kFloat64))
    throw std::invalid_argument("masked_optim: dtype must be float32 or float64");
  std::vector<int64_t> first_chunk(count + 1, 0), words(count);
  int64_t elements = 0;
  for (int64_t i = 0; i < count; i++) {
    words[i] = tensors[i].rows * words_per_row(tensors[i].columns);
    first_chunk[i + 1] = first_chunk[i] + (words[i] + kChunkWords - 1) / kChunkWords;
    elements += tensors[i].rows * tensors[i].columns;
  }
  const int64_t chunks = first_chunk[count];
#pragma omp parallel for schedule(static) if (elements >= kParallelElements)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    const int64_t begin = (chunk - first_chunk[i]) * kChunkWords;
    step(tensors[i], options, dtype, begin, std::min(begin + kChunkWords, words[i]));
  }
}

}  // namespace

#if defined(__x86_64__)
#define SL_PICK(fn) (isa() == Isa::kAvx512 ? avx512::fn : isa() == Isa::kAvx2 ? avx2::fn : portable::fn)
#else
#define SL_PICK(fn) portable::fn
#endif

void masked_sgd(const OptimTensor* tensors, int64_t count, const SgdOptions& options, int dtype) {
  each_chunk<SgdOptions>(tensors, count, options, dtype, SL_PICK(masked_sgd));
}

void masked_adam(const OptimTensor* tensors, int64_t count, const AdamOptions& options, int dtype) {
  each_chunk<AdamOptions>(tensors, count, options, dtype, SL_PICK(masked_adam));
}

}  // namespace sl::cpu
