// What a Network (network.cpp) consists of, in which order its layers run, and where its activations lie.
#pragma once
#include <omp.h>

#include <algorithm>
#include <vector>

#include "isa.h"
#include "network_layers.h"

namespace sl::cpu {

constexpr int64_t kParallelWork = 1 << 22;  // multiply-adds of a stage below which waking threads costs more

// What lies between two layers: an activation and its gradient.
struct Node {
  Extent extent;
  Space activation, gradient;
};

struct Step {
  int64_t layer, from, to;  // nodes
  bool relu;
};

// Steps [first, last) that a group passes at once, or one step that takes a tile.
struct Stage {
  int64_t first, last;
  bool tiles;
  int64_t work;  // multiply-adds forward for one example
};

struct Plan {
  std::vector<Step> steps;
  std::vector<Stage> stages;
  std::vector<char> inside;  // by node: written and read within one stage, so that threads reuse one group's memory
};

// Every node's activation (or gradient), with room for `slots` groups each, in one array: large enough for huge pages,
// without which a layer that reads features in no order misses the translation cache.
struct Memory {
  Array<float> all;
  std::vector<float*> node;  // null: none
  std::vector<int64_t> slots;
};

// A batch, or part of one, in groups.
struct Chunk {
  int64_t count, groups, width;

  int64_t tile(int64_t group) const { return std::min(kTile, groups - group / kTile * kTile); }
  int64_t examples(int64_t group) const { return std::min(width, count - group * width); }
  // Parts of the batch whose gradients are summed apart: not a function of the number of threads.
  int64_t shares() const { return std::min(groups, kShares); }
};

struct Blueprint {
  NetworkKernels k;
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<Node> nodes;  // layers + 1
  Plan learning, inference;
  bool wants_dx = false;

  // trains: the last activation must be one that losses can be computed from. Throws std::invalid_argument.
  void build(Extent input, const std::vector<NetworkLayer>& all, bool trains, double linear_densest,
             double conv_densest);

  const Extent& outputs() const { return nodes.back().extent; }
  int64_t classes() const { return outputs().channels * outputs().height * outputs().width; }
  int64_t last_node() const { return static_cast<int64_t>(nodes.size()) - 1; }
  int64_t values(int64_t node) const {
    const Extent& e = nodes[node].extent;
    return e.channels * e.height * e.width;
  }
  // A stage's multiply-adds forward for one example; pooling and the like cost something, too.
  int64_t work(const Plan& plan, const Stage& stage) const { return stage.work + values(plan.steps[stage.first].from); }

  // slots: groups of a chunk; private_slots: threads.
  void reserve(Memory& m, int64_t slots, int64_t private_slots, const std::vector<char>& inside, bool gradients) const;
  // group: in the whole chunk; slot: where a node inside a stage has it.
  View view(const Memory& m, int64_t node, bool gradient, const Extent& extent, int64_t group, int64_t slot,
            int64_t tile) const;

  Chunk chunk(int64_t count) const { return {count, (count + k.width - 1) / k.width, k.width}; }
  int thread_count(const Chunk& c, int64_t work) const {
    if (omp_in_parallel() || work * c.count < kParallelWork) return 1;
    return static_cast<int>(private_slots(c));
  }
  int64_t private_slots(const Chunk& c) const {
    return std::max<int64_t>(1, std::min<int64_t>(max_threads(), c.shares()));
  }

  // Calls f(group, share, thread) for all groups. work: multiply-adds for one example.
  template <class F>
  void for_groups(const Chunk& c, int64_t work, F f) const {
    const int64_t shares = c.shares();
    const int threads = thread_count(c, work);
    const auto run = [&](int64_t share, int thread) {
      for (int64_t g = share * c.groups / shares; g < (share + 1) * c.groups / shares; g++) f(g, share, thread);
    };
    if (threads == 1) {  // a team of one costs a microsecond
      for (int64_t share = 0; share < shares; share++) run(share, 0);
      return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t share = 0; share < shares; share++) run(share, omp_get_thread_num());
  }

  Blueprint();

 private:
  void add(std::unique_ptr<Layer> layer, int64_t index, Node& at, bool& flattened);
  void plan(Plan& plan, bool folds) const;
};

}  // namespace sl::cpu
