// Unstructured sparse convolution on CPU.
//
// Images are copied into planes: one plane per channel, rows one behind the other, the zeros of the padding between
// them. In such a plane a filter tap is a constant distance, so that a survivor is one multiply-add per vector of
// consecutive pixels, whatever the width of the image. A stride splits a channel into one plane per phase (row and
// column modulo the stride), within which the convolution has stride 1. Positions between the rows are computed and
// thrown away.
//
//   y[o, p] = sum over survivors (o, plane, tap) of W * x[plane, p + distance(tap)]
//
// The gradients walk over the planes of x and read each dY once for both: dX sums W * dY, dW sums x * dY.
#include "../masked_conv2d.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "../common.h"
#include "isa.h"
#include "masked_conv2d_simd.h"

SL_CONV_LOOPS(portable)
#if defined(__x86_64__)
SL_CONV_LOOPS(avx2)
SL_CONV_LOOPS(avx512)
#endif

namespace sl::cpu {
namespace {

constexpr int64_t kVector = 16;             // floats; planes are multiples of it
constexpr int64_t kScratch = 1024 * 1024;   // bytes of planes that a core keeps in its cache
constexpr int64_t kPanel = 24 * 1024;       // bytes of planes that stay in the first cache
constexpr int64_t kPanelPixels = 128;       // pixels that the loops take at a time
constexpr int64_t kPanelWork = 24;          // survivors of a row in a panel that pay for a second look at the row
constexpr int64_t kLength = 512;            // pixels of a plane that fill the vectors well
constexpr int64_t kShares = 16;             // parts that a batch is dealt out in, whatever the number of threads
constexpr int64_t kMaxScratch = 1LL << 32;  // distances are 32-bit numbers of bytes

struct Loops {
  decltype(&portable::conv_copy) copy;
  decltype(&portable::conv_product) product;
  decltype(&portable::conv_gradients) gradients;
  decltype(&portable::conv_sum) sum;
};

Loops loops() {
#define SL_USE(ISA)                                                       \
  {                                                                       \
    ISA::conv_copy, ISA::conv_product, ISA::conv_gradients, ISA::conv_sum \
  }
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return SL_USE(avx512);
  if (isa() == Isa::kAvx2) return SL_USE(avx2);
#endif
  return SL_USE(portable);
#undef SL_USE
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t divide_up(int64_t n, int64_t d) { return n <= 0 ? 0 : (n + d - 1) / d; }  // 0 for what lies before the image

// One direction of the planes.
struct Grid : ConvAxis {
  int64_t output, reach, extent, pitch;

  explicit Grid(const ConvAxis& axis) : ConvAxis(axis) {
    stride = std::min(stride, input + 2 * padding);  // beyond there is one output whatever it is; phases are counted
    output = (input + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    reach = dilation * (kernel - 1) / stride;
    extent = output + reach;
    // Zeros at the end of one row that can be those at the start of the next.
    const int64_t lead = padding / stride, trail = std::max<int64_t>(0, extent - divide_up(input + padding, stride));
    pitch = std::max(output, extent - std::min(lead, trail));
  }
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t distance(int64_t tap) const { return tap * dilation / stride; }
  // Of a phase: the places [begin, end) of a row that hold pixels, and the first such pixel.
  int64_t begin(int64_t phase) const { return std::min(divide_up(padding - phase, stride), extent); }
  int64_t end(int64_t phase) const { return std::min(extent, divide_up(input + padding - phase, stride)); }
  int64_t pixel(int64_t phase) const { return begin(phase) * stride + phase - padding; }
  // Every pixel of the image lies in a plane of phase `phase` or in another's.
  bool covers() const { return stride == 1 && end(0) - begin(0) == input; }
};

struct Plane {  // with at least one survivor
  int64_t channel, row_phase, column_phase;
};

// Scratch planes, one lot for each thread. Allocated by the caller: an exception must not leave a parallel region.
class Scratch {
 public:
  Scratch(int64_t threads, int64_t floats) : floats_(round_up(floats, kVector)) {
    data_ = static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(threads * floats_ * sizeof(float), 64)));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* of(int64_t thread) { return data_ + thread * floats_; }
  void clear(int64_t thread) { std::memset(of(thread), 0, floats_ * sizeof(float)); }

 private:
  int64_t floats_;
  float* data_;
};

}  // namespace

struct ConvPlan::Parts {
  int64_t out, channels, groups;
  Grid rows, columns;
  int64_t image;  // floats from one image of a plane to the next
  int64_t reach;  // the longest distance of a tap
  std::vector<Plane> planes;
  // Survivors by filter (as in the weight) and by plane. `tap` is the distance within a plane.
  struct Survivor {
    int64_t weight;
    int32_t filter, plane;
    int64_t tap;
  };
  std::vector<Survivor> survivors, by_plane;
  std::vector<int64_t> filter_first, plane_first;
  int64_t filter_panels, plane_panels;

  Parts(int64_t out, int64_t channels, int64_t groups, ConvAxis r, ConvAxis c)
      : out(out), channels(channels), groups(groups), rows(r), columns(c) {
    image = rows.pitch * columns.pitch;
    reach = rows.reach * columns.pitch + columns.reach;
  }

  int64_t plane_count() const { return static_cast<int64_t>(planes.size()); }
  // Floats of `images` images: from the first output to the last, and the same for inputs.
  int64_t output_length(int64_t images) const {
    return (images - 1) * image + (rows.output - 1) * columns.pitch + columns.output;
  }
  int64_t input_stride(int64_t images) const { return round_up(output_length(images) + reach, kVector); }
  int64_t output_stride(int64_t images) const { return round_up(output_length(images), kVector); }
  // Planes of dY have zeros on both sides: a tap may look before the first output and behind the last.
  int64_t margin() const { return round_up(reach, kVector); }
  int64_t grad_stride(int64_t images) const { return margin() + input_stride(images) + kVector; }

  int64_t bytes(int64_t images) const {
    return (2 * plane_count() * input_stride(images) + out * grad_stride(images)) * static_cast<int64_t>(sizeof(float));
  }

  // How many images share a plane: enough to fill vectors, no more than the cache holds, and two lots or more. Not a
  // function of the number of threads, so that sums over the batch round alike for any.
  int64_t lot(int64_t batch) const {
    int64_t images = std::max(batch / (2 * kShares), kLength / image);
    images = std::max<int64_t>(1, std::min(images, batch / 2));
    while (images > 1 && bytes(images) > kScratch) images--;
    return images;
  }

  void read(const int32_t* words, int64_t taps_h, int64_t taps_w) {
    const int64_t group_channels = channels / groups, taps = taps_h * taps_w, width = group_channels * taps;
    const int64_t row_words = words_per_row(width), phases = rows.stride * columns.stride;
    std::vector<int32_t> plane_of(channels * phases, -1);
    for (int64_t o = 0; o < out; o++) {
      for (int64_t w = 0; w < row_words; w++) {
        for (uint32_t bits = static_cast<uint32_t>(words[o * row_words + w]); bits; bits &= bits - 1) {
          const int64_t column = w * kWordBits + __builtin_ctz(bits), tap = column % taps;
          const int64_t channel = o / (out / groups) * group_channels + column / taps;
          const int64_t r = tap / taps_w, s = tap % taps_w;
          const int64_t slot = channel * phases + rows.phase(r) * columns.stride + columns.phase(s);
          plane_of[slot] = 0;
          survivors.push_back({o * width + column, static_cast<int32_t>(o), static_cast<int32_t>(slot),
                               rows.distance(r) * columns.pitch + columns.distance(s)});
        }
      }
    }
    for (int64_t slot = 0; slot < channels * phases; slot++) {
      if (plane_of[slot] < 0) continue;
      plane_of[slot] = static_cast<int32_t>(planes.size());
      planes.push_back({slot / phases, slot % phases / columns.stride, slot % columns.stride});
    }
    for (Survivor& s : survivors) s.plane = plane_of[s.plane];
    by_plane = survivors;
    filter_panels = sort(survivors, filter_first, out, plane_count(),
                         [](const Survivor& s) { return std::make_pair<int64_t, int64_t>(s.filter, s.plane); });
    plane_panels = sort(by_plane, plane_first, plane_count(), out,
                        [](const Survivor& s) { return std::make_pair<int64_t, int64_t>(s.plane, s.filter); });
  }

  // Puts the survivors, each in a (row, source), in the order (panel of the source, row), otherwise as they were.
  // Returns the number of panels: few enough that a row has some work in each.
  template <class Place>
  int64_t sort(std::vector<Survivor>& list, std::vector<int64_t>& first, int64_t rows, int64_t sources,
               Place place) const {
    const int64_t work = static_cast<int64_t>(list.size()) / std::max<int64_t>(1, rows * kPanelWork);
    const int64_t span = kPanelPixels + std::min(reach, 2 * kPanelPixels);  // floats of a source that a block looks at
    const int64_t panels =
        std::max<int64_t>(1, std::min(work, sources * span * static_cast<int64_t>(sizeof(float)) / kPanel));
    const auto slot = [&](const Survivor& s) {
      const auto [row, source] = place(s);
      return source * panels / sources * rows + row;
    };
    first.assign(panels * rows + 1, 0);
    for (const Survivor& s : list) first[slot(s) + 1]++;
    for (size_t i = 1; i < first.size(); i++) first[i] += first[i - 1];
    std::vector<int64_t> next(first.begin(), first.end());
    std::vector<Survivor> sorted(list.size());
    for (const Survivor& s : list) sorted[next[slot(s)]++] = s;
    list.swap(sorted);
    return panels;
  }

  // Copies pixels into planes (load) or back; zeros between them stay.
  void load_inputs(const Loops& loop, const ConvView& x, int64_t n, int64_t images, float* to, int64_t stride) const {
    for (int64_t p = 0; p < plane_count(); p++) {
      const Plane& plane = planes[p];
      const int64_t top = rows.begin(plane.row_phase), left = columns.begin(plane.column_phase);
      const int64_t height = rows.end(plane.row_phase) - top, width = columns.end(plane.column_phase) - left;
      const float* from = x.data + n * x.stride[0] + plane.channel * x.stride[1] +
                          rows.pixel(plane.row_phase) * x.stride[2] + columns.pixel(plane.column_phase) * x.stride[3];
      for (int64_t i = 0; i < images; i++) {
        loop.copy(height, width, from + i * x.stride[0], rows.stride * x.stride[2], columns.stride * x.stride[3],
                  to + p * stride + i * image + top * columns.pitch + left, columns.pitch, 1);
      }
    }
  }

  void store_inputs(const Loops& loop, const float* from, int64_t stride, int64_t n, int64_t images, float* dx) const {
    const int64_t pixels = rows.input * columns.input;
    float* base = dx + n * channels * pixels;
    const bool complete = rows.covers() && columns.covers() && plane_count() == channels;
    if (!complete) std::memset(base, 0, images * channels * pixels * sizeof(float));
    for (int64_t p = 0; p < plane_count(); p++) {
      const Plane& plane = planes[p];
      const int64_t top = rows.begin(plane.row_phase), left = columns.begin(plane.column_phase);
      const int64_t height = rows.end(plane.row_phase) - top, width = columns.end(plane.column_phase) - left;
      float* to = base + plane.channel * pixels + rows.pixel(plane.row_phase) * columns.input +
                  columns.pixel(plane.column_phase);
      for (int64_t i = 0; i < images; i++) {
        loop.copy(height, width, from + p * stride + i * image + top * columns.pitch + left, columns.pitch, 1,
                  to + i * channels * pixels, rows.stride * columns.input, columns.stride);
      }
    }
  }

  void load_grads(const Loops& loop, const ConvView& grad, int64_t n, int64_t images, float* to, int64_t stride) const {
    for (int64_t o = 0; o < out; o++) {
      for (int64_t i = 0; i < images; i++) {
        loop.copy(rows.output, columns.output, grad.data + (n + i) * grad.stride[0] + o * grad.stride[1],
                  grad.stride[2], grad.stride[3], to + o * stride + i * image, columns.pitch, 1);
      }
    }
  }

  void store_outputs(const Loops& loop, const float* from, int64_t stride, int64_t n, int64_t images, float* y) const {
    const int64_t pixels = rows.output * columns.output;
    for (int64_t o = 0; o < out; o++) {
      for (int64_t i = 0; i < images; i++) {
        loop.copy(rows.output, columns.output, from + o * stride + i * image, columns.pitch, 1,
                  y + ((n + i) * out + o) * pixels, columns.output, 1);
      }
    }
  }
};

ConvPlan::ConvPlan(const int32_t* words, int64_t out, int64_t channels, int64_t groups, ConvAxis rows, ConvAxis columns)
    : parts(std::make_unique<Parts>(out, channels, groups, rows, columns)) {
  parts->read(words, rows.kernel, columns.kernel);
  if (parts->bytes(1) >= kMaxScratch) throw std::invalid_argument("x: expected images of less than 4 GiB with padding");
}

ConvPlan::~ConvPlan() = default;

int64_t ConvPlan::survivors() const { return static_cast<int64_t>(parts->survivors.size()); }

void masked_conv2d_forward(const ConvPlan& plan, int64_t batch, ConvView x, const float* weight, const float* bias,
                           float* y) {
  const ConvPlan::Parts& part = *plan.parts;
  const Loops loop = loops();
  const int64_t lot = part.lot(batch), lots = divide_up(batch, lot);
  if (!lots || !part.out) return;
  const int64_t x_stride = part.input_stride(lot), y_stride = part.output_stride(lot);
  std::vector<float> value;
  std::vector<uint32_t> offset;
  value.reserve(part.survivors.size());
  offset.reserve(part.survivors.size());
  for (const auto& s : part.survivors) {
    value.push_back(weight[s.weight]);
    offset.push_back(static_cast<uint32_t>((s.plane * x_stride + s.tap) * sizeof(float)));
  }
  const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), lots));
  // The last vector of the last plane may look `reach` behind its end.
  Scratch inputs(threads, part.plane_count() * x_stride + part.reach + kVector), outputs(threads, part.out * y_stride);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    float *in = inputs.of(thread), *result = outputs.of(thread);
    inputs.clear(thread);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < lots; i++) {
      const int64_t n = i * lot, images = std::min(lot, batch - n);
      part.load_inputs(loop, x, n, images, in, x_stride);
      loop.product(part.filter_panels, part.out, part.filter_first.data(), offset.data(), value.data(), bias, in,
                   result, y_stride, part.output_length(images));
      part.store_outputs(loop, result, y_stride, n, images, y);
    }
  }
}

void masked_conv2d_backward(const ConvPlan& plan, int64_t batch, ConvView grad, ConvView x, const float* weight,
                            float* dx, float* dweight, float* dbias) {
  const ConvPlan::Parts& part = *plan.parts;
  const Loops loop = loops();
  const int64_t lot = part.lot(batch), lots = divide_up(batch, lot), shares = std::min(lots, kShares);
  const int64_t x_stride = part.input_stride(lot), y_stride = part.grad_stride(lot), margin = part.margin();
  const int64_t survivors = plan.survivors();
  std::vector<float> value;
  std::vector<uint32_t> offset;
  value.reserve(survivors);
  offset.reserve(survivors);
  for (const auto& s : part.by_plane) {
    value.push_back(weight[s.weight]);
    offset.push_back(static_cast<uint32_t>((s.filter * y_stride + margin - s.tap) * sizeof(float)));
  }
  // Each share of the batch has sums of its own, added up in order at the end.
  std::vector<float> dw(dweight ? shares * survivors : 0), db(dbias ? shares * part.out : 0);
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), shares)));
  Scratch grads(threads, part.out * y_stride), inputs(threads, dweight ? part.plane_count() * x_stride : 0),
      results(threads, dx ? part.plane_count() * x_stride : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    float *dy = grads.of(thread), *in = inputs.of(thread), *back = results.of(thread);
    grads.clear(thread);
    inputs.clear(thread);
#pragma omp for schedule(static)
    for (int64_t share = 0; share < shares; share++) {
      for (int64_t i = lots * share / shares; i < lots * (share + 1) / shares; i++) {
        const int64_t n = i * lot, images = std::min(lot, batch - n);
        if (images < lot) grads.clear(thread);  // of the images before
        part.load_grads(loop, grad, n, images, dy + margin, y_stride);
        if (dbias) {
          for (int64_t o = 0; o < part.out; o++) {
            db[share * part.out + o] += loop.sum(dy + o * y_stride + margin, part.output_length(images));
          }
        }
        if (!dx && !dweight) continue;
        if (dweight) part.load_inputs(loop, x, n, images, in, x_stride);
        loop.gradients(part.plane_panels, part.plane_count(), part.plane_first.data(), offset.data(), value.data(), dy,
                       in, dx ? back : nullptr, x_stride, dweight ? dw.data() + share * survivors : nullptr,
                       part.output_length(images) + part.reach);
        if (dx) part.store_inputs(loop, back, x_stride, n, images, dx);
      }
    }
  }
  if (dweight) {
    const int64_t width = part.channels / part.groups * part.rows.kernel * part.columns.kernel;
    std::memset(dweight, 0, part.out * width * sizeof(float));
    for (int64_t k = 0; k < survivors; k++) {
      float sum = 0;
      for (int64_t share = 0; share < shares; share++) sum += dw[share * survivors + k];
      dweight[part.by_plane[k].weight] = sum;
    }
  }
  if (dbias) {
    for (int64_t o = 0; o < part.out; o++) {
      float sum = 0;
      for (int64_t share = 0; share < shares; share++) sum += db[share * part.out + o];
      dbias[o] = sum;
    }
  }
}

}  // namespace sl::cpu
