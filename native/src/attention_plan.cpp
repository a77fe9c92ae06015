#include "attention_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tiermem {
namespace {

// Lines that share one pass over a run. Their queries and sums, 2 x 64 KiB for head_dim 128, stay in the
// second-level cache, and arithmetic outweighs reading K and V long before.
constexpr std::size_t kGroupLines = 128;

// A unit costs about as much as reading this many bytes of K and V, or a share of all: enough units for
// an even division among dozens of threads, few enough that starting one and merging its result do not count.
constexpr std::size_t kUnitBytes = 256 << 10;
constexpr std::size_t kMostUnits = 1024;

// Tokens of a run for each line: a partial result is as large as two tokens' K or V for each line.
constexpr std::size_t kRunTokensPerLine = 8;

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

void check(const PageTables& tables) {
  const std::size_t batch = tables.num_pages.size();
  const auto lengths = [](const char* name, std::size_t has, std::size_t wanted) {
    require(has == wanted, std::string(name) + " of " + std::to_string(has) + " entries: must be " +
                               std::to_string(wanted));
  };
  lengths("kv_end", tables.kv_end.size(), batch);
  lengths("q_start", tables.q_start.size(), batch);
  lengths("row_starts", tables.row_starts.size(), batch + 1);
  lengths("slices", tables.slices.size(), batch * tables.max_pages);
  if (!tables.starts.empty()) lengths("starts", tables.starts.size(), batch * tables.max_pages);
  require(tables.row_starts[0] == 0, "row_starts: must begin with 0");
  for (std::size_t b = 0; b < batch; ++b) {
    const auto pages = tables.num_pages[b];
    require(pages >= 0 && static_cast<std::size_t>(pages) <= tables.max_pages,
            "num_pages=" + std::to_string(pages) + ": must be 0 to " +
                std::to_string(tables.max_pages));
    require(tables.row_starts[b] <= tables.row_starts[b + 1], "row_starts: must be ascending");
  }
}

}  // namespace

void AttentionPlan::make(const KvShape& shape, const PageTables& tables,
                         const QueryRows& queries) {
  check(tables);
  shape_ = shape;
  heads_per_kv_ = queries.num_heads / shape.num_kv_heads;
  padded_dim_ = ceil_div(shape.head_dim, kMostLanes) * kMostLanes;
  for (auto* list : {&first_pages_, &group_tokens_}) list->clear();
  pages_.clear();
  runs_.clear();
  groups_.clear();
  sees_.clear();
  units_.clear();
  query_floats_ = 0;
  for (std::size_t b = 0; b < tables.num_pages.size(); ++b) add_groups(tables, queries, b);
  first_pages_.push_back(pages_.size());
  cut_runs(group_tokens_);
}

// Cuts a sequence's rows into groups and collects the pages that each group sees.
void AttentionPlan::add_groups(const PageTables& tables, const QueryRows& queries,
                               std::size_t sequence) {
  const auto row_start = static_cast<std::size_t>(tables.row_starts[sequence]);
  const auto row_end = static_cast<std::size_t>(tables.row_starts[sequence + 1]);
  const std::size_t num_groups =
      ceil_div(row_end - row_start, std::max<std::size_t>(1, kGroupLines / heads_per_kv_));
  for (std::size_t i = 0; i < num_groups; ++i) {
    const std::size_t first_row = row_start + (row_end - row_start) * i / num_groups;
    const std::size_t end_row = row_start + (row_end - row_start) * (i + 1) / num_groups;
    groups_.push_back({first_row, end_row - first_row, 0, 0, sees_.size(), query_floats_, 0});
    query_floats_ = queries_at(groups_.back(), shape_.num_kv_heads);
    add_sees(tables, queries, sequence, groups_.back());
    const SeenRange seen{sees_[groups_.back().first_sees].start, sees_.back().end};
    first_pages_.push_back(pages_.size());
    group_tokens_.push_back(add_pages(tables, sequence, seen));
  }
}

void AttentionPlan::add_sees(const PageTables& tables, const QueryRows& queries,
                             std::size_t sequence, const RowGroup& group) {
  const std::int64_t kv_end = tables.kv_end[sequence];
  const std::int64_t first_position =
      std::int64_t{tables.q_start[sequence]} - tables.row_starts[sequence];
  for (std::size_t row = group.first_row; row < group.first_row + group.num_rows; ++row) {
    const std::int64_t end = first_position + static_cast<std::int64_t>(row) + 1;
    const std::int64_t start =
        queries.window ? std::max<std::int64_t>(0, end - std::min(*queries.window, end)) : 0;
    sees_.insert(sees_.end(), heads_per_kv_, {start, std::min(end, kv_end)});
  }
}

// Returns the tokens within them that lie in `seen`, the union of what the group's rows see.
std::size_t AttentionPlan::add_pages(const PageTables& tables, std::size_t sequence,
                                     SeenRange seen) {
  const auto page_tokens = static_cast<std::int64_t>(shape_.page_tokens);
  std::size_t num_tokens = 0;
  for (std::size_t j = 0; j < static_cast<std::size_t>(tables.num_pages[sequence]); ++j) {
    const std::size_t entry = sequence * tables.max_pages + j;
    const std::int64_t start = tables.starts.empty() ? static_cast<std::int64_t>(j) * page_tokens
                                                     : tables.starts[entry];
    const std::int64_t first = std::max<std::int64_t>(0, seen.start - start);
    const std::int64_t end = std::min(page_tokens, seen.end - start);
    if (first >= end) continue;
    const std::int64_t slice = tables.slices[entry];
    require(slice != 0, "page " + std::to_string(j) + " of sequence " + std::to_string(sequence) +
                            " is seen by a row, but lies nowhere");
    pages_.push_back({reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(slice)),
                      static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(end),
                      static_cast<std::uint32_t>(j), start + first});
    num_tokens += static_cast<std::size_t>(end - first);
  }
  return num_tokens;
}

// What a token costs one KV head: the bytes of its K and V, for as many lines as one pass takes.
std::size_t AttentionPlan::cost_per_token(const RowGroup& group) const {
  const std::size_t passes = ceil_div(num_lines(group), kMostBlockLines);
  return 2 * shape_.head_dim * bytes_of(shape_.type) * passes;
}

void AttentionPlan::cut_runs(const std::vector<std::size_t>& group_tokens) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    total += cost_per_token(groups_[i]) * group_tokens[i] * shape_.num_kv_heads;
  }
  const std::size_t unit_cost = std::max(kUnitBytes, total / kMostUnits);
  scratch_floats_ = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    RowGroup& group = groups_[i];
    const std::size_t run_tokens =
        std::max(kRunTokensPerLine * num_lines(group), unit_cost / cost_per_token(group));
    const std::size_t num_runs = ceil_div(group_tokens[i], run_tokens);
    group.first_run = runs_.size();
    if (num_runs > 0) {
      add_runs(group, first_pages_[i], first_pages_[i + 1], ceil_div(group_tokens[i], num_runs));
    }
    group.partials_at = scratch_floats_;
    scratch_floats_ += group.num_runs * shape_.num_kv_heads * partial_floats(group);
    for (std::size_t run = 0; run < group.num_runs; ++run) {
      for (std::size_t head = 0; head < shape_.num_kv_heads; ++head) {
        units_.push_back({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(run),
                          static_cast<std::uint32_t>(head)});
      }
    }
  }
}

// Runs of whole pages with about run_tokens tokens each.
void AttentionPlan::add_runs(RowGroup& group, std::size_t first_page, std::size_t end_page,
                             std::size_t run_tokens) {
  std::size_t tokens = 0;
  std::size_t start = first_page;
  for (std::size_t page = first_page; page < end_page; ++page) {
    tokens += pages_[page].end - pages_[page].first;
    if (tokens < run_tokens && page + 1 < end_page) continue;
    runs_.push_back({start, page + 1});
    start = page + 1;
    tokens = 0;
  }
  group.num_runs = runs_.size() - group.first_run;
}

std::span<const SeenPage> AttentionPlan::pages_of(const RowGroup& group) const {
  if (group.num_runs == 0) return {};
  const std::size_t first = runs_[group.first_run].first_page;
  const std::size_t end = runs_[group.first_run + group.num_runs - 1].end_page;
  return {&pages_[first], end - first};
}

std::size_t AttentionPlan::queries_at(const RowGroup& group, std::size_t kv_head) const {
  return group.queries_at + kv_head * prepared_lines(num_lines(group)) * padded_dim_;
}

std::size_t AttentionPlan::partial_floats(const RowGroup& group) const {
  return num_lines(group) * padded_dim_ + 2 * partial_lanes(num_lines(group));
}

Partial AttentionPlan::partial(float* scratch, const RowGroup& group, std::size_t run,
                               std::size_t kv_head) const {
  float* weighted =
      scratch + group.partials_at + (run * shape_.num_kv_heads + kv_head) * partial_floats(group);
  float* peak = weighted + num_lines(group) * padded_dim_;
  return {weighted, peak, peak + partial_lanes(num_lines(group))};
}

}  // namespace tiermem
