// Index structures, workspace and choice of instruction set for masked_linear on a CPU; the loops are in
// masked_linear_simd.cpp.
#include "masked_linear.h"

#include <omp.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common.h"
#include "isa.h"
#include "masked_linear_simd.h"
#include "masked_linear_small_simd.h"
#include "sparse_order.h"

namespace sl::cpu {
namespace {

constexpr int64_t kMaxPanel = 65536;     // an index in a panel has 16 bits
constexpr int64_t kSmallWork = 1 << 17;  // multiply-adds below which waking other threads costs more than it saves
constexpr uint32_t kAhead = 32;          // survivors whose weights are fetched ahead of their use
constexpr int64_t kSamples = 64;         // words, weights and dead gradients that are looked at on each call
constexpr int64_t kRowTile = 2;          // vectors of batch up to which dW is computed row by row
constexpr int64_t kLooks = 32;           // survivors among which one is sought that is not 0
constexpr int64_t kDense = -1;           // as a tile: the loops for a few samples, whatever batch and density
constexpr int64_t kSmallBatch = 64;      // that these loops were made for
constexpr int64_t kThin = 2;             // vectors of batch up to which panels hold more features
constexpr double kFewInALine = 0.05;     // density from which on most cache lines hold a survivor

struct Kernels {
  int64_t width, max_tile;
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*weight)(const WeightArgs&);
  void (*vector)(const VectorArgs&);
  void (*small_forward)(const SmallArgs&);
  void (*small_backward)(const SmallArgs&);
};

#define SL_KERNELS(ns)                                                                                              \
  Kernels {                                                                                                         \
    ns::masked_linear_width(), ns::masked_linear_max_tile(), ns::masked_linear_forward, ns::masked_linear_backward, \
        ns::masked_linear_weight, ns::masked_linear_vector, ns::masked_linear_small_forward,                        \
        ns::masked_linear_small_backward                                                                            \
  }

Kernels kernels(int64_t batch) {
#if defined(__x86_64__)
  const Isa best = isa();
  // Up to half a vector of batch, the narrower instructions move half the bytes.
  if (best == Isa::kAvx512 && batch > avx512::masked_linear_width() / 2) return SL_KERNELS(avx512);
  if (best != Isa::kPortable) return SL_KERNELS(avx2);
#endif
  (void)batch;
  return SL_KERNELS(portable);
}

// A weight in float32 or bfloat16, read as float.
struct Weights {
  const void* data = nullptr;
  bool half = false;

  float operator[](uint64_t i) const {
    if (!half) return static_cast<const float*>(data)[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  void prefetch(uint64_t i) const {
    __builtin_prefetch(static_cast<const char*>(data) + i * (half ? sizeof(uint16_t) : sizeof(float)));
  }
};

// Rounded to the nearest bfloat16, ties to even; a NaN stays one.
uint16_t to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Tiles are as large as a batch tile of activations, and fresh pages for them cost as much as a sparse product: each
// thread that calls keeps its own.
struct Workspace {
  Array<float> x, y, dx, dw;
};
thread_local Workspace workspace;

int thread_count(int64_t work) { return work < kSmallWork || omp_in_parallel() ? 1 : omp_get_max_threads(); }

// The batch as full tiles of T vectors and a rest of fewer, so that no vector of batch is computed in vain: run(first,
// rows, T) for each part. Four vectors keep enough sums in flight, and a panel of features then fits the first-level
// cache.
template <class Run>
void in_tiles(const Kernels& k, int64_t batch, int64_t wish, Run run) {
  const int64_t tile = std::min(wish > 0 ? wish : 4, k.max_tile);
  const int64_t vectors = (batch + k.width - 1) / k.width;
  const int64_t full = std::min(batch, vectors / tile * tile * k.width);
  if (full > 0) run(0, full, tile);
  if (full < batch) run(full, batch - full, vectors % tile);
}

// Lines per block: as many as possible, for long runs of equal trip counts, yet some blocks for every thread.
int64_t block_for(int64_t lines) {
  const int64_t share = (lines + omp_get_max_threads() - 1) / omp_get_max_threads();
  return std::max<int64_t>(16, std::min<int64_t>(1024, (share + 15) / 16 * 16));
}

}  // namespace

struct MaskedLinearPlan::Impl : Survivors {
  bool packed;
  // An order, and where each survivor, row by row, stands in it.
  struct Placed : Order {
    Array<uint32_t> where;  // [count]
  };
  Placed wide, thin;            // rows, for batches of more than kThin vectors and of fewer
  Order whole;                  // rows, for a single sample
  Placed transposed;            // columns
  std::vector<uint32_t> words;  // the mask, once a few samples have come
  std::vector<uint32_t> sample_word, sample_bits;
  std::vector<uint64_t> sample_weight, sample_dead;
  std::vector<float> sample_value;
  bool has_sample = false;
  Weights weight;  // whose values were gathered; read in calls that were given it
  int64_t weight_version = -1;
  std::mutex lock;

  // Forgets the gathered values unless they are this weight's.
  void use(const Weight& now) {
    bool same = now.same && now.data == weight.data && now.half == weight.half && now.version == weight_version;
    for (size_t i = 0; same && has_sample && i < sample_weight.size(); i++) {
      const float value = weight[sample_weight[i]];
      // Bytes, not values: a NaN is like itself.
      same = std::memcmp(&value, &sample_value[i], sizeof(float)) == 0;
    }
    if (same) return;
    weight = {now.data, now.half};
    weight_version = now.version;
    wide.has_values = thin.has_values = whole.has_values = transposed.has_values = has_sample = false;
  }

  const uint32_t* mask() {
    if (words.empty()) {
      const int64_t per_row = words_per_row(columns);
      words.resize(rows * per_row);
      for (int64_t r = 0; r < rows; r++) {
        for (uint32_t k = offsets[r]; k < offsets[r + 1]; k++) {
          const int64_t column = position[k] - r * columns;
          words[r * per_row + column / kWordBits] |= uint32_t{1} << (column % kWordBits);
        }
      }
    }
    return words.data();
  }

  // Whether a dense product under the mask is likely to beat the index of survivors. Costs in ns a weight and a
  // survivor, fitted to 784x300 and 1024x1024 with batches of 1 to 32 on one core of an AMD EPYC (Zen 4); survivors
  // whose values must be gathered first, as after each step of an optimizer, cost more than most products. What is
  // chosen does not depend on what has been called before, so that a call gives the same bits again.
  bool small_forward(const Weight& now, int64_t batch, int64_t tile, bool trains) const {
    if (!can_be_small(now, batch, tile) || tile == kDense) return tile == kDense;
    const double sparse = (batch == 1 ? 0.26 : 0.4 + 0.014 * batch) + (trains ? 1.3 : 0);
    return small_cost() * std::max(0.055, 0.02 + 0.022 * batch) < density() * sparse;
  }

  bool small_backward(const Weight& now, int64_t batch, int64_t tile, bool dx, bool dw) const {
    if (!can_be_small(now, batch, tile) || tile == kDense) return tile == kDense;
    double sparse = dx ? 1 + 0.005 * batch + (small_forward(now, batch, 0, true) ? 1.2 : 0) : 0;
    if (dw) sparse += 0.85 + 0.02 * batch;
    return small_cost() * (dx + dw) * (0.05 + 0.02 * batch) < density() * sparse;
  }

  bool can_be_small(const Weight& now, int64_t batch, int64_t tile) const {
    if (packed || now.half || tile > 0 || batch == 0 || rows * columns == 0) {
      if (tile == kDense) throw std::invalid_argument("masked_linear: no dense product of such a call");
      return false;
    }
    return batch <= kSmallBatch;
  }

  static double small_cost() { return isa() == Isa::kAvx512 ? 1 : isa() == Isa::kAvx2 ? 1.4 : 4; }

  SmallArgs small_args(const Weight& now, int64_t batch) {
    SmallArgs a{};
    a.rows = rows, a.columns = columns, a.batch = batch;
    a.weight = static_cast<const float*>(now.data), a.words = mask();
    a.threads = thread_count(rows * columns * batch);
    return a;
  }

  void gather_whole() {
    if (whole.has_values) return;
    const SparseLayout& m = whole.layout;
    const int threads = thread_count(count());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
      const uint32_t first = m.begin[r], size = m.begin[r + 1] - first;
      const int64_t start = packed ? offsets[m.line[r]] : static_cast<int64_t>(m.line[r]) * columns;
      for (uint32_t k = 0; k < size; k++) whole.value[first + k] = weight[start + (packed ? k : m.index[first + k])];
    }
    whole.has_values = true;
    sample();
  }

  // Values for a batched pass. They are gathered for the other orders that have been in use too: the dense weight is
  // read once, row by row, which for a large one costs more than anything done to its survivors.
  void gather(const Order& wanted) {
    if (wanted.has_values) return;
    std::array<std::pair<float*, const uint32_t*>, 3> targets;
    size_t count_of_targets = 0;
    for (Placed* order : {&wide, &thin, &transposed}) {
      if (order->layout.blocks == 0 || order->has_values) continue;
      targets[count_of_targets++] = {order->value.get(), order->where.get()};
      order->has_values = true;
    }
    const uint32_t survivors = count();
    const int threads = thread_count(survivors);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) {
        if (!packed && k + kAhead < survivors) weight.prefetch(position[k + kAhead]);
        const float v = weight[packed ? k : position[k]];
        for (size_t t = 0; t < count_of_targets; t++) targets[t].first[targets[t].second[k]] = v;
      }
    }
    sample();
  }

  // Of each stretch of survivors the first that is not 0, if one of its first few is: scaling would not show in a 0,
  // and a mask that grew has many.
  void sample() {
    const int64_t samples = static_cast<int64_t>(sample_weight.size());
    for (int64_t i = 0; i < samples; i++) {
      const int64_t begin = i * count() / samples, end = std::min((i + 1) * count() / samples, begin + kLooks);
      float value = 0;
      for (int64_t k = begin; k < end && value == 0; k++) {
        sample_weight[i] = packed ? k : position[k];
        value = weight[sample_weight[i]];
      }
      sample_value[i] = value;
    }
    has_sample = true;
  }

  bool is_zero_off_the_mask(const float* dw) const {
    return std::all_of(sample_dead.begin(), sample_dead.end(), [&](uint64_t i) { return dw[i] == 0; });
  }

  // dw in bfloat16 from the survivors' gradients: every element is written.
  void scatter(const float* compact, uint16_t* dw) const {
    const int threads = thread_count(rows * columns);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
      if (!packed) std::memset(dw + i * columns, 0, columns * sizeof(uint16_t));
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++)
        dw[packed ? k : position[k]] = to_half(compact[transposed.where[k]]);
    }
  }

  // dw, [rows, columns] or packed, from the survivors' gradients: every element is written, so that fresh or reused
  // memory will do, unless the dead ones are zero already.
  void scatter(const float* compact, float* dw, bool is_zero) const {
    if (packed) {
      const int threads = thread_count(count());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int64_t k = 0; k < count(); k++) dw[k] = compact[transposed.where[k]];
      return;
    }
    const auto put = [&](int64_t i, float* target) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) {
        target[position[k]] = compact[transposed.where[k]];
      }
    };
    const bool streams = can_stream(dw);
    // Where survivors are in most cache lines, streaming past the caches beats reading each line to change it.
    if (is_zero && (!streams || density() < kFewInALine) && is_zero_off_the_mask(dw)) {
      const int few = thread_count(count());
#pragma omp parallel for schedule(static) num_threads(few) if (few > 1)
      for (int64_t i = 0; i < rows; i++) put(i, dw);
      return;
    }
    const int threads = thread_count(rows * columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> scratch(streams ? columns : 0);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows; i++) {
        if (!streams) {
          std::memset(dw + i * columns, 0, columns * sizeof(float));
          put(i, dw);
          continue;
        }
        const int64_t first = i * columns;
        for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++)
          scratch[position[k] - first] = compact[transposed.where[k]];
        stream(scratch.data(), dw + first);
        for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) scratch[position[k] - first] = 0;
      }
    }
  }

  // A gradient larger than the caches is written past them: then its lines need not be read first.
  bool can_stream(const float* dw) const {
#if defined(__x86_64__)
    constexpr int64_t kCached = int64_t{4} << 20;
    return rows * columns > kCached && columns % 4 == 0 && reinterpret_cast<uintptr_t>(dw) % 16 == 0;
#else
    (void)dw;
    return false;
#endif
  }

  void stream(const float* from, float* to) const {
#if defined(__x86_64__)
    for (int64_t j = 0; j < columns; j += 4) _mm_stream_ps(to + j, _mm_loadu_ps(from + j));
    _mm_sfence();
#else
    std::memcpy(to, from, columns * sizeof(float));
#endif
  }
};

MaskedLinearPlan::MaskedLinearPlan(const uint32_t* words, int64_t rows, int64_t columns, bool packed)
    : impl_(new Impl) {
  Impl& m = *impl_;
  m.packed = packed;
  if (rows < 0 || columns < 0 || (columns > 0 && rows >= (int64_t{1} << 32) / columns)) {
    throw std::invalid_argument("masked_linear: an index holds fewer than 2^32 weights");
  }
  m.build(words, rows, columns);
  const int64_t words_per_line = words_per_row(columns), total = rows * words_per_line;
  for (int64_t i = 0; i < std::min(kSamples, total); i++) {
    const int64_t at = i * total / std::min(kSamples, total);
    m.sample_word.push_back(static_cast<uint32_t>(at));
    m.sample_bits.push_back(words[at]);
  }
  m.sample_weight.resize(std::min(kSamples, m.count()));
  m.sample_value.resize(m.sample_weight.size());
  // The first dead weight of each of kSamples stretches.
  const auto is_dead = [&](int64_t i) {
    const int64_t j = i % columns;
    return (words[i / columns * words_per_line + j / kWordBits] >> (j % kWordBits) & 1) == 0;
  };
  const int64_t weights = rows * columns, stretch = (weights + kSamples - 1) / kSamples;
  for (int64_t first = 0; first < weights; first += stretch) {
    int64_t at = first;
    const int64_t end = std::min(first + stretch, weights);
    while (at < end && !is_dead(at)) at++;
    if (at < end) m.sample_dead.push_back(at);
  }
}

MaskedLinearPlan::~MaskedLinearPlan() = default;

int64_t MaskedLinearPlan::count() const { return impl_->count(); }

bool MaskedLinearPlan::same_words(const uint32_t* words) const {
  const Impl& m = *impl_;
  for (size_t i = 0; i < m.sample_word.size(); i++) {
    if (words[m.sample_word[i]] != m.sample_bits[i]) return false;
  }
  return true;
}

void MaskedLinearPlan::forward(const Weight& weight, const float* x, int64_t x_stride, int64_t batch, const float* bias,
                               float* y, int64_t tile, bool relu, bool trains) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (m.rows == 0 || batch == 0) return;
  if (m.small_forward(weight, batch, tile, trains)) {
    SmallArgs a = m.small_args(weight, batch);
    a.x = x, a.x_stride = x_stride, a.bias = bias, a.y = y, a.relu = relu;
    kernels(std::numeric_limits<int64_t>::max()).small_forward(a);
    return;
  }
  m.use(weight);
  const int threads = thread_count(m.count() * batch);
  const Kernels k = kernels(batch);
  if (batch == 1 && m.columns <= kMaxPanel && tile == 0) {
    if (m.whole.layout.blocks == 0) {
      m.build_rows(m.whole, std::min<int64_t>(64, block_for(m.rows)), kMaxPanel, nullptr);
    }
    m.gather_whole();
    kernels(std::numeric_limits<int64_t>::max()).vector({m.whole.layout, x, bias, y, gathers(), threads, relu});
    return;
  }
  const bool is_thin = batch <= kThin * k.width;
  Impl::Placed& order = is_thin ? m.thin : m.wide;
  if (order.layout.blocks == 0) m.build_rows(order, block_for(m.rows), m.row_panel(is_thin), &order.where);
  m.gather(order);
  in_tiles(k, batch, tile, [&](int64_t first, int64_t count, int64_t vectors) {
    float* x_tile = workspace.x.reserve(m.columns * vectors * k.width);
    float* y_tile = workspace.y.reserve(m.rows * vectors * k.width);
    k.forward({order.layout, count, vectors, x + first * x_stride, x_stride, bias, y + first * m.rows, x_tile, y_tile,
               threads, relu});
  });
}

void MaskedLinearPlan::backward(const Weight& weight, const float* grad, int64_t grad_stride, const float* x,
                                int64_t x_stride, int64_t batch, float* dx, void* dw_any, float* db, int64_t tile,
                                bool dw_is_zero) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (m.small_backward(weight, batch, tile, dx != nullptr, dw_any != nullptr)) {
    SmallArgs a = m.small_args(weight, batch);
    a.x = x, a.x_stride = x_stride, a.grad = grad, a.grad_stride = grad_stride;
    a.dx = dx, a.dw = static_cast<float*>(dw_any), a.db = db;
    kernels(std::numeric_limits<int64_t>::max()).small_backward(a);
    return;
  }
  m.use(weight);
  const Kernels k = kernels(batch);
  float* dw = m.weight.half ? nullptr : static_cast<float*>(dw_any);
  const bool by_rows =
      dw != nullptr && !m.packed && batch > 0 && batch <= kRowTile * k.width && tile == 0 && !m.can_stream(dw);
  if ((dx != nullptr || !by_rows) && m.transposed.layout.blocks == 0) {
    m.build_columns(m.transposed, block_for(m.columns), m.transposed.where);
  }
  if (dx != nullptr) m.gather(m.transposed);
  SparseLayout columns = m.transposed.layout;
  if (dx == nullptr && by_rows) {  // no walk, only packing
    columns = SparseLayout{};
    columns.lines = m.columns;
    columns.minors = m.rows;
  }
  const int threads = thread_count(m.count() * batch);
  float* compact = dw_any != nullptr && !by_rows ? workspace.dw.reserve(m.count()) : nullptr;
  if (batch == 0) {
    if (dw_any != nullptr) std::fill_n(compact, m.count(), 0.f);
    if (db != nullptr) std::fill_n(db, m.rows, 0.f);
  }
  in_tiles(k, batch, tile, [&](int64_t first, int64_t count, int64_t vectors) {
    float* x_tile = dw_any != nullptr ? workspace.x.reserve(m.columns * vectors * k.width) : nullptr;
    float* g_tile = workspace.y.reserve(m.rows * vectors * k.width);
    float* dx_tile = dx != nullptr ? workspace.dx.reserve(m.columns * vectors * k.width) : nullptr;
    k.backward({columns, count, vectors, x + first * x_stride, x_stride, grad + first * grad_stride, grad_stride,
                dx != nullptr ? dx + first * m.columns : nullptr, compact, by_rows, db, first > 0, x_tile, g_tile,
                dx_tile, threads});
    if (by_rows) {
      const bool clear = !dw_is_zero || !m.is_zero_off_the_mask(dw);
      k.weight({m.rows, m.columns, m.offsets.data(), m.position.get(), vectors, x_tile, g_tile, dw, clear, threads});
    }
  });
  if (dw_any == nullptr || by_rows) return;
  if (m.weight.half) {
    m.scatter(compact, static_cast<uint16_t*>(dw_any));
  } else {
    m.scatter(compact, dw, dw_is_zero);
  }
}

}  // namespace sl::cpu
