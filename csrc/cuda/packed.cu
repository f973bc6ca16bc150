// Packed parameters on the GPU: the survivors' values <-> the dense weight. A warp takes a tile of 32 words: lane l
// keeps word l, a scan over the lanes says where each word's survivors begin after the tile's own offset; then the warp
// walks the words, one weight per lane, so that reads and writes of weights coalesce, and a lane's value is found by
// counting the bits below its own.
#include "../common.h"
#include "../packed.h"
#include "launch.cuh"
#include "strides.cuh"

namespace sl::cuda {
namespace {

static_assert(kPackedTile == kWarp);

__device__ inline int scan_before(int mine) {
  int sum = mine;
  for (int step = 1; step < kWarp; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += left;
  }
  return sum - mine;
}

__global__ void __launch_bounds__(kBlock) counts(const uint32_t* words, int64_t count, int64_t* out) {
  for (int64_t first = warp_in_grid() * kWarp; first < count; first += warps_in_grid() * kWarp) {
    const int64_t i = first + lane_id();
    int sum = i < count ? __popc(words[i]) : 0;
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
    if (lane_id() == 0) out[first / kWarp] = sum;
  }
}

// Calls each(flat index of the weight, whether it is kept, the place of its value) for every weight.
template <class Each>
__device__ inline void walk(const uint32_t* words, const int64_t* offsets, const Layout& layout, const Each& each) {
  const int lane = lane_id();
  const uint32_t below = (1u << lane) - 1;
  for (int64_t first = warp_in_grid() * kWarp; first < layout.words; first += warps_in_grid() * kWarp) {
    const Span mine = layout.span(first + lane);
    const uint32_t word = first + lane < layout.words ? words[first + lane] : 0;
    const int before = scan_before(__popc(word));
    const int64_t base = offsets[first / kWarp];
    for (int j = 0; j < kWarp && first + j < layout.words; ++j) {
      const Span span = span_of(mine, j);
      const uint32_t bits = __shfl_sync(kAllLanes, word, j);
      const int64_t place = base + __shfl_sync(kAllLanes, before, j) + __popc(bits & below);
      if (lane < span.count) each(span.start + lane, (bits >> lane & 1) != 0, place);
    }
  }
}

template <class Bits>
__global__ void __launch_bounds__(kBlock) expand(const Bits* values, int64_t count, const uint32_t* words,
                                                 const int64_t* offsets, Layout layout, Bits* dense) {
  walk(words, offsets, layout,
       [=](int64_t flat, bool keep, int64_t place) { dense[flat] = keep && place < count ? values[place] : Bits{0}; });
}

template <class Bits>
__global__ void __launch_bounds__(kBlock) gather(const Bits* dense, const uint32_t* words, const int64_t* offsets,
                                                 Layout layout, Bits* values, int64_t count) {
  walk(words, offsets, layout, [=](int64_t flat, bool keep, int64_t place) {
    if (keep && place < count) values[place] = dense[flat];
  });
}

template <class Bits>
__global__ void __launch_bounds__(kBlock)
    gather_strided(const Bits* dense, const uint32_t* words, const int64_t* offsets, Layout layout, Strides strides,
                   Bits* values, int64_t count) {
  walk(words, offsets, layout, [=](int64_t flat, bool keep, int64_t place) {
    if (!keep || place >= count) return;
    const int64_t row = flat / layout.columns;
    values[place] = dense[strides.offset(row, flat - row * layout.columns)];
  });
}

// run(a pointer to an unsigned integer of this size)
template <class Run>
void by_size(int64_t item_size, const Run& run) {
  switch (item_size) {
    case 2:
      return run(static_cast<uint16_t*>(nullptr));
    case 4:
      return run(static_cast<uint32_t*>(nullptr));
    case 8:
      return run(static_cast<uint64_t*>(nullptr));
  }
  throw std::invalid_argument("packed: expected values of 2, 4 or 8 bytes, got " + std::to_string(item_size));
}

}  // namespace

void packed_counts(const uint32_t* words, int64_t count, int64_t* out, void* stream) {
  if (count != 0) launch(counts, blocks_for(count, kBlock), kBlock, 0, stream, words, count, out);
}

void packed_expand(const void* values, int64_t count, int64_t item_size, const uint32_t* words, const int64_t* offsets,
                   int64_t rows, int64_t columns, void* dense, void* stream) {
  const Layout layout = layout_of(rows, columns);
  by_size(item_size, [&](auto* kind) {
    using Bits = std::remove_pointer_t<decltype(kind)>;
    if (layout.words == 0) return;
    launch(expand<Bits>, blocks_for(layout.words, kBlock), kBlock, 0, stream, static_cast<const Bits*>(values), count,
           words, offsets, layout, static_cast<Bits*>(dense));
  });
}

void packed_gather(const void* dense, int64_t item_size, const uint32_t* words, const int64_t* offsets, int64_t dims,
                   const int64_t* sizes, const int64_t* strides, void* values, int64_t count, void* stream) {
  if (dims < 2 || dims > kMaxDims) {
    throw std::invalid_argument("packed: expected 2 to 8 dimensions, got " + std::to_string(dims));
  }
  Strides where;
  int64_t columns;
  const bool contiguous = strides_of(dims, sizes, strides, where, columns);
  const Layout layout = layout_of(sizes[0], columns);
  by_size(item_size, [&](auto* kind) {
    using Bits = std::remove_pointer_t<decltype(kind)>;
    if (layout.words == 0) return;
    const unsigned grid = blocks_for(layout.words, kBlock);
    const Bits* from = static_cast<const Bits*>(dense);
    if (contiguous) {
      launch(gather<Bits>, grid, kBlock, 0, stream, from, words, offsets, layout, static_cast<Bits*>(values), count);
    } else {
      launch(gather_strided<Bits>, grid, kBlock, 0, stream, from, words, offsets, layout, where,
             static_cast<Bits*>(values), count);
    }
  });
}

}  // namespace sl::cuda
