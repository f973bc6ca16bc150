// y = x W^T + bias for a weight packed for inference: what is stored is read once and is all that is read of the
// weight.
//
// Gap formats. A row is a list of entries, each a 16-bit value and how many columns lie between its column and that of
// the entry before (from column -1 on). A gap that the code cannot hold is bridged by fillers: the largest code and the
// value 0. A row is padded with code 0 and value 0 to whole groups of 8 entries, so a row may end up to 7 columns
// past the last one. starts int32 [rows + 1]: groups before the row. values [groups, 8]; codes [groups, bytes of a
// group], 8 nibbles (lowest first) or 8 bytes.
//
// Tile format. A step is 16 rows by 64 columns, four tiles of 16 x 16 side by side; steps of one strip of 16 rows
// follow each other. An entry is a value and its position in its tile; a tile's entries are padded to units of 4
// with value 0 at positions of dead weights, each used once. Position p is the p-th of the four 8 x 8 matrices (rows
// 0-7 columns 0-7; rows 8-15 columns 0-7; rows 0-7 columns 8-15; the rest), row by row: what ldmatrix wants. starts
// int32 [strips * steps, 2]: the first unit of the step, and the units of its four tiles, one byte each. values
// [units, 4], codes [units, 4]. Entries are ordered so that the i-th entries of 32 neighbouring units of a step lie in
// different banks of shared memory where the step allows it.
#pragma once
#include <cstdint>

#include "common.h"

namespace sl {

enum class DecodeFormat : int { kGap4 = 4, kGap8 = 8, kTiles = 16 };

constexpr int64_t kGapGroup = 8;   // entries of a group
constexpr int64_t kTileSide = 16;  // rows and columns of a tile
constexpr int64_t kStepTiles = 4;  // tiles of a step
constexpr int64_t kUnit = 4;       // entries of a unit
constexpr int64_t kStepColumns = kTileSide * kStepTiles;

inline int64_t decode_strips(int64_t rows) { return (rows + kTileSide - 1) / kTileSide; }
inline int64_t decode_steps(int64_t columns) { return (columns + kStepColumns - 1) / kStepColumns; }

// A packed weight; all pointers into memory of one device, values and codes 16-byte aligned.
struct DecodeWeight {
  DecodeFormat format;
  int64_t rows, columns;
  int64_t units;  // groups or units
  const int32_t* starts;
  const uint8_t* codes;
  const uint16_t* values;
};

namespace cpu {

// Fills `starts` from a mask and returns how many groups or units there are. Throws std::invalid_argument where they
// are more than an int32 can count.
int64_t decode_linear_layout(DecodeFormat format, const uint32_t* words, int64_t rows, int64_t columns,
                             int32_t* starts);

// Writes all of `codes` and `values` from a contiguous weight of 2-byte numbers; `starts` comes from
// decode_linear_layout with the same mask.
void decode_linear_pack(DecodeFormat format, const uint16_t* weight, const uint32_t* words, int64_t rows,
                        int64_t columns, const int32_t* starts, uint8_t* codes, uint16_t* values);

}  // namespace cpu

namespace cuda {

// x [batch, columns] and y [batch, rows] contiguous, of `dtype` (float16 or bfloat16, as the values); bias [rows] or
// null; x, y and bias need no alignment but an element's. Sums are in float32. A dead weight may count as 0 x, as in
// a dense layer: an x that is not finite may make outputs NaN that do not depend on it. `scratch` is device memory of
// decode_linear_scratch(...) bytes, 16-byte aligned, contents arbitrary. Nothing waits for the device.
int64_t decode_linear_scratch(const DecodeWeight& weight, int64_t batch);
void decode_linear(const DecodeWeight& weight, DType dtype, const void* x, const void* bias, void* y, int64_t batch,
                   void* scratch, void* stream);

// Columns that a gap format can take on the current device: x of one row lies in shared memory.
int64_t decode_linear_max_columns();

}  // namespace cuda
}  // namespace sl
