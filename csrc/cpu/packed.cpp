#include "packed.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common.h"
#include "bitmask_simd.h"
#include "isa.h"
#include "packed_simd.h"

#if defined(__x86_64__)
#define SL_PICK(fn) (isa() == Isa::kAvx512 ? avx512::fn : isa() == Isa::kAvx2 ? avx2::fn : portable::fn)
#else
#define SL_PICK(fn) portable::fn
#endif

namespace sl::cpu {
namespace {

constexpr int64_t kRunWords = 1024;          // what one thread takes at a time
constexpr int64_t kParallelWords = 1 << 13;  // below, waking threads costs more than it saves

// The weights cut into runs that start at a word, and where each run's survivors begin. Counting them anew on each call
// reads a 32nd of the dense weight's bytes, and a mask that does not fit the values is noticed before a write.
struct Runs {
  int64_t columns, per_row, count;
  std::vector<int64_t> starts;  // [count + 1]

  Runs(const uint32_t* words, int64_t rows, int64_t row_columns, int64_t survivors, bool merge) : columns(row_columns) {
    if (merge && columns % kWordBits == 0) {  // rows follow one another without padding, in the mask too
      columns *= rows;
      rows = 1;
    }
    per_row = (words_per_row(columns) + kRunWords - 1) / kRunWords;
    count = rows * per_row;
    starts.resize(count + 1);
    const auto count_run = SL_PICK(bitmask_count_run);
#pragma omp parallel for schedule(static) if (rows * words_per_row(columns) >= kParallelWords)
    for (int64_t i = 0; i < count; i++) {
      starts[i + 1] = count_run(words + first_word(i), words_per_row(length(i)));
    }
    for (int64_t i = 0; i < count; i++) starts[i + 1] += starts[i];
    if (starts[count] != survivors) {
      throw std::invalid_argument("packed: the mask keeps " + std::to_string(starts[count]) + " weights, got " +
                                  std::to_string(survivors) + " values");
    }
  }

  int64_t row(int64_t i) const { return i / per_row; }
  int64_t first_column(int64_t i) const { return i % per_row * kRunWords * kWordBits; }
  int64_t length(int64_t i) const { return std::min(kRunWords * kWordBits, columns - first_column(i)); }
  int64_t first_word(int64_t i) const { return row(i) * words_per_row(columns) + i % per_row * kRunWords; }
  bool parallel() const { return count * words_per_row(std::min(columns, kRunWords * kWordBits)) >= kParallelWords; }
};

void check_item_size(int64_t item_size) {
  if (item_size != 2 && item_size != 4 && item_size != 8) {
    throw std::invalid_argument("packed: item_size must be 2, 4 or 8");
  }
}

template <class Bits>
void gather_strided(const Bits* dense, const uint32_t* words, int64_t dims, const int64_t* sizes,
                    const int64_t* strides, const Runs& runs, Bits* values) {
#pragma omp parallel for schedule(static) if (runs.parallel())
  for (int64_t i = 0; i < runs.count; i++) {
    Bits* to = values + runs.starts[i];
    const Bits* row = dense + runs.row(i) * strides[0];
    for (int64_t w = 0; w < words_per_row(runs.length(i)); w++) {
      for (uint32_t live = words[runs.first_word(i) + w]; live != 0; live &= live - 1) {
        int64_t column = runs.first_column(i) + w * kWordBits + __builtin_ctz(live), offset = 0;
        for (int64_t d = dims - 1; d > 1; d--) {
          offset += column % sizes[d] * strides[d];
          column /= sizes[d];
        }
        *to++ = row[offset + column * strides[1]];
      }
    }
  }
}

}  // namespace

void packed_expand(const void* values, int64_t count, int64_t item_size, const uint32_t* words, int64_t rows,
                   int64_t columns, void* dense) {
  check_item_size(item_size);
  const Runs runs(words, rows, columns, count, true);
  const auto expand = SL_PICK(packed_expand_run);
#pragma omp parallel for schedule(static) if (runs.parallel())
  for (int64_t i = 0; i < runs.count; i++) {
    expand(static_cast<const char*>(values) + runs.starts[i] * item_size, item_size, words + runs.first_word(i),
           runs.length(i), static_cast<char*>(dense) + (runs.row(i) * runs.columns + runs.first_column(i)) * item_size);
  }
}

void packed_gather(const void* dense, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides, void* values, int64_t count) {
  check_item_size(item_size);
  int64_t columns = 1;
  bool contiguous = true;
  for (int64_t d = dims - 1; d >= 0; d--) {
    contiguous = contiguous && (sizes[d] == 1 || strides[d] == columns);
    if (d) columns *= sizes[d];
  }
  const Runs runs(words, sizes[0], columns, count, contiguous);
  if (!contiguous) {
    if (item_size == 2) {
      gather_strided(static_cast<const uint16_t*>(dense), words, dims, sizes, strides, runs,
                     static_cast<uint16_t*>(values));
    } else if (item_size == 4) {
      gather_strided(static_cast<const uint32_t*>(dense), words, dims, sizes, strides, runs,
                     static_cast<uint32_t*>(values));
    } else {
      gather_strided(static_cast<const uint64_t*>(dense), words, dims, sizes, strides, runs,
                     static_cast<uint64_t*>(values));
    }
    return;
  }
  const auto gather = SL_PICK(packed_gather_run);
#pragma omp parallel for schedule(static) if (runs.parallel())
  for (int64_t i = 0; i < runs.count; i++) {
    gather(static_cast<const char*>(dense) + (runs.row(i) * runs.columns + runs.first_column(i)) * item_size, item_size,
           words + runs.first_word(i), runs.length(i), static_cast<char*>(values) + runs.starts[i] * item_size);
  }
}

}  // namespace sl::cpu
