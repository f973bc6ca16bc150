// A sparse matrix times a dense one, for masks of high sparsity: float32, and 16-bit floats on the tensor cores.
#pragma once
#include <cstdint>

#include "common.h"

namespace sl::cuda {

constexpr int64_t kSparseChunk = 64;  // columns whose survivors `starts` notes

// A survivor: its column within the chunk, and its value.
struct SparseEntry {
  int32_t column;
  float value;
};

// entries[i].value = weight[places[i]] for i < count.
void sparse_linear_fill(const float* weight, const int64_t* places, int64_t count, SparseEntry* entries, void* stream);

// target [rows, batch] = S [rows, columns] X [columns, batch] + bias [rows] (null: none), all contiguous. starts
// [rows * chunks + 1], chunks = ceil(columns / 64): where in `entries` the survivors of row r and chunk c begin, at
// r * chunks + c. Sums run in the order of the columns: results repeat bit for bit.
void sparse_linear_product(const SparseEntry* entries, const int32_t* starts, const float* x, const float* bias,
                           int64_t rows, int64_t columns, int64_t batch, float* target, void* stream);

// ---- 16-bit floats ----

constexpr int64_t kHalfChunk = 192;  // columns whose part of x lies in shared memory at once, twice: 96 KiB
constexpr int64_t kHalfSide = 16;    // rows of a strip, columns of a group

// The rows of S [rows, columns] in strips of 16, row order[16 s + i] (-1: none) being row i of strip s. The columns
// of a chunk of 192 in which a strip has survivors lie in groups of 16, columns[16 g + j] (-1: none) being column j
// of group g; groups starts[s * chunks + c] to starts[s * chunks + c + 1] are those of strip s and chunk c, and
// strips[g] is s.
struct HalfIndex {
  const int32_t* columns;
  const int32_t* strips;
  const int32_t* order;
  const int32_t* starts;
  int64_t groups;
};

// values [groups, 256] (16-byte aligned): the groups' 16 x 16 weights, 0 off the mask, as mma's fragments. S is
// `weight` [*, weight_columns] with its mask `words`, or the transpose of that. A dead weight is not read.
void sparse_linear_half_fill(const uint16_t* weight, const uint32_t* words, const HalfIndex& index,
                             int64_t weight_columns, bool transposed, uint16_t* values, void* stream);

// y [batch, rows] = (S X)^T + bias [rows] (null: none), with sums in float32. x: X [columns, padded_batch], 16-byte
// aligned, padded_batch a multiple of 8; what lies past `batch` is read and must be numbers. Results repeat bit for
// bit. inf or NaN in x reach rows that share a strip with a survivor of that column, as they reach all in a dense
// product.
void sparse_linear_half_product(DType dtype, const HalfIndex& index, const uint16_t* values, const uint16_t* x,
                                const uint16_t* bias, int64_t rows, int64_t columns, int64_t batch,
                                int64_t padded_batch, uint16_t* y, void* stream);

}  // namespace sl::cuda
