// What a network does besides products, one vector of the batch at a time; compiled once per instruction set.
#include "network_simd.h"

#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

constexpr int64_t kAhead = 64;  // values of an example between asking for a line and reading it

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SL_INLINE float* at(const View& v, int64_t c, int64_t h) { return v.data + c * v.channel + h * v.row; }

#if defined(SL_ISA_AVX512)
// The larger one, NaN where either is; v where a equals b, and where a is NaN, unless seen before, 0 elsewhere.
SL_INLINE V maximum(V a, V b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
using Seen = __mmask16;
SL_INLINE Seen none() { return 0; }
SL_INLINE V where_first(V a, V b, V v, Seen& seen) {
  const Seen here = _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) & ~seen;
  seen |= here;
  return _mm512_maskz_mov_ps(here, v);
}
SL_INLINE V where_nan(V a, V v, Seen& seen) {
  const Seen here = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) & ~seen;
  seen |= here;
  return _mm512_maskz_mov_ps(here, v);
}
SL_INLINE bool any_nan(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
#elif defined(SL_ISA_AVX2)
SL_INLINE V maximum(V a, V b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
using Seen = __m256;
SL_INLINE Seen none() { return zero(); }
SL_INLINE V where_first(V a, V b, V v, Seen& seen) {
  const V here = _mm256_andnot_ps(seen, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  seen = _mm256_or_ps(seen, here);
  return _mm256_and_ps(here, v);
}
SL_INLINE V where_nan(V a, V v, Seen& seen) {
  const V here = _mm256_andnot_ps(seen, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  seen = _mm256_or_ps(seen, here);
  return _mm256_and_ps(here, v);
}
SL_INLINE bool any_nan(V a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
#else
typedef int Seen __attribute__((vector_size(16)));
SL_INLINE V maximum(V a, V b) { return a != a ? a : (a > b ? a : b); }
SL_INLINE Seen none() { return Seen{0, 0, 0, 0}; }
SL_INLINE V where_first(V a, V b, V v, Seen& seen) {
  const Seen here = (a == b) & ~seen;
  seen |= here;
  return here ? v : zero();
}
SL_INLINE V where_nan(V a, V v, Seen& seen) {
  const Seen here = (a != a) & ~seen;
  seen |= here;
  return here ? v : zero();
}
SL_INLINE bool any_nan(V a) {
  for (int i = 0; i < kWidth; i++) {
    if (a[i] != a[i]) return true;
  }
  return false;
}
#endif

// Calls f(row pointer of x, row pointer of y) for each row of each channel.
template <class F>
SL_INLINE void rows(Extent e, View x, View y, F f) {
  for (int64_t c = 0; c < e.channels; c++) {
    for (int64_t h = 0; h < e.height; h++) f(at(x, c, h), at(y, c, h));
  }
}

// The part of a window that lies inside the image.
struct Window {
  int64_t from, to;
  SL_INLINE Window(int64_t place, int64_t stride, int64_t padding, int64_t kernel, int64_t size) {
    const int64_t first = place * stride - padding;
    from = larger(first, 0);
    to = smaller(first + kernel, size);
  }
};

SL_INLINE float divisor(const PoolArgs& a, int64_t i, int64_t j, Window h, Window w) {
  if (!a.count_include_pad) return (float)((h.to - h.from) * (w.to - w.from));
  // torch: padding counts, what lies beyond it does not.
  const int64_t top = i * a.stride[0] - a.padding[0], left = j * a.stride[1] - a.padding[1];
  const int64_t high = smaller(top + a.kernel[0], a.in.height + a.padding[0]) - top;
  const int64_t wide = smaller(left + a.kernel[1], a.in.width + a.padding[1]) - left;
  return (float)(high * wide);
}

void clear(View v, Extent e) {
  for (int64_t c = 0; c < e.channels; c++) {
    for (int64_t h = 0; h < e.height; h++) {
      for (int64_t w = 0; w < e.width; w++) store(at(v, c, h) + w * v.pixel, zero());
    }
  }
}

}  // namespace

int64_t net_width() { return kWidth; }

void net_pack(const EdgeArgs& a) {
  const float* row[kWidth];
  for (int i = 0; i < kWidth; i++) {
    row[i] = i >= a.count ? nullptr : a.from + (a.order != nullptr ? a.order[i] : a.first + i) * a.stride;
  }
  for (int64_t c = 0; c < a.extent.channels; c++) {
    for (int64_t h = 0; h < a.extent.height; h++) {
      const int64_t base = (c * a.extent.height + h) * a.extent.width;
      float* out = at(a.view, c, h);
      for (int64_t k = 0; k < a.extent.width; k += kWidth) {
        const int n = (int)smaller(kWidth, a.extent.width - k);
        V r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) {
          // Examples in no order, and more of them side by side than the CPU follows by itself.
          if (row[i] != nullptr) __builtin_prefetch(row[i] + base + k + kAhead);
          r[i] = row[i] == nullptr ? zero() : n == kWidth ? load(row[i] + base + k) : load(row[i] + base + k, n);
        }
        transpose(r);
        for (int i = 0; i < n; i++) store(out + (k + i) * a.view.pixel, r[i]);
      }
    }
  }
}

void net_unpack(const EdgeArgs& a) {
  for (int64_t c = 0; c < a.extent.channels; c++) {
    for (int64_t h = 0; h < a.extent.height; h++) {
      const float* in = at(a.view, c, h);
      float* to = a.to + a.first * a.stride + (c * a.extent.height + h) * a.extent.width;
      for (int64_t k = 0; k < a.extent.width; k += kWidth) {
        const int n = (int)smaller(kWidth, a.extent.width - k);
        V r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) r[i] = i < n ? load(in + (k + i) * a.view.pixel) : zero();
        transpose(r);
        for (int64_t i = 0; i < a.count; i++) {
          if (n == kWidth) {
            store(to + i * a.stride + k, r[i]);
          } else {
            store(to + i * a.stride + k, r[i], n);
          }
        }
      }
    }
  }
}

void net_copy(View from, View to, Extent e, bool with_relu) {
  rows(e, from, to, [&](const float* x, float* y) {
    for (int64_t w = 0; w < e.width; w++) {
      const V v = load(x + w * from.pixel);
      store(y + w * to.pixel, with_relu ? relu(v) : v);
    }
  });
}

void net_relu_gradient(View y, View grad, Extent e) {
  rows(e, y, grad, [&](const float* result, float* g) {
    for (int64_t w = 0; w < e.width; w++) {
      store(g + w * grad.pixel, relu_gradient(load(result + w * y.pixel), load(g + w * grad.pixel)));
    }
  });
}

void net_sums(View x, Extent e, float* sum) {
  for (int64_t c = 0; c < e.channels; c += kWidth) {
    const int n = (int)smaller(kWidth, e.channels - c);
    V r[kWidth];
    for (int i = 0; i < kWidth; i++) r[i] = zero();
    for (int i = 0; i < n; i++) {
      V even = zero(), odd = zero();
      for (int64_t h = 0; h < e.height; h++) {
        const float* p = at(x, c + i, h);
        int64_t w = 0;
        for (; w + 2 <= e.width; w += 2) {
          even = add(even, load(p + w * x.pixel));
          odd = add(odd, load(p + (w + 1) * x.pixel));
        }
        if (w < e.width) even = add(even, load(p + w * x.pixel));
      }
      r[i] = add(even, odd);
    }
    store(sum + c, add(load(sum + c, n), row_sums(r)), n);
  }
}

void net_max_pool(const PoolArgs& a) {
  for (int64_t c = 0; c < a.in.channels; c++) {
    for (int64_t i = 0; i < a.height; i++) {
      const Window h(i, a.stride[0], a.padding[0], a.kernel[0], a.in.height);
      float* y = at(a.y, c, i);
      for (int64_t j = 0; j < a.width; j++) {
        const Window w(j, a.stride[1], a.padding[1], a.kernel[1], a.in.width);
        V most = load(at(a.x, c, h.from) + w.from * a.x.pixel);
        for (int64_t p = h.from; p < h.to; p++) {
          const float* x = at(a.x, c, p);
          for (int64_t q = w.from; q < w.to; q++) most = maximum(most, load(x + q * a.x.pixel));
        }
        store(y + j * a.y.pixel, a.relu ? relu(most) : most);
      }
    }
  }
}

// The gradient goes to the first largest value of a window, or to the last NaN, as in torch.
void net_max_pool_backward(const PoolArgs& a) {
  const bool apart = a.kernel[0] <= a.stride[0] && a.kernel[1] <= a.stride[1];  // no pixel is in two windows
  const bool covers = apart && a.kernel[0] == a.stride[0] && a.kernel[1] == a.stride[1] && a.padding[0] == 0 &&
                      a.padding[1] == 0 && a.height * a.stride[0] == a.in.height && a.width * a.stride[1] == a.in.width;
  if (!covers) clear(a.gx, a.in);
  for (int64_t c = 0; c < a.in.channels; c++) {
    for (int64_t i = 0; i < a.height; i++) {
      const Window h(i, a.stride[0], a.padding[0], a.kernel[0], a.in.height);
      const float *y = at(a.y, c, i), *g = at(a.gy, c, i);
      for (int64_t j = 0; j < a.width; j++) {
        const Window w(j, a.stride[1], a.padding[1], a.kernel[1], a.in.width);
        V result = load(y + j * a.y.pixel), grad = load(g + j * a.gy.pixel);
        if (a.relu) {
          grad = relu_gradient(result, grad);  // where this is 0 it does not matter which pixel gets it
        }
        Seen seen = none();
        for (int64_t p = h.from; p < h.to; p++) {
          const float* x = at(a.x, c, p);
          float* gx = at(a.gx, c, p);
          for (int64_t q = w.from; q < w.to; q++) {
            const V part = where_first(load(x + q * a.x.pixel), result, grad, seen);
            float* to = gx + q * a.gx.pixel;
            store(to, apart ? part : add(load(to), part));
          }
        }
        if (!any_nan(result)) continue;
        for (int64_t p = h.to; p-- > h.from;) {
          const float* x = at(a.x, c, p);
          float* gx = at(a.gx, c, p);
          for (int64_t q = w.to; q-- > w.from;) {
            float* to = gx + q * a.gx.pixel;
            store(to, add(load(to), where_nan(load(x + q * a.x.pixel), grad, seen)));
          }
        }
      }
    }
  }
}

void net_avg_pool(const PoolArgs& a) {
  for (int64_t c = 0; c < a.in.channels; c++) {
    for (int64_t i = 0; i < a.height; i++) {
      const Window h(i, a.stride[0], a.padding[0], a.kernel[0], a.in.height);
      for (int64_t j = 0; j < a.width; j++) {
        const Window w(j, a.stride[1], a.padding[1], a.kernel[1], a.in.width);
        V sum = zero();
        for (int64_t p = h.from; p < h.to; p++) {
          const float* x = at(a.x, c, p);
          for (int64_t q = w.from; q < w.to; q++) sum = add(sum, load(x + q * a.x.pixel));
        }
        sum = mul(sum, set1(1.f / divisor(a, i, j, h, w)));
        store(at(a.y, c, i) + j * a.y.pixel, a.relu ? relu(sum) : sum);
      }
    }
  }
}

void net_avg_pool_backward(const PoolArgs& a) {
  clear(a.gx, a.in);
  for (int64_t c = 0; c < a.in.channels; c++) {
    for (int64_t i = 0; i < a.height; i++) {
      const Window h(i, a.stride[0], a.padding[0], a.kernel[0], a.in.height);
      for (int64_t j = 0; j < a.width; j++) {
        const Window w(j, a.stride[1], a.padding[1], a.kernel[1], a.in.width);
        V grad = load(at(a.gy, c, i) + j * a.gy.pixel);
        if (a.relu) grad = relu_gradient(load(at(a.y, c, i) + j * a.y.pixel), grad);
        grad = mul(grad, set1(1.f / divisor(a, i, j, h, w)));
        for (int64_t p = h.from; p < h.to; p++) {
          float* gx = at(a.gx, c, p);
          for (int64_t q = w.from; q < w.to; q++) store(gx + q * a.gx.pixel, add(load(gx + q * a.gx.pixel), grad));
        }
      }
    }
  }
}

namespace {

// Lanes that hold examples, as factors.
SL_INLINE V lanes(int64_t count) {
  float one[kWidth];
  for (int i = 0; i < kWidth; i++) one[i] = i < count ? 1.f : 0.f;
  return load(one);
}

// For each channel the sums over pixels and lanes of two functions of a pixel, `pair(channel, row, pixel, first,
// second)`.
template <class F>
SL_INLINE void two_sums(const NormArgs& a, F pair) {
  for (int64_t c = 0; c < a.extent.channels; c += kWidth) {
    const int n = (int)smaller(kWidth, a.extent.channels - c);
    V r[kWidth], s[kWidth];
    for (int i = 0; i < kWidth; i++) r[i] = s[i] = zero();
    for (int i = 0; i < n; i++) {
      for (int64_t h = 0; h < a.extent.height; h++) {
        for (int64_t w = 0; w < a.extent.width; w++) pair(c + i, h, w, r[i], s[i]);
      }
    }
    store(a.sum + c, row_sums(r), n);
    store(a.other + c, row_sums(s), n);
  }
}

}  // namespace

void net_norm_sums(const NormArgs& a) {
  const V live = lanes(a.count);
  two_sums(a, [&](int64_t c, int64_t h, int64_t w, V& sum, V& squares) {
    const V d = mul(add(load(at(a.x, c, h) + w * a.x.pixel), set1(-a.mean[c])), live);
    sum = add(sum, d);
    squares = fma(d, d, squares);
  });
}

void net_norm_products(const NormArgs& a) {
  const V live = lanes(a.count);
  two_sums(a, [&](int64_t c, int64_t h, int64_t w, V& sum, V& products) {
    const V g = mul(load(at(a.gy, c, h) + w * a.gy.pixel), live);
    sum = add(sum, g);
    products = fma(g, add(load(at(a.x, c, h) + w * a.x.pixel), set1(-a.mean[c])), products);
  });
}

// Rounded as torch does for the same instruction set, to the bit: what a constant channel becomes (0 but for rounding,
// where the layer's bias is 0) decides whether a ReLU behind it lets its gradient through.
void net_norm_apply(const NormArgs& a) {
  for (int64_t c = 0; c < a.extent.channels; c++) {
    const V scale = set1(a.a[c]), shift = fma(set1(-a.mean[c]), scale, set1(a.shift[c]));
    for (int64_t h = 0; h < a.extent.height; h++) {
      const float* x = at(a.x, c, h);
      float* y = at(a.y, c, h);
      for (int64_t w = 0; w < a.extent.width; w++) {
        const V v = fma(scale, load(x + w * a.x.pixel), shift);
        store(y + w * a.y.pixel, a.relu ? relu(v) : v);
      }
    }
  }
}

void net_norm_backward(const NormArgs& a) {
  const V live = lanes(a.count);
  for (int64_t ch = 0; ch < a.extent.channels; ch++) {
    const V scale = set1(a.a[ch]), slope = set1(a.b != nullptr ? a.b[ch] : 0.f);
    const V shift = set1(a.shift[ch]), minus = set1(-a.mean[ch]);
    for (int64_t h = 0; h < a.extent.height; h++) {
      const float *x = at(a.x, ch, h), *g = at(a.gy, ch, h);
      float* gx = at(a.gx, ch, h);
      for (int64_t w = 0; w < a.extent.width; w++) {
        V v = fma(scale, load(g + w * a.gy.pixel), shift);
        if (a.b != nullptr) {  // not 0 times an x that is inf or NaN
          v = fma(slope, add(load(x + w * a.x.pixel), minus), v);
        }
        store(gx + w * a.gx.pixel, mul(v, live));
      }
    }
  }
}

}  // namespace sl::cpu::SL_ISA
