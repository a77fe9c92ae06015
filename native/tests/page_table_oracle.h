// A page table that is slow and obvious: maps, sets, and batches done one page at a time on a copy
// that is thrown away if anything is refused. What tiermem::PageTable must agree with.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <stdexcept>
#include <vector>

#include "tiermem/page_table.h"

namespace tiermem_test {

using tiermem::CopyState;
using tiermem::PageId;

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Class { None, Pinned, Open, Droppable, Redundant, Dirty };

struct OracleCopy {
  CopyState state = CopyState::Absent;
  std::int64_t slot = -1;
  int pins = 0;
  std::uint64_t used = 0;  // when it joined the MRU end of its list
  Class where = Class::None;
};

struct OraclePage {
  int refs = 0;
  bool sealed = false;
  bool published = false;
  bool lost = false;
  std::array<OracleCopy, 3> copies;

  bool valid(int tier) const { return copies[tier].state == CopyState::Valid; }
  bool dying() const { return refs == 0 && !published; }
  int count(CopyState state) const {
    int n = 0;
    for (const OracleCopy& copy : copies) n += copy.state == state;
    return n;
  }
  bool bare() const { return count(CopyState::Absent) == 3; }
};

class Oracle {
 public:
  explicit Oracle(const std::array<std::int64_t, 3>& num_slots) {
    for (int tier = 0; tier < 3; ++tier) {
      for (std::int64_t slot = 0; slot < num_slots[tier]; ++slot) free[tier].insert(slot);
      if (num_slots[tier] > 0) lowest = tier;
    }
  }

  std::map<PageId, OraclePage> pages;
  std::array<std::set<std::int64_t>, 3> free;
  std::vector<PageId> dead;         // of the last call
  std::vector<std::int64_t> slots;  // of the last reserve

  OraclePage& at(PageId id) {
    const auto found = pages.find(id);
    if (found == pages.end()) throw Refused("stale");
    return found->second;
  }

  // A copy that has but one page, to try a verb on.
  Oracle alone(PageId id) const {
    Oracle other({});
    other.free = free;
    other.lowest = lowest;
    other.pages[id] = pages.at(id);
    return other;
  }

  void create(PageId id) { pages[id].refs = 1; }

  void create_stored(PageId id, int tier, std::int64_t slot) {
    if (free[tier].erase(slot) == 0) throw Refused("slot");
    OraclePage page;
    page.sealed = page.published = true;
    page.copies[tier].state = CopyState::Valid;
    page.copies[tier].slot = slot;
    pages[id] = page;
    settle(id);
  }

  void add_ref(PageId id) {
    need(!at(id).dying());
    ++at(id).refs;
    settle(id);
  }

  void release(PageId id) {
    need(at(id).refs > 0);
    if (--at(id).refs > 0) return;
    settle(id);
    if (pages.contains(id)) use(id);
  }

  void publish(PageId id) {
    need(at(id).sealed && !at(id).published && !at(id).lost && !at(id).dying());
    at(id).published = true;
  }

  void unpublish(PageId id) {
    need(at(id).published);
    at(id).published = false;
    settle(id);
  }

  void seal(PageId id) {
    need(!at(id).sealed && !at(id).dying() && at(id).valid(0));
    at(id).sealed = true;
    settle(id);
  }

  void reopen(PageId id) {
    const OraclePage& page = at(id);
    need(page.sealed && page.refs == 1 && !page.published && !page.lost);
    need(page.valid(0) && page.count(CopyState::Absent) == 2);
    at(id).sealed = false;
    settle(id);
  }

  void mark_lost(PageId id) { at(id).lost = true; }

  void reserve(PageId id, int tier) {
    OraclePage& page = at(id);
    need(page.copies[tier].state == CopyState::Absent && !page.dying());
    need(page.sealed || page.bare());
    need(!free[tier].empty());
    page.copies[tier].state = CopyState::Filling;
    page.copies[tier].slot = *free[tier].begin();
    free[tier].erase(free[tier].begin());
    slots.push_back(page.copies[tier].slot);
  }

  void commit(PageId id, int tier) {
    need(at(id).copies[tier].state == CopyState::Filling);
    at(id).copies[tier].state = CopyState::Valid;
    if (tier > 0) at(id).sealed = true;
    settle(id);
  }

  void abort(PageId id, int tier) {
    need(at(id).copies[tier].state == CopyState::Filling && at(id).copies[tier].pins == 0);
    remove(id, tier);
    settle(id);
  }

  void drop(PageId id, int tier) {
    need(at(id).valid(tier) && at(id).copies[tier].pins == 0);
    need(at(id).count(CopyState::Valid) > 1);
    remove(id, tier);
    settle(id);
  }

  void discard(PageId id, int tier) {
    need(at(id).valid(tier) && at(id).copies[tier].pins == 0);
    remove(id, tier);
    if (at(id).count(CopyState::Valid) == 0 && !at(id).dying()) at(id).lost = true;
    settle(id);
  }

  void pin(PageId id, int tier) {
    need(at(id).copies[tier].state != CopyState::Absent && !at(id).dying());
    ++at(id).copies[tier].pins;
    settle(id);
  }

  void unpin(PageId id, int tier) {
    need(at(id).copies[tier].pins > 0);
    --at(id).copies[tier].pins;
    settle(id);
  }

  void touch(PageId id) { (void)at(id), use(id); }

  // Ids whose copy in a tier is of a class, least recently used first.
  std::vector<PageId> list(int tier, Class where) const {
    std::map<std::uint64_t, PageId> by_use;
    for (const auto& [id, page] : pages) {
      if (page.copies[tier].where == where) by_use[page.copies[tier].used] = id;
    }
    std::vector<PageId> ids;
    for (const auto& [used, id] : by_use) ids.push_back(id);
    return ids;
  }

 private:
  static void need(bool holds) {
    if (!holds) throw Refused("state");
  }

  void use(PageId id) {
    for (OracleCopy& copy : at(id).copies) copy.used = ++clock;
  }

  void remove(PageId id, int tier) {
    free[tier].insert(at(id).copies[tier].slot);
    at(id).copies[tier] = OracleCopy{};
  }

  Class class_of(const OraclePage& page, int tier) const {
    if (!page.valid(tier)) return Class::None;
    if (page.copies[tier].pins > 0) return Class::Pinned;
    if (!page.sealed) return Class::Open;
    bool higher = false;
    bool lower = false;
    for (int other = 0; other < 3; ++other) {
      if (other < tier && page.valid(other)) higher = true;
      if (other > tier && page.valid(other)) lower = true;
    }
    const bool is_leftover = tier == lowest && page.refs == 0;
    return lower || is_leftover ? Class::Droppable : higher ? Class::Redundant : Class::Dirty;
  }

  void settle(PageId id) {
    OraclePage& page = at(id);
    for (int tier = 0; tier < 3; ++tier) {
      if (page.dying() && page.valid(tier) && page.copies[tier].pins == 0) remove(id, tier);
    }
    for (int tier = 0; tier < 3; ++tier) {
      const Class now = class_of(page, tier);
      if (now != page.copies[tier].where) page.copies[tier].used = ++clock;
      page.copies[tier].where = now;
    }
    if (page.refs == 0 && page.bare()) {
      dead.push_back(id);
      pages.erase(id);
    }
  }

  int lowest = 0;
  std::uint64_t clock = 0;
};

}  // namespace tiermem_test
