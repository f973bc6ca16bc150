// A sparse 16-bit matrix times a dense one on the tensor cores, for masks of very high sparsity: see sparse_linear.h
// for the groups that the matrix lies in. A block keeps the sums of kStrips strips of 16 rows by 128 of the batch in
// registers, one strip a warp, and walks the columns in chunks, whose part of x all warps share through shared memory.
// A group's 16 columns of x are wherever they are in the tile: ldmatrix takes an address per row.
#include "../sparse_linear.h"
#include "half.cuh"
#include "launch.cuh"
#include "tensor_core.cuh"

namespace sl::cuda {
namespace {

constexpr int kThreads = 2 * kBlock;
constexpr int kStrips = kThreads / kWarp;
constexpr int kBatch = 128;
constexpr int kPiece = 8;  // 16-bit numbers of 16 bytes
constexpr int kPieces = kBatch / kPiece;
constexpr int kChunk = static_cast<int>(kHalfChunk);
constexpr int kStage = kChunk * kBatch;
constexpr int kSide = static_cast<int>(kHalfSide);

// One lane's fragment (see mma) of a group after the other.
__global__ void __launch_bounds__(kBlock)
    fill_half(const uint16_t* weight, const uint32_t* words, HalfIndex of, int64_t weight_columns, int64_t words_each,
              bool transposed, Words4* values) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < of.groups * kWarp; i += step) {
    const int64_t group = i / kWarp;
    const int lane = static_cast<int>(i % kWarp);
    const int32_t* const order = of.order + static_cast<int64_t>(of.strips[group]) * kSide + lane / 4;
    const int32_t* const columns = of.columns + group * kSide + 2 * (lane % 4);
    uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int32_t row = order[p % 2 * 8];
      pairs[p] = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t column = columns[p / 2 * 8 + h];
        if (row < 0 || column < 0) continue;
        const int64_t down = transposed ? column : row, across = transposed ? row : column;
        if (words[down * words_each + across / 32] >> (across % 32) & 1u)
          pairs[p] |= static_cast<uint32_t>(weight[down * weight_columns + across]) << (16 * h);
      }
    }
    values[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

struct HalfArguments {
  HalfIndex index;
  const Words4* values;
  const uint16_t* x;
  const uint16_t* bias;
  uint16_t* y;
  int64_t rows, columns, batch, padded_batch, strips, row_blocks;
};

// Where 16 bytes of the tile lie: the pieces of 8 columns in a row are in different banks.
__device__ inline int place(int column, int piece) { return (column * kPieces + (piece ^ column % 8)) * kPiece; }

__device__ inline void load_chunk(const HalfArguments& of, int64_t chunk, int64_t first_b, uint16_t* tile) {
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kThreads) {
    const int64_t column = chunk * kChunk + i / kPieces, b = first_b + i % kPieces * kPiece;
    const bool there = column < of.columns && b < of.padded_batch;
    cp_async(tile + place(i / kPieces, i % kPieces), of.x + (there ? column * of.padded_batch + b : 0), there);
  }
  cp_async_commit();
}

template <DType D>
__global__ void __launch_bounds__(kThreads) product_half(HalfArguments of) {
  DYNAMIC_SHARED(uint16_t, shared);
  const int lane = lane_id();
  // Blocks that run together share x, so that it is found in the L2.
  const int64_t strip = blockIdx.x % of.row_blocks * kStrips + threadIdx.x / kWarp;
  const int64_t first_b = blockIdx.x / of.row_blocks * kBatch;
  const int64_t chunks = (of.columns + kChunk - 1) / kChunk;
  const bool busy = strip < of.strips;
  const int32_t* const starts = of.index.starts + (busy ? strip * chunks : 0);
  int32_t at = starts[0];
  const int32_t last = busy ? starts[chunks] : at;
  Words4 next{};
  int32_t next_column = 0;
  if (at < last) {
    next = load_once(of.values + static_cast<int64_t>(at) * kWarp + lane);
    next_column = of.index.columns[static_cast<int64_t>(at) * kSide + lane % kSide];
  }
  float sums[kPieces][4] = {};
  if (chunks > 0) load_chunk(of, 0, first_b, shared);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // the tile of this chunk is there, and nobody reads that of the chunk before
    if (chunk + 1 < chunks) load_chunk(of, chunk + 1, first_b, shared + (chunk + 1) % 2 * kStage);
    const uint16_t* const tile = shared + chunk % 2 * kStage;
    const int32_t end = busy ? starts[chunk + 1] : at;
#pragma unroll 1
    while (at < end) {
      const uint32_t a[4] = {next.x, next.y, next.z, next.w};
      // Where a group has fewer than 16 columns its weights are 0, and it takes any column that is there.
      const int column = next_column < 0 ? 0 : static_cast<int>(next_column - chunk * kChunk);
      if (++at < last) {
        next = load_once(of.values + static_cast<int64_t>(at) * kWarp + lane);
        next_column = of.index.columns[static_cast<int64_t>(at) * kSide + lane % kSide];
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, tile + place(column, piece + lane / kSide));
        mma<D>(sums[piece], a, b[0], b[1]);
        mma<D>(sums[piece + 1], a, b[2], b[3]);
      }
    }
  }
  if (!busy) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = of.index.order[strip * kSide + 8 * half + lane / 4];
    if (row < 0) continue;
    const float add = of.bias ? low_half<D>(of.bias[row]) : 0.0f;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t b = first_b + piece * kPiece + 2 * (lane % 4) + j;
        if (b < of.batch) of.y[b * of.rows + row] = to_half<D>(sums[piece][2 * half + j] + add);
      }
    }
  }
}

}  // namespace

void sparse_linear_half_fill(const uint16_t* weight, const uint32_t* words, const HalfIndex& index,
                             int64_t weight_columns, bool transposed, uint16_t* values, void* stream) {
  if (index.groups == 0) return;
  launch(fill_half, blocks_for(index.groups * kWarp, kBlock), kBlock, 0, stream, weight, words, index, weight_columns,
         words_per_row(weight_columns), transposed, reinterpret_cast<Words4*>(values));
}

void sparse_linear_half_product(DType dtype, const HalfIndex& index, const uint16_t* values, const uint16_t* x,
                                const uint16_t* bias, int64_t rows, int64_t columns, int64_t batch,
                                int64_t padded_batch, uint16_t* y, void* stream) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16)
    throw std::invalid_argument("sparse_linear: expected bfloat16 or float16");
  if (padded_batch % kPiece != 0 || padded_batch < batch)
    throw std::invalid_argument("sparse_linear: expected padded_batch, a multiple of 8, to be batch or more");
  if (reinterpret_cast<uintptr_t>(x) % 16 != 0 || reinterpret_cast<uintptr_t>(values) % 16 != 0)
    throw std::invalid_argument("sparse_linear: expected x and values at multiples of 16 bytes");
  if (rows == 0 || batch == 0) return;
  const int64_t strips = (rows + kSide - 1) / kSide, row_blocks = (strips + kStrips - 1) / kStrips;
  const int64_t blocks = row_blocks * ((batch + kBatch - 1) / kBatch);
  if (blocks > INT32_MAX) throw std::invalid_argument("sparse_linear: more than 2^31 blocks of 256 by 128 results");
  const HalfArguments of{
      index,     reinterpret_cast<const Words4*>(values), x, bias, y, rows, columns, batch, padded_batch, strips,
      row_blocks};
  const auto kernel = dtype == DType::kBFloat16 ? product_half<DType::kBFloat16> : product_half<DType::kFloat16>;
  launch(kernel, static_cast<unsigned>(blocks), kThreads, 2 * kStage * sizeof(uint16_t), stream, of);
}

}  // namespace sl::cuda
