// Packs weights for decode_cpu (once per layer, plain loops) and picks the instruction set; the loops are in
// decode_cpu_simd.cpp.
#include "../decode_cpu.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "decode_cpu_simd.h"
#include "isa.h"
#include "sparse_order.h"

namespace sl::cpu {
namespace {

constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds below which waking other threads costs more than it saves
// What a step and an entry of the overflow cost, in cycles: 32 permuted multiply-adds in five, and a load, a
// multiply-add and a store of one that lie in the way of the next (EPYC, Zen 4).
constexpr int64_t kStepCost = 5, kOverflowCost = 2;

int64_t blocks_of(int64_t columns) { return (columns + kDecodeBlock - 1) / kDecodeBlock; }
int64_t rows_of(CpuFormat format) { return format == CpuFormat::kSlots ? kSlotRows : kMaskRows; }
// Of the steps of all blocks, in front of their codes.
int64_t header(int64_t slices, int64_t blocks) { return (slices * blocks + 63) / 64 * 64; }

// The survivors of one row in one block, bit by bit.
uint64_t block_bits(const uint32_t* words, int64_t columns, int64_t row, int64_t block) {
  const int64_t in_row = words_per_row(columns), w = 2 * block;
  const uint32_t* line = words + row * in_row;
  return line[w] | (w + 1 < in_row ? uint64_t{line[w + 1]} << 32 : 0);
}

int32_t checked(int64_t count) {
  if (count > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("decode_cpu: expected fewer than 2^31 survivors, got " + std::to_string(count));
  }
  return static_cast<int32_t>(count);
}

// How many slots the blocks of one slice have, and what is left over.
struct SlicePlan {
  std::vector<uint8_t> steps;
  int64_t total = 0, overflow = 0;

  // order: the row in each place, -1: none.
  SlicePlan(const uint32_t* words, int64_t columns, const int32_t* order) : steps(blocks_of(columns)) {
    std::array<int64_t, kDecodeBlock + 1> rows{};    // with so many survivors in a block
    std::array<int64_t, kDecodeBlock + 1> blocks{};  // whose fullest row has so many
    std::vector<std::array<uint8_t, kSlotRows>> counts(steps.size());
    for (size_t b = 0; b < steps.size(); b++) {
      for (int64_t i = 0; i < kSlotRows; i++) {
        const uint64_t bits = order[i] < 0 ? 0 : block_bits(words, columns, order[i], b);
        counts[b][i] = static_cast<uint8_t>(__builtin_popcountll(bits));
        rows[counts[b][i]]++;
      }
      steps[b] = *std::max_element(counts[b].begin(), counts[b].end());
      blocks[steps[b]]++;
    }
    // From s - 1 to s slots: a step more in each block with a row of s or more, an overflow less for each such row.
    int64_t longer_blocks = 0, longer_rows = 0, cost = 0, least = 0;
    int64_t slots = kDecodeBlock;
    for (int64_t s = kDecodeBlock; s > 0; s--) {  // downwards, from where nothing overflows
      longer_blocks += blocks[s];
      longer_rows += rows[s];
      cost += kOverflowCost * longer_rows - kStepCost * longer_blocks;
      if (cost < least) {
        least = cost;
        slots = s - 1;
      }
    }
    for (size_t b = 0; b < steps.size(); b++) {
      steps[b] = static_cast<uint8_t>(std::min<int64_t>(steps[b], slots));
      total += steps[b];
      for (const uint8_t count : counts[b]) overflow += std::max(0, count - steps[b]);
    }
  }
};

// Rows with about as many survivors share a slice: then few of its slots stay empty.
std::vector<int32_t> rows_by_count(const uint32_t* words, int64_t rows, int64_t columns) {
  std::vector<int64_t> count(rows);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t w = 0; w < words_per_row(columns); w++) {
      count[r] += __builtin_popcount(words[r * words_per_row(columns) + w]);
    }
  }
  std::vector<int32_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return count[a] > count[b]; });
  return order;
}

void layout_slots(const uint32_t* words, int64_t rows, int64_t columns, int32_t* starts, int64_t* codes,
                  int64_t* values) {
  const int64_t slices = decode_cpu_slices(CpuFormat::kSlots, rows, columns);
  const std::vector<int32_t> order = rows_by_count(words, rows, columns);
  int64_t steps = 0, overflow = 0;
  for (int64_t s = 0; s <= slices; s++) {
    int32_t* line = starts + s * kSlotStarts;
    line[0] = checked(steps * kSlotRows) / kSlotRows;
    line[1] = checked(overflow);
    for (int64_t i = 0; i < kSlotRows; i++) {
      const int64_t at = s * kSlotRows + i;
      line[2 + i] = at < rows ? order[at] : -1;
    }
    if (s == slices) break;
    const SlicePlan plan(words, columns, line + 2);
    steps += plan.total;
    overflow += plan.overflow;
  }
  *codes = header(slices, blocks_of(columns)) + steps * kSlotRows + overflow * int64_t{sizeof(uint32_t)};
  *values = steps * kSlotRows + overflow;
}

template <class T>
void pack_slots(const CpuDecodeWeight& w, const T* dense, const uint32_t* words, uint8_t* codes, T* values) {
  const int64_t slices = decode_cpu_slices(w.format, w.rows, w.columns), blocks = blocks_of(w.columns);
  const int64_t steps = w.starts[slices * kSlotStarts];
  uint8_t* const step_codes = codes + header(slices, blocks);
  uint8_t* const over_codes = step_codes + steps * kSlotRows;
  std::fill(codes + slices * blocks, step_codes, uint8_t{0});
#pragma omp parallel for schedule(static)
  for (int64_t s = 0; s < slices; s++) {
    const int32_t* line = w.starts + s * kSlotStarts;
    const SlicePlan plan(words, w.columns, line + 2);
    std::copy(plan.steps.begin(), plan.steps.end(), codes + s * blocks);
    int64_t step = line[0], over = line[1];
    for (int64_t b = 0; b < blocks; step += plan.steps[b++]) {
      std::fill_n(step_codes + step * kSlotRows, plan.steps[b] * kSlotRows, kEmptySlot);
      std::fill_n(values + step * kSlotRows, plan.steps[b] * kSlotRows, T{0});
      for (int64_t i = 0; i < kSlotRows && line[2 + i] >= 0; i++) {
        const T* row = dense + line[2 + i] * w.columns;
        int64_t slot = 0;
        for (uint64_t bits = block_bits(words, w.columns, line[2 + i], b); bits != 0; bits &= bits - 1, slot++) {
          const int64_t column = b * kDecodeBlock + __builtin_ctzll(bits);
          if (slot < plan.steps[b]) {
            step_codes[(step + slot) * kSlotRows + slot_lane(i)] = static_cast<uint8_t>(column % kDecodeBlock);
            values[(step + slot) * kSlotRows + i] = row[column];
          } else {
            const uint32_t code = static_cast<uint32_t>(column * kSlotRows + i);
            std::memcpy(over_codes + over * sizeof code, &code, sizeof code);
            values[steps * kSlotRows + over++] = row[column];
          }
        }
      }
    }
  }
}

void layout_bitmask(const uint32_t* words, int64_t rows, int64_t columns, int32_t* starts, int64_t* codes,
                    int64_t* values) {
  const int64_t slices = decode_cpu_slices(CpuFormat::kBitmask, rows, columns);
  int64_t count = 0;
  for (int64_t s = 0; s <= slices; s++) {
    starts[s] = checked(count);
    const int64_t last = std::min((s + 1) * kMaskRows, rows);
    for (int64_t w = s * kMaskRows * words_per_row(columns); w < last * words_per_row(columns); w++) {
      count += __builtin_popcount(words[w]);
    }
  }
  *codes = slices * blocks_of(columns) * kMaskRows * int64_t{sizeof(uint64_t)};
  *values = count + kMaskPad;
}

template <class T>
void pack_bitmask(const CpuDecodeWeight& w, const T* dense, const uint32_t* words, uint8_t* codes, T* values) {
  const int64_t slices = decode_cpu_slices(w.format, w.rows, w.columns), blocks = blocks_of(w.columns);
#pragma omp parallel for schedule(static)
  for (int64_t s = 0; s < slices; s++) {
    int64_t at = w.starts[s];
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t i = 0; i < kMaskRows; i++) {
        const int64_t r = s * kMaskRows + i;
        const uint64_t bits = r < w.rows ? block_bits(words, w.columns, r, b) : 0;
        std::memcpy(codes + ((s * blocks + b) * kMaskRows + i) * sizeof bits, &bits, sizeof bits);
        for (uint64_t left = bits; left != 0; left &= left - 1) {
          values[at++] = dense[r * w.columns + b * kDecodeBlock + __builtin_ctzll(left)];
        }
      }
    }
  }
  std::fill_n(values + w.starts[slices], kMaskPad, T{0});
}

template <class T>
void pack(const CpuDecodeWeight& weight, const void* dense, const uint32_t* words, uint8_t* codes, void* values) {
  const auto fill = weight.format == CpuFormat::kSlots ? pack_slots<T> : pack_bitmask<T>;
  fill(weight, static_cast<const T*>(dense), words, codes, static_cast<T*>(values));
}

struct Kernels {
  bool planes;
  void (*slots)(const DecodeArgs&);
  void (*bitmask)(const DecodeArgs&);
};

#define SL_KERNELS(ns) \
  Kernels { ns::decode_planes(), ns::decode_slots, ns::decode_bitmask }

Kernels kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return SL_KERNELS(avx512);
  if (isa() == Isa::kAvx2) return SL_KERNELS(avx2);
#endif
  return SL_KERNELS(portable);
}

// x in the form that the loops want; each thread that calls keeps its own.
struct Workspace {
  Array<float> x;
  Array<uint16_t> planes;
};
thread_local Workspace workspace;

}  // namespace

int64_t decode_cpu_slices(CpuFormat format, int64_t rows, int64_t columns) {
  if (format != CpuFormat::kSlots && format != CpuFormat::kBitmask) {
    throw std::invalid_argument("decode_cpu: unknown format " + std::to_string(static_cast<int>(format)));
  }
  constexpr int64_t kMostColumns = int64_t{1} << 27;  // a column and a place share 32 bits
  if (rows < 0 || columns < 0 || rows > std::numeric_limits<int32_t>::max() || columns >= kMostColumns) {
    throw std::invalid_argument("decode_cpu: expected fewer than 2^31 rows and 2^27 columns, got [" +
                                std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  return (rows + rows_of(format) - 1) / rows_of(format);
}

void decode_cpu_layout(CpuFormat format, const uint32_t* words, int64_t rows, int64_t columns, int32_t* starts,
                       int64_t* codes, int64_t* values) {
  (format == CpuFormat::kSlots ? layout_slots : layout_bitmask)(words, rows, columns, starts, codes, values);
}

void decode_cpu_pack(const CpuDecodeWeight& weight, const void* dense, const uint32_t* words, uint8_t* codes,
                     void* values) {
  (item_size(weight.dtype) == 4 ? pack<uint32_t> : pack<uint16_t>)(weight, dense, words, codes, values);
}

void decode_cpu(const CpuDecodeWeight& weight, const float* x, const float* bias, float* y, int64_t batch) {
  const int64_t slices = decode_cpu_slices(weight.format, weight.rows, weight.columns);
  const bool slots = weight.format == CpuFormat::kSlots;
  const Kernels k = kernels();
  DecodeArgs a{};
  a.rows = weight.rows;
  a.columns = weight.columns;
  a.slices = slices;
  a.blocks = blocks_of(weight.columns);
  a.batch = batch;
  a.starts = weight.starts;
  a.codes = weight.codes;
  a.values = weight.values;
  a.half = weight.dtype == DType::kBFloat16;
  a.x = x;
  a.x_stride = weight.columns;
  const int64_t padded = a.blocks * kDecodeBlock;
  if (padded != weight.columns) {
    float* copy = workspace.x.reserve(batch * padded);
    for (int64_t i = 0; i < batch; i++) {
      std::copy_n(x + i * weight.columns, weight.columns, copy + i * padded);
      std::fill(copy + i * padded + weight.columns, copy + (i + 1) * padded, 0.f);
    }
    a.x = copy;
    a.x_stride = padded;
  }
  if (slots && k.planes) a.planes = workspace.planes.reserve(2 * batch * padded);
  a.bias = bias;
  a.y = y;
  const int64_t work = weight.starts[slots ? slices * kSlotStarts : slices] * (slots ? kSlotRows : 1) * batch;
  a.threads = work < kSmallWork || omp_in_parallel() ? 1 : omp_get_max_threads();
  (slots ? k.slots : k.bitmask)(a);
}

}  // namespace sl::cpu
