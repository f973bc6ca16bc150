// global_topk: keys of weights, and how a warp walks the weights of a list of tensors. Part of global_topk.cu.
#pragma once
#include <limits>

#include "../common.h"
#include "half.cuh"
#include "launch.cuh"

namespace sl::cuda {
namespace {

constexpr int kBatch = 8;                 // loads of a lane in flight
constexpr int64_t kTile = kWarp * kWarp;  // positions of a tile

struct Entry {
  const void* data;
  const uint32_t* eligible;
  uint32_t* words;
  Layout layout;
  int64_t first_tile;   // tiles of the tensors before it
  int64_t first_index;  // weights of the tensors before it
  int64_t dtype;
};

struct Table {
  const Entry* entries;
  int tensors;
  int64_t tiles, weights;
};

// ---- keys ----

template <class Key>
constexpr Key kNoKey = std::numeric_limits<Key>::max();  // above every number's key

template <DType D>
struct Raw;
template <>
struct Raw<DType::kFloat32> {
  using Type = uint32_t;
  static __device__ uint32_t bits(Type raw) { return raw; }
};
template <>
struct Raw<DType::kFloat16> {
  using Type = uint16_t;
  static __device__ uint32_t bits(Type raw) { return half_to_float(raw); }
};
template <>
struct Raw<DType::kBFloat16> {
  using Type = uint16_t;
  static __device__ uint32_t bits(Type raw) { return static_cast<uint32_t>(raw) << 16; }
};
template <>
struct Raw<DType::kFloat64> {
  using Type = uint64_t;
  static __device__ uint64_t bits(Type raw) { return raw; }
};

// Bits of the float (Key uint32_t) or double (uint64_t) with the raw value's number.
template <DType D, class Key>
__device__ Key widen(typename Raw<D>::Type raw) {
  const auto bits = Raw<D>::bits(raw);
  if constexpr (sizeof(bits) == sizeof(Key)) {
    return bits;
  } else {
    const double wide = static_cast<double>(__uint_as_float(bits));
    return static_cast<Key>(__double_as_longlong(wide));
  }
}

template <class Key>
constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
template <class Key>
constexpr Key kInfinity = sizeof(Key) == 4 ? static_cast<Key>(0x7f800000u) : static_cast<Key>(0x7ff0000000000000ull);

template <class Key>
__device__ bool is_nan(Key bits) {
  return (bits & ~kSign<Key>) > kInfinity<Key>;
}

// Monotonic in |value|, or in the value itself (then -0 must not fall below +0).
template <class Key, bool kByValue>
__device__ Key to_key(Key bits) {
  if (!kByValue) return bits & ~kSign<Key>;
  if (bits == kSign<Key>) bits = 0;
  return (bits & kSign<Key>) != 0 ? ~bits : bits | kSign<Key>;
}

template <class Key, bool kByValue>
__device__ double to_number(Key key) {
  if (kByValue) key = (key & kSign<Key>) != 0 ? key ^ kSign<Key> : ~key;
  if constexpr (sizeof(Key) == 4) {
    return static_cast<double>(__uint_as_float(key));
  } else {
    return __longlong_as_double(static_cast<long long>(key));
  }
}

// ---- walking the weights ----

// The last tensor that begins at or before `tile` (tensors without tiles begin where the next one does). `near`: a
// tensor that begins before it.
__device__ inline int tensor_of_tile(const Table& table, int64_t tile, int near) {
  int low = near, high = table.tensors - 1;
  if (low == high || table.entries[low + 1].first_tile > tile) return low;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (table.entries[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls visit(j, key, counts, nan) for each word j of a tile with all lanes: lane i has weight i of the word; `counts`
// where there is such a weight and it is eligible.
template <DType D, class Key, bool kByValue, class Visit>
__device__ __forceinline__ void visit_words(const Entry& entry, int64_t first, const Visit& visit) {
  using Type = typename Raw<D>::Type;
  const Type* data = static_cast<const Type*>(entry.data);
  const int lane = lane_id();
  const Span mine = entry.layout.span(first + lane);
  const uint32_t eligible = entry.eligible == nullptr           ? kAllLanes
                            : first + lane < entry.layout.words ? entry.eligible[first + lane]
                                                                : 0;
  for (int group = 0; group < kWarp && first + group < entry.layout.words; group += kBatch) {
    Type raw[kBatch];
    int counts[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {  // all loads before the first use
      const Span span = span_of(mine, group + u);
      counts[u] = span.count;
      raw[u] = lane < span.count ? data[span.start + lane] : Type{0};
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const uint32_t allowed = __shfl_sync(kAllLanes, eligible, group + u);
      const Key bits = widen<D, Key>(raw[u]);
      visit(group + u, to_key<Key, kByValue>(bits), lane < counts[u] && (allowed >> lane & 1) != 0, is_nan(bits));
    }
  }
}

template <class Key, bool kByValue, class Visit>
__device__ __forceinline__ void visit_tile(const Entry& entry, int64_t tile, const Visit& visit) {
  const int64_t first = (tile - entry.first_tile) * kWarp;
  switch (static_cast<DType>(entry.dtype)) {
    case DType::kFloat32:
      return visit_words<DType::kFloat32, Key, kByValue>(entry, first, visit);
    case DType::kFloat16:
      return visit_words<DType::kFloat16, Key, kByValue>(entry, first, visit);
    case DType::kBFloat16:
      return visit_words<DType::kBFloat16, Key, kByValue>(entry, first, visit);
    case DType::kFloat64:
      if constexpr (sizeof(Key) == 8) visit_words<DType::kFloat64, Key, kByValue>(entry, first, visit);
      return;
  }
}

template <class Key, bool kByValue>
__device__ Key key_at(const Entry& entry, int64_t index) {
  switch (static_cast<DType>(entry.dtype)) {
    case DType::kFloat32:
      return to_key<Key, kByValue>(widen<DType::kFloat32, Key>(static_cast<const uint32_t*>(entry.data)[index]));
    case DType::kFloat16:
      return to_key<Key, kByValue>(widen<DType::kFloat16, Key>(static_cast<const uint16_t*>(entry.data)[index]));
    case DType::kBFloat16:
      return to_key<Key, kByValue>(widen<DType::kBFloat16, Key>(static_cast<const uint16_t*>(entry.data)[index]));
    case DType::kFloat64:
      if constexpr (sizeof(Key) == 8) {
        return to_key<Key, kByValue>(widen<DType::kFloat64, Key>(static_cast<const uint64_t*>(entry.data)[index]));
      }
  }
  return 0;
}

__device__ inline uint32_t lanes_below() { return (1u << lane_id()) - 1; }

}  // namespace
}  // namespace sl::cuda
