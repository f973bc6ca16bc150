// decode_linear and the wrappers of tensor-core instructions as a shared library, for tests/test_host_cuda_decode.py.
// Every function returns the message of what it threw, or null.
#include <algorithm>
#include <vector>

#include "decode_linear.h"
#include "guarded.h"
#include "half.cuh"
#include "launch.cuh"
#include "tensor_core.cuh"

namespace {

// One warp; lane l reads the row that starts at element offsets[l] of 1024 in shared memory.
__global__ void load_matrices(const uint16_t* in, const int32_t* offsets, bool transposed, uint32_t* out) {
  DYNAMIC_SHARED(unsigned char, shared);
  uint16_t* const elements = reinterpret_cast<uint16_t*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 32) elements[i] = in[i];
  __syncthreads();
  uint32_t to[4];
  if (transposed) {
    sl::cuda::ldmatrix_transposed(to, elements + offsets[threadIdx.x]);
  } else {
    sl::cuda::ldmatrix(to, elements + offsets[threadIdx.x]);
  }
  for (int m = 0; m < 4; ++m) out[threadIdx.x * 4 + m] = to[m];
}

// a [32, 4], b [32, 2], c [32, 4]: what each lane holds.
template <sl::DType D>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* c) {
  const unsigned lane = threadIdx.x;
  uint32_t left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i], sums[i] = c[lane * 4 + i];
  sl::cuda::mma<D>(sums, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = sums[i];
}

// Copies two groups of 16 bytes per thread, the second one not valid; reads before, between and after the waits.
__global__ void copy_later(const uint16_t* in, uint16_t* out) {
  DYNAMIC_SHARED(unsigned char, shared);
  uint16_t* const to = reinterpret_cast<uint16_t*>(shared) + threadIdx.x * 16;
  sl::cuda::cp_async(to, in + threadIdx.x * 8, true);
  sl::cuda::cp_async_commit();
  sl::cuda::cp_async(to + 8, in, false);
  sl::cuda::cp_async_commit();
  const auto look = [&](int when) {
    for (int i = 0; i < 16; ++i) out[(when * 32 + static_cast<int>(threadIdx.x)) * 16 + i] = to[i];
  };
  look(0);
  sl::cuda::cp_async_wait<1>();
  look(1);
  sl::cuda::cp_async_wait<0>();
  look(2);
}

}  // namespace

extern "C" {

// `weight`: format, rows, columns, units, starts, codes, values.
const char* sl_decode(const int64_t* weight, int dtype, const void* x, const void* bias, void* y, int64_t batch,
                      int reversed) {
  return guarded([&] {
    const sl::DecodeWeight packed{static_cast<sl::DecodeFormat>(weight[0]),
                                  weight[1],
                                  weight[2],
                                  weight[3],
                                  reinterpret_cast<const int32_t*>(weight[4]),
                                  reinterpret_cast<const uint8_t*>(weight[5]),
                                  reinterpret_cast<const uint16_t*>(weight[6])};
    constexpr size_t kGuard = 4096;
    std::vector<unsigned char> scratch(static_cast<size_t>(sl::cuda::decode_linear_scratch(packed, batch)) + kGuard,
                                       0xa5);
    host_cuda::reversed = reversed != 0;
    sl::cuda::decode_linear(packed, static_cast<sl::DType>(dtype), x, bias, y, batch, scratch.data(), nullptr);
    host_cuda::reversed = false;
    if (std::any_of(scratch.end() - kGuard, scratch.end(), [](unsigned char c) { return c != 0xa5; }))
      throw std::runtime_error("a kernel wrote past its scratch");
  });
}

int64_t sl_max_columns() { return sl::cuda::decode_linear_max_columns(); }

const char* sl_ldmatrix(const uint16_t* in, const int32_t* offsets, bool transposed, uint32_t* out) {
  return guarded([&] { sl::cuda::launch(load_matrices, 1, 32, 2048, nullptr, in, offsets, transposed, out); });
}

const char* sl_mma(int dtype, const uint32_t* a, const uint32_t* b, float* c) {
  return guarded([&] {
    if (static_cast<sl::DType>(dtype) == sl::DType::kBFloat16) {
      sl::cuda::launch(multiply<sl::DType::kBFloat16>, 1, 32, 0, nullptr, a, b, c);
    } else {
      sl::cuda::launch(multiply<sl::DType::kFloat16>, 1, 32, 0, nullptr, a, b, c);
    }
  });
}

const char* sl_copy_later(const uint16_t* in, uint16_t* out) {
  return guarded([&] { sl::cuda::launch(copy_later, 1, 32, 32 * 32, nullptr, in, out); });
}

// Rounds every float to float16 (2) or bfloat16 (3) and widens every 16-bit number.
const char* sl_convert(int dtype, const float* in, uint16_t* narrow, const uint16_t* halves, float* wide, int64_t count,
                       int64_t half_count) {
  return guarded([&] {
    const bool bfloat = static_cast<sl::DType>(dtype) == sl::DType::kBFloat16;
    for (int64_t i = 0; i < count; ++i)
      narrow[i] = bfloat ? sl::cuda::float_to_bfloat(in[i]) : sl::cuda::float_to_half(in[i]);
    for (int64_t i = 0; i < half_count; ++i) {
      wide[i] = bfloat ? sl::cuda::low_half<sl::DType::kBFloat16>(halves[i])
                       : sl::cuda::low_half<sl::DType::kFloat16>(halves[i]);
    }
  });
}

}  // extern "C"
