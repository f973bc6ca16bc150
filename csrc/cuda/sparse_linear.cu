// A sparse float32 matrix times a dense one. A block keeps the sums of kRows rows by 128 of the batch in registers: a
// warp has 16 rows, a lane 4 of the batch. It walks the columns in chunks of 64, whose part of x all warps share
// through shared memory; a survivor costs one broadcast of its entry, one 16-byte read of x and 4 multiply-adds a lane.
#include "../sparse_linear.h"
#include "launch.cuh"

namespace sl::cuda {
namespace {

constexpr int kBatch = 4 * kWarp;
constexpr int kRowsPerWarp = 16;
constexpr int kRows = kWarps * kRowsPerWarp;

struct alignas(16) Four {
  float v[4];
};

__global__ void __launch_bounds__(kBlock)
    fill(const float* weight, const int64_t* places, int64_t count, SparseEntry* entries) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < count; i += step)
    entries[i].value = weight[places[i]];
}

__global__ void __launch_bounds__(kBlock)
    product(const SparseEntry* entries, const int32_t* starts, const float* x, const float* bias, int64_t rows,
            int64_t columns, int64_t batch, int64_t row_blocks, float* target) {
  __shared__ Four tile[kSparseChunk * kWarp];
  float* flat = reinterpret_cast<float*>(tile);
  // Blocks that run together share x, so that it is found in the L2.
  const int64_t first_row = blockIdx.x % row_blocks * kRows + threadIdx.x / kWarp * kRowsPerWarp;
  const int64_t first_b = blockIdx.x / row_blocks * kBatch;
  const int64_t chunks = (columns + kSparseChunk - 1) / kSparseChunk;
  const int lane = lane_id();
  Four sums[kRowsPerWarp] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kSparseChunk;
    __syncthreads();  // nobody reads the tile of the chunk before
    for (int i = threadIdx.x; i < kSparseChunk * kBatch; i += kBlock) {
      const int64_t column = first + i / kBatch, b = first_b + i % kBatch;
      flat[i] = column < columns && b < batch ? x[column * batch + b] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int64_t row = first_row + r;
      if (row >= rows) break;
      const int32_t* where = starts + row * chunks + chunk;
      const int32_t end = where[1];
#pragma unroll 4
      for (int32_t i = where[0]; i < end; ++i) {
        const SparseEntry entry = entries[i];
        const Four values = tile[entry.column * kWarp + lane];
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r].v[j] += entry.value * values.v[j];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int64_t row = first_row + r;
    if (row >= rows) break;
    const float add = bias ? bias[row] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t b = first_b + 4 * lane + j;
      if (b < batch) target[row * batch + b] = sums[r].v[j] + add;
    }
  }
}

}  // namespace

void sparse_linear_fill(const float* weight, const int64_t* places, int64_t count, SparseEntry* entries, void* stream) {
  if (count) launch(fill, blocks_for(count, kBlock), kBlock, 0, stream, weight, places, count, entries);
}

void sparse_linear_product(const SparseEntry* entries, const int32_t* starts, const float* x, const float* bias,
                           int64_t rows, int64_t columns, int64_t batch, float* target, void* stream) {
  if (rows == 0 || batch == 0) return;
  const int64_t row_blocks = (rows + kRows - 1) / kRows;
  const int64_t blocks = row_blocks * ((batch + kBatch - 1) / kBatch);
  if (blocks > INT32_MAX) throw std::invalid_argument("sparse_linear: more than 2^31 blocks of 128 by 128 results");
  launch(product, static_cast<unsigned>(blocks), kBlock, 0, stream, entries, starts, x, bias, rows, columns, batch,
         row_blocks, target);
}

}  // namespace sl::cuda
