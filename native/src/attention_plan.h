// AttentionPlan: how one call of CpuAttention::attend is cut into units, by its shape alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "attention_kernel.h"
#include "tiermem/cpu_attention.h"

namespace tiermem {

// Pages [first_page, end_page) of AttentionPlan::pages.
struct PageRun {
  std::size_t first_page;
  std::size_t end_page;
};

// Rows of one sequence that go through its pages together.
struct RowGroup {
  std::size_t first_row;  // of all queries
  std::size_t num_rows;
  std::size_t first_run;  // of AttentionPlan::runs
  std::size_t num_runs;   // 0: no row sees anything
  std::size_t first_sees;  // of AttentionPlan::sees, one for each line
  std::size_t queries_at;   // float of the prepared queries; KV heads, then lines
  std::size_t partials_at;  // float of the scratch memory; runs, then KV heads, then the arrays
};

struct PlannedUnit {
  std::uint32_t group;
  std::uint32_t run;  // of the group
  std::uint32_t kv_head;
};

// Kept from call to call, so that its vectors keep their memory.
class AttentionPlan {
 public:
  // Throws std::invalid_argument as CpuAttention::attend says.
  void make(const KvShape& shape, const PageTables& tables, const QueryRows& queries);

  const std::vector<SeenPage>& pages() const noexcept { return pages_; }
  const std::vector<PageRun>& runs() const noexcept { return runs_; }
  const std::vector<RowGroup>& groups() const noexcept { return groups_; }
  const std::vector<SeenRange>& sees() const noexcept { return sees_; }
  const std::vector<PlannedUnit>& units() const noexcept { return units_; }

  std::size_t heads_per_kv() const noexcept { return heads_per_kv_; }
  std::size_t padded_dim() const noexcept { return padded_dim_; }
  std::size_t num_lines(const RowGroup& group) const { return group.num_rows * heads_per_kv_; }
  // What some row of the group sees, in the order of its table.
  std::span<const SeenPage> pages_of(const RowGroup& group) const;

  // Floats of one unit's partial result, and of all together.
  std::size_t partial_floats(const RowGroup& group) const;
  std::size_t scratch_floats() const noexcept { return scratch_floats_; }

  // Floats of all prepared queries, and where those of a group and KV head begin.
  std::size_t query_floats() const noexcept { return query_floats_; }
  std::size_t queries_at(const RowGroup& group, std::size_t kv_head) const;

  // Where a unit's partial result lies in `scratch`.
  Partial partial(float* scratch, const RowGroup& group, std::size_t run,
                  std::size_t kv_head) const;

 private:
  void add_groups(const PageTables& tables, const QueryRows& queries, std::size_t sequence);
  void add_sees(const PageTables& tables, const QueryRows& queries, std::size_t sequence,
                const RowGroup& group);
  std::size_t add_pages(const PageTables& tables, std::size_t sequence, SeenRange seen);
  void cut_runs(const std::vector<std::size_t>& group_tokens);
  void add_runs(RowGroup& group, std::size_t first_page, std::size_t end_page,
                std::size_t run_tokens);
  std::size_t cost_per_token(const RowGroup& group) const;

  KvShape shape_{};
  std::size_t heads_per_kv_ = 1;
  std::size_t padded_dim_ = 0;
  std::size_t scratch_floats_ = 0;
  std::size_t query_floats_ = 0;
  std::vector<SeenPage> pages_;
  std::vector<PageRun> runs_;
  std::vector<RowGroup> groups_;
  std::vector<SeenRange> sees_;
  std::vector<PlannedUnit> units_;
  std::vector<std::size_t> first_pages_;   // (groups + 1): of each group in pages_
  std::vector<std::size_t> group_tokens_;  // (groups): tokens that some row sees
};

}  // namespace tiermem
