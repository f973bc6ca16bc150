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
// Steps of windows count by their bytes: they are for weights that lie in memory.
constexpr int64_t kStepCost = 5, kWindowCost = 12, kOverflowCost = 2;
constexpr int64_t kLeastShare = 90, kShareStep = 5, kShares = 20;  // percent

int64_t blocks_of(int64_t columns) { return (columns + kDecodeBlock - 1) / kDecodeBlock; }
int64_t rows_of(CpuFormat format) { return format == CpuFormat::kBitmask ? kMaskRows : kSlotRows; }
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

// The survivors of a slice's rows in each block.
using Counts = std::vector<std::array<uint8_t, kSlotRows>>;

// How many survivors find no slot.
int64_t overflow_of(const Counts& counts, const std::vector<uint8_t>& steps, bool windows) {
  int64_t total = 0;
  for (int64_t i = 0; i < kSlotRows; i++) {
    int ahead = 0;  // survivors of a block that were in the steps of the one before
    for (size_t b = 0; b < counts.size(); b++) {
      const int own = counts[b][i] - ahead, taken = std::min<int>(own, steps[b]);
      total += own - taken;
      ahead = windows && b + 1 < counts.size() ? std::min<int>(counts[b + 1][i], steps[b] - taken) : 0;
    }
  }
  return total;
}

// The same number for all blocks, but no more than the fullest row of each can use.
std::vector<uint8_t> slots_of_blocks(const Counts& counts, int64_t slots) {
  std::vector<uint8_t> steps(counts.size());
  for (size_t b = 0; b < counts.size(); b++) {
    steps[b] = static_cast<uint8_t>(std::min<int64_t>(slots, *std::max_element(counts[b].begin(), counts[b].end())));
  }
  return steps;
}

// By and large `share` percent of what the rows hold on average up to the middle of the next block.
std::vector<uint8_t> slots_of_windows(const Counts& counts, int64_t share) {
  std::vector<int64_t> sum(counts.size() + 1, 0);
  for (size_t b = 0; b < counts.size(); b++) sum[b] = std::accumulate(counts[b].begin(), counts[b].end(), int64_t{0});
  std::vector<uint8_t> steps(counts.size());
  int64_t before = 0, given = 0;
  for (size_t b = 0; b < counts.size(); b++) {
    before += sum[b];
    const int64_t wanted = share * (2 * before + sum[b + 1]) / (200 * kSlotRows);
    steps[b] = static_cast<uint8_t>(std::clamp<int64_t>(wanted - given, 0, 2 * kDecodeBlock));
    given += steps[b];
  }
  return steps;
}

// How many slots the blocks of one slice have, and what is left over: what costs least.
struct SlicePlan {
  std::vector<uint8_t> steps;
  int64_t total = 0, overflow = 0;

  // order: the row in each place, -1: none.
  SlicePlan(const uint32_t* words, int64_t columns, const int32_t* order, bool windows) {
    Counts counts(blocks_of(columns));
    for (size_t b = 0; b < counts.size(); b++) {
      for (int64_t i = 0; i < kSlotRows; i++) {
        const uint64_t bits = order[i] < 0 ? 0 : block_bits(words, columns, order[i], b);
        counts[b][i] = static_cast<uint8_t>(__builtin_popcountll(bits));
      }
    }
    int64_t least = std::numeric_limits<int64_t>::max();
    const int64_t tries = windows ? kShares : kDecodeBlock + 1;
    for (int64_t t = 0; t < tries; t++) {
      std::vector<uint8_t> now =
          windows ? slots_of_windows(counts, kLeastShare + t * kShareStep) : slots_of_blocks(counts, t);
      const int64_t all = std::accumulate(now.begin(), now.end(), int64_t{0});
      const int64_t over = overflow_of(counts, now, windows);
      const int64_t cost = (windows ? kWindowCost : kStepCost) * all + kOverflowCost * over;
      if (cost >= least) continue;
      least = cost;
      steps = std::move(now);
      total = all;
      overflow = over;
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

void layout_slots(CpuFormat format, const uint32_t* words, int64_t rows, int64_t columns, int32_t* starts,
                  int64_t* codes, int64_t* values) {
  const int64_t slices = decode_cpu_slices(format, rows, columns);
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
    const SlicePlan plan(words, columns, line + 2, format == CpuFormat::kWindows);
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
  const bool windows = w.format == CpuFormat::kWindows;
#pragma omp parallel for schedule(static)
  for (int64_t s = 0; s < slices; s++) {
    const int32_t* line = w.starts + s * kSlotStarts;
    const SlicePlan plan(words, w.columns, line + 2, windows);
    std::copy(plan.steps.begin(), plan.steps.end(), codes + s * blocks);
    for (int64_t b = 0, step = line[0]; b < blocks; step += plan.steps[b++]) {
      const uint8_t empty = windows ? kEmptySlot + b % 2 * kDecodeBlock : kEmptySlot;
      std::fill_n(step_codes + step * kSlotRows, plan.steps[b] * kSlotRows, empty);
      std::fill_n(values + step * kSlotRows, plan.steps[b] * kSlotRows, T{0});
    }
    std::vector<uint32_t> left;  // 32 * column + place
    for (int64_t i = 0; i < kSlotRows && line[2 + i] >= 0; i++) {
      const T* row = dense + line[2 + i] * w.columns;
      const auto bits_of = [&](int64_t b) { return b < blocks ? block_bits(words, w.columns, line[2 + i], b) : 0; };
      uint64_t next = bits_of(0);
      for (int64_t b = 0, step = line[0]; b < blocks; step += plan.steps[b++]) {
        uint64_t own = next;
        next = bits_of(b + 1);
        int64_t slot = 0;
        const auto put = [&](uint64_t bits, int64_t block) {
          const int64_t column = block * kDecodeBlock + __builtin_ctzll(bits), at = step + slot++;
          step_codes[at * kSlotRows + slot_lane(i)] = column % (windows ? 2 * kDecodeBlock : kDecodeBlock);
          values[at * kSlotRows + i] = row[column];
        };
        for (; own != 0 && slot < plan.steps[b]; own &= own - 1) put(own, b);
        for (; own != 0; own &= own - 1) left.push_back((b * kDecodeBlock + __builtin_ctzll(own)) * kSlotRows + i);
        for (; windows && next != 0 && slot < plan.steps[b]; next &= next - 1) put(next, b + 1);
      }
    }
    std::sort(left.begin(), left.end());  // by columns: neighbours are not added to the same sum
    int64_t over = line[1];
    for (const uint32_t code : left) {
      std::memcpy(over_codes + over * sizeof code, &code, sizeof code);
      values[steps * kSlotRows + over++] = dense[line[2 + code % kSlotRows] * w.columns + code / kSlotRows];
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
  const auto fill = weight.format == CpuFormat::kBitmask ? pack_bitmask<T> : pack_slots<T>;
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
  if (format != CpuFormat::kSlots && format != CpuFormat::kWindows && format != CpuFormat::kBitmask) {
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
  if (format == CpuFormat::kBitmask) {
    layout_bitmask(words, rows, columns, starts, codes, values);
  } else {
    layout_slots(format, words, rows, columns, starts, codes, values);
  }
}

void decode_cpu_pack(const CpuDecodeWeight& weight, const void* dense, const uint32_t* words, uint8_t* codes,
                     void* values) {
  (item_size(weight.dtype) == 4 ? pack<uint32_t> : pack<uint16_t>)(weight, dense, words, codes, values);
}

void decode_cpu(const CpuDecodeWeight& weight, const float* x, const float* bias, float* y, int64_t batch) {
  const int64_t slices = decode_cpu_slices(weight.format, weight.rows, weight.columns);
  const bool slots = weight.format != CpuFormat::kBitmask;
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
  a.windows = weight.format == CpuFormat::kWindows;
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
