#include "../bitmask.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../common.h"
#include "bitmask_simd.h"
#include "isa.h"

#if defined(__x86_64__)
#define SL_PICK(fn) (isa() == Isa::kAvx512 ? avx512::fn : isa() == Isa::kAvx2 ? avx2::fn : portable::fn)
#else
#define SL_PICK(fn) portable::fn
#endif

namespace sl::cpu {
namespace {

constexpr int64_t kRunWords = 4096;          // what one thread takes at a time
constexpr int64_t kParallelWords = 1 << 14;  // below, waking threads costs more than they save

// Calls run(row, first column, columns) for stretches of rows that start at a word, on all threads.
template <class Run>
void each_run(int64_t rows, int64_t columns, const Run& run) {
  if (columns % kWordBits == 0) {  // rows follow one another without padding, in the mask too
    columns *= rows;
    rows = 1;
  }
  if (rows * columns == 0) return;
  const int64_t run_columns = kRunWords * kWordBits, per_row = (columns + run_columns - 1) / run_columns;
#pragma omp parallel for schedule(static) if (rows * words_per_row(columns) >= kParallelWords)
  for (int64_t i = 0; i < rows * per_row; i++) {
    const int64_t first = i % per_row * run_columns;
    run(i / per_row, first, std::min(run_columns, columns - first), columns);
  }
}

template <class CountRun>
int64_t sum_runs(int64_t count, const CountRun& count_run) {
  int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) if (count >= kParallelWords)
  for (int64_t first = 0; first < count; first += kRunWords) {
    total += count_run(first, std::min(kRunWords, count - first));
  }
  return total;
}

template <class Bits>
void apply_strided(Bits* weights, const uint32_t* words, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t columns = 1;
  for (int64_t d = 1; d < dims; d++) columns *= sizes[d];
  const int64_t per_row = words_per_row(columns), inner = sizes[dims - 1], step = strides[dims - 1];
  if (columns == 0) return;
#pragma omp parallel for schedule(static) if (sizes[0] * per_row >= kParallelWords)
  for (int64_t row = 0; row < sizes[0]; row++) {
    const uint32_t* mask = words + row * per_row;
    for (int64_t first = 0; first < columns; first += inner) {
      Bits* p = weights + row * strides[0];
      int64_t rest = first / inner;
      for (int64_t d = dims - 2; d >= 1; d--) {
        p += rest % sizes[d] * strides[d];
        rest /= sizes[d];
      }
      for (int64_t i = 0; i < inner; i++) {
        const int64_t column = first + i;
        if (!(mask[column / kWordBits] >> (column % kWordBits) & 1)) p[i * step] = 0;
      }
    }
  }
}

}  // namespace

void bitmask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint32_t* words) {
  const auto pack = SL_PICK(bitmask_pack_run);
  each_run(rows, columns, [=](int64_t row, int64_t first, int64_t n, int64_t row_columns) {
    pack(dense + row * row_columns + first, n, words + row * words_per_row(row_columns) + first / kWordBits);
  });
}

void bitmask_unpack(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* dense) {
  const auto unpack = SL_PICK(bitmask_unpack_run);
  each_run(rows, columns, [=](int64_t row, int64_t first, int64_t n, int64_t row_columns) {
    unpack(words + row * words_per_row(row_columns) + first / kWordBits, n, dense + row * row_columns + first);
  });
}

void bitmask_count(const uint32_t* words, int64_t count, int64_t* out) {
  const auto run = SL_PICK(bitmask_count_run);
  *out = sum_runs(count, [=](int64_t first, int64_t n) { return run(words + first, n); });
}

void bitmask_hamming(const uint32_t* a, const uint32_t* b, int64_t count, int64_t* out) {
  const auto run = SL_PICK(bitmask_hamming_run);
  *out = sum_runs(count, [=](int64_t first, int64_t n) { return run(a + first, b + first, n); });
}

void bitmask_apply(void* weights, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides) {
  if (item_size != 2 && item_size != 4 && item_size != 8)
    throw std::invalid_argument("bitmask_apply: item_size must be 2, 4 or 8");
  int64_t columns = 1;
  bool contiguous = true;
  for (int64_t d = dims - 1; d >= 0; d--) {
    contiguous = contiguous && (sizes[d] == 1 || strides[d] == columns);
    if (d) columns *= sizes[d];
  }
  if (contiguous) {
    const auto apply = SL_PICK(bitmask_apply_run);
    char* base = static_cast<char*>(weights);
    each_run(sizes[0], columns, [=](int64_t row, int64_t first, int64_t n, int64_t row_columns) {
      apply(base + (row * row_columns + first) * item_size, item_size,
            words + row * words_per_row(row_columns) + first / kWordBits, n);
    });
  } else if (item_size == 2) {
    apply_strided(static_cast<uint16_t*>(weights), words, dims, sizes, strides);
  } else if (item_size == 4) {
    apply_strided(static_cast<uint32_t*>(weights), words, dims, sizes, strides);
  } else {
    apply_strided(static_cast<uint64_t*>(weights), words, dims, sizes, strides);
  }
}

}  // namespace sl::cpu
