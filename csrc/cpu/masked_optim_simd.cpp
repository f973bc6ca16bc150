// The arithmetic of masked_optim, once per instruction set. Two ways through a stretch of weights, same sums: in place
// under the mask bits, or, where few survive, gathered into a small buffer first, because the divisions and square
// roots of dead lanes would cost more than the copying.
#include "masked_optim_simd.h"

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#endif

namespace sl::cpu::SL_ISA {
namespace {

// Vectors: a load leaves lanes whose bit is 0 at zero without touching their memory, a store leaves their memory alone.
#if defined(SL_ISA_AVX512)
struct F32 {
  using T = float;
  static constexpr int kLanes = 16;
  __m512 v;
  static F32 of(double x) { return {_mm512_set1_ps(static_cast<float>(x))}; }
  static F32 load(const T* p, uint32_t bits) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p)}; }
  void store(T* p, uint32_t bits) const { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), v); }
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
  static F64 load(const T* p, uint32_t bits) { return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p)}; }
  void store(T* p, uint32_t bits) const { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(bits), v); }
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
  static F32 load(const T* p, uint32_t bits) {
    return {bits == 0xff ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes(bits))};
  }
  void store(T* p, uint32_t bits) const {
    if (bits == 0xff)
      _mm256_storeu_ps(p, v);
    else
      _mm256_maskstore_ps(p, lanes(bits), v);
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
  static F64 load(const T* p, uint32_t bits) {
    return {bits == 0xf ? _mm256_loadu_pd(p) : _mm256_maskload_pd(p, lanes(bits))};
  }
  void store(T* p, uint32_t bits) const {
    if (bits == 0xf)
      _mm256_storeu_pd(p, v);
    else
      _mm256_maskstore_pd(p, lanes(bits), v);
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
  static Scalar load(const T* p, uint32_t bits) { return {bits ? *p : T(0)}; }
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
  void at(T* const* s, int64_t i, uint32_t bits) const {
    V w = V::load(s[1] + i, bits);
    V g = V::load(s[0] + i, bits) * sign;
    if (decays) g = g + decay * w;  // not always: 0 * inf would be NaN
    if (kMomentum) {
      const V b = first ? g : momentum * V::load(s[2] + i, bits) + blend * g;
      b.store(s[2] + i, bits);
      g = nesterov ? g + momentum * b : b;
    }
    (w - rate * g).store(s[1] + i, bits);
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
  void at(T* const* s, int64_t i, uint32_t bits) const {
    V w = V::load(s[1] + i, bits) * shrink;
    V g = V::load(s[0] + i, bits) * sign;
    if (decays) g = g + decay * w;
    V m = V::load(s[2] + i, bits);
    m = m + one_minus_beta1 * (g - m);
    V v = V::load(s[3] + i, bits);
    v = beta2 * v + one_minus_beta2 * (g * g);
    m.store(s[2] + i, bits);
    v.store(s[3] + i, bits);
    if (kMax) {
      v = larger(V::load(s[4] + i, bits), v);
      v.store(s[4] + i, bits);
    }
    (w - rate * (m / (root(v) * correction + eps))).store(s[1] + i, bits);
  }
};

template <int kLanes>
constexpr uint32_t all_lanes() {
  return (uint32_t(1) << kLanes) - 1;
}

// Elements [begin, end), all of them.
template <class V, class Rule>
void run(const Rule& rule, typename V::T* const* s, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + V::kLanes <= end; i += V::kLanes) rule.at(s, i, all_lanes<V::kLanes>());
  if (i < end) rule.at(s, i, (uint32_t(1) << (end - i)) - 1);
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

constexpr int kBuffer = 256;  // gathered elements; five streams of them stay in the first-level cache

// Appends the positions of a word's set bits.
inline int append(uint32_t word, int32_t offset, int32_t* index, int n) {
#if defined(SL_ISA_AVX512)
  const __m512i low = _mm512_add_epi32(_mm512_set1_epi32(offset),
                                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const uint32_t a = word & 0xffff, b = word >> 16;
  // Compressed in registers and stored whole: a compressing store is microcoded on some CPUs.
  _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(static_cast<__mmask16>(a), low));
  n += __builtin_popcount(a);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
  _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(static_cast<__mmask16>(b), high));
  return n + __builtin_popcount(b);
#else
  for (; word; word &= word - 1) index[n++] = offset + __builtin_ctz(word);
  return n;
#endif
}

// Survivors gathered into buffers, advanced there and written back.
template <class V, class Rule>
struct Gatherer {
  using T = typename V::T;
  const Rule& rule;
  T* base[Rule::kStreams];  // streams from the first element of the stretch on: positions then fit 32 bits
  int n = 0;
  int32_t index[kBuffer + 48];  // append writes up to 16 entries past the last one
  T buffer[Rule::kStreams][kBuffer + 32];

  explicit Gatherer(const Rule& r, T* const* s, int64_t origin) : rule(r) {
    for (int k = 0; k < Rule::kStreams; k++) base[k] = s[k] + origin;
  }
  void flush() {
    T* s[Rule::kStreams];
    for (int k = 0; k < Rule::kStreams; k++) {
      s[k] = buffer[k];
      for (int i = 0; i < n; i++) buffer[k][i] = base[k][index[i]];
    }
    run<V>(rule, s, 0, n);
    for (int k = 1; k < Rule::kStreams; k++)
      for (int i = 0; i < n; i++) base[k][index[i]] = buffer[k][i];
    n = 0;
  }
  void add(uint32_t word, int32_t offset) {
    n = append(word, offset, index, n);
    if (n >= kBuffer) flush();
  }
};

template <class V, class Rule>
void step(const OptimTensor& t, const Rule& rule, int64_t begin, int64_t end) {
  using T = typename V::T;
  // Rules read the gradient only; one array of pointers for all streams keeps them simple.
  T* s[Rule::kStreams] = {const_cast<T*>(static_cast<const T*>(t.grad))};
  Rule::streams(t, s);
  if (t.words == nullptr) {
    run<V>(rule, s, begin * 32, end * 32 < t.columns ? end * 32 : t.columns);
    return;
  }
  if (!t.clean) {
    each_word(t, begin, end, [&](uint32_t word, int64_t offset, int count) {
      for (int k = 1; k < Rule::kStreams; k++)
        for (int j = 0; j < count; j++)
          if (!(word >> j & 1)) s[k][offset + j] = 0;
    });
  }
  int64_t live = 0;
  for (int64_t q = begin; q < end; q++) live += __builtin_popcount(static_cast<uint32_t>(t.words[q]));
  if (live == 0) return;
  if (live * 4 < (end - begin) * 32) {
    const int64_t per_row = (t.columns + 31) / 32;
    const int64_t origin = begin / per_row * t.columns + begin % per_row * 32;
    Gatherer<V, Rule> gatherer(rule, s, origin);
    each_word(t, begin, end,
              [&](uint32_t word, int64_t offset, int) { gatherer.add(word, static_cast<int32_t>(offset - origin)); });
    gatherer.flush();
    return;
  }
  each_word(t, begin, end, [&](uint32_t word, int64_t offset, int) {
    for (int j = 0; j < 32; j += V::kLanes) {
      const uint32_t bits = word >> j & all_lanes<V::kLanes>();
      if (bits) rule.at(s, offset + j, bits);
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
