// Convolutions of a network, one vector of the batch ("group") at a time; compiled once per instruction set.
//
// A group lies as [channel][row][pixel][lane], so that a tap of a filter is a constant distance. A block of up to T
// neighbouring pixels stands in registers while the survivors of a line pass by: one load per multiply-add forward,
// half of one backward, where each dY feeds dX and dW.
#include "network_simd.h"
#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

constexpr int kRing = 64;  // survivors whose dW lanes wait to be summed; a power of two
#if defined(SL_ISA_AVX512)
constexpr int kPixels = 8, kGradPixels = 8;  // in registers
constexpr int kLines = 4, kDensePixels = 6;
#else
constexpr int kPixels = 8, kGradPixels = 4;
constexpr int kLines = 2, kDensePixels = 4;
#endif
constexpr int kWeightLines = kWidth / 4, kWeightTaps = 4;  // a block of dW fills one vector of sums

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The address as the compiler must see it: computed once, then used with constant offsets.
SL_INLINE const float* opaque(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}
SL_INLINE const float* bytes(const float* p, int64_t distance) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(p) + distance);
}

// Calls body.template run<T>(first pixel) for a row's pixels in as few blocks as go, of nearly equal lengths.
template <int MOST, class Body>
SL_INLINE void in_blocks(int64_t width, const Body& body) {
  const int64_t blocks = (width + MOST - 1) / MOST;
  for (int64_t b = 0, at = 0; b < blocks; b++) {
    const int64_t next = (b + 1) * width / blocks;
    switch (next - at) {
#define SL_BLOCK(n)                                    \
  case n:                                              \
    if constexpr (n <= MOST) body.template run<n>(at); \
    break;
      SL_BLOCK(1)
      SL_BLOCK(2)
      SL_BLOCK(3)
      SL_BLOCK(4)
      SL_BLOCK(5)
      SL_BLOCK(6)
      SL_BLOCK(7)
      SL_BLOCK(8)
#undef SL_BLOCK
    }
    at = next;
  }
}

// STEP: vectors from one input pixel to the next; 0: any.
template <int STEP>
struct SparseForward {
  const ConvArgs& a;
  int64_t row;

  template <int T>
  SL_INLINE void run(int64_t pixel) const {
    constexpr int U = T <= 2 ? 4 : T <= 5 ? 2 : 1;  // sums side by side hide the latency
    const int64_t step = STEP > 0 ? STEP * kWidth : a.in_pixel;
    const float* in = a.in + row * a.in_row + pixel * step;
    float* out = a.out.data + row * a.out.row + pixel * a.out.pixel;
    const ConvWalk& m = a.walk;
    const int64_t segments = m.lines * m.panels, last = segments - m.lines;
    for (int64_t r = 0; r < segments; r++) {
      const uint32_t s = m.begin[r], e = m.begin[r + 1];
      const bool fresh = r < m.lines, relus = a.relu && r >= last;
      if (s == e && !fresh && !relus) continue;
      const int64_t line = m.line[r] - m.first_line;
      float* y = out + line * a.out.channel;
      V sum[U][T];
      if (fresh) {
        const V b = set1(a.bias != nullptr ? a.bias[line] : 0.f);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[0][t] = b;
      } else {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[0][t] = load(y + t * a.out.pixel);
      }
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[u][t] = zero();
      }
      uint32_t k = s;
      for (; k + 4 <= e; k += 4) {
        V w[4];
        set4(m.value + k, w);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
          const float* f = opaque(bytes(in, m.place[k + u]));
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) sum[u % U][t] = fma(w[u], load(f + t * step), sum[u % U][t]);
        }
      }
      for (; k < e; k++) {
        const V w = set1(m.value[k]);
        const float* f = opaque(bytes(in, m.place[k]));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[0][t] = fma(w, load(f + t * step), sum[0][t]);
      }
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[0][t] = add(sum[0][t], sum[u][t]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) store(y + t * a.out.pixel, relus ? relu(sum[0][t]) : sum[0][t]);
    }
  }
};

// Sums waiting survivors [done, upto) in groups of kWidth; `last`: also the incomplete group. Returns the new `done`.
SL_INLINE uint32_t flush(const float* ring, float* dw, uint32_t done, uint32_t upto, bool last) {
  while (upto - done >= (uint32_t)kWidth || (last && upto > done)) {
    const int n = (int)smaller(kWidth, upto - done);
    V r[kWidth];
#pragma GCC unroll 16
    for (int u = 0; u < kWidth; u++) r[u] = load(ring + ((done + u) & (kRing - 1)) * kWidth);
    const V v = row_sums(r);
    if (n == kWidth) {
      store(dw + done, add(v, load(dw + done)));
    } else {
      store(dw + done, add(v, load(dw + done, n)), n);
    }
    done += n;
  }
  return done;
}

template <bool DX>
struct SparseGradients {
  const ConvGradArgs& a;
  int64_t row;
  float* ring;

  template <int T>
  SL_INLINE void run(int64_t pixel) const {
    const ConvWalk& m = a.walk;
    const float* in = a.in + row * a.in_row + pixel * kWidth;
    const int64_t segments = m.lines * m.panels;
    uint32_t done = m.begin[0];
    for (int64_t r = 0; r < segments; r++) {
      const uint32_t s = m.begin[r], e = m.begin[r + 1];
      const bool fresh = r < m.lines;
      if (s == e && !(DX && fresh)) continue;
      const int64_t line = m.line[r] - m.first_line;
      const float* from = a.x.data + line * a.x.channel + row * a.x.row + pixel * a.x.pixel;
      float* to = DX ? a.dx.data + line * a.dx.channel + row * a.dx.row + pixel * a.dx.pixel : nullptr;
      V x[T], g[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        x[t] = load(from + t * a.x.pixel);
        if (DX) g[t] = fresh ? zero() : load(to + t * a.dx.pixel);
      }
      for (uint32_t k = s; k < e;) {
        const uint32_t stop = (uint32_t)smaller(e, (int64_t)done + kRing);
        for (; k < stop; k++) {
          const V w = DX ? set1(m.value[k]) : zero();
          const float* d = opaque(bytes(in, m.place[k]));
          V even = zero(), odd = zero();
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
            const V dy = once(load(d + t * kWidth));
            if (DX) g[t] = fma(w, dy, g[t]);
            if (t == 0) {
              even = mul(dy, x[0]);
            } else if (t == 1) {
              odd = mul(dy, x[1]);
            } else if (t & 1) {
              odd = fma(dy, x[t], odd);
            } else {
              even = fma(dy, x[t], even);
            }
          }
          store(ring + (k & (kRing - 1)) * kWidth, T > 1 ? add(even, odd) : even);
        }
        done = flush(ring, a.dw, done, k, false);
      }
      if (DX) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) store(to + t * a.dx.pixel, g[t]);
      }
    }
    flush(ring, a.dw, done, m.begin[segments], true);
  }
};

template <int STEP>
struct DenseForward {
  const ConvArgs& a;
  int64_t row;

  template <int T>
  SL_INLINE void run(int64_t pixel) const {
    int64_t i = 0;
    for (; i + kLines <= a.lines; i += kLines) lines<T, kLines>(i, pixel);
    for (; i < a.lines; i++) lines<T, 1>(i, pixel);
  }

  template <int T, int L>
  SL_INLINE void lines(int64_t first, int64_t pixel) const {
    const int64_t step = STEP > 0 ? STEP * kWidth : a.in_pixel;
    const float* in = a.in + row * a.in_row + pixel * step;
    const float* weight = a.weight + first * a.line_step;
    V sum[L][T];
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
      const V b = set1(a.bias != nullptr ? a.bias[first + l] : 0.f);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) sum[l][t] = b;
    }
    for (int64_t k = 0; k < a.taps.count; k++) {
      const float* f = opaque(bytes(in, a.taps.place[k]));
      const float* w = weight + a.taps.index[k];
      V value[L];
#pragma GCC unroll 4
      for (int l = 0; l < L; l++) value[l] = set1(w[l * a.line_step]);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const V x = load(f + t * step);
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) sum[l][t] = fma(value[l], x, sum[l][t]);
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
      float* y = a.out.data + (first + l) * a.out.channel + row * a.out.row + pixel * a.out.pixel;
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) store(y + t * a.out.pixel, a.relu ? relu(sum[l][t]) : sum[l][t]);
    }
  }
};

template <int STEP>
void sparse(const ConvArgs& a) {
  for (int64_t h = 0; h < a.height; h++) in_blocks<kPixels>(a.width, SparseForward<STEP>{a, h});
}

template <int STEP>
void dense(const ConvArgs& a) {
  for (int64_t h = 0; h < a.height; h++) in_blocks<kDensePixels>(a.width, DenseForward<STEP>{a, h});
}

template <bool DX>
void gradients(const ConvGradArgs& a) {
  alignas(64) float ring[kRing * kWidth];
  for (int64_t h = 0; h < a.height; h++) in_blocks<kGradPixels>(a.width, SparseGradients<DX>{a, h, ring});
}

}  // namespace

void net_conv_sparse(const ConvArgs& a) {
  switch (a.in_pixel / kWidth) {
    case 1:
      return sparse<1>(a);
    case 2:
      return sparse<2>(a);
    default:
      return sparse<0>(a);
  }
}

void net_conv_dense(const ConvArgs& a) {
  switch (a.in_pixel / kWidth) {
    case 1:
      return dense<1>(a);
    case 2:
      return dense<2>(a);
    default:
      return dense<0>(a);
  }
}

void net_conv_sparse_gradients(const ConvGradArgs& a) {
  if (a.dx.data != nullptr) return gradients<true>(a);
  gradients<false>(a);
}

void net_conv_dense_weight(const ConvWeightArgs& a) {
  for (int64_t h = 0; h < a.height; h++) {
    const float* x = a.x + h * a.x_row;
    for (int64_t i = 0; i < a.lines; i += kWeightLines) {
      // Beyond the edge the last line or tap is computed once more, and not written.
      const float* g[kWeightLines];
      for (int r = 0; r < kWeightLines; r++) {
        g[r] = a.g.data + smaller(i + r, a.lines - 1) * a.g.channel + h * a.g.row;
      }
      const int64_t high = smaller(kWeightLines, a.lines - i);
      for (int64_t k = 0; k < a.taps.count; k += kWeightTaps) {
        const float* in[kWeightTaps];
        for (int c = 0; c < kWeightTaps; c++) in[c] = bytes(x, a.taps.place[smaller(k + c, a.taps.count - 1)]);
        V sum[kWidth];
#pragma GCC unroll 16
        for (int u = 0; u < kWidth; u++) sum[u] = zero();
        for (int64_t w = 0; w < a.width; w++) {
          V grad[kWeightLines];
#pragma GCC unroll 4
          for (int r = 0; r < kWeightLines; r++) grad[r] = load(g[r] + w * a.g.pixel);
#pragma GCC unroll 4
          for (int c = 0; c < kWeightTaps; c++) {
            const V v = load(in[c] + w * a.x_pixel);
#pragma GCC unroll 4
            for (int r = 0; r < kWeightLines; r++) {
              sum[r * kWeightTaps + c] = fma(grad[r], v, sum[r * kWeightTaps + c]);
            }
          }
        }
        alignas(64) float block[kWidth];
        store(block, row_sums(sum));
        const int64_t wide = smaller(kWeightTaps, a.taps.count - k);
        for (int64_t r = 0; r < high; r++) {
          float* out = a.dw + (i + r) * a.line_step;
          for (int64_t c = 0; c < wide; c++) out[a.taps.index[k + c]] += block[r * kWeightTaps + c];
        }
      }
    }
  }
}

}  // namespace sl::cpu::SL_ISA
