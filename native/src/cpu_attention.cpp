#include "tiermem/cpu_attention.h"

#include <atomic>
#include <algorithm>
#include <cmath>
#include <mutex>
#include <numbers>
#include <stdexcept>
#include <string>

#include "amx_support.h"
#include "attention_kernel.h"
#include "attention_plan.h"
#include "tiermem/worker_team.h"

namespace tiermem {
namespace {

const AttentionKernel* kernel_for(AttentionInstructions instructions) noexcept {
  switch (instructions) {
    case AttentionInstructions::automatic:
      if (const auto* tiles = kernel_for(AttentionInstructions::amx)) return tiles;
      if (const auto* wide = kernel_for(AttentionInstructions::avx512)) return wide;
      if (const auto* wide = kernel_for(AttentionInstructions::avx2)) return wide;
      return &kPortableAttention;
    case AttentionInstructions::portable:
      return &kPortableAttention;
#if defined(__x86_64__)
    case AttentionInstructions::avx2: {
      const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("f16c");
      return has ? &kAvx2Attention : nullptr;
    }
    case AttentionInstructions::avx512:
      return __builtin_cpu_supports("avx512f") ? &kAvx512Attention : nullptr;
    case AttentionInstructions::amx:
#if defined(TIERMEM_HAS_AMX)
      return has_amx() ? &kAmxAttention : nullptr;
#else
      return nullptr;
#endif
#else
    default:
      return nullptr;
#endif
  }
  return nullptr;
}

const AttentionKernel& require_kernel(AttentionInstructions instructions) {
  const AttentionKernel* kernel = kernel_for(instructions);
  if (kernel != nullptr) return *kernel;
  throw std::invalid_argument("attention instructions " +
                              std::to_string(static_cast<int>(instructions)) +
                              " are not supported by this processor");
}

// Aligned memory for floats that keeps the largest size asked for.
class Scratch {
 public:
  float* floats(std::size_t count) {
    const std::size_t lines = (count + kMostLanes - 1) / kMostLanes;
    if (lines_.size() < lines) {
      lines_.clear();  // so that nothing is copied
      lines_.resize(lines);
    }
    return lines_.empty() ? nullptr : lines_[0].floats;
  }

 private:
  struct Line {
    alignas(64) float floats[kMostLanes];
  };
  std::vector<Line> lines_;
};

// Counters that threads decrease, one for each pair of a group and a KV head.
class Counters {
 public:
  std::atomic<std::size_t>& operator[](std::size_t i) { return counters_[i]; }
  void make(std::size_t count) {
    if (count <= size_) return;
    counters_ = std::make_unique<std::atomic<std::size_t>[]>(count);
    size_ = count;
  }

 private:
  std::unique_ptr<std::atomic<std::size_t>[]> counters_;
  std::size_t size_ = 0;
};

// Queries are prepared by the team from this many lines on; fewer take less time than waking threads.
constexpr std::size_t kSharedLines = 256;

// Partial results of more floats than this are merged by the whole team in the end, a few lines at a time.
constexpr std::size_t kSharedMerge = 1 << 20;
constexpr std::size_t kMergeLines = 4;

}  // namespace

bool attention_instructions_supported(AttentionInstructions instructions) noexcept {
  return kernel_for(instructions) != nullptr;
}

struct CpuAttention::State {
  State(const AttentionKernel& chosen, std::size_t num_threads, const std::vector<int>& cpus,
        double spin_s)
      : kernel(chosen), team(num_threads, cpus, spin_s) {}

  const AttentionKernel& kernel;
  WorkerTeam team;

  std::mutex one_call;  // guards what follows
  AttentionPlan plan;
  Scratch queries;   // see AttentionPlan::queries_at
  Scratch partials;  // see AttentionPlan::partial
  Counters runs_left;
};

namespace {

// One call of attend: what its units need.
struct Call {
  const AttentionKernel& kernel;
  const AttentionPlan& plan;
  const KvShape& shape;
  const QueryRows& queries;
  const AttentionResult& result;
  std::size_t max_pages;
  float* prepared;
  float* partials;
  Counters& runs_left;
  bool shares_merge;

  std::byte* out_at(std::size_t row, std::size_t head) const {
    const std::size_t item = (row * queries.num_heads + head) * shape.head_dim;
    return static_cast<std::byte*>(result.out) + item * bytes_of(result.type);
  }

  void prepare(std::size_t index) const {
    const RowGroup& group = plan.groups()[index / shape.num_kv_heads];
    const std::size_t kv_head = index % shape.num_kv_heads;
    const auto item_bytes = static_cast<std::int64_t>(bytes_of(shape.type));
    const std::int64_t row_bytes = queries.row_stride * item_bytes;
    const std::int64_t head_bytes = queries.head_stride * item_bytes;
    const auto* first = static_cast<const std::byte*>(queries.data) +
                        static_cast<std::int64_t>(group.first_row) * row_bytes;
    const auto head = static_cast<std::int64_t>(kv_head * plan.heads_per_kv());
    kernel.prepare({shape.type, first + head * head_bytes, row_bytes, head_bytes,
                    plan.heads_per_kv(), plan.num_lines(group), shape.head_dim, plan.padded_dim(),
                    queries.scale * std::numbers::log2e, prepared + plan.queries_at(group, kv_head)});
  }

  // Without a shared merge, the thread that ends the last run of a group and KV head merges them all. Runs
  // are merged in their order either way.
  void attend_unit(std::size_t index) const {
    const PlannedUnit unit = plan.units()[index];
    const RowGroup& group = plan.groups()[unit.group];
    const PageRun run = plan.runs()[group.first_run + unit.run];
    kernel.attend({shape, plan.padded_dim(), unit.kv_head, &plan.pages()[run.first_page],
                   run.end_page - run.first_page, plan.num_lines(group),
                   prepared + plan.queries_at(group, unit.kv_head),
                   queries.scale * std::numbers::log2e, &plan.sees()[group.first_sees],
                   plan.partial(partials, group, unit.run, unit.kv_head),
                   page_output(group, unit.kv_head)});
    if (shares_merge) return;
    const std::size_t target = unit.group * shape.num_kv_heads + unit.kv_head;
    if (runs_left[target].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      merge(group, unit.kv_head, 0, plan.num_lines(group));
    }
  }

  std::size_t merge_units() const {
    std::size_t count = 0;
    for (const RowGroup& group : plan.groups()) count += merge_units(group) * shape.num_kv_heads;
    return count;
  }
  std::size_t merge_units(const RowGroup& group) const {
    return group.num_runs == 0 ? 0 : (plan.num_lines(group) + kMergeLines - 1) / kMergeLines;
  }

  void merge_unit(std::size_t index) const {
    const RowGroup* group = plan.groups().data();
    for (; index >= merge_units(*group) * shape.num_kv_heads; ++group) {
      index -= merge_units(*group) * shape.num_kv_heads;
    }
    const std::size_t first = index / shape.num_kv_heads * kMergeLines;
    merge(*group, index % shape.num_kv_heads, first,
          std::min(first + kMergeLines, plan.num_lines(*group)));
  }

  void merge(const RowGroup& group, std::size_t kv_head, std::size_t first_line,
             std::size_t end_line) const {
    const std::size_t head = kv_head * plan.heads_per_kv();
    kernel.merge({group.num_runs, plan.num_lines(group), first_line, end_line, plan.heads_per_kv(),
                  shape.head_dim, plan.padded_dim(), plan.partial(partials, group, 0, kv_head),
                  shape.num_kv_heads * plan.partial_floats(group), result.type,
                  out_at(group.first_row, head),
                  result.lse + group.first_row * queries.num_heads + head, queries.num_heads});
  }

  float* page_lse_at(std::size_t row, std::size_t head) const {
    return result.page_lse + (row * queries.num_heads + head) * max_pages;
  }

  PageOutput page_output(const RowGroup& group, std::size_t kv_head) const {
    if (result.page_lse == nullptr) return {};
    return {page_lse_at(group.first_row, kv_head * plan.heads_per_kv()), plan.heads_per_kv(),
            queries.num_heads * max_pages, max_pages};
  }

  // Pages of which no row of the group sees a token; units write the others.
  void write_unseen_pages(const RowGroup& group) const {
    std::size_t next = 0;
    const auto fill_to = [&](std::size_t end) {
      const std::size_t num_lines = group.num_rows * queries.num_heads;
      for (std::size_t i = 0; next < end && i < num_lines; ++i) {
        std::fill_n(page_lse_at(group.first_row, i) + next, end - next, -INFINITY);
      }
    };
    for (const SeenPage& page : plan.pages_of(group)) {
      fill_to(page.index);
      next = page.index + std::size_t{1};
    }
    fill_to(max_pages);
  }

  // Groups without runs: no row sees anything.
  void write_nothing_seen(const RowGroup& group) const {
    const std::size_t heads = group.num_rows * queries.num_heads;
    std::byte* out = out_at(group.first_row, 0);
    std::fill_n(out, heads * shape.head_dim * bytes_of(result.type), std::byte{0});
    std::fill_n(result.lse + group.first_row * queries.num_heads, heads, -INFINITY);
  }
};

}  // namespace

CpuAttention::CpuAttention(std::size_t num_threads, const std::vector<int>& cpus,
                           AttentionInstructions instructions, double spin_s)
    : state_(std::make_unique<State>(require_kernel(instructions), num_threads, cpus, spin_s)) {}

CpuAttention::CpuAttention(std::size_t num_threads, const AttentionKernel& kernel, double spin_s)
    : state_(std::make_unique<State>(kernel, num_threads, std::vector<int>{}, spin_s)) {}

CpuAttention::~CpuAttention() = default;

std::size_t CpuAttention::num_threads() const noexcept { return state_->team.num_threads(); }

AttentionInstructions CpuAttention::instructions() const noexcept {
  return state_->kernel.instructions;
}

void CpuAttention::attend(const KvShape& shape, const PageTables& tables, const QueryRows& queries,
                          const AttentionResult& result) {
  State& state = *state_;
  const std::lock_guard alone(state.one_call);
  AttentionPlan& plan = state.plan;
  plan.make(shape, tables, queries);
  const auto num_rows = static_cast<std::size_t>(tables.row_starts.back());
  const std::size_t num_lines = num_rows * queries.num_heads;
  const Call call{state.kernel,
                  plan,
                  shape,
                  queries,
                  result,
                  tables.max_pages,
                  state.queries.floats(plan.query_floats()),
                  state.partials.floats(plan.scratch_floats()),
                  state.runs_left,
                  plan.scratch_floats() > kSharedMerge};
  state.runs_left.make(plan.groups().size() * shape.num_kv_heads);
  for (std::size_t i = 0; i < plan.groups().size(); ++i) {
    const RowGroup& group = plan.groups()[i];
    if (group.num_runs == 0) call.write_nothing_seen(group);
    if (result.page_lse != nullptr) call.write_unseen_pages(group);
    for (std::size_t head = 0; head < shape.num_kv_heads; ++head) {
      state.runs_left[i * shape.num_kv_heads + head].store(group.num_runs);
    }
  }
  const std::size_t num_targets = plan.groups().size() * shape.num_kv_heads;
  if (num_lines >= kSharedLines) {
    state.team.run(num_targets, [&](std::size_t i) { call.prepare(i); });
  } else {
    for (std::size_t i = 0; i < num_targets; ++i) call.prepare(i);
  }
  state.team.run(plan.units().size(), [&](std::size_t i) { call.attend_unit(i); });
  if (call.shares_merge) {
    state.team.run(call.merge_units(), [&](std::size_t i) { call.merge_unit(i); });
  }
}

}  // namespace tiermem
