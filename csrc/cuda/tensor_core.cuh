// Instructions that C++ has no words for, each behind a function with a host version (tests/host_cuda), so that
// kernels built of them run on the CPU too. The fragments are those of the PTX manual, "Matrix Fragments for
// mma.m16n8k16 with floating point type" and "ldmatrix"; tests/test_host_cuda_decode.py checks them against it.
#pragma once
#include <cstdint>

#include "../common.h"
#include "half.cuh"
#include "launch.cuh"
#ifdef HOST_CUDA
#include "host_tensor_core.h"
#endif

namespace sl::cuda {
namespace {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

// Loads of what is read once: past the first-level cache, which has x to keep.
__device__ inline Words4 load_once(const Words4* from) {
#ifdef __CUDA_ARCH__
  Words4 to;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from));
  return to;
#else
  return *from;
#endif
}

__device__ inline Words2 load_once(const Words2* from) {
#ifdef __CUDA_ARCH__
  Words2 to;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
  return to;
#else
  return *from;
#endif
}

__device__ inline uint32_t load_once(const uint32_t* from) {
#ifdef __CUDA_ARCH__
  uint32_t to;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to) : "l"(from));
  return to;
#else
  return *from;
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address (16-byte aligned) of row r of matrix m and
// gets, in to[m], the elements 2 (lane % 4) and 2 (lane % 4) + 1 of row lane / 4 of each.
__device__ inline void ldmatrix(uint32_t (&to)[4], const void* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#elif defined(HOST_CUDA)
  host_cuda::ldmatrix(to, row);
#endif
}

// The same of matrices that lie transposed: to[m] holds the elements of column lane / 4 in rows 2 (lane % 4) and
// 2 (lane % 4) + 1.
__device__ inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#elif defined(HOST_CUDA)
  host_cuda::ldmatrix_transposed(to, row);
#endif
}

// c += a b for a 16 x 16 and b 16 x 8 matrix of 16-bit floats, c in float32. With g = lane / 4 and t = lane % 4 a lane
// holds a[0]: row g, columns 2 t and 2 t + 1; a[1]: row g + 8; a[2], a[3]: the same rows, columns 2 t + 8 and
// 2 t + 9; b[0]: rows 2 t and 2 t + 1 of column g; b[1]: rows 2 t + 8 and 2 t + 9; c[0], c[1]: row g, columns 2 t and
// 2 t + 1; c[2], c[3]: row g + 8.
template <DType D>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  if constexpr (D == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif defined(HOST_CUDA)
  host_cuda::mma(c, a, b0, b1, low_half<D>, high_half<D>);
#endif
}

// Starts copying 16 bytes to shared memory (zeros, if not `valid`); they are there after cp_async_wait and a barrier.
// Both addresses 16-byte aligned; `from` must be an address of the array in any case.
__device__ inline void cp_async(void* to, const void* from, bool valid) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(valid ? 16 : 0)
      : "memory");
#elif defined(HOST_CUDA)
  host_cuda::cp_async(to, from, valid ? 16 : 0);
#endif
}

__device__ inline void cp_async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(HOST_CUDA)
  host_cuda::cp_async_commit();
#endif
}

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ void cp_async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(HOST_CUDA)
  host_cuda::cp_async_wait(kPending);
#endif
}

}  // namespace
}  // namespace sl::cuda
