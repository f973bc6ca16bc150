// y = x W^T + bias for a weight packed for inference at small batches on a CPU: what is stored is read front to back
// and is all that is read of the weight. Values are float32 or bfloat16, sums float32. A block is 64 columns.
//
// Slots. A slice is 32 rows, made of rows with about as many survivors. In each of its blocks every row has the same
// number of slots; the survivors of a row that find none there are the slice's overflow. A step is one slot of each of
// the 32 rows: with one row to a lane, x of a step is a permutation of the 64 floats of the block, which lie in
// registers. starts int32 [slices + 1, 34]: the first step and the first overflow of a slice, and which row is in each
// place of it (-1: none); the last line holds the totals. codes: the steps of each block, [slices, blocks], one byte
// each, up to a multiple of 64 bytes; then 32 bytes a step: the column in the block, 128 where the slot is empty, the
// places in the order of slot_lane; then the overflow, uint32: 32 * column + place. values: [steps, 32], place by
// place, 0 in an empty slot; then the overflow's.
//
// Windows. As slots, but a step belongs to a block and the one after it, so that a row may be ahead of its blocks and
// few slots stay empty: fewer bytes, twice the permutations. The code is the column modulo 128, of an empty slot 128
// more than that of the block's first column.
//
// Bitmask. A slice is 8 rows. codes: [slices, blocks, 8 rows, 8 bytes], bit i of a row's 64 for column i of the block.
// values: the survivors in that order, and 16 zeros, so that 16 may be loaded from any place. starts int32
// [slices + 1]: the survivors before a slice.
#pragma once
#include <cstdint>

#include "common.h"

namespace sl {

enum class CpuFormat : int { kSlots = 32, kWindows = 33, kBitmask = 64 };  // Python: CPU_FORMATS in ops/decode_cpu.py

// A packed weight. Pointers of any alignment.
struct CpuDecodeWeight {
  CpuFormat format;
  int64_t rows, columns;
  const int32_t* starts;
  const uint8_t* codes;
  const void* values;
  DType dtype;  // of the values
};

namespace cpu {

// How many rows `starts` has lines for; sizes that the formats cannot hold throw std::invalid_argument.
int64_t decode_cpu_slices(CpuFormat format, int64_t rows, int64_t columns);

// Fills `starts` and says how long codes (bytes) and values (elements) become.
void decode_cpu_layout(CpuFormat format, const uint32_t* words, int64_t rows, int64_t columns, int32_t* starts,
                       int64_t* codes, int64_t* values);

// Writes all of `codes` and `values`, from a contiguous weight of the same dtype; `starts` comes from decode_cpu_layout
// with the same mask.
void decode_cpu_pack(const CpuDecodeWeight& weight, const void* dense, const uint32_t* words, uint8_t* codes,
                     void* values);

// x [batch, columns] and y [batch, rows], contiguous; bias [rows] or null. A dead weight may count as 0 x, as in a
// dense layer. Bit-equal for any number of threads.
void decode_cpu(const CpuDecodeWeight& weight, const float* x, const float* bias, float* y, int64_t batch);

}  // namespace cpu
}  // namespace sl
