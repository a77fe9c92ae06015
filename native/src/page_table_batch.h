// How the page table walks a batch of ids. Private to the table's sources.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "tiermem/page_table.h"

namespace tiermem {

// Pages of a batch, and their neighbours in the lists, lie anywhere in memory; asking for a page
// this far ahead, and for its neighbours when it has come, hides the misses.
inline constexpr std::size_t kPageDistance = 16;
inline constexpr std::size_t kNeighbourDistance = 6;

inline std::size_t tier_number(Tier tier) { return static_cast<std::size_t>(tier); }

inline void require_count(const char* verb, std::int64_t count) {
  if (count >= 0) return;
  throw std::invalid_argument(std::string(verb) + ": count=" + std::to_string(count) +
                              ": must be >= 0");
}

inline PageTable::List& PageTable::list_of(std::size_t tier, Place place) {
  return lists_[tier][static_cast<std::size_t>(place) - static_cast<std::size_t>(Place::Droppable)];
}

inline const PageTable::List& PageTable::list_of(std::size_t tier, Place place) const {
  return lists_[tier][static_cast<std::size_t>(place) - static_cast<std::size_t>(Place::Droppable)];
}

inline std::int32_t PageTable::index_of(PageId id) const {
  const auto index = static_cast<std::size_t>(id & 0xffffffff);
  if (id < 0 || index >= pages_.size()) return kNone;
  const Page& page = pages_[index];
  if (page.generation != id >> 32 || !page.has(kAlive)) return kNone;
  return static_cast<std::int32_t>(index);
}

inline void PageTable::prefetch_page(PageIds ids, std::size_t i) const {
  if (i >= ids.size()) return;
  const auto index = static_cast<std::size_t>(ids[i] & 0xffffffff);
  if (index < pages_.size()) __builtin_prefetch(&pages_[index], 1);
}

inline void PageTable::prefetch_neighbours(PageIds ids, std::size_t i) const {
  if (i >= ids.size()) return;
  const auto index = static_cast<std::size_t>(ids[i] & 0xffffffff);
  if (index >= pages_.size()) return;
  for (const Copy& copy : pages_[index].copies) {
    if (copy.prev != kNone) __builtin_prefetch(&page_at(copy.prev), 1);
    if (copy.next != kNone) __builtin_prefetch(&page_at(copy.next), 1);
  }
}

template <class Use>
void PageTable::each(const char* verb, PageIds ids, Use use) const {
  for (std::size_t i = 0; i < std::min(kPageDistance, ids.size()); ++i) prefetch_page(ids, i);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    prefetch_page(ids, i + kPageDistance);
    prefetch_neighbours(ids, i + kNeighbourDistance);
    use(find(verb, ids[i]));
  }
}

template <class Value, class Read>
std::vector<Value> PageTable::read(const char* verb, PageIds ids, Read read_page) const {
  std::vector<Value> values;
  values.reserve(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    prefetch_page(ids, i + kPageDistance);
    values.push_back(read_page(page_at(find(verb, ids[i]))));
  }
  return values;
}

template <class Counter>
void PageTable::require_countdown(const char* verb, PageIds ids, const char* want,
                                  Counter counter) {
  std::size_t num_done = 0;
  while (num_done < ids.size()) {
    prefetch_page(ids, num_done + kPageDistance);
    const std::int32_t index = index_of(ids[num_done]);
    if (index == kNone || counter(page_at(index)) == 0) break;
    --counter(page_at(index));
    ++num_done;
  }
  for (const PageId id : ids.first(num_done)) ++counter(page_at(index_of(id)));
  if (num_done < ids.size()) refuse(verb, id_of(find(verb, ids[num_done])), want);
}

}  // namespace tiermem
