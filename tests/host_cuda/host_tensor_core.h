// Host versions of the instructions behind csrc/cuda/tensor_core.cuh. Fragments are those of the PTX manual.
#pragma once
#include <cstdint>
#include <cstring>
#include <source_location>
#include <utility>

#include "host_cuda.h"

namespace host_cuda {

constexpr size_t kCopyBytes = 16;

inline void check_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(what);
}

inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  check_aligned(row, "ldmatrix of a row that is not aligned to 16 bytes");
  const auto* rows = gather(kMatrix, ~0u, reinterpret_cast<uintptr_t>(row));
  uintptr_t mine[4];  // the rows that this lane gets its elements from
  for (unsigned m = 0; m < 4; ++m) mine[m] = rows[8 * m + lane() / 4].load(std::memory_order_relaxed);
  for (unsigned m = 0; m < 4; ++m) std::memcpy(&to[m], reinterpret_cast<const char*>(mine[m]) + lane() % 4 * 4, 4);
}

inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  check_aligned(row, "ldmatrix of a row that is not aligned to 16 bytes");
  const auto* rows = gather(kMatrix, ~0u, reinterpret_cast<uintptr_t>(row));
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const uintptr_t from = rows[8 * m + 2 * (lane() % 4) + i].load(std::memory_order_relaxed);
      std::memcpy(&pair[i], reinterpret_cast<const char*>(from) + lane() / 4 * 2, 2);
    }
    to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// `low` and `high` are the floats of the two 16-bit numbers in a word.
template <class Low, class High>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Low& low, const High& high) {
  uint32_t left[4][kWarp], right[2][kWarp];
  const auto share = [](uint32_t first, uint32_t second, uint32_t* firsts, uint32_t* seconds) {
    const auto* all = gather(kMatrix, ~0u, first | uint64_t{second} << 32);
    for (unsigned l = 0; l < kWarp; ++l) {
      const uint64_t both = all[l].load(std::memory_order_relaxed);
      firsts[l] = static_cast<uint32_t>(both), seconds[l] = static_cast<uint32_t>(both >> 32);
    }
  };
  share(a[0], a[1], left[0], left[1]);
  share(a[2], a[3], left[2], left[3]);
  share(b0, b1, right[0], right[1]);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; k += 2) {  // two neighbouring k share a word
      const uint32_t x = left[k / 8 * 2 + i / 2][row * 4 + k % 8 / 2], y = right[k / 8][column * 4 + k % 8 / 2];
      c[i] += low(x) * low(y) + high(x) * high(y);
    }
  }
}

// `used` bytes are read, the rest becomes zeros. Nothing is copied before cp_async_wait.
inline void cp_async(void* to, const void* from, size_t used) {
  check_aligned(to, "cp.async to an address that is not aligned to 16 bytes");
  check_aligned(from, "cp.async from an address that is not aligned to 16 bytes");
  block->copies[thread_id].open.push_back({to, from, used});
}

inline void cp_async_commit() {
  Copies& mine = block->copies[thread_id];
  mine.groups.push_back(std::exchange(mine.open, {}));
}

inline void cp_async_wait(size_t pending, std::source_location where = std::source_location::current()) {
  if (dropped(where)) return;
  auto& groups = block->copies[thread_id].groups;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, kCopyBytes);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace host_cuda
