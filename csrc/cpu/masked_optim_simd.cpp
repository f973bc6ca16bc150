// The arithmetic of masked_optim, once per instruction set. Two ways through a stretch of weights, same sums: in place
// under the mask bits, or, where few survive, gathered into a small buffer first, because the divisions and square
// roots of dead lanes would cost more than the copying.
#include "masked_optim_simd.h"

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#endif

namespace sl::cpu::SL_ISA {
namespace {

// Vectors of kLanes. Lanes whose bit is 0 are loaded as zero. kInside says that all lanes are memory of this row, dead
// ones holding zero: a store may then write zeros there, otherwise it leaves memory whose bit is 0 alone.
#if defined(SL_ISA_AVX512)
struct F32 {
  using T = float;
  static constexpr int kLanes = 16;
  __m512 v;
  static F32 of(double x) { return {_mm512_set1_ps(static_cast<float>(x))}; }
  template <bool kInside>
  static F32 load(const T* p, uint32_t bits) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p)};
  }
  template <bool kInside>
  void store(T* p, uint32_t bits) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), v);
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 root(F32 a) { return {_mm512_maskz_sqrt_ps(0xffff, a.v)}; }  // the plain form makes GCC 12 warn
inline F32 larger(F32 a, F32 b) { return {_mm512_maskz_max_ps(0xffff, a.v, b.v)}; }

struct F64 {
  using T = double;
  static constexpr int kLanes = 8;
  __m512d v;
  static F64 of(double x) { return {_mm512_set1_pd(x)}; }
  template <bool kInside>
  static F64 load(const T* p, uint32_t bits) {
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p)};
  }
  template <bool kInside>
  void store(T* p, uint32_t bits) const {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(bits), v);
  }
};
inline F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 root(F64 a) { return {_mm512_maskz_sqrt_pd(0xff, a.v)}; }
inline F64 larger(F64 a, F64 b) { return {_mm512_maskz_max_pd(0xff, a.v, b.v)}; }

#elif defined(SL_ISA_AVX2)
struct F32 {
  using T = float;
  static constexpr int kLanes = 8;
  __m256 v;
  static __m256i lanes(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
  }
  static F32 of(double x) { return {_mm256_set1_ps(static_cast<float>(x))}; }
  template <bool kInside>
  static F32 load(const T* p, uint32_t bits) {
    if (!kInside) return {_mm256_maskload_ps(p, lanes(bits))};
    return {bits == 0xff ? _mm256_loadu_ps(p) : _mm256_and_ps(_mm256_loadu_ps(p), _mm256_castsi256_ps(lanes(bits)))};
  }
  template <bool kInside>
  void store(T* p, uint32_t bits) const {
    if (!kInside)
      _mm256_maskstore_ps(p, lanes(bits), v);  // microcoded and slow on some CPUs
    else
      _mm256_storeu_ps(p, bits == 0xff ? v : _mm256_and_ps(v, _mm256_castsi256_ps(lanes(bits))));
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 root(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 larger(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }

struct F64 {
  using T = double;
  static constexpr int kLanes = 4;
  __m256d v;
  static __m256i lanes(uint32_t bits) {
    const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), each), each);
  }
  static F64 of(double x) { return {_mm256_set1_pd(x)}; }
  template <bool kInside>
  static F64 load(const T* p, uint32_t bits) {
    if (!kInside) return {_mm256_maskload_pd(p, lanes(bits))};
    return {bits == 0xf ? _mm256_loadu_pd(p) : _mm256_and_pd(_mm256_loadu_pd(p), _mm256_castsi256_pd(lanes(bits)))};
  }
  template <bool kInside>
  void store(T* p, uint32_t bits) const {
    if (!kInside)
      _mm256_maskstore_pd(p, lanes(bits), v);  // microcoded and slow on some CPUs
    else
      _mm256_storeu_pd(p, bits == 0xf ? v : _mm256_and_pd(v, _mm256_castsi256_pd(lanes(bits))));
  }
};
inline F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64 root(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
inline F64 larger(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }

#else
template <class Real>
struct Scalar {
  using T = Real;
  static constexpr int kLanes = 1;
  T v;
  static Scalar of(double x) { return {static_cast<T>(x)}; }
  template <bool kInside>
  static Scalar load(const T* p, uint32_t bits) {
    return {bits ? *p : T(0)};
  }
  template <bool kInside>
  void store(T* p, uint32_t bits) const {
    if (bits) *p = v;
  }
  friend Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  friend Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  friend Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  friend Scalar operator/(Scalar a, Scalar b) { return {a.v / b.v}; }
};
using F32 = Scalar<float>;
using F64 = Scalar<double>;
inline F32 root(F32 a) { return {__builtin_sqrtf(a.v)}; }
inline F64 root(F64 a) { return {__builtin_sqrt(a.v)}; }
template <class Real>
inline Scalar<Real> larger(Scalar<Real> a, Scalar<Real> b) {
  return {a.v > b.v ? a.v : b.v};  // b where either is NaN, as the vector instructions have it
}
#endif

// An update rule: constants, and at(streams, i, bits), which advances the lanes `bits` from element i on. streams[0] is
// the gradient, the others are read and written; streams[kStreams - 1] may be unused (null).
template <class V, bool kMomentum>
struct Sgd {
  using T = typename V::T;
  static constexpr int kStreams = kMomentum ? 3 : 2;
  V rate, momentum, blend, decay, sign;
  bool nesterov, first, decays;
  Sgd(const OptimTensor& t, const SgdOptions& o)
      : rate(V::of(t.rate)),
        momentum(V::of(o.momentum)),
        blend(V::of(1 - o.dampening)),
        decay(V::of(o.weight_decay)),
        sign(V::of(o.maximize ? -1 : 1)),
        nesterov(o.nesterov),
        first(t.fresh),
        decays(o.weight_decay != 0) {}
  static void streams(const OptimTensor& t, T** s) {
    s[1] = static_cast<T*>(t.param);
    if (kMomentum) s[2] = static_cast<T*>(t.first);
  }
  template <bool kInside>
  void at(T* const* s, int64_t i, uint32_t bits) const {
    V w = V::template load<kInside>(s[1] + i, bits);
    V g = V::template load<kInside>(s[0] + i, bits) * sign;
    if (decays) g = g + decay * w;  // not always: 0 * inf would be NaN
    if (kMomentum) {
      const V b = first ? g : momentum * V::template load<kInside>(s[2] + i, bits) + blend * g;
      b.template store<kInside>(s[2] + i, bits);
      g = nesterov ? g + momentum * b : b;
    }
    (w - rate * g).template store<kInside>(s[1] + i, bits);
  }
};

template <class V, bool kMax>
struct Adam {
  using T = typename V::T;
  static constexpr int kStreams = kMax ? 5 : 4;
  V rate, correction, one_minus_beta1, beta2, one_minus_beta2, eps, decay, shrink, sign;
  bool decays;
  Adam(const OptimTensor& t, const AdamOptions& o)
      : rate(V::of(t.rate)),
        correction(V::of(t.correction)),
        one_minus_beta1(V::of(1 - o.beta1)),
        beta2(V::of(o.beta2)),
        one_minus_beta2(V::of(1 - o.beta2)),
        eps(V::of(o.eps)),
        decay(V::of(o.weight_decay)),
        shrink(V::of(o.shrink)),
        sign(V::of(o.maximize ? -1 : 1)),
        decays(o.weight_decay != 0) {}
  static void streams(const OptimTensor& t, T** s) {
    s[1] = static_cast<T*>(t.param);
    s[2] = static_cast<T*>(t.first);
    s[3] = static_cast<T*>(t.second);
    if (kMax) s[4] = static_cast<T*>(t.max_second);
  }
  template <bool kInside>
  void at(T* const* s, int64_t i, uint32_t bits) const {
    V w = V::template load<kInside>(s[1] + i, bits) * shrink;
    V g = V::template load<kInside>(s[0] + i, bits) * sign;
    if (decays) g = g + decay * w;
    V m = V::template load<kInside>(s[2] + i, bits);
    m = m + one_minus_beta1 * (g - m);
    V v = V::template load<kInside>(s[3] + i, bits);
    v = beta2 * v + one_minus_beta2 * (g * g);
    m.template store<kInside>(s[2] + i, bits);
    v.template store<kInside>(s[3] + i, bits);
    if (kMax) {
      v = larger(V::template load<kInside>(s[4] + i, bits), v);
      v.template store<kInside>(s[4] + i, bits);
    }
    (w - rate * (m / (root(v) * correction + eps))).template store<kInside>(s[1] + i, bits);
  }
};

template <int kLanes>
constexpr uint32_t all_lanes() {
  return (uint32_t(1) << kLanes) - 1;
}

// Walks the words [begin, end) of a tensor: f(word, offset of its first element, how many elements it covers).
template <class F>
void each_word(const OptimTensor& t, int64_t begin, int64_t end, const F& f) {
  const int64_t per_row = (t.columns + 31) / 32;
  int64_t row = begin / per_row, column = begin % per_row * 32;
  for (int64_t q = begin; q < end; q++) {
    const int64_t left = t.columns - column;
    f(static_cast<uint32_t>(t.words[q]), row * t.columns + column, left < 32 ? static_cast<int>(left) : 32);
    column += 32;
    if (column >= t.columns) {
      column = 0;
      row++;
    }
  }
}

template <class V, class Rule>
void step(const OptimTensor& t, const Rule& rule, int64_t begin, int64_t end) {
  using T = typename V::T;
  // Rules read the gradient only; one array of pointers for all streams keeps them simple.
  T* s[Rule::kStreams] = {const_cast<T*>(static_cast<const T*>(t.grad))};
  Rule::streams(t, s);
  if (t.words == nullptr) {
    const int64_t last = end * 32 < t.columns ? end * 32 : t.columns;
    int64_t i = begin * 32;
    for (; i + V::kLanes <= last; i += V::kLanes) rule.template at<true>(s, i, all_lanes<V::kLanes>());
    if (i < last) rule.template at<false>(s, i, (uint32_t(1) << (last - i)) - 1);
    return;
  }
  if (!t.clean) {
    each_word(t, begin, end, [&](uint32_t word, int64_t offset, int count) {
      for (int k = 1; k < Rule::kStreams; k++)
        for (int j = 0; j < count; j++)
          if (!(word >> j & 1)) s[k][offset + j] = 0;
    });
  }
  each_word(t, begin, end, [&](uint32_t word, int64_t offset, int count) {
    if (V::kLanes == 1) {
      for (; word; word &= word - 1) rule.template at<true>(s, offset + __builtin_ctz(word), 1);
      return;
    }
    for (int j = 0; j < 32; j += V::kLanes) {
      const uint32_t bits = word >> j & all_lanes<V::kLanes>();
      if (!bits) continue;
      if (j + V::kLanes <= count)
        rule.template at<true>(s, offset + j, bits);
      else
        rule.template at<false>(s, offset + j, bits);
    }
  });
}

}  // namespace

void masked_sgd(const OptimTensor& t, const SgdOptions& o, int dtype, int64_t begin, int64_t end) {
  if (dtype == 0)
    t.first ? step<F32>(t, Sgd<F32, true>(t, o), begin, end) : step<F32>(t, Sgd<F32, false>(t, o), begin, end);
  else
    t.first ? step<F64>(t, Sgd<F64, true>(t, o), begin, end) : step<F64>(t, Sgd<F64, false>(t, o), begin, end);
}

void masked_adam(const OptimTensor& t, const AdamOptions& o, int dtype, int64_t begin, int64_t end) {
  if (dtype == 0)
    t.max_second ? step<F32>(t, Adam<F32, true>(t, o), begin, end) : step<F32>(t, Adam<F32, false>(t, o), begin, end);
  else
    t.max_second ? step<F64>(t, Adam<F64, true>(t, o), begin, end) : step<F64>(t, Adam<F64, false>(t, o), begin, end);
}

}  // namespace sl::cpu::SL_ISA
