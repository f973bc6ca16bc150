// global_topk: the search for the rank-th largest of many values, narrowed by histograms. Part of global_topk.cu.
#pragma once
#include "launch.cuh"

namespace sl::cuda {
namespace {

constexpr int kBins = 2048, kBinBits = 11;

// The search for the rank-th largest (from 1) of the values in [lo, hi). Done when hi - lo <= 2^grain.
struct Search {
  u64 lo, hi, rank;
  int grain;

  __device__ int bits() const { return hi - lo <= 1 ? 0 : 64 - __clzll(static_cast<long long>(hi - lo - 1)); }
  __device__ bool done() const { return bits() <= grain; }
  __device__ int shift() const { return bits() > kBinBits ? bits() - kBinBits : 0; }
};

// True in all threads of the block that is the last of `blocks` to get here; what the others wrote before is then
// visible.
__device__ inline bool last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();  // what this block wrote, before its ticket
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == blocks - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  const bool result = last;
  __threadfence();
  return result;
}

__device__ inline void clear_bins(unsigned* bins) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kBlock) bins[i] = 0;
  __syncthreads();
}

// Adds the values of the lanes with `counts` to the block's bins. A block sees less than 2^32 values.
__device__ inline void add_to_bins(unsigned* bins, const Search& search, int shift, u64 value, bool counts) {
  counts = counts && value >= search.lo && value < search.hi;
  const uint32_t active = __ballot_sync(kAllLanes, counts);
  if (active == 0) return;
  const int bin = static_cast<int>((value - search.lo) >> shift);
  const int leader = __ffs(static_cast<int>(active)) - 1;
  const int leading = __shfl_sync(kAllLanes, bin, leader);
  // Heavy ties are why this runs at all: 32 additions to one bin would go one after another.
  if (__ballot_sync(kAllLanes, counts && bin == leading) == active) {
    if (lane_id() == leader) atomicAdd(bins + leading, static_cast<unsigned>(__popc(active)));
  } else if (counts) {
    atomicAdd(bins + bin, 1u);
  }
}

// Adds the block's bins to `histogram`; the last block finds the bin that holds the rank-th largest, makes it the range
// of the search and leaves the histogram zero.
__device__ inline void narrow(Search* search, u64* histogram, unsigned* ticket, const unsigned* bins, int shift) {
  __shared__ u64 warp_sums[kWarps];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kBlock) {
    if (bins[i] != 0) atomicAdd(histogram + i, static_cast<u64>(bins[i]));
  }
  if (!last_block(ticket, gridDim.x)) return;
  constexpr int kPerThread = kBins / kBlock;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // thread 0 has the largest values
  u64 counts[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    counts[i] = atomicExch(histogram + top - i, u64{0});
    sum += counts[i];
  }
  u64 through = sum;  // how many values up to and with this thread's bins, from the top
  for (int step = 1; step < kWarp; step *= 2) {
    const u64 other = __shfl_up_sync(kAllLanes, through, step);
    if (lane_id() >= step) through += other;
  }
  if (lane_id() == kWarp - 1) warp_sums[threadIdx.x / kWarp] = through;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) through += warp_sums[w];
  const u64 rank = search->rank;
  __syncthreads();  // one thread changes the search that all have read
  u64 before = through - sum;
  if (before >= rank || through < rank) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (before < rank && before + counts[i] >= rank) {
      const u64 lo = search->lo + (static_cast<u64>(top - i) << shift), hi = lo + (u64{1} << shift);
      search->rank = rank - before;
      search->lo = lo;
      if (hi > lo && hi < search->hi) search->hi = hi;
      return;
    }
    before += counts[i];
  }
}

}  // namespace
}  // namespace sl::cuda
