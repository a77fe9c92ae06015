// Random batches, legal and not, against the oracle; the whole state is compared after every one.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <optional>
#include <random>
#include <set>
#include <string>

#include "check.h"
#include "page_table_oracle.h"
#include "tiermem/errors.h"
#include "tiermem/page_table.h"

namespace {

using namespace tiermem_test;
using tiermem::PageIds;
using tiermem::PageTable;
using tiermem::Slots;
using tiermem::Tier;

using Ids = std::vector<PageId>;

// One verb, in both tables. The oracle takes one page at a time.
struct Verb {
  const char* name;
  int weight;
  std::function<Ids(PageTable&, PageIds, Tier)> table;
  std::function<void(Oracle&, PageId, int)> oracle;
};

// Wraps a method of either form; methods without an answer answer no dead.
template <auto kMethod>
Ids call(PageTable& table, PageIds ids, Tier tier) {
  if constexpr (std::is_invocable_v<decltype(kMethod), PageTable&, PageIds, Tier>) {
    if constexpr (std::is_void_v<
                      std::invoke_result_t<decltype(kMethod), PageTable&, PageIds, Tier>>) {
      (table.*kMethod)(ids, tier);
      return {};
    } else {
      return (table.*kMethod)(ids, tier);
    }
  } else if constexpr (std::is_void_v<
                           std::invoke_result_t<decltype(kMethod), PageTable&, PageIds>>) {
    (table.*kMethod)(ids);
    return {};
  } else {
    return (table.*kMethod)(ids);
  }
}

const std::vector<Verb> kVerbs = {
    {"add_ref", 4, call<&PageTable::add_ref>, [](Oracle& o, PageId id, int) { o.add_ref(id); }},
    {"release", 9, call<&PageTable::release>, [](Oracle& o, PageId id, int) { o.release(id); }},
    {"publish", 6, call<&PageTable::publish>, [](Oracle& o, PageId id, int) { o.publish(id); }},
    {"unpublish", 2, call<&PageTable::unpublish>,
     [](Oracle& o, PageId id, int) { o.unpublish(id); }},
    {"seal", 8, call<&PageTable::seal>, [](Oracle& o, PageId id, int) { o.seal(id); }},
    {"reopen", 3, call<&PageTable::reopen>, [](Oracle& o, PageId id, int) { o.reopen(id); }},
    {"mark_lost", 1, call<&PageTable::mark_lost>,
     [](Oracle& o, PageId id, int) { o.mark_lost(id); }},
    {"touch", 4, call<&PageTable::touch>, [](Oracle& o, PageId id, int) { o.touch(id); }},
    {"reserve", 16, call<&PageTable::reserve>,
     [](Oracle& o, PageId id, int t) { o.reserve(id, t); }},
    {"commit", 14, call<&PageTable::commit>, [](Oracle& o, PageId id, int t) { o.commit(id, t); }},
    {"abort", 3, call<&PageTable::abort>, [](Oracle& o, PageId id, int t) { o.abort(id, t); }},
    {"drop", 4, call<&PageTable::drop>, [](Oracle& o, PageId id, int t) { o.drop(id, t); }},
    {"discard", 2, call<&PageTable::discard>,
     [](Oracle& o, PageId id, int t) { o.discard(id, t); }},
    {"pin", 8, call<&PageTable::pin>, [](Oracle& o, PageId id, int t) { o.pin(id, t); }},
    {"unpin", 10, call<&PageTable::unpin>, [](Oracle& o, PageId id, int t) { o.unpin(id, t); }},
};

class Run {
 public:
  Run(std::uint32_t seed, const std::array<std::int64_t, 3>& num_slots)
      : random_(seed), num_slots_(num_slots), table_(num_slots), oracle_(num_slots) {
    for (const Verb& verb : kVerbs) weights_.push_back(verb.weight);
  }

  // Whether both tables agreed about one random call.
  bool step() {
    const int kind = pick(100);
    last_ = kind < 8 ? "create" : kind < 11 ? "create_stored" : kind < 18 ? "evict" : "";
    const bool agreed = kind < 8    ? create()
                        : kind < 11 ? create_stored()
                        : kind < 18 ? evict()
                                    : transition();
    table_.check();
    return agreed && same_state();
  }

  const std::string& last() const { return last_; }
  int num_refused() const { return num_refused_; }

 private:
  int pick(int count) { return std::uniform_int_distribution<int>(0, count - 1)(random_); }

  Ids known() const {
    Ids ids;
    for (const auto& [id, page] : oracle_.pages) ids.push_back(id);
    return ids;
  }

  bool is_new(PageId id) { return id > 0 && ever_.insert(id).second; }

  bool create() {
    if (oracle_.pages.size() > 40) return true;
    bool all_new = true;
    for (const PageId id : table_.create(pick(4))) {
      all_new = is_new(id) && all_new;
      oracle_.create(id);
    }
    return all_new;
  }

  bool create_stored() {
    const int tier = pick(3);
    std::vector<std::int64_t> slots;
    for (int i = pick(3); i > 0; --i)
      slots.push_back(pick(static_cast<int>(num_slots_[tier]) + 2) - 1);
    std::set<std::int64_t> distinct(slots.begin(), slots.end());
    const bool is_legal = distinct.size() == slots.size() &&
                          std::includes(oracle_.free[tier].begin(), oracle_.free[tier].end(),
                                        distinct.begin(), distinct.end());
    try {
      const Ids ids = table_.create_stored(static_cast<Tier>(tier), slots);
      bool all_new = true;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        all_new = is_new(ids[i]) && all_new;
        oracle_.create_stored(ids[i], tier, slots[i]);
      }
      return is_legal && all_new;
    } catch (const tiermem::InvariantError&) {
      ++num_refused_;
      return !is_legal;
    }
  }

  bool evict() {
    const int tier = pick(3);
    const auto count = static_cast<std::size_t>(pick(4));
    const bool is_redundant = pick(3) == 0;
    Ids wanted = oracle_.list(tier, is_redundant ? Class::Redundant : Class::Droppable);
    wanted.resize(std::min(wanted.size(), count));
    oracle_.dead.clear();
    for (const PageId id : wanted) oracle_.discard(id, tier);
    const auto method = is_redundant ? &PageTable::evict_redundant : &PageTable::evict;
    const auto evicted =
        (table_.*method)(static_cast<Tier>(tier), static_cast<std::int64_t>(count));
    return evicted.dropped == wanted && evicted.dead == oracle_.dead;
  }

  // Ids for which the verb is legal, mostly; now and then a stale, repeated or random one.
  Ids choose(const Verb& verb, int tier) {
    Ids legal;
    for (const PageId id : known()) {
      Oracle copy = oracle_.alone(id);
      try {
        verb.oracle(copy, id, tier);
        legal.push_back(id);
      } catch (const Refused&) {
      }
    }
    std::shuffle(legal.begin(), legal.end(), random_);
    legal.resize(std::min(legal.size(), static_cast<std::size_t>(1 + pick(4))));
    const auto insert = [&](PageId id) {
      legal.insert(legal.begin() + pick(static_cast<int>(legal.size()) + 1), id);
    };
    if (pick(8) == 0 && !legal.empty())
      insert(legal[static_cast<std::size_t>(pick(static_cast<int>(legal.size())))]);
    if (pick(16) == 0 && !oracle_.pages.empty())
      insert(known()[static_cast<std::size_t>(pick(static_cast<int>(oracle_.pages.size())))]);
    if (pick(30) == 0 && !ever_.empty())
      insert(*std::next(ever_.begin(), pick(static_cast<int>(ever_.size()))));
    if (pick(60) == 0) insert(pick(1000) - 10);
    return legal;
  }

  bool transition() {
    std::discrete_distribution<std::size_t> which(weights_.begin(), weights_.end());
    const Verb& verb = kVerbs[which(random_)];
    last_ = verb.name;
    const int tier = pick(3);
    const Ids ids = choose(verb, tier);
    std::optional<Oracle> after = oracle_;
    after->dead.clear();
    after->slots.clear();
    try {
      for (const PageId id : ids) verb.oracle(*after, id, tier);
    } catch (const Refused&) {
      after.reset();
    }
    try {
      const Ids answer = verb.table(table_, ids, static_cast<Tier>(tier));
      if (!after) return false;
      oracle_ = *after;
      return answer == (last_ == "reserve" ? oracle_.slots : oracle_.dead);
    } catch (const tiermem::InvariantError&) {
      ++num_refused_;
      return !after;
    }
  }

  bool same_state() {
    const Ids ids = known();
    bool same = table_.num_pages() == static_cast<std::int64_t>(ids.size());
    for (const PageId id : ids) same = same_page(id, oracle_.at(id)) && same;
    for (int tier = 0; tier < 3; ++tier) same = same_tier(tier) && same;
    if (!ever_.empty()) {
      const PageId any = *std::next(ever_.begin(), pick(static_cast<int>(ever_.size())));
      same = table_.alive({&any, 1})[0] == oracle_.pages.contains(any) && same;
    }
    return same;
  }

  bool same_page(PageId id, const OraclePage& page) {
    const PageIds one{&id, 1};
    bool same = table_.refs(one)[0] == page.refs && table_.is_sealed(one)[0] == page.sealed &&
                table_.is_published(one)[0] == page.published &&
                table_.is_lost(one)[0] == page.lost;
    bool has_pins = false;
    for (int tier = 0; tier < 3; ++tier) {
      const OracleCopy& copy = page.copies[tier];
      const Tier t = static_cast<Tier>(tier);
      same = same && table_.slots(one, t)[0] == copy.slot &&
             table_.states(one, t)[0] == copy.state && table_.pins(one, t)[0] == copy.pins;
      has_pins = has_pins || copy.pins > 0;
    }
    return same && table_.has_pins(one)[0] == has_pins;
  }

  bool same_tier(int tier) {
    const tiermem::TierCounts counts = table_.counts(static_cast<Tier>(tier));
    const auto in = [&](Class where) {
      return static_cast<std::int64_t>(oracle_.list(tier, where).size());
    };
    std::int64_t num_pinned = 0, num_open = 0, num_filling = 0;
    for (const auto& [id, page] : oracle_.pages) {
      num_pinned += page.copies[tier].where == Class::Pinned;
      num_open += page.copies[tier].where == Class::Open;
      num_filling += page.copies[tier].state == CopyState::Filling;
    }
    const Ids dirty = oracle_.list(tier, Class::Dirty);
    return counts.slots == num_slots_[tier] &&
           counts.free == static_cast<std::int64_t>(oracle_.free[tier].size()) &&
           counts.filling == num_filling && counts.pinned == num_pinned &&
           counts.open == num_open && counts.droppable == in(Class::Droppable) &&
           counts.redundant == in(Class::Redundant) && counts.dirty == in(Class::Dirty) &&
           table_.coldest_dirty(static_cast<Tier>(tier), 1000) == dirty;
  }

  std::mt19937 random_;
  std::array<std::int64_t, 3> num_slots_;
  PageTable table_;
  Oracle oracle_;
  std::vector<int> weights_;
  std::set<PageId> ever_;
  std::string last_;
  int num_refused_ = 0;
};

void test_against_oracle(std::uint32_t seed, const std::array<std::int64_t, 3>& num_slots,
                         int num_steps) {
  Run run(seed, num_slots);
  for (int step = 0; step < num_steps; ++step) {
    bool agreed = false;
    try {
      agreed = run.step();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "threw: %s\n", error.what());
    }
    CHECK(agreed);
    if (agreed) continue;
    std::fprintf(stderr, "seed %u, step %d: %s\n", seed, step, run.last().c_str());
    return;
  }
  CHECK(run.num_refused() > num_steps / 100);
}

}  // namespace

int main() {
  const std::vector<std::array<std::int64_t, 3>> shapes = {{4, 6, 10}, {3, 5, 0}, {6, 0, 0},
                                                           {4, 0, 8},  {0, 4, 6}, {10, 10, 10}};
  for (std::uint32_t seed = 1; seed <= 12; ++seed) {
    test_against_oracle(seed, shapes[seed % shapes.size()], 4000);
  }
  return tiermem_test::report("page_table_random");
}
