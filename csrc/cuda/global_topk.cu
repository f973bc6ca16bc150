// Exactly `keep` survivors over a list of tensors, in one pass over the weights in the common case.
//
//   1. A stratified sample of keys brackets the key of the last survivor: [lo, hi) at 4.5 sigma.
//   2. mark: one pass over all tensors through a table of pointers. It writes every mask word as key >= hi, counts,
//      looks for NaN, and appends the few keys inside the bracket, with their positions, to a pool.
//   3. The last survivor is found exactly in the pool (narrow_pool) and the bits from there on are set (set_picked).
//   4. Where the bracket was missed, or holds more keys than the pool (heavy ties), the exact counts say in which
//      range the last survivor lies: histograms of the weights narrow it down to one key (narrow_weights), and the
//      keys equal to it are taken lowest position first by counting them per chunk (mark_above, scan_ties, mark_ties).
//
// The host never waits: every step is launched, and the steps that are not needed return at once. So a call can be
// captured in a CUDA graph. Results do not depend on the order in which blocks run: what is appended in any order is
// made unique by its position, and everything else is a sum.
//
// Keys are float bits made monotonic: 32 bits for lists without float64 (float16 and bfloat16 widen exactly), else
// 64. A position is 32 * (word in all masks, each tensor's words padded to whole tiles of 32) + bit: the order of
// flat indices.
#include <cmath>
#include <limits>
#include <vector>

#include "../global_topk.h"
#include "global_topk_search.cuh"
#include "global_topk_weights.cuh"
#include "launch.cuh"

namespace sl::cuda {
namespace {

constexpr int kQueue = 4 * kWarp;  // candidates a warp collects in shared memory before it appends them to the pool
constexpr int64_t kChunks = 4096;  // ties are counted in at most so many pieces
#ifndef SL_SAMPLE_ABOVE            // tests lower it, to take every path with few weights
#define SL_SAMPLE_ABOVE 65536
#endif
constexpr int64_t kSampleAbove = SL_SAMPLE_ABOVE;  // shorter lists go to the pool whole
constexpr int64_t kMaxSample = int64_t{1} << 20;
constexpr int64_t kBeside = 1 << 14;  // bytes of the results and scalars that a caller allocates, rounded up generously
constexpr double kSigmas = 4.5;

// Kernel parameters hold 4 KiB: the table travels in them, since a copy from the host's memory could not be captured.
constexpr int kEntriesPerLaunch = 48;
struct EntryBatch {
  Entry entries[kEntriesPerLaunch];
};
static_assert(sizeof(EntryBatch) <= 3840);

enum Path : int { kNothing, kPool, kWeights };  // kNothing: no survivor at all

struct State {
  Search sample[2];  // the keys that bound the bracket: [1] from below, [0] is the last key inside
  Search pick;       // kPool: the last survivor among the candidates; kWeights: the range of its key
  u64 bracket_lo, bracket_hi;
  u64 above, inside;  // keys >= bracket_hi, keys in the bracket
  u64 keep;
  u64 threshold;  // the last survivor's key
  u64 first_nan;  // tensor
  int path;
  unsigned ticket[2];
};

// ---- 0. set up ----

__global__ void begin(State* state, State initial) {
  if (threadIdx.x == 0) *state = initial;
}

__global__ void describe(Entry* entries, EntryBatch batch, int count) {
  if (static_cast<int>(threadIdx.x) < count) entries[threadIdx.x] = batch.entries[threadIdx.x];
}

// ---- 1. the bracket ----

__device__ inline uint32_t scramble(uint32_t x) {  // an integer hash: samples must not follow a pattern in the weights
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// One key from each of `samples` equal parts of the list. A weight that is not eligible counts as the smallest key.
template <class Key, bool kByValue>
__global__ void __launch_bounds__(kBlock) sample(Table table, Key* keys, int64_t samples) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < samples; i += step) {
    const double part = static_cast<double>(table.weights) / static_cast<double>(samples);
    const double jitter = static_cast<double>(scramble(static_cast<uint32_t>(i))) * 0x1p-32;
    int64_t index = static_cast<int64_t>((static_cast<double>(i) + jitter) * part);
    index = index < table.weights ? index : table.weights - 1;
    int low = 0, high = table.tensors - 1;
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (table.entries[middle].first_index <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const Entry& entry = table.entries[low];
    index -= entry.first_index;
    bool allowed = true;
    if (entry.eligible != nullptr) {
      const int64_t row = index / entry.layout.columns, column = index - row * entry.layout.columns;
      allowed = (entry.eligible[row * entry.layout.words_per_row + column / kWarp] >> column % kWarp & 1) != 0;
    }
    keys[i] = allowed ? key_at<Key, kByValue>(entry, index) : Key{0};
  }
}

// Both bounds at once: blockIdx.y says which.
template <class Key>
__global__ void __launch_bounds__(kBlock)
    narrow_sample(State* state, u64* histograms, const Key* keys, int64_t samples) {
  __shared__ unsigned bins[kBins];
  Search* target = &state->sample[blockIdx.y];
  const Search search = *target;
  if (search.done()) return;
  const int shift = search.shift();
  clear_bins(bins);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock; first < samples; first += step) {
    const int64_t i = first + threadIdx.x;
    add_to_bins(bins, search, shift, i < samples ? keys[i] : 0, i < samples);
  }
  narrow(target, histograms + blockIdx.y * kBins, &state->ticket[blockIdx.y], bins, shift);
}

// ---- 2. the pass over the weights ----

// A candidate: larger for a larger key, then for a lower position; no two are equal.
__device__ inline u64 candidate(u64 key_above_lo, u64 position, int position_bits) {
  return key_above_lo << position_bits | (((u64{1} << position_bits) - 1) - position);
}

// Which way leads to the last survivor, from the exact counts.
__device__ inline void decide(State* state, bool pool_holds, int position_bits, u64 top) {
  const u64 above = atomicAdd(&state->above, u64{0}), inside = atomicAdd(&state->inside, u64{0}), keep = state->keep;
  const int grain = state->pick.grain;
  if (keep == 0) {
    state->path = kNothing;
  } else if (above >= keep) {
    state->path = kWeights;
    state->pick = {state->bracket_hi, top, keep, grain};
  } else if (above + inside < keep) {
    state->path = kWeights;
    state->pick = {0, state->bracket_lo, keep - above - inside, grain};
  } else if (!pool_holds) {
    state->path = kWeights;
    state->pick = {state->bracket_lo, state->bracket_hi, keep - above, grain};
  } else {
    state->path = kPool;
    state->pick = {0, (state->bracket_hi - state->bracket_lo) << position_bits, keep - above, 0};
  }
}

template <class Key, bool kByValue>
__global__ void __launch_bounds__(kBlock) mark(Table table, State* state, u64* pool, u64 capacity, int position_bits) {
  __shared__ u64 queues[kWarps][kQueue];
  const int lane = lane_id();
  u64* const queue = queues[threadIdx.x / kWarp];
  const u64 lo_bound = state->sample[1].lo, last_inside = state->sample[0].lo;
  const Key lo = static_cast<Key>(lo_bound);
  const Key hi = last_inside >= kNoKey<Key> ? kNoKey<Key> : static_cast<Key>(last_inside + 1);
  const Search range{0, static_cast<u64>(hi - lo), 0, 0};
  const bool fits = range.bits() + position_bits <= 63;
  u64 kept = 0;
  int waiting = 0, near = 0;

  const auto flush = [&] {
    __syncwarp();  // the queue is written
    u64 at = 0;
    if (lane == 0) at = atomicAdd(&state->inside, static_cast<u64>(waiting));
    at = __shfl_sync(kAllLanes, at, 0);
    for (int i = lane; i < waiting; i += kWarp) {
      if (fits && at + i < capacity) pool[at + i] = queue[i];
    }
    __syncwarp();  // and read, before it is written again
    waiting = 0;
  };

  for (int64_t tile = warp_in_grid(); tile < table.tiles; tile += warps_in_grid()) {
    near = tensor_of_tile(table, tile, near);
    const Entry& entry = table.entries[near];
    uint32_t word = 0;
    bool nan_seen = false;
    visit_tile<Key, kByValue>(entry, tile, [&](int j, Key key, bool counts, bool nan) {
      const uint32_t keep = __ballot_sync(kAllLanes, counts && key >= hi);
      const uint32_t inside = __ballot_sync(kAllLanes, counts && key >= lo && key < hi);
      if (lane == j) word = keep;
      nan_seen |= nan;
      if (inside == 0) return;
      if (inside >> lane & 1) {
        const u64 position = static_cast<u64>(tile) * kTile + static_cast<u64>(j * kWarp + lane);
        queue[waiting + __popc(inside & lanes_below())] = candidate(key - lo, position, position_bits);
      }
      waiting += __popc(inside);
      if (waiting > kQueue - kWarp) flush();
    });
    const int64_t mine = (tile - entry.first_tile) * kWarp + lane;
    if (mine < entry.layout.words) entry.words[mine] = word;
    kept += static_cast<u64>(__popc(word));
    if (__any_sync(kAllLanes, nan_seen) && lane == 0) atomicMin(&state->first_nan, static_cast<u64>(near));
  }
  if (waiting != 0) flush();
  for (int step = kWarp / 2; step > 0; step /= 2) kept += __shfl_down_sync(kAllLanes, kept, step);
  if (lane == 0 && kept != 0) atomicAdd(&state->above, kept);
  if (last_block(&state->ticket[0], gridDim.x) && threadIdx.x == 0) {
    state->bracket_lo = lo;
    state->bracket_hi = hi;
    decide(state, fits && atomicAdd(&state->inside, u64{0}) <= capacity, position_bits, kNoKey<Key>);
  }
}

// ---- 3. the last survivor in the pool ----

__global__ void __launch_bounds__(kBlock) narrow_pool(State* state, u64* histogram, const u64* pool) {
  __shared__ unsigned bins[kBins];
  if (state->path != kPool) return;
  const Search search = state->pick;
  if (search.done()) return;
  const int shift = search.shift();
  const u64 candidates = state->inside;
  clear_bins(bins);
  const u64 step = static_cast<u64>(gridDim.x) * kBlock;
  for (u64 first = static_cast<u64>(blockIdx.x) * kBlock; first < candidates; first += step) {
    const u64 i = first + threadIdx.x;
    add_to_bins(bins, search, shift, i < candidates ? pool[i] : 0, i < candidates);
  }
  narrow(&state->pick, histogram, &state->ticket[0], bins, shift);
}

__global__ void __launch_bounds__(kBlock) set_picked(Table table, State* state, const u64* pool, int position_bits) {
  if (state->path != kPool) return;
  const u64 last = state->pick.lo, candidates = state->inside, mask = (u64{1} << position_bits) - 1;
  const u64 step = static_cast<u64>(gridDim.x) * kBlock;
  for (u64 i = static_cast<u64>(blockIdx.x) * kBlock + threadIdx.x; i < candidates; i += step) {
    const u64 value = pool[i];
    if (value < last) continue;
    const int64_t position = static_cast<int64_t>(mask - (value & mask)), tile = position / kTile;
    const Entry& entry = table.entries[tensor_of_tile(table, tile, 0)];
    atomicOr(entry.words + (position / kWarp - entry.first_tile * kWarp), 1u << (position % kWarp));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) state->threshold = state->bracket_lo + (last >> position_bits);
}

// ---- 4. the last survivor by histograms of the weights ----

template <class Key, bool kByValue>
__global__ void __launch_bounds__(kBlock) narrow_weights(Table table, State* state, u64* histogram) {
  __shared__ unsigned bins[kBins];
  if (state->path != kWeights) return;
  const Search search = state->pick;
  if (search.done()) return;
  const int shift = search.shift();
  clear_bins(bins);
  int near = 0;
  for (int64_t tile = warp_in_grid(); tile < table.tiles; tile += warps_in_grid()) {
    near = tensor_of_tile(table, tile, near);
    visit_tile<Key, kByValue>(table.entries[near], tile,
                              [&](int, Key key, bool counts, bool) { add_to_bins(bins, search, shift, key, counts); });
  }
  narrow(&state->pick, histogram, &state->ticket[0], bins, shift);
}

__device__ inline int64_t chunk_begin(const Table& table, int64_t chunk, int64_t chunks) {
  return chunk * (table.tiles / chunks) + (chunk < table.tiles % chunks ? chunk : table.tiles % chunks);
}

// Writes every word as key > the last survivor's, and how many keys of each chunk of tiles are equal to it. The search
// may have stopped at a range that can hold only one key of these dtypes; the key itself comes from a weight.
template <class Key, bool kByValue>
__global__ void __launch_bounds__(kBlock, 2) mark_above(Table table, State* state, u64* ties, int64_t chunks) {
  if (state->path != kWeights) return;
  const int lane = lane_id();
  const Key lo = static_cast<Key>(state->pick.lo), hi = static_cast<Key>(state->pick.hi);
  int near = 0;
  for (int64_t chunk = warp_in_grid(); chunk < chunks; chunk += warps_in_grid()) {
    u64 equal = 0, found = 0;
    for (int64_t tile = chunk_begin(table, chunk, chunks); tile < chunk_begin(table, chunk + 1, chunks); ++tile) {
      near = tensor_of_tile(table, tile, near);
      const Entry& entry = table.entries[near];
      uint32_t word = 0;
      visit_tile<Key, kByValue>(entry, tile, [&](int j, Key key, bool counts, bool) {
        const uint32_t keep = __ballot_sync(kAllLanes, counts && key >= hi);
        if (lane == j) word = keep;
        if (counts && key >= lo && key < hi) {
          ++equal;
          found = key;
        }
      });
      const int64_t mine = (tile - entry.first_tile) * kWarp + lane;
      if (mine < entry.layout.words) entry.words[mine] = word;
    }
    if (equal != 0) atomicMax(&state->threshold, found);
    for (int step = kWarp / 2; step > 0; step /= 2) equal += __shfl_down_sync(kAllLanes, equal, step);
    if (lane == 0) ties[chunk] = equal;
  }
}

// Makes ties[chunk] how many lie in the chunks before it. One block.
__global__ void __launch_bounds__(kBlock) scan_ties(State* state, u64* ties, int64_t chunks) {
  __shared__ u64 warp_sums[kWarps];
  if (state->path != kWeights) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  u64 before = 0;
  for (int64_t first = 0; first < chunks; first += kBlock) {
    const int64_t i = first + threadIdx.x;
    const u64 mine = i < chunks ? ties[i] : 0;
    u64 through = mine;
    for (int step = 1; step < kWarp; step *= 2) {
      const u64 other = __shfl_up_sync(kAllLanes, through, step);
      if (lane_id() >= step) through += other;
    }
    if (lane_id() == kWarp - 1) warp_sums[warp] = through;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) through += warp_sums[w];
      total += warp_sums[w];
    }
    if (i < chunks) ties[i] = before + through - mine;
    before += total;
    __syncthreads();  // warp_sums is read before the next round writes it
  }
}

// Sets the first `rank` ties, lowest position first, and writes the result.
template <class Key, bool kByValue>
__global__ void __launch_bounds__(kBlock)
    mark_ties(Table table, State* state, const u64* ties, int64_t chunks, TopkResult* result) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    result->nan_tensor = state->first_nan == ~u64{0} ? -1 : static_cast<int64_t>(state->first_nan);
    result->threshold = state->path == kNothing ? to_number<Key, false>(kInfinity<Key>)
                                                : to_number<Key, kByValue>(static_cast<Key>(state->threshold));
  }
  if (state->path != kWeights) return;
  const int lane = lane_id();
  const u64 wanted = state->pick.rank;
  const Key lo = static_cast<Key>(state->pick.lo), hi = static_cast<Key>(state->pick.hi);
  int near = 0;
  for (int64_t chunk = warp_in_grid(); chunk < chunks; chunk += warps_in_grid()) {
    u64 taken = ties[chunk];
    if (taken >= wanted || (chunk + 1 < chunks && ties[chunk + 1] == taken)) continue;
    for (int64_t tile = chunk_begin(table, chunk, chunks); tile < chunk_begin(table, chunk + 1, chunks); ++tile) {
      near = tensor_of_tile(table, tile, near);
      const Entry& entry = table.entries[near];
      uint32_t equal = 0;
      visit_tile<Key, kByValue>(entry, tile, [&](int j, Key key, bool counts, bool) {
        const uint32_t bits = __ballot_sync(kAllLanes, counts && key >= lo && key < hi);
        if (lane == j) equal = bits;
      });
      u64 through = static_cast<u64>(__popc(equal));
      for (int step = 1; step < kWarp; step *= 2) {
        const u64 other = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += other;
      }
      const u64 before = taken + through - static_cast<u64>(__popc(equal));
      uint32_t left = equal;
      if (before >= wanted) left = 0;
      while (left != 0 && before + static_cast<u64>(__popc(left)) > wanted)
        left &= ~(0x80000000u >> __clz(static_cast<int>(left)));
      if (left != 0) entry.words[(tile - entry.first_tile) * kWarp + lane] |= left;
      taken += __shfl_sync(kAllLanes, through, kWarp - 1);
      if (taken >= wanted) break;
    }
  }
}

// ---- host ----

struct Plan {
  std::vector<Entry> entries;
  int64_t weights = 0, tiles = 0, bytes = 0;
  bool wide = false;
  int grain = 16;  // low key bits in which two numbers of the list never differ alone
  int64_t samples = 0, capacity = 0, chunks = 0;
  int position_bits = 1;
  int64_t at_histograms = 0, at_entries = 0, at_ties = 0, at_pool = 0, total = 0;  // where things lie in the scratch
};

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Plan make_plan(const TopkTensor* tensors, int64_t count) {
  if (count > std::numeric_limits<int>::max()) throw std::invalid_argument("global_topk: too many tensors");
  Plan plan;
  for (int64_t t = 0; t < count; ++t) {
    const TopkTensor& tensor = tensors[t];
    int64_t columns = 1;
    for (int64_t d = 1; d < tensor.dims; ++d) columns *= tensor.sizes[d];
    const int64_t rows = tensor.sizes[0], per_row = words_per_row(columns);
    const Layout layout{columns, per_row, rows * per_row};
    plan.entries.push_back({tensor.data, tensor.eligible, tensor.words, layout, plan.tiles, plan.weights,
                            static_cast<int64_t>(tensor.dtype)});
    plan.weights += rows * columns;
    plan.tiles += (layout.words + kWarp - 1) / kWarp;
    plan.bytes += rows * columns * item_size(tensor.dtype);
    plan.wide |= tensor.dtype == DType::kFloat64;
    plan.grain = std::min(plan.grain, tensor.dtype == DType::kBFloat16 ? 16 : tensor.dtype == DType::kFloat16 ? 13 : 0);
  }
  if (plan.wide) plan.grain = 0;
  plan.chunks = std::clamp<int64_t>(plan.tiles, 1, kChunks);
  while (plan.tiles * kTile >> plan.position_bits != 0) ++plan.position_bits;
  plan.at_histograms = aligned(sizeof(State));
  plan.at_entries = plan.at_histograms + aligned(2 * kBins * sizeof(u64));
  plan.at_ties = plan.at_entries + aligned(count * static_cast<int64_t>(sizeof(Entry)));
  plan.at_pool = plan.at_ties + aligned(plan.chunks * static_cast<int64_t>(sizeof(u64)));
  // All of the scratch may take 2 % of the weights' bytes, some of it for what the caller allocates beside. The sample
  // lies where the pool will be: it is no longer needed then. A bracket is at most 0.9 % of the weights wide beyond
  // 2^24 of them.
  const int64_t room = std::max<int64_t>(plan.bytes / 50 - plan.at_pool - kBeside, 0), key = plan.wide ? 8 : 4;
  if (plan.weights > kSampleAbove) {
    const int64_t most = std::clamp(room / key, kSampleAbove / 4, kMaxSample);
    plan.samples = std::clamp(plan.weights / 64, kSampleAbove / 4, most);
  }
  plan.capacity = std::max(std::min(plan.weights, kSampleAbove), room / int64_t{sizeof(u64)});
  plan.total = plan.at_pool + aligned(std::max(plan.samples * key, plan.capacity * static_cast<int64_t>(sizeof(u64))));
  return plan;
}

State initial_state(const Plan& plan, int64_t keep) {
  const u64 top = plan.wide ? kNoKey<uint64_t> : kNoKey<uint32_t>;
  State state{};
  state.keep = static_cast<u64>(keep);
  state.first_nan = ~u64{0};
  state.pick.grain = plan.grain;
  // Bounds that need no search are given as finished ones.
  state.sample[0] = {top, top, 0, 0};
  state.sample[1] = {keep == 0 ? top : 0, keep == 0 ? top : 0, 0, 0};
  if (keep == 0 || plan.samples == 0) return state;
  const double part = static_cast<double>(keep) / static_cast<double>(plan.weights),
               samples = static_cast<double>(plan.samples);
  const double rank = part * samples, margin = kSigmas * std::sqrt(rank * (1 - part)) + 2;
  if (rank - margin >= 1) state.sample[0] = {0, top, static_cast<u64>(rank - margin), 0};
  if (rank + margin <= samples) state.sample[1] = {0, top, static_cast<u64>(rank + margin), 0};
  return state;
}

template <class Key, bool kByValue>
void run(const Plan& plan, int64_t keep, char* scratch, TopkResult* result, void* stream) {
  State* const state = reinterpret_cast<State*>(scratch);
  u64* const histograms = reinterpret_cast<u64*>(scratch + plan.at_histograms);
  Entry* const entries = reinterpret_cast<Entry*>(scratch + plan.at_entries);
  u64* const ties = reinterpret_cast<u64*>(scratch + plan.at_ties);
  u64* const pool = reinterpret_cast<u64*>(scratch + plan.at_pool);
  Key* const sampled = reinterpret_cast<Key*>(pool);
  const Table table{entries, static_cast<int>(plan.entries.size()), plan.tiles, plan.weights};

  fill_zero(histograms, 2 * kBins * sizeof(u64), stream);
  launch(begin, 1, kWarp, 0, stream, state, initial_state(plan, keep));
  for (size_t first = 0; first < plan.entries.size(); first += kEntriesPerLaunch) {
    EntryBatch batch{};
    const size_t count = std::min<size_t>(kEntriesPerLaunch, plan.entries.size() - first);
    std::copy_n(plan.entries.begin() + static_cast<int64_t>(first), count, batch.entries);
    launch(describe, 1, 2 * kWarp, 0, stream, entries + first, batch, static_cast<int>(count));
  }
  constexpr int kKeyPasses = (8 * static_cast<int>(sizeof(Key)) + kBinBits - 1) / kBinBits;
  if (keep != 0 && plan.samples != 0) {
    const unsigned blocks = blocks_for(plan.samples, kBlock);
    launch(sample<Key, kByValue>, blocks, kBlock, 0, stream, table, sampled, plan.samples);
    for (int pass = 0; pass < kKeyPasses; ++pass) {
      launch(narrow_sample<Key>, dim3(blocks, 2), kBlock, 0, stream, state, histograms,
             static_cast<const Key*>(sampled), plan.samples);
    }
  }
  const unsigned blocks = blocks_for(plan.tiles, kWarps);
  launch(mark<Key, kByValue>, blocks, kBlock, 0, stream, table, state, pool, static_cast<u64>(plan.capacity),
         plan.position_bits);
  if (keep != 0) {
    const unsigned pool_blocks = blocks_for(plan.capacity, kBlock);
    const int candidate_bits = std::min(63, 8 * static_cast<int>(sizeof(Key)) + plan.position_bits);
    for (int pass = 0; pass < (candidate_bits + kBinBits - 1) / kBinBits; ++pass) {
      launch(narrow_pool, pool_blocks, kBlock, 0, stream, state, histograms, static_cast<const u64*>(pool));
    }
    launch(set_picked, pool_blocks, kBlock, 0, stream, table, state, static_cast<const u64*>(pool), plan.position_bits);
    for (int pass = 0; pass < kKeyPasses; ++pass) {
      launch(narrow_weights<Key, kByValue>, blocks, kBlock, 0, stream, table, state, histograms);
    }
    launch(mark_above<Key, kByValue>, blocks, kBlock, 0, stream, table, state, ties, plan.chunks);
    launch(scan_ties, 1, kBlock, 0, stream, state, ties, plan.chunks);
  }
  launch(mark_ties<Key, kByValue>, blocks, kBlock, 0, stream, table, state, static_cast<const u64*>(ties), plan.chunks,
         result);
}

}  // namespace

int64_t global_topk_scratch(const TopkTensor* tensors, int64_t count) { return make_plan(tensors, count).total; }

void global_topk(const TopkTensor* tensors, int64_t count, int64_t keep, bool by_value, void* scratch,
                 TopkResult* result, void* stream) {
  const Plan plan = make_plan(tensors, count);
  char* const base = static_cast<char*>(scratch);
  if (plan.wide) {
    by_value ? run<uint64_t, true>(plan, keep, base, result, stream)
             : run<uint64_t, false>(plan, keep, base, result, stream);
  } else {
    by_value ? run<uint32_t, true>(plan, keep, base, result, stream)
             : run<uint32_t, false>(plan, keep, base, result, stream);
  }
}

}  // namespace sl::cuda
