// A sparse float32 matrix times a dense one, for masks of high sparsity.
#pragma once
#include <cstdint>

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

}  // namespace sl::cuda
