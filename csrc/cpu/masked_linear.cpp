// Index structures, workspace and choice of instruction set for masked_linear on a CPU; the loops are in
// masked_linear_simd.cpp.
#include "masked_linear.h"

#include <omp.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "common.h"
#include "isa.h"
#include "masked_linear_simd.h"
#include "sparse_order.h"

namespace sl::cpu {
namespace {

constexpr int64_t kMaxPanel = 65536;     // an index in a panel has 16 bits
constexpr int64_t kSmallWork = 1 << 17;  // multiply-adds below which waking other threads costs more than it saves
constexpr uint32_t kAhead = 32;          // survivors whose weights are fetched ahead of their use
constexpr int64_t kSamples = 64;         // words, weights and dead gradients that are looked at on each call
constexpr int64_t kRowTile = 2;          // vectors of batch up to which dW is computed row by row
constexpr double kFewInALine = 0.05;     // density from which on most cache lines hold a survivor

struct Kernels {
  int64_t width, max_tile;
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*weight)(const WeightArgs&);
  void (*vector)(const VectorArgs&);
};

#define SL_KERNELS(ns)                                                                                              \
  Kernels {                                                                                                         \
    ns::masked_linear_width(), ns::masked_linear_max_tile(), ns::masked_linear_forward, ns::masked_linear_backward, \
        ns::masked_linear_weight, ns::masked_linear_vector                                                          \
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
  Order panelled, whole;           // rows, for batches and for a single sample
  Order transposed;                // columns
  Array<uint32_t> where;           // [count]: where a survivor of the row order stands in `transposed`
  Array<uint32_t> panelled_where;  // [count]: and where in `panelled`
  std::vector<uint32_t> sample_word, sample_bits;
  std::vector<uint64_t> sample_weight, sample_dead;
  std::vector<float> sample_value;
  bool has_sample = false;
  const float* weight = nullptr;  // whose values were gathered, never read through this
  int64_t weight_version = -1;
  std::mutex lock;

  void gather_whole(const float* weight) {
    if (whole.has_values) return;
    const SparseLayout& m = whole.layout;
    const int threads = thread_count(count());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
      const uint32_t first = m.begin[r], size = m.begin[r + 1] - first;
      if (packed) {
        std::copy_n(weight + offsets[m.line[r]], size, &whole.value[first]);
        continue;
      }
      const float* row = weight + static_cast<int64_t>(m.line[r]) * columns;
      for (uint32_t k = first; k < first + size; k++) whole.value[k] = row[m.index[k]];
    }
    whole.has_values = true;
    sample(weight);
  }

  // Values for the batched forward and, if a backward has been here before, for the next one too: the dense weight is
  // read once, row by row, which for a large one costs more than anything done to its survivors.
  void gather(const float* weight, bool forward, bool backward) {
    forward = forward && !panelled.has_values;
    backward = backward && !transposed.has_values;
    if (!forward && !backward) return;
    float* rows_value = panelled.value.get();
    float* columns_value = transposed.value.get();
    const uint32_t survivors = count();
    const int threads = thread_count(survivors);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) {
        if (!packed && k + kAhead < survivors) __builtin_prefetch(weight + position[k + kAhead]);
        const float v = weight[packed ? k : position[k]];
        if (forward) rows_value[panelled_where[k]] = v;
        if (backward) columns_value[where[k]] = v;
      }
    }
    panelled.has_values = panelled.has_values || forward;
    transposed.has_values = transposed.has_values || backward;
    sample(weight);
  }

  void sample(const float* weight) {
    for (size_t i = 0; i < sample_weight.size(); i++) sample_value[i] = weight[sample_weight[i]];
    has_sample = true;
  }

  bool is_zero_off_the_mask(const float* dw) const {
    return std::all_of(sample_dead.begin(), sample_dead.end(), [&](uint64_t i) { return dw[i] == 0; });
  }

  // dw, [rows, columns] or packed, from the survivors' gradients: every element is written, so that fresh or reused
  // memory will do, unless the dead ones are zero already.
  void scatter(const float* compact, float* dw, bool is_zero) const {
    if (packed) {
      const int threads = thread_count(count());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int64_t k = 0; k < count(); k++) dw[k] = compact[where[k]];
      return;
    }
    const auto put = [&](int64_t i, float* target) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) {
        target[position[k]] = compact[where[k]];
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
        for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) scratch[position[k] - first] = compact[where[k]];
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
  const int64_t samples = std::min(kSamples, m.count());
  for (int64_t i = 0; i < samples; i++) {
    const int64_t k = i * m.count() / samples;
    m.sample_weight.push_back(packed ? k : m.position[k]);
  }
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

void MaskedLinearPlan::use_weight(const float* weight, int64_t version, bool same) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  same = same && weight == m.weight && version == m.weight_version;
  for (size_t i = 0; same && m.has_sample && i < m.sample_weight.size(); i++) {
    // Bytes, not values: a NaN is like itself.
    same = std::memcmp(&weight[m.sample_weight[i]], &m.sample_value[i], sizeof(float)) == 0;
  }
  if (same) return;
  m.weight = weight;
  m.weight_version = version;
  m.panelled.has_values = m.whole.has_values = m.transposed.has_values = m.has_sample = false;
}

void MaskedLinearPlan::forward(const float* x, int64_t x_stride, int64_t batch, const float* weight, const float* bias,
                               float* y, int64_t tile) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  if (m.rows == 0 || batch == 0) return;
  const int threads = thread_count(m.count() * batch);
  const Kernels k = kernels(batch);
  if (batch == 1 && m.columns <= kMaxPanel && tile == 0) {
    if (m.whole.layout.blocks == 0) {
      m.build_rows(m.whole, std::min<int64_t>(64, block_for(m.rows)), kMaxPanel, nullptr);
    }
    m.gather_whole(weight);
    kernels(std::numeric_limits<int64_t>::max()).vector({m.whole.layout, x, bias, y, gathers(), threads});
    return;
  }
  if (m.panelled.layout.blocks == 0) m.build_rows(m.panelled, block_for(m.rows), m.panel(), &m.panelled_where);
  m.gather(weight, true, m.transposed.layout.blocks > 0);
  in_tiles(k, batch, tile, [&](int64_t first, int64_t count, int64_t vectors) {
    float* x_tile = workspace.x.reserve(m.columns * vectors * k.width);
    float* y_tile = workspace.y.reserve(m.rows * vectors * k.width);
    k.forward({m.panelled.layout, count, vectors, x + first * x_stride, x_stride, bias, y + first * m.rows, x_tile,
               y_tile, threads});
  });
}

void MaskedLinearPlan::backward(const float* grad, int64_t grad_stride, const float* x, int64_t x_stride, int64_t batch,
                                const float* weight, float* dx, float* dw, float* db, int64_t tile, bool dw_is_zero) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> guard(m.lock);
  const Kernels k = kernels(batch);
  const bool by_rows =
      dw != nullptr && !m.packed && batch > 0 && batch <= kRowTile * k.width && tile == 0 && !m.can_stream(dw);
  if ((dx != nullptr || !by_rows) && m.transposed.layout.blocks == 0) {
    m.build_columns(m.transposed, block_for(m.columns), m.where);
  }
  if (dx != nullptr) m.gather(weight, false, true);
  SparseLayout columns = m.transposed.layout;
  if (dx == nullptr && by_rows) {  // no walk, only packing
    columns = SparseLayout{};
    columns.lines = m.columns;
    columns.minors = m.rows;
  }
  const int threads = thread_count(m.count() * batch);
  float* compact = dw != nullptr && !by_rows ? workspace.dw.reserve(m.count()) : nullptr;
  if (batch == 0) {
    if (dw != nullptr) std::fill_n(compact, m.count(), 0.f);
    if (db != nullptr) std::fill_n(db, m.rows, 0.f);
  }
  in_tiles(k, batch, tile, [&](int64_t first, int64_t count, int64_t vectors) {
    float* x_tile = dw != nullptr ? workspace.x.reserve(m.columns * vectors * k.width) : nullptr;
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
  if (dw != nullptr && !by_rows) m.scatter(compact, dw, dw_is_zero);
}

}  // namespace sl::cpu
