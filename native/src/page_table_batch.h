// How the page table walks a batch of ids. Private to the table's sources.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "tiermem/page_table.h"

namespace tiermem {

// Pages of a batch lie anywhere in memory; asking for them this far ahead hides the misses.
inline constexpr std::size_t kPrefetchDistance = 12;

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

template <class Use>
void PageTable::each(const char* verb, PageIds ids, Use use) const {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::size_t ahead =
        static_cast<std::size_t>(ids[std::min(i + kPrefetchDistance, ids.size() - 1)] & 0xffffffff);
    if (ahead < pages_.size()) __builtin_prefetch(&pages_[ahead]);
    use(find(verb, ids[i]));
  }
}

template <class Value, class Read>
std::vector<Value> PageTable::read(const char* verb, PageIds ids, Read read_page) const {
  std::vector<Value> values;
  values.reserve(ids.size());
  each(verb, ids, [&](std::int32_t index) { values.push_back(read_page(page_at(index))); });
  return values;
}

template <class Counter>
void PageTable::require_countdown(const char* verb, PageIds ids, const char* want,
                                  Counter counter) {
  std::size_t num_done = 0;
  while (num_done < ids.size()) {
    const std::int32_t index = index_of(ids[num_done]);
    if (index == kNone || counter(page_at(index)) == 0) break;
    --counter(page_at(index));
    ++num_done;
  }
  for (const PageId id : ids.first(num_done)) ++counter(page_at(index_of(id)));
  if (num_done < ids.size()) refuse(verb, id_of(find(verb, ids[num_done])), want);
}

}  // namespace tiermem
