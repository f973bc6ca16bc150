// Runs CUDA kernels on the host, so that csrc/cuda/*.cu can be executed and checked on a machine without a GPU:
//
//     g++ -std=c++20 -DHOST_CUDA -Icsrc -Itests/host_cuda -x c++ csrc/cuda/bitmask.cu ...
//
// A block runs with one host thread (HOST_CUDA_THREADS: for ThreadSanitizer, which then sees a missing barrier as a
// data race) or one fiber (the default: a barrier costs a few nanoseconds, so millions of weights are affordable) per
// CUDA thread; blocks run one after another. Barriers, shuffles, votes, atomics, static and dynamic shared memory are
// real. Shared memory is filled with garbage before each block. What would be undefined on a GPU is an error here:
// lanes of a warp that meet different collectives, a barrier that part of a block never reaches, a partial lane mask.
//
// Asynchronous copies happen when they are waited for, not before. Tensor-core instructions take and give the fragments
// of the PTX manual.
//
// Not covered: memory that is visible too late between blocks (they run in order).
#pragma once
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#ifdef HOST_CUDA_THREADS
#include <unistd.h>

#include <barrier>
#include <csignal>
#include <thread>
#define HOST_CUDA_LOCAL thread_local
#else
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#define HOST_CUDA_LOCAL
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// Blocks run one at a time, so a static is shared by exactly the threads of a block. Kernels must lie in an unnamed
// namespace: a named section cannot hold both plain and merged (inline, template) variables.
#define __shared__ static __attribute__((section("host_cuda_shared")))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(host_cuda::block->dynamic.data())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline HOST_CUDA_LOCAL dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" __attribute__((weak, visibility("hidden"))) char __start_host_cuda_shared[], __stop_host_cuda_shared[];

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr int kMultiprocessors = 1;  // small, so that grid-stride loops go round more than once
constexpr int kSharedBytes = 227 * 1024;
constexpr unsigned kTimeout = 120;  // seconds a launch may take with real threads before it counts as hung
constexpr unsigned char kGarbage = 0xa5;

inline HOST_CUDA_LOCAL unsigned thread_id = 0;
// Several exchanges of a warp alternate between two sets of slots, so each needs one barrier: nobody can be two ahead.
inline HOST_CUDA_LOCAL unsigned turn = 0;

// ---- how the threads of a block wait for each other ----

#ifdef HOST_CUDA_THREADS

// Orders memory like __syncthreads and __syncwarp, or, with `relaxed`, not at all, like a shuffle or a vote: a kernel
// that leans on one of those instead of a barrier has a data race then, as it has on a GPU.
struct Barrier {
  unsigned parties;
  std::atomic<unsigned> arrived{0}, round{0};
  explicit Barrier(unsigned parties_) : parties(parties_) {}
  void wait(bool relaxed = false) {
    const unsigned now = round.load(std::memory_order_relaxed);
    const auto both = relaxed ? std::memory_order_relaxed : std::memory_order_acq_rel;
    if (arrived.fetch_add(1, both) + 1 == parties) {
      arrived.store(0, std::memory_order_relaxed);
      round.fetch_add(1, both);
    } else {
      while (round.load(relaxed ? std::memory_order_relaxed : std::memory_order_acquire) == now)
        std::this_thread::yield();
    }
  }
};

#else

struct Fiber {
  ucontext_t begin{};
  jmp_buf at;
  bool started = false;
  unsigned id = 0, turn = 0;
  dim3 index;
  std::unique_ptr<char[]> stack;
};

inline jmp_buf scheduler;
inline Fiber* running = nullptr;
inline std::deque<Fiber*> ready;
inline unsigned finished = 0;
inline bool reversed = false;  // which of the waiting threads goes on first
inline const std::function<void()>* body = nullptr;

inline void suspend() {
  if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    (*body)();
    ++finished;
    suspend();
  }
}

inline void resume(Fiber* fiber) {
  running = fiber;
  thread_id = fiber->id;
  threadIdx = fiber->index;
  turn = fiber->turn;
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->at, 1);
    fiber->started = true;
    setcontext(&fiber->begin);
  }
  running->turn = turn;
}

struct Barrier {
  unsigned parties;
  std::vector<Fiber*> waiting;
  explicit Barrier(unsigned parties_) : parties(parties_) {}
  void wait(bool = false) {
    waiting.push_back(running);
    if (waiting.size() == parties) {
      if (reversed) {
        ready.insert(ready.end(), waiting.rbegin(), waiting.rend());
      } else {
        ready.insert(ready.end(), waiting.begin(), waiting.end());
      }
      waiting.clear();
    }
    suspend();
  }
};

#endif

struct Warp {
  Barrier barrier{kWarp};
  std::atomic<uint64_t> slots[2][kWarp];
  std::atomic<int> collective[2][kWarp];
};

// Asynchronous copies of a thread: committed groups that nobody waited for yet, and the group that is open.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Copies {
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<char> dynamic;
  std::vector<Copies> copies;  // of each thread
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), dynamic(shared_bytes + 1), copies(threads) {
    for (unsigned w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Warp>());
  }
  void dirty() {
    for (Copies& left : copies) left = {};
    std::memset(dynamic.data(), kGarbage, dynamic.size());
    if (__start_host_cuda_shared != nullptr) {
      std::memset(__start_host_cuda_shared, kGarbage,
                  static_cast<size_t>(__stop_host_cuda_shared - __start_host_cuda_shared));
    }
  }
};

inline Block* block = nullptr;

// ---- launch ----

#ifdef HOST_CUDA_THREADS

// A hang must fail the test that caused it, and nothing can be unwound from a thread that waits forever.
[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "host_cuda: %s\n", message);
  std::_Exit(86);
}

inline void hung(int) {
  const char message[] = "host_cuda: a kernel hangs: some threads wait at a barrier that others never reach\n";
  if (write(2, message, sizeof(message) - 1) < 0) {
  }
  _exit(86);
}

inline void run(dim3 grid, dim3 threads, unsigned count, const std::function<void()>& kernel) {
  std::barrier<> begin(count + 1), end(count + 1);
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < count; ++t) {
    pool.emplace_back([&, t] {
      thread_id = t;
      threadIdx = dim3(t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y));
      blockDim = threads;
      gridDim = grid;
      for (uint64_t b = 0; b < uint64_t{grid.x} * grid.y * grid.z; ++b) {
        begin.arrive_and_wait();
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        kernel();
        end.arrive_and_wait();
      }
    });
  }
  std::signal(SIGALRM, hung);
  alarm(kTimeout);
  for (uint64_t b = 0; b < uint64_t{grid.x} * grid.y * grid.z; ++b) {
    block->dirty();
    begin.arrive_and_wait();
    end.arrive_and_wait();
  }
  for (auto& thread : pool) thread.join();
  alarm(0);
}

#else

[[noreturn]] inline void fail(const char* message);

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::string failure;

inline void run(dim3 grid, dim3 threads, unsigned count, const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber->begin);
    fiber->begin.uc_stack.ss_sp = fiber->stack.get();
    fiber->begin.uc_stack.ss_size = kStack;
    fiber->begin.uc_link = nullptr;
    makecontext(&fiber->begin, live, 0);
    fibers.push_back(std::move(fiber));
  }
  body = &kernel;
  blockDim = threads;
  gridDim = grid;
  for (uint64_t b = 0; b < uint64_t{grid.x} * grid.y * grid.z; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    block->dirty();
    finished = 0;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = reversed ? count - 1 - i : i;
      fibers[t]->id = t;
      fibers[t]->turn = 0;
      fibers[t]->index = dim3(t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y));
      ready.push_back(fibers[t].get());
    }
    while (!ready.empty() && failure.empty()) {
      Fiber* next = ready.front();
      ready.pop_front();
      resume(next);
    }
    if (failure.empty() && finished != count) {
      failure = "a kernel hangs: " + std::to_string(count - finished) + " of " + std::to_string(count) +
                " threads wait at a barrier that the others never reach";
    }
    if (!failure.empty()) {
      fibers.clear();  // they stand in the middle of a kernel and can't be used again
      ready.clear();
      throw std::runtime_error("host_cuda: " + std::exchange(failure, {}));
    }
  }
}

[[noreturn]] inline void fail(const char* message) {
  failure = message;  // run() throws it: an exception can't leave a fiber
  suspend();
  std::abort();
}

#endif

// While there is one, launches and memsets are kept in it instead of done: a CUDA graph that is being captured.
using Graph = std::vector<std::function<void()>>;
inline Graph* capture = nullptr;

inline void now_or_later(std::function<void()> work) {
  if (capture != nullptr) {
    capture->push_back(std::move(work));
  } else {
    work();
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared_bytes, Args... args) {
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count % kWarp != 0) throw std::invalid_argument("host_cuda: a block must be whole warps");
  if (count > 1024 || uint64_t{grid.x} * grid.y * grid.z == 0)
    throw std::invalid_argument("host_cuda: invalid grid or block");
  now_or_later([=] {
    Block state(count, shared_bytes);
    block = &state;
    run(grid, threads, count, [&] { kernel(args...); });
    block = nullptr;
  });
}

// ---- collectives ----

// HOST_CUDA_DROP_BARRIER=file.cu:LINE takes one barrier out of a kernel, to see that the tests notice.
inline bool dropped(const std::source_location& where) {
  static const std::string site = [] {
    const char* value = std::getenv("HOST_CUDA_DROP_BARRIER");
    return std::string(value == nullptr ? "" : value);
  }();
  if (site.empty()) return false;
  const std::string here = std::string(where.file_name()) + ":" + std::to_string(where.line());
  return here.ends_with("/" + site);
}

inline Warp& warp() { return *block->warps[thread_id / kWarp]; }
inline unsigned lane() { return thread_id % kWarp; }

enum Collective : int { kShuffle, kVote, kSyncWarp, kMatrix };

// Every lane gives a value; afterwards all of them are in the returned slots.
inline const std::atomic<uint64_t>* gather(Collective kind, unsigned mask, uint64_t value) {
  if (mask != ~0u) fail("a warp collective with a partial lane mask");
  Warp& w = warp();
  const unsigned set = turn++ % 2;
  w.slots[set][lane()].store(value, std::memory_order_relaxed);
  w.collective[set][lane()].store(kind, std::memory_order_relaxed);
  w.barrier.wait(kind != kSyncWarp);
  for (const auto& other : w.collective[set]) {
    if (other.load(std::memory_order_relaxed) != kind) fail("lanes of one warp met different collectives");
  }
  return w.slots[set];
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  raw = gather(kShuffle, mask, raw)[source % kWarp].load(std::memory_order_relaxed);
  std::memcpy(&value, &raw, sizeof(T));
  return value;
}

}  // namespace host_cuda

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  if (!host_cuda::dropped(where)) host_cuda::block->barrier.wait();
}
inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  if (!host_cuda::dropped(where)) host_cuda::gather(host_cuda::kSyncWarp, mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return host_cuda::shuffle(mask, value, host_cuda::lane() / width * width + unsigned(source) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  return host_cuda::shuffle(mask, value, host_cuda::lane() ^ unsigned(bits));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned l = host_cuda::lane();
  return host_cuda::shuffle(mask, value, l % width < by ? l : l - by);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned l = host_cuda::lane();
  return host_cuda::shuffle(mask, value, l % width + by >= unsigned(width) ? l : l + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* votes = host_cuda::gather(host_cuda::kVote, mask, predicate != 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= unsigned(votes[i].load(std::memory_order_relaxed)) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

// ---- scalar functions, and atomics, which order nothing ----

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(unsigned(v)) + 1; }
inline int __clz(int v) { return std::countl_zero(unsigned(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}  // blocks run one after another

template <class T>
T atomicAdd(T* p, T v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* p, T v) {
  return std::atomic_ref<T>(*p).fetch_or(v, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* p, T v) {
  return std::atomic_ref<T>(*p).exchange(v, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  std::atomic_ref<T>(*p).compare_exchange_strong(expected, v, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMin(T* p, T v) {
  std::atomic_ref<T> at(*p);
  T old = at.load(std::memory_order_relaxed);
  while (v < old && !at.compare_exchange_weak(old, v, std::memory_order_relaxed)) {
  }
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  std::atomic_ref<T> at(*p);
  T old = at.load(std::memory_order_relaxed);
  while (v > old && !at.compare_exchange_weak(old, v, std::memory_order_relaxed)) {
  }
  return old;
}

// ---- the few calls of the runtime that csrc/cuda makes; none copies to the host or waits, so nothing there can ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? host_cuda::kMultiprocessors : host_cuda::kSharedBytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  host_cuda::now_or_later([=] { std::memset(pointer, value, bytes); });
  return cudaSuccess;
}
