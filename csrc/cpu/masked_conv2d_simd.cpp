// Compiled once per instruction set (setup.py). No standard templates here: see setup.py.
#include "masked_conv2d_simd.h"

#include <cstring>
// GCC 12 warns about its own header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#endif

SL_CONV_LOOPS(SL_ISA)

namespace sl::cpu::SL_ISA {
namespace {

#if defined(SL_ISA_AVX512)
constexpr int kLanes = 16, kProductVectors = 8, kGradientVectors = 8;
#elif defined(SL_ISA_AVX2)
constexpr int kLanes = 8, kProductVectors = 8, kGradientVectors = 4;
#else
constexpr int kLanes = 4, kProductVectors = 8, kGradientVectors = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
// Loaded once and kept: the compiler would rather read memory twice, once for each use, and these loads are the
// bottleneck.
#if defined(SL_ISA_AVX512)
#define SL_KEEP(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define SL_KEEP(v) asm("" : "+x"(v))
#else
#define SL_KEEP(v)
#endif
#define SL_INLINE __attribute__((always_inline)) inline

SL_INLINE Vector load(const void* p) {  // any alignment
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

SL_INLINE void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

SL_INLINE Vector all(float v) { return v - Vector{}; }

// Adds the lanes of 16 (8, 4) vectors at once: dw[i] += sum of part[i].
SL_INLINE void add_lanes(const float* part, float* dw) {
#if defined(SL_ISA_AVX512)
  __m512 a[16], b[8], c[4];
  for (int i = 0; i < 16; i++) a[i] = _mm512_load_ps(part + 16 * i);
  // Each step halves the lanes that a sum is spread over and doubles the sums that a register holds.
  for (int i = 0; i < 8; i++) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
  }
  for (int i = 0; i < 4; i++) {
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
  }
  const __m512 d = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[2]), _mm512_unpackhi_ps(c[0], c[2]));
  const __m512 e = _mm512_add_ps(_mm512_unpacklo_ps(c[1], c[3]), _mm512_unpackhi_ps(c[1], c[3]));
  const __m512 f = _mm512_add_ps(_mm512_unpacklo_ps(d, e), _mm512_unpackhi_ps(d, e));
  // 128-bit lanes now hold sums 0-3, 8-11, 4-7, 12-15.
  _mm512_storeu_ps(dw, _mm512_add_ps(_mm512_loadu_ps(dw), _mm512_shuffle_f32x4(f, f, 0xd8)));
#elif defined(SL_ISA_AVX2)
  __m256 a[8], b[4];
  for (int i = 0; i < 8; i++) a[i] = _mm256_load_ps(part + 8 * i);
  for (int i = 0; i < 4; i++) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
  const __m256 c = _mm256_hadd_ps(b[0], b[1]), d = _mm256_hadd_ps(b[2], b[3]);
  const __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  _mm256_storeu_ps(dw, _mm256_add_ps(_mm256_loadu_ps(dw), sums));
#else
  for (int i = 0; i < 4; i++) dw[i] += (part[4 * i] + part[4 * i + 2]) + (part[4 * i + 1] + part[4 * i + 3]);
#endif
}

// kLanes partial sums wait here for add_lanes; a last, smaller lot goes through a copy.
struct Lanes {
  alignas(64) float part[kLanes * kLanes];
  float* dw;
  int count = 0;

  SL_INLINE void push(Vector v) {
    store(part + kLanes * count, v);
    if (++count == kLanes) {
      add_lanes(part, dw);
      dw += kLanes;
      count = 0;
    }
  }

  void flush() {
    if (!count) return;
    float sums[kLanes] = {};
    std::memset(part + kLanes * count, 0, sizeof(float) * kLanes * (kLanes - count));
    add_lanes(part, sums);
    for (int i = 0; i < count; i++) dw[i] += sums[i];
  }
};

// N vectors of every row of y, at one place of the images.
template <int N>
void product_block(int64_t panels, int64_t rows, const int64_t* first, const uint32_t* offset, const float* value,
                   const float* bias, const float* x, float* y, int64_t y_stride) {
  const char* base = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < panels * rows; i++) {
    const int64_t row = i % rows, begin = first[i], end = first[i + 1];
    const bool fresh = i < rows;
    if (begin == end && !fresh) continue;
    float* to = y + row * y_stride;
    Vector sum[N];
    for (int t = 0; t < N; t++) sum[t] = fresh ? all(bias ? bias[row] : 0.0f) : load(to + t * kLanes);
    for (int64_t k = begin; k < end; k++) {
      const Vector w = all(value[k]);
      const char* from = base + offset[k];
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) sum[t] += w * load(from + t * sizeof(Vector));
    }
    for (int t = 0; t < N; t++) store(to + t * kLanes, sum[t]);
  }
}

template <int N, bool DX, bool DW>
void gradients_block(int64_t panels, int64_t columns, const int64_t* first, const uint32_t* offset, const float* value,
                     const float* dy, const float* x, float* dx, int64_t stride, float* dw) {
  const char* base = reinterpret_cast<const char*>(dy);
  Lanes lanes;
  lanes.dw = dw;
  for (int64_t i = 0; i < panels * columns; i++) {
    const int64_t column = i % columns, begin = first[i], end = first[i + 1];
    const bool fresh = i < columns;
    if (begin == end && !fresh) continue;
    float* to = dx + column * stride;
    Vector sum[N], here[N];
    for (int t = 0; t < N; t++) {
      if (DX) sum[t] = fresh ? Vector{} : load(to + t * kLanes);
      if (DW) here[t] = load(x + column * stride + t * kLanes);
    }
    for (int64_t k = begin; k < end; k++) {
      const Vector w = DX ? all(value[k]) : Vector{};
      const char* from = base + offset[k];
      Vector even = {}, odd = {};
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) {
        Vector d = load(from + t * sizeof(Vector));
        SL_KEEP(d);
        if (DX) sum[t] += w * d;
        if (DW) (t % 2 ? odd : even) += here[t] * d;
      }
      if (DW) lanes.push(even + odd);
    }
    if (DX) {
      for (int t = 0; t < N; t++) store(to + t * kLanes, sum[t]);
    }
  }
  if (DW) lanes.flush();
}

template <int N, bool DX, bool DW>
void gradients(int64_t panels, int64_t columns, const int64_t* first, const uint32_t* offset, const float* value,
               const float* dy, const float* x, float* dx, int64_t stride, float* dw, int64_t length) {
  int64_t q = 0;
  for (; q + N * kLanes <= length; q += N * kLanes) {
    gradients_block<N, DX, DW>(panels, columns, first, offset, value, dy + q, x + q, DX ? dx + q : nullptr, stride, dw);
  }
  if constexpr (N > 1) {
    if (q < length) {
      gradients<N / 2, DX, DW>(panels, columns, first, offset, value, dy + q, x + q, DX ? dx + q : nullptr, stride, dw,
                               length - q);
    }
  } else if (q < length) {
    gradients_block<1, DX, DW>(panels, columns, first, offset, value, dy + q, x + q, DX ? dx + q : nullptr, stride, dw);
  }
}

template <int N>
void product(int64_t panels, int64_t rows, const int64_t* first, const uint32_t* offset, const float* value,
             const float* bias, const float* x, float* y, int64_t y_stride, int64_t length) {
  int64_t p = 0;
  for (; p + N * kLanes <= length; p += N * kLanes) {
    product_block<N>(panels, rows, first, offset, value, bias, x + p, y + p, y_stride);
  }
  if constexpr (N > 1) {
    if (p < length) product<N / 2>(panels, rows, first, offset, value, bias, x + p, y + p, y_stride, length - p);
  } else if (p < length) {
    product_block<1>(panels, rows, first, offset, value, bias, x + p, y + p, y_stride);
  }
}

}  // namespace

void conv_copy(int64_t rows, int64_t columns, const float* from, int64_t from_row, int64_t from_column, float* to,
               int64_t to_row, int64_t to_column) {
  for (int64_t h = 0; h < rows; h++, from += from_row, to += to_row) {
    if (from_column == 1 && to_column == 1) {
      int64_t w = 0;
      for (; w + kLanes <= columns; w += kLanes) store(to + w, load(from + w));
      for (; w < columns; w++) to[w] = from[w];
    } else if (from_column == 2 && to_column == 1) {
      for (int64_t w = 0; w < columns; w++) to[w] = from[2 * w];
    } else {
      for (int64_t w = 0; w < columns; w++) to[w * to_column] = from[w * from_column];
    }
  }
}

void conv_product(int64_t panels, int64_t rows, const int64_t* first, const uint32_t* offset, const float* value,
                  const float* bias, const float* x, float* y, int64_t y_stride, int64_t length) {
  product<kProductVectors>(panels, rows, first, offset, value, bias, x, y, y_stride, length);
}

void conv_gradients(int64_t panels, int64_t columns, const int64_t* first, const uint32_t* offset, const float* value,
                    const float* dy, const float* x, float* dx, int64_t stride, float* dw, int64_t length) {
  constexpr int N = kGradientVectors;
  if (dx && dw) return gradients<N, true, true>(panels, columns, first, offset, value, dy, x, dx, stride, dw, length);
  if (dx) return gradients<N, true, false>(panels, columns, first, offset, value, dy, x, dx, stride, dw, length);
  if (dw) return gradients<N, false, true>(panels, columns, first, offset, value, dy, x, dx, stride, dw, length);
}

float conv_sum(const float* x, int64_t n) {
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i);
  float total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += sum[lane];
  for (; i < n; i++) total += x[i];
  return total;
}

}  // namespace sl::cpu::SL_ISA
