// Masks of one bit per weight on the GPU. A warp takes a tile of 32 words: lane l works out which weights word l stands
// for and keeps that word; then the warp walks the words, one weight per lane, so that reads and writes of weights
// coalesce for any number of columns and any alignment.
#include "../bitmask.h"
#include "../common.h"
#include "launch.cuh"
#include "strides.cuh"

namespace sl::cuda {
namespace {

__global__ void __launch_bounds__(kBlock) pack(const uint8_t* dense, Layout layout, uint32_t* words) {
  const int lane = lane_id();
  for (int64_t first = warp_in_grid() * kWarp; first < layout.words; first += warps_in_grid() * kWarp) {
    const Span mine = layout.span(first + lane);
    uint32_t word = 0;
    for (int j = 0; j < kWarp && first + j < layout.words; ++j) {
      const Span span = span_of(mine, j);
      const uint32_t bits = __ballot_sync(kAllLanes, lane < span.count && dense[span.start + lane] != 0);
      if (lane == j) word = bits;
    }
    if (first + lane < layout.words) words[first + lane] = word;
  }
}

__global__ void __launch_bounds__(kBlock) unpack(const uint32_t* words, Layout layout, uint8_t* dense) {
  const int lane = lane_id();
  for (int64_t first = warp_in_grid() * kWarp; first < layout.words; first += warps_in_grid() * kWarp) {
    const Span mine = layout.span(first + lane);
    const uint32_t word = first + lane < layout.words ? words[first + lane] : 0;
    for (int j = 0; j < kWarp && first + j < layout.words; ++j) {
      const Span span = span_of(mine, j);
      const uint32_t bits = __shfl_sync(kAllLanes, word, j);
      if (lane < span.count) dense[span.start + lane] = bits >> lane & 1;
    }
  }
}

// `b` null: the bits of a; otherwise the bits in which a and b differ.
__global__ void __launch_bounds__(kBlock) count(const uint32_t* a, const uint32_t* b, int64_t words, u64* out) {
  __shared__ u64 parts[kWarps];
  u64 mine = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < words; i += step) {
    mine += __popc(b == nullptr ? a[i] : a[i] ^ b[i]);
  }
  const u64 sum = block_sum(mine, parts);
  if (threadIdx.x == 0 && sum != 0) atomicAdd(out, sum);
}

template <class Bits>
__global__ void __launch_bounds__(kBlock) apply(Bits* weights, const uint32_t* words, Layout layout) {
  const int lane = lane_id();
  for (int64_t first = warp_in_grid() * kWarp; first < layout.words; first += warps_in_grid() * kWarp) {
    const Span mine = layout.span(first + lane);
    const uint32_t word = first + lane < layout.words ? words[first + lane] : 0;
    for (int j = 0; j < kWarp && first + j < layout.words; ++j) {
      const Span span = span_of(mine, j);
      const uint32_t bits = __shfl_sync(kAllLanes, word, j);
      if (lane < span.count && (bits >> lane & 1) == 0) weights[span.start + lane] = 0;
    }
  }
}

// The same where neighbouring columns need not be neighbours in memory.
template <class Bits>
__global__ void __launch_bounds__(kBlock)
    apply_strided(Bits* weights, const uint32_t* words, Layout layout, Strides strides) {
  const int lane = lane_id();
  for (int64_t first = warp_in_grid() * kWarp; first < layout.words; first += warps_in_grid() * kWarp) {
    const Span mine = layout.span(first + lane);
    const uint32_t word = first + lane < layout.words ? words[first + lane] : 0;
    for (int j = 0; j < kWarp && first + j < layout.words; ++j) {
      const Span span = span_of(mine, j);
      const uint32_t bits = __shfl_sync(kAllLanes, word, j);
      if (lane >= span.count || (bits >> lane & 1) != 0) continue;
      const int64_t flat = span.start + lane, row = flat / layout.columns;
      weights[strides.offset(row, flat - row * layout.columns)] = 0;
    }
  }
}

void count_into(const uint32_t* a, const uint32_t* b, int64_t words, int64_t* out, void* stream) {
  fill_zero(out, sizeof(*out), stream);
  if (words == 0) return;
  launch(count, blocks_for(words, kBlock), kBlock, 0, stream, a, b, words, reinterpret_cast<u64*>(out));
}

template <class Bits>
void apply_as(void* weights, const uint32_t* words, const Layout& layout, const Strides& strides, bool contiguous,
              void* stream) {
  const unsigned grid = blocks_for(layout.words, kBlock);
  Bits* const to = static_cast<Bits*>(weights);
  if (contiguous) {
    launch(apply<Bits>, grid, kBlock, 0, stream, to, words, layout);
  } else {
    launch(apply_strided<Bits>, grid, kBlock, 0, stream, to, words, layout, strides);
  }
}

}  // namespace

void bitmask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint32_t* words, void* stream) {
  const Layout layout = layout_of(rows, columns);
  if (layout.words != 0) launch(pack, blocks_for(layout.words, kBlock), kBlock, 0, stream, dense, layout, words);
}

void bitmask_unpack(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* dense, void* stream) {
  const Layout layout = layout_of(rows, columns);
  if (layout.words != 0) launch(unpack, blocks_for(layout.words, kBlock), kBlock, 0, stream, words, layout, dense);
}

void bitmask_count(const uint32_t* words, int64_t count, int64_t* out, void* stream) {
  count_into(words, nullptr, count, out, stream);
}

void bitmask_hamming(const uint32_t* a, const uint32_t* b, int64_t count, int64_t* out, void* stream) {
  count_into(a, b, count, out, stream);
}

void bitmask_apply(void* weights, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides, void* stream) {
  if (dims < 2 || dims > kMaxDims) {
    throw std::invalid_argument("bitmask_apply: expected 2 to 8 dimensions, got " + std::to_string(dims));
  }
  Strides where;
  int64_t columns;
  const bool contiguous = strides_of(dims, sizes, strides, where, columns);
  const Layout layout = layout_of(sizes[0], columns);
  if (layout.words == 0) return;
  switch (item_size) {
    case 2:
      return apply_as<uint16_t>(weights, words, layout, where, contiguous, stream);
    case 4:
      return apply_as<uint32_t>(weights, words, layout, where, contiguous, stream);
    case 8:
      return apply_as<uint64_t>(weights, words, layout, where, contiguous, stream);
  }
  throw std::invalid_argument("bitmask_apply: expected weights of 2, 4 or 8 bytes, got " + std::to_string(item_size));
}

}  // namespace sl::cuda
