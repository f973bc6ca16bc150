// Exact selection in about one read of the weights:
//
// 1. A sample brackets the key of the last survivor: (low, high].
// 2. One pass writes the mask words of everything above `high` and collects the few keys inside the bracket with their
//    places. It also counts the keys equal to `low`, because a key that many weights share (the zeros of a pruned
//    network) ends up there.
// 3. The last survivor is found exactly among the collected keys, and their bits are set, equal keys in order.
//
// The counts of step 2 are exact, so they say when the sample misled: then histograms narrow the range (as a radix
// select does) until step 2 must succeed. The result is defined by the weights alone: neither the sample, nor the
// number of threads, nor the order in which they come can change a bit.
#include "../global_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../bitmask.h"
#include "global_topk_simd.h"
#include "global_topk_view.h"
#include "isa.h"

namespace sl::cpu {
namespace {

template <class Key>
using Scan = ScanCounts<Key> (*)(const void*, DType, bool, int64_t, const uint32_t*, Key, Key, uint32_t*, uint32_t*);

template <class Key>
Scan<Key> pick_scan() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::topk_scan;
  if (isa() == Isa::kAvx2) return avx2::topk_scan;
#endif
  return portable::topk_scan;
}

constexpr int64_t kSampleItems = 1 << 16,
                  kSampleRun = 16;        // runs of neighbours: a cache line costs the same as a weight
constexpr int64_t kSmall = 1 << 13;       // fewer weights than this are all collected, without a sample
constexpr double kSigmas = 3.5;           // half width of the bracket; a miss costs more passes
constexpr double kCandidateShare = 0.03;  // of the bytes of the weights, for the collected keys
constexpr int64_t kMinCandidates = 1 << 14;
constexpr int kBins = 2048;
constexpr int64_t kLongRow = 8;                                // words; shorter rows are copied to be padded
constexpr int64_t kMaxStretches = kChunkWords / kLongRow + 3;  // of a chunk: its rows, two of them in part, the copy
constexpr int64_t kParallelItems = 1 << 17;                    // below, waking threads costs more than they save

struct Chunk {
  int32_t tensor, words;
  int64_t first_word;
  int64_t place;  // of its first candidate in the arena
  int32_t candidates, ties;
};

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

double weight_of(int32_t key) {
  const uint32_t magnitude = static_cast<uint32_t>(key < 0 ? -key : key);
  float value;
  std::memcpy(&value, &magnitude, 4);
  return key < 0 ? -static_cast<double>(value) : value;
}

double weight_of(int64_t key) {
  const uint64_t magnitude = static_cast<uint64_t>(key < 0 ? -key : key);
  double value;
  std::memcpy(&value, &magnitude, 8);
  return key < 0 ? -value : value;
}

// The keys in (low, high], counted in up to kBins bins of equal width.
template <class Key>
struct Range {
  using Unsigned = std::make_unsigned_t<Key>;
  Key low, high;

  Unsigned width() const { return static_cast<Unsigned>(high) - static_cast<Unsigned>(low); }
  int shift() const {
    int s = 0;
    while ((width() - 1) >> s >= kBins) s++;
    return s;
  }
  bool holds(Key key) const { return low < key && key <= high; }
  int bin(Key key, int shift) const {
    return static_cast<int>((static_cast<Unsigned>(key) - static_cast<Unsigned>(low) - 1) >> shift);
  }
  Range part(int bin, int shift) const {
    const Unsigned from = static_cast<Unsigned>(low) + (static_cast<Unsigned>(bin) << shift);
    const Unsigned left = static_cast<Unsigned>(high) - from, size = Unsigned{1} << shift;
    return {static_cast<Key>(from), static_cast<Key>(from + std::min(left, size))};
  }
};

// Goes down the bins to the one that holds the rank-th largest key, and takes the bins above from the rank.
int find_bin(const std::vector<int64_t>& bins, int64_t* rank) {
  int bin = kBins - 1;
  while (bins[bin] < *rank) *rank -= bins[bin--];
  return bin;
}

template <class Key>
class Selection {
 public:
  Selection(const TopkTensor* tensors, int64_t count, bool by_value) : tensors_(tensors), by_value_(by_value) {
    scan_ = pick_scan<Key>();
    double bytes = 0;
    for (int64_t i = 0; i < count; i++) {
      const Layout l = layout_of(tensors[i]);
      layouts_.push_back(l);
      first_item_.push_back(items_);
      items_ += l.items;
      bytes += static_cast<double>(l.items * item_size(tensors[i].dtype));
      for (int64_t w = 0; w < l.words; w += kChunkWords) {
        const int64_t words = std::min(kChunkWords, l.words - w);
        chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(words), w, 0, 0, 0});
      }
      int64_t eligible = l.items;
      if (tensors[i].eligible) bitmask_count(tensors[i].eligible, l.words, &eligible);
      eligible_ += eligible;
    }
    const int64_t share = static_cast<int64_t>(bytes * kCandidateShare) / static_cast<int64_t>(sizeof(Key) + 2);
    capacity_ = std::min(std::max(kMinCandidates, share), eligible_);
  }

  TopkResult run(int64_t keep) {
    using Traits = KeyTraits<Key>;
    TopkResult result;
    Range<Key> range = {Traits::kHighest, Traits::kHighest};
    if (keep > 0) range = eligible_ <= kSmall ? everything() : bracket(keep);
    keys_.reset(new Key[capacity_]);
    places_.reset(new uint16_t[capacity_]);
    mark(range);
    if (nan_tensor_ < std::numeric_limits<int64_t>::max()) {
      result.nan_tensor = nan_tensor_;
      return result;
    }
    if (keep == 0) {
      result.threshold = std::numeric_limits<double>::infinity();
      return result;
    }
    if (!decided(keep)) {
      if (keep <= above_)
        range = narrow({range.high, Traits::kHighest}, keep);
      else if (keep > above_ + candidates_ + ties_)
        range = narrow({Traits::kLowest, static_cast<Key>(range.low - 1)}, keep - above_ - candidates_ - ties_);
      else if (keep > above_ + candidates_)
        range = {range.low, range.low};
      else
        range = narrow(range, keep - above_);
      mark(range);
    }
    result.threshold =
        weight_of(keep > above_ + candidates_ ? fill_ties(range.low, keep) : fill_candidates(range, keep));
    return result;
  }

 private:
  static Range<Key> everything() { return {KeyTraits<Key>::kLowest, KeyTraits<Key>::kHighest}; }

  // Whether the last pass has collected what decides who survives.
  bool decided(int64_t keep) const {
    return above_ < keep && keep <= above_ + candidates_ + ties_ && candidates_ <= capacity_;
  }

  // A range that holds the keep-th largest key, very likely, and few others.
  Range<Key> bracket(int64_t keep) const {
    // Neighbours are often alike (a row's scale), so the spread is taken from the runs and not only from the items.
    std::vector<Key> sample;
    std::vector<int64_t> run_ends;
    const int64_t runs = std::min(items_ / 16, kSampleItems) / kSampleRun;
    sample.reserve(runs * kSampleRun);
    run_ends.reserve(runs);
    size_t tensor = 0;
    for (int64_t r = 0; r < runs; r++) {
      // One run at a random place in each of `runs` equal stretches of the list.
      const int64_t stretch = items_ / runs;
      const int64_t item = r * stretch + std::min(r, items_ % runs) + static_cast<int64_t>(mix(r) % stretch);
      while (item >= first_item_[tensor] + layouts_[tensor].items) tensor++;
      const TopkTensor& t = tensors_[tensor];
      const Layout& l = layouts_[tensor];
      const int64_t begin = item - first_item_[tensor], row = begin / l.columns, column = begin % l.columns;
      const int64_t end = std::min(column + kSampleRun, l.columns);
      for (int64_t j = column; j < end; j++) {
        if (t.eligible && !(t.eligible[row * l.row_words + j / kWordBits] >> (j % kWordBits) & 1)) continue;
        sample.push_back(key_at<Key>(t.data, t.dtype, by_value_, offset_of(t, row, j)));
      }
      run_ends.push_back(sample.size());
    }
    const int64_t n = sample.size();
    if (n < 64) return everything();
    const double share = (keep - 0.5) / eligible_;
    std::vector<Key> order(sample);
    const auto at = [&order](int64_t rank, int64_t from) {  // the rank-th largest; ranks before `from` are in place
      std::nth_element(order.begin() + from, order.begin() + rank, order.end(), std::greater<Key>());
      return order[rank];
    };
    const int64_t middle = std::min(static_cast<int64_t>(share * n), n - 1);
    const Key pivot = at(middle, 0);
    double variance = 0;
    for (int64_t r = 0, i = 0; r < runs; r++) {
      double over = 0;
      const int64_t begin = i;
      for (; i < run_ends[r]; i++) over += sample[i] > pivot;
      variance += std::pow(over - share * (i - begin), 2);
    }
    const double spread = kSigmas * std::sqrt(std::max(variance, n * share * (1 - share))) + kSigmas;
    const int64_t last = static_cast<int64_t>(std::min(share * n + spread, 4e18));
    const int64_t first = static_cast<int64_t>(share * n - spread);
    Range<Key> range = everything();
    // `order` is split at `middle`: the larger keys lie before it, the smaller ones behind.
    if (last < n) range.low = at(last, middle);
    if (share * n - spread >= 0) {
      std::nth_element(order.begin(), order.begin() + first, order.begin() + middle + 1, std::greater<Key>());
      range.high = order[first];
    }
    return range;
  }

  // Shows the weights of a chunk as whole words: visit(stretch, allowed) for a few stretches of it, in order.
  template <class Visit>
  void view(const Chunk& chunk, Padded& padded, const Visit& visit) const {
    const TopkTensor& t = tensors_[chunk.tensor];
    const Layout& l = layouts_[chunk.tensor];
    const uint32_t* eligible = t.eligible ? t.eligible + chunk.first_word : nullptr;
    const int64_t size = item_size(t.dtype);
    const char* data = static_cast<const char*>(t.data);
    int64_t whole = 0;
    if (l.direct) {
      whole = std::min<int64_t>(chunk.words, l.items / kWordBits - chunk.first_word);
      if (whole) visit(Stretch{data + chunk.first_word * kWordBits * size, 0, whole}, eligible);
    } else if (l.dense && l.row_words >= kLongRow) {
      // A row's last word is read on into the next row, whose weights `allowed` shuts out. The last row has none after
      // it.
      const uint32_t tail = (1u << (l.columns % kWordBits)) - 1;
      const int64_t end = std::min<int64_t>(chunk.words, l.words - l.row_words - chunk.first_word);
      if (!eligible) std::fill(padded.allowed, padded.allowed + kChunkWords, ~0u);
      while (whole < end) {
        const int64_t word = chunk.first_word + whole, row = word / l.row_words, at = word % l.row_words;
        const int64_t run = std::min(l.row_words - at, end - whole);
        if (at + run == l.row_words) padded.allowed[whole + run - 1] = tail;
        visit(Stretch{data + (row * l.columns + at * kWordBits) * size, whole, run},
              (eligible ? eligible : padded.allowed) + whole);
        whole += run;
      }
    }
    if (whole == chunk.words) return;
    const auto fill = size == 2 ? pad<uint16_t> : size == 4 ? pad<uint32_t> : pad<uint64_t>;
    fill(t, l, chunk.first_word + whole, chunk.words - whole, padded);
    visit(Stretch{padded.items, whole, chunk.words - whole}, eligible ? eligible + whole : padded.allowed);
  }

  // Writes the mask words of the keys above range.high; collects those inside; counts those equal to range.low.
  void mark(Range<Key> range) {
    std::atomic<int64_t> used{0};
    int64_t above = 0, candidates = 0, ties = 0, nan_tensor = std::numeric_limits<int64_t>::max();
#pragma omp parallel reduction(+ : above, candidates, ties) reduction(min : nan_tensor) if (items_ >= kParallelItems)
    {
      const std::unique_ptr<Padded> padded(new Padded);
      uint32_t inside[kChunkWords];
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); c++) {
        Chunk& chunk = chunks_[c];
        const TopkTensor& t = tensors_[chunk.tensor];
        Stretch seen[kMaxStretches];
        int stretches = 0;
        chunk.candidates = chunk.ties = 0;
        view(chunk, *padded, [&](const Stretch& s, const uint32_t* allowed) {
          const auto found = scan_(s.data, t.dtype, by_value_, s.words, allowed, range.low, range.high,
                                   t.words + chunk.first_word + s.from, inside + s.from);
          above += found.above;
          chunk.candidates += static_cast<int32_t>(found.candidates);
          chunk.ties += static_cast<int32_t>(found.ties);
          if (found.largest > KeyTraits<Key>::kInfinity) nan_tensor = std::min<int64_t>(nan_tensor, chunk.tensor);
          seen[stretches++] = s;
        });
        candidates += chunk.candidates, ties += chunk.ties;
        if (!chunk.candidates) continue;
        chunk.place = used.fetch_add(chunk.candidates, std::memory_order_relaxed);
        if (chunk.place + chunk.candidates > capacity_) continue;
        int64_t place = chunk.place;
        for (int i = 0; i < stretches; i++) place = collect(seen[i], t.dtype, inside, place);
      }
    }
    above_ = above, candidates_ = candidates, ties_ = ties, nan_tensor_ = nan_tensor;
  }

  // Puts the keys and places of the candidates of a stretch into the arena from `place` on.
  int64_t collect(const Stretch& s, DType dtype, const uint32_t* inside, int64_t place) {
    for (int64_t w = 0; w < s.words; w++) {
      for (uint32_t bits = inside[s.from + w]; bits; bits &= bits - 1) {
        const int64_t i = w * kWordBits + __builtin_ctz(bits);
        keys_[place] = key_at<Key>(s.data, dtype, by_value_, i);
        places_[place++] = static_cast<uint16_t>(s.from * kWordBits + i);
      }
    }
    return place;
  }

  // Narrows a range, in which the rank-th largest key lies, by histograms, until it is one key or its keys fit the
  // arena. One key v comes back as the range (v, v]: all that matters then are the ties.
  Range<Key> narrow(Range<Key> range, int64_t rank) {
    std::vector<int64_t> bins(kBins);
    while (true) {
      const int shift = range.shift();
      std::fill(bins.begin(), bins.end(), 0);
#pragma omp parallel if (items_ >= kParallelItems)
      {
        const std::unique_ptr<Padded> padded(new Padded);
        std::vector<int64_t> mine(kBins, 0);
        uint32_t above[kChunkWords], inside[kChunkWords];
#pragma omp for schedule(dynamic, 4)
        for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); c++) {
          const DType dtype = tensors_[chunks_[c].tensor].dtype;
          view(chunks_[c], *padded, [&](const Stretch& s, const uint32_t* allowed) {
            scan_(s.data, dtype, by_value_, s.words, allowed, range.low, range.high, above, inside);
            for (int64_t w = 0; w < s.words; w++) {
              for (uint32_t bits = inside[w]; bits; bits &= bits - 1) {
                const int64_t i = w * kWordBits + __builtin_ctz(bits);
                mine[range.bin(key_at<Key>(s.data, dtype, by_value_, i), shift)]++;
              }
            }
          });
        }
#pragma omp critical
        for (int b = 0; b < kBins; b++) bins[b] += mine[b];
      }
      const int bin = find_bin(bins, &rank);
      range = range.part(bin, shift);
      if (shift == 0) return {range.high, range.high};
      if (bins[bin] <= capacity_) return range;
    }
  }

  // The last survivor is among the collected keys: finds it, sets the bits of those above and of the first of its
  // equals.
  Key fill_candidates(Range<Key> range, int64_t keep) {
    int64_t rank = keep - above_;
    std::vector<int64_t> bins(kBins);
    for (bool found = false; !found;) {
      const int shift = range.shift();
      std::fill(bins.begin(), bins.end(), 0);
      for (const Chunk& chunk : chunks_) {
        for (int64_t i = chunk.place; i < chunk.place + chunk.candidates; i++) {
          if (range.holds(keys_[i])) bins[range.bin(keys_[i], shift)]++;
        }
      }
      range = range.part(find_bin(bins, &rank), shift);
      found = shift == 0;
    }
    const Key last = range.high;
    set_bits(last, rank);
    return last;
  }

  // Sets the bits of the collected keys above `last` and of the first `equals` that are equal to it.
  void set_bits(Key last, int64_t equals) {
    for (const Chunk& chunk : chunks_) {
      uint32_t* words = tensors_[chunk.tensor].words + chunk.first_word;
      for (int64_t i = chunk.place; i < chunk.place + chunk.candidates; i++) {
        // No branch on the comparison: half of the keys are above, in no order.
        const bool equal = keys_[i] == last;
        const uint32_t survives = (keys_[i] > last) | (equal & (equals > 0));
        equals -= equal;
        words[places_[i] / kWordBits] |= survives << (places_[i] % kWordBits);
      }
    }
  }

  // All collected keys survive, and then the first of those equal to `low`. Only chunks with such survivors are read
  // again.
  Key fill_ties(Key low, int64_t keep) {
    set_bits(low, 0);
    int64_t left = keep - above_ - candidates_;
    std::vector<int64_t> take(chunks_.size());
    for (size_t c = 0; c < chunks_.size(); c++) {
      take[c] = std::min<int64_t>(left, chunks_[c].ties);
      left -= take[c];
    }
#pragma omp parallel if (items_ >= kParallelItems)
    {
      const std::unique_ptr<Padded> padded(new Padded);
      uint32_t above[kChunkWords], ties[kChunkWords];
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); c++) {
        if (!take[c]) continue;
        const TopkTensor& t = tensors_[chunks_[c].tensor];
        view(chunks_[c], *padded, [&](const Stretch& s, const uint32_t* allowed) {
          scan_(s.data, t.dtype, by_value_, s.words, allowed, static_cast<Key>(low - 1), low, above, ties);
          uint32_t* out = t.words + chunks_[c].first_word + s.from;
          for (int64_t w = 0; w < s.words; w++) {
            uint32_t bits = ties[w];
            if (take[c] >= kWordBits) {
              out[w] |= bits;
              take[c] -= __builtin_popcount(bits);
            } else {
              for (; bits && take[c]; bits &= bits - 1, take[c]--) out[w] |= bits & -bits;
            }
          }
        });
      }
    }
    return low;
  }

  const TopkTensor* tensors_;
  bool by_value_;
  Scan<Key> scan_;
  std::vector<Layout> layouts_;
  std::vector<int64_t> first_item_;
  std::vector<Chunk> chunks_;
  int64_t items_ = 0, eligible_ = 0, capacity_ = 0;
  std::unique_ptr<Key[]> keys_;  // the arena: of each candidate its key and its place in its chunk
  std::unique_ptr<uint16_t[]> places_;
  int64_t above_ = 0, candidates_ = 0, ties_ = 0, nan_tensor_ = 0;  // what the last pass counted
};

}  // namespace

TopkResult global_topk(const TopkTensor* tensors, int64_t count, int64_t keep, bool by_value) {
  bool wide = false;
  for (int64_t i = 0; i < count; i++) wide = wide || tensors[i].dtype == DType::kFloat64;
  if (wide) return Selection<int64_t>(tensors, count, by_value).run(keep);
  return Selection<int32_t>(tensors, count, by_value).run(keep);
}

}  // namespace sl::cpu
