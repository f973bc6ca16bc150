// Linear layers at small batches, where the time is that of reading the weight: see decode_linear.h for the formats.
//
// gaps: x of up to 8 rows lies in shared memory, column by column, as the 16-bit numbers it came as. A few lanes share
// a row of the weight, each with a group of 8 entries (one 16-byte load) at a time; a scan over the lanes' sums of gaps
// says in which column a lane begins. The next group is loaded while this one is used.
//
// tiles: a warp owns 16 rows. Per step it scatters the survivors of 16 x 64 weights into zeroed shared memory, reads
// them back as fragments for the tensor cores, multiplies by the block's share of x, and zeroes what it wrote. Blocks
// split the columns where there are too few rows to fill the device; reduce adds their sums in order.
#include <cmath>

#include "../decode_linear.h"
#include "half.cuh"
#include "launch.cuh"
#include "tensor_core.cuh"

namespace sl::cuda {
namespace {

// ---- gaps ----

constexpr int kGapThreads = 2 * kBlock;
constexpr int kGapWarps = kGapThreads / kWarp;
constexpr int kGroup = static_cast<int>(kGapGroup);
constexpr int kOverhang = kGroup - 1;  // columns past the last one that padding may name: zeros in shared memory

struct GapArguments {
  const Words4* values;
  const void* codes;
  const int32_t* starts;
  const uint16_t* x;
  const uint16_t* bias;
  uint16_t* y;
  int64_t rows, columns, batch;
};

// The codes of a group: 8 nibbles or 8 bytes.
template <int kBits>
struct Codes;
template <>
struct Codes<4> {
  using Type = uint32_t;
  static __device__ uint32_t at(Type codes, int i) { return codes >> (4 * i) & 15u; }
  static __device__ uint32_t sum(Type codes) {
    const uint32_t pairs = (codes & 0x0f0f0f0fu) + (codes >> 4 & 0x0f0f0f0fu);
    return pairs * 0x01010101u >> 24;  // at most 120
  }
};
template <>
struct Codes<8> {
  using Type = Words2;
  static __device__ uint32_t at(Type codes, int i) { return (i < 4 ? codes.x : codes.y) >> (8 * (i % 4)) & 255u; }
  static __device__ uint32_t sum(Type codes) {
    const uint32_t even = (codes.x & 0x00ff00ffu) + (codes.y & 0x00ff00ffu),
                   odd = (codes.x >> 8 & 0x00ff00ffu) + (codes.y >> 8 & 0x00ff00ffu), pairs = even + odd;
    return (pairs & 0xffffu) + (pairs >> 16);
  }
};

// One column of x for kBatch rows, as it lies in shared memory.
template <int kBatch>
struct alignas(2 * kBatch) Column {
  uint16_t rows[kBatch];
};

template <DType D, int kBatch>
__device__ void add_column(float (&sums)[kBatch], float weight, const Column<kBatch>* column) {
  if constexpr (kBatch == 1) {
    sums[0] = fmaf(weight, low_half<D>(column->rows[0]), sums[0]);
  } else {
    uint32_t pairs[kBatch / 2];
    if constexpr (kBatch == 2) {
      pairs[0] = *reinterpret_cast<const uint32_t*>(column);
    } else if constexpr (kBatch == 4) {
      const Words2 both = *reinterpret_cast<const Words2*>(column);
      pairs[0] = both.x, pairs[1] = both.y;
    } else {
      const Words4 all = *reinterpret_cast<const Words4*>(column);
      pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
    }
#pragma unroll
    for (int b = 0; b < kBatch; b += 2) {
      sums[b] = fmaf(weight, low_half<D>(pairs[b / 2]), sums[b]);
      sums[b + 1] = fmaf(weight, high_half<D>(pairs[b / 2]), sums[b + 1]);
    }
  }
}

// kLanes lanes share a row; blockIdx.y: which kBatch rows of x.
template <DType D, int kBits, int kBatch, int kLanes>
__global__ void __launch_bounds__(kGapThreads, 2) gaps(GapArguments of) {
  DYNAMIC_SHARED(unsigned char, shared);
  using Code = typename Codes<kBits>::Type;
  Column<kBatch>* const x = reinterpret_cast<Column<kBatch>*>(shared);
  const int64_t first_in_batch = static_cast<int64_t>(blockIdx.y) * kBatch, left = of.batch - first_in_batch;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < of.columns + kOverhang; c += kGapThreads) {
    Column<kBatch> column;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool there = b < left && c < of.columns;
      column.rows[b] = there ? of.x[(first_in_batch + b) * of.columns + c] : uint16_t{0};
    }
    x[c] = column;
  }
  __syncthreads();  // x is there

  constexpr int kRows = kWarp / kLanes;  // of a warp
  const int lane = lane_id() % kLanes, own = lane_id() / kLanes;
  const Code* const codes = static_cast<const Code*>(of.codes);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kGapThreads + threadIdx.x) / kWarp;
  for (int64_t first = warp * kRows; first < of.rows; first += static_cast<int64_t>(gridDim.x) * kGapWarps * kRows) {
    const int64_t row = first + own;
    int32_t at = 0, end = 0;
    if (row < of.rows) at = of.starts[row], end = of.starts[row + 1];
    int rounds = (end - at + kLanes - 1) / kLanes;
    // Lanes of a warp meet in the shuffles below, so all go round as often as the longest row needs.
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) {
      const int other = __shfl_xor_sync(kAllLanes, rounds, step);
      rounds = other > rounds ? other : rounds;
    }
    float sums[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) sums[b] = 0;
    uint32_t before = 0;  // columns before the groups of this round
    at += lane;
    Words4 values{}, next_values{};
    Code code{}, next_code{};
    if (at < end) values = load_once(of.values + at), code = load_once(codes + at);
    for (int round = 0; round < rounds; ++round) {
      const bool active = at < end;
      at += kLanes;
      if (at < end) next_values = load_once(of.values + at), next_code = load_once(codes + at);
      const uint32_t sum = active ? Codes<kBits>::sum(code) + kGroup : 0;
      uint32_t through = sum;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, through, step, kLanes);
        if (lane >= step) through += other;
      }
      uint32_t next = before + through - sum;  // the column after that of the entry before
      before += __shfl_sync(kAllLanes, through, kLanes - 1, kLanes);
      if (active) {
        const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          next += Codes<kBits>::at(code, i);
          const float weight = i % 2 == 0 ? low_half<D>(pairs[i / 2]) : high_half<D>(pairs[i / 2]);
          add_column<D>(sums, weight, x + next);
          ++next;
        }
      }
      values = next_values;
      code = next_code;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        sums[b] += __shfl_down_sync(kAllLanes, sums[b], step, kLanes);
      }
      if (lane == 0 && row < of.rows && b < left) {
        const float bias = of.bias == nullptr ? 0.0f : low_half<D>(of.bias[row]);
        of.y[(first_in_batch + b) * of.rows + row] = to_half<D>(sums[b] + bias);
      }
    }
  }
}

int64_t gap_shared_bytes(int64_t columns, int64_t batch) { return (columns + kOverhang) * batch * 2; }

template <DType D, int kBits, int kBatch>
void run_gaps(const GapArguments& of, int64_t groups_per_row, void* stream) {
  const size_t shared = static_cast<size_t>(gap_shared_bytes(of.columns, kBatch));
  const unsigned chunks = static_cast<unsigned>((of.batch + kBatch - 1) / kBatch);
  // Whole warps to rows that keep one busy; shorter rows share a warp.
  if (groups_per_row >= 24) {
    const unsigned blocks = blocks_for(of.rows, kGapWarps, 2);
    launch(gaps<D, kBits, kBatch, 32>, dim3(blocks, chunks), kGapThreads, shared, stream, of);
  } else {
    const unsigned blocks = blocks_for(of.rows, kGapWarps * 4, 2);
    launch(gaps<D, kBits, kBatch, 8>, dim3(blocks, chunks), kGapThreads, shared, stream, of);
  }
}

template <DType D, int kBits>
void run_gaps(const GapArguments& of, int64_t groups_per_row, void* stream) {
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (gap_shared_bytes(of.columns, 1) > room) {
    throw std::invalid_argument("decode_linear: expected at most " + std::to_string(room / 2 - kOverhang) +
                                " columns, got " + std::to_string(of.columns));
  }
  if (of.batch > 4 && gap_shared_bytes(of.columns, 8) <= room) return run_gaps<D, kBits, 8>(of, groups_per_row, stream);
  if (of.batch > 2 && gap_shared_bytes(of.columns, 4) <= room) return run_gaps<D, kBits, 4>(of, groups_per_row, stream);
  if (of.batch > 1 && gap_shared_bytes(of.columns, 2) <= room) return run_gaps<D, kBits, 2>(of, groups_per_row, stream);
  run_gaps<D, kBits, 1>(of, groups_per_row, stream);
}

// ---- tiles ----

constexpr int kStages = 3;  // of x in shared memory: one in use, two on their way
constexpr int kChunk = 8;   // 16-bit numbers of 16 bytes
constexpr int kHeld = 2;    // rounds of a step whose entries stay in registers: up to a quarter of its weights
constexpr int kStepChunks = static_cast<int>(kStepColumns) / kChunk;
constexpr int kTileArea = static_cast<int>(kTileSide * kTileSide);
constexpr int kStepArea = kTileArea * static_cast<int>(kStepTiles);

struct TileArguments {
  const Words2* values;
  const uint32_t* codes;
  const Words2* starts;
  const uint16_t* x;
  const uint16_t* bias;
  uint16_t* y;
  float* parts;  // [splits, batch, rows] where the columns are split over blockIdx.y, else null
  int64_t rows, columns, batch, strips, steps;
  bool whole_chunks;  // every row of x can be read by 16 bytes
};

// Which units of a step belong to which of its tiles.
struct Ends {
  int first, second, third, all;

  __device__ explicit Ends(uint32_t counts)
      : first(static_cast<int>(counts & 255u)),
        second(first + static_cast<int>(counts >> 8 & 255u)),
        third(second + static_cast<int>(counts >> 16 & 255u)),
        all(third + static_cast<int>(counts >> 24)) {}
  __device__ int tile_of(int unit) const { return (unit >= first) + (unit >= second) + (unit >= third); }
};

// What a lane has of a round: four entries, and where their tile begins (-1: nothing).
struct Unit {
  Words2 values;
  uint32_t positions;
  int tile;

  __device__ void load(const TileArguments& of, const Words2& step, const Ends& ends, int unit) {
    tile = -1;
    if (unit >= ends.all) return;
    const int64_t at = static_cast<int64_t>(step.x) + unit;
    values = load_once(of.values + at);
    positions = load_once(of.codes + at);
    tile = ends.tile_of(unit) * kTileArea;
  }
  __device__ void scatter(uint16_t* weights) const {
    if (tile < 0) return;
    weights[tile + (positions & 255u)] = static_cast<uint16_t>(values.x);
    weights[tile + (positions >> 8 & 255u)] = static_cast<uint16_t>(values.x >> 16);
    weights[tile + (positions >> 16 & 255u)] = static_cast<uint16_t>(values.y);
    weights[tile + (positions >> 24)] = static_cast<uint16_t>(values.y >> 16);
  }
  __device__ void clear(uint16_t* weights) const {
    if (tile < 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[tile + (positions >> (8 * i) & 255u)] = 0;
  }
};

__device__ inline void clear_step(uint16_t* weights) {
  for (int i = lane_id(); i < kStepArea / kChunk; i += kWarp) reinterpret_cast<Words4*>(weights)[i] = Words4{};
}

// Where chunk `chunk` of row `row` of a stage of x lies: shuffled so that the rows of a fragment miss each other's
// banks.
__device__ inline int chunk_at(int row, int chunk) {
  return (row * kStepChunks + (chunk ^ (row % kStepChunks))) * kChunk;
}

// Starts bringing columns 64 step to 64 step + 63 of kRows rows of x, zeros where there are none.
template <int kRows>
__device__ void fetch_x(const TileArguments& of, int64_t first_in_batch, int64_t step, uint16_t* stage) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kStepChunks; i += kBlock) {
    const int row = i / kStepChunks, chunk = i % kStepChunks;
    const int64_t column = step * kStepColumns + chunk * kChunk;
    const bool there = first_in_batch + row < of.batch;
    const uint16_t* const from = of.x + (first_in_batch + row) * of.columns + column;
    uint16_t* const to = stage + chunk_at(row, chunk);
    if (of.whole_chunks) {
      const bool valid = there && column < of.columns;
      cp_async(to, valid ? from : of.x, valid);
    } else {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) to[c] = there && column + c < of.columns ? from[c] : uint16_t{0};
    }
  }
}

// kPairs: 16 rows of x each. blockIdx.x: kWarps strips of the weight; .y: a part of the columns; .z: which rows of x.
template <DType D, int kPairs>
__global__ void __launch_bounds__(kBlock, 2) tiles(TileArguments of) {
  constexpr int kRows = 16 * kPairs;
  constexpr int kStage = kRows * static_cast<int>(kStepColumns);
  DYNAMIC_SHARED(unsigned char, shared);
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  uint16_t* const stages = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const weights = stages + kStages * kStage + warp * kStepArea;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + warp, steps = of.steps;
  const int64_t begin = steps * blockIdx.y / gridDim.y, end = steps * (blockIdx.y + 1) / gridDim.y;
  const int64_t first_in_batch = static_cast<int64_t>(blockIdx.z) * kRows;
  const bool live = strip < of.strips;  // the others only help to bring x
  const auto start_of = [&](int64_t step) {
    return live && step < end ? of.starts[strip * steps + step] : Words2{0, 0};
  };

  float sums[2 * kPairs][4];
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
  }
  clear_step(weights);
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) fetch_x<kRows>(of, first_in_batch, begin + s, stages + s * kStage);
    cp_async_commit();
  }
  Words2 start = start_of(begin);
  Unit held[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) held[h].load(of, start, Ends(start.y), h * kWarp + lane);

  int stage = 0;
  for (int64_t step = begin; step < end; ++step) {
    const Words2 next = start_of(step + 1);
    const Ends ends(start.y);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // x of this step is there for all; everybody is done with the stage that is filled next
    const int filled = stage == 0 ? kStages - 1 : stage - 1;
    if (step + kStages - 1 < end) {
      fetch_x<kRows>(of, first_in_batch, step + kStages - 1, stages + filled * kStage);
    }
    cp_async_commit();

    Unit now[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      now[h] = held[h];
      now[h].scatter(weights);
    }
    for (int unit = kHeld * kWarp + lane; unit < ends.all; unit += kWarp) {
      Unit more;
      more.load(of, start, ends, unit);
      more.scatter(weights);
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h) held[h].load(of, next, Ends(next.y), h * kWarp + lane);
    __syncwarp();  // the step's weights are in shared memory

    const uint16_t* const x = stages + stage * kStage;
#pragma unroll
    for (int t = 0; t < static_cast<int>(kStepTiles); ++t) {
      uint32_t a[4];
      ldmatrix(a, weights + t * kTileArea + lane * kChunk);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        uint32_t b[4];  // the two halves of 16 columns for 8 rows of x, then for the next 8
        ldmatrix(b, x + chunk_at(16 * j + lane / 16 * 8 + lane % 8, 2 * t + lane / 8 % 2));
        mma<D>(sums[2 * j], a, b[0], b[1]);
        mma<D>(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
    __syncwarp();  // and are read, before they are cleared
    if (ends.all <= kHeld * kWarp) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) now[h].clear(weights);
    } else {  // so many that clearing all costs less than clearing each
      clear_step(weights);
    }
    start = next;
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = strip * kTileSide + lane / 4 + i / 2 * 8, b = first_in_batch + 8 * j + lane % 4 * 2 + i % 2;
      if (row >= of.rows || b >= of.batch) continue;
      if (of.parts != nullptr) {
        of.parts[(blockIdx.y * of.batch + b) * of.rows + row] = sums[j][i];
      } else {
        const float bias = of.bias == nullptr ? 0.0f : low_half<D>(of.bias[row]);
        of.y[b * of.rows + row] = to_half<D>(sums[j][i] + bias);
      }
    }
  }
}

// y from the sums of the splits, in their order.
template <DType D>
__global__ void __launch_bounds__(kBlock) reduce(TileArguments of, int splits) {
  const int64_t count = of.batch * of.rows, step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < count; i += step) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += of.parts[s * count + i];
    of.y[i] = to_half<D>(sum + (of.bias == nullptr ? 0.0f : low_half<D>(of.bias[i % of.rows])));
  }
}

// How many parts the columns are split into: enough blocks to fill the device, steps enough for each to be worth it.
int64_t splits_of(int64_t rows, int64_t columns) {
  constexpr int64_t kLeastSteps = 4;
  const int64_t blocks = (decode_strips(rows) + kWarps - 1) / kWarps, steps = decode_steps(columns);
  const int64_t wanted = 2 * device_attribute(cudaDevAttrMultiProcessorCount) / std::max<int64_t>(blocks, 1);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(steps / kLeastSteps, 1));
}

template <DType D, int kPairs>
void run_tiles(const TileArguments& of, int64_t splits, void* stream) {
  constexpr int64_t kRows = 16 * kPairs;
  const int64_t shared = 2 * (kStages * kRows * kStepColumns + kWarps * kStepArea);
  const dim3 grid(static_cast<unsigned>((of.strips + kWarps - 1) / kWarps), static_cast<unsigned>(splits),
                  static_cast<unsigned>((of.batch + kRows - 1) / kRows));
  launch(tiles<D, kPairs>, grid, kBlock, static_cast<size_t>(shared), stream, of);
}

template <DType D>
void run_tiles(const TileArguments& of, int64_t splits, void* stream) {
  if (of.batch <= 16) {
    run_tiles<D, 1>(of, splits, stream);
  } else if (of.batch <= 32) {
    run_tiles<D, 2>(of, splits, stream);
  } else if (of.batch <= 64) {
    run_tiles<D, 4>(of, splits, stream);
  } else {
    run_tiles<D, 8>(of, splits, stream);
  }
  if (of.parts != nullptr) {
    launch(reduce<D>, blocks_for(of.batch * of.rows, kBlock), kBlock, 0, stream, of, static_cast<int>(splits));
  }
}

template <DType D>
void run(const DecodeWeight& weight, const void* x, const void* bias, void* y, int64_t batch, void* scratch,
         void* stream) {
  const auto* const from = static_cast<const uint16_t*>(x);
  const auto* const add = static_cast<const uint16_t*>(bias);
  auto* const to = static_cast<uint16_t*>(y);
  if (weight.format == DecodeFormat::kTiles) {
    const int64_t splits = splits_of(weight.rows, weight.columns);
    const bool whole = weight.columns % kChunk == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const TileArguments of{reinterpret_cast<const Words2*>(weight.values),
                           reinterpret_cast<const uint32_t*>(weight.codes),
                           reinterpret_cast<const Words2*>(weight.starts),
                           from,
                           add,
                           to,
                           splits > 1 ? static_cast<float*>(scratch) : nullptr,
                           weight.rows,
                           weight.columns,
                           batch,
                           decode_strips(weight.rows),
                           decode_steps(weight.columns),
                           whole};
    return run_tiles<D>(of, splits, stream);
  }
  const GapArguments of{reinterpret_cast<const Words4*>(weight.values),
                        weight.codes,
                        weight.starts,
                        from,
                        add,
                        to,
                        weight.rows,
                        weight.columns,
                        batch};
  const int64_t groups = weight.units / weight.rows;
  weight.format == DecodeFormat::kGap4 ? run_gaps<D, 4>(of, groups, stream) : run_gaps<D, 8>(of, groups, stream);
}

}  // namespace

int64_t decode_linear_scratch(const DecodeWeight& weight, int64_t batch) {
  if (weight.format != DecodeFormat::kTiles || weight.rows == 0) return 0;
  const int64_t splits = splits_of(weight.rows, weight.columns);
  return splits > 1 ? splits * batch * weight.rows * static_cast<int64_t>(sizeof(float)) : 0;
}

void decode_linear(const DecodeWeight& weight, DType dtype, const void* x, const void* bias, void* y, int64_t batch,
                   void* scratch, void* stream) {
  if (weight.rows == 0 || batch == 0) return;
  switch (dtype) {
    case DType::kFloat16:
      return run<DType::kFloat16>(weight, x, bias, y, batch, scratch, stream);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(weight, x, bias, y, batch, scratch, stream);
    default:
      throw std::invalid_argument("decode_linear: expected float16 or bfloat16");
  }
}

int64_t decode_linear_max_columns() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / 2 - kOverhang;
}

}  // namespace sl::cuda
