// PageTable: which page has a copy where, and what may be dropped.
//
// A page is an id; a copy is a place. A page has at most one copy per tier, and each copy is
//
//     ABSENT --reserve--> FILLING --commit--> VALID --drop, evict, discard--> ABSENT
//        ^------abort--------'
//
// Sealed pages never change; an open page (the last, writable page of a sequence) has at most one
// copy. A page lives while a sequence refers to it or the prefix index names it (published).
//
// Every VALID copy is in exactly one place:
//   pinned      someone reads or writes it
//   open        unpinned, of an open page: only `release` takes it away
//   droppable   clean (a VALID copy in a lower tier), or unreferenced in the lowest tier (I5)
//   redundant   not droppable, but a VALID copy in a higher tier exists: dropping it loses nothing,
//               and makes that one dirty; a last resort
//   dirty       the only place that has the bytes, or the lowest of them
// The last three are LRU lists, least recently used first, so that a victim needs no test. A copy
// is appended at the MRU end when it is unpinned, touched, or when an event changes its list.
//
// Calls take batches; each is O(1) a page, without hashing. A call either does all of what it is
// asked or throws and has changed nothing: InvariantError for an id that is stale and for a state
// that does not allow the transition, std::invalid_argument for a value out of range. Where the
// same id twice in one batch would mean two transitions of one copy, that is refused too. Calls
// that may end a page's life return the ids of the pages that died, in order of death. Not
// thread-safe: one thread owns a table.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "tiermem/huge_pages.h"
#include "tiermem/slot_bitmap.h"

namespace tiermem {

// generation << 32 | index. An index is used again with the next generation, so a stale id never
// names a new page. Never negative, never 0.
using PageId = std::int64_t;
using Slot = std::int64_t;
inline constexpr Slot kNoSlot = -1;

enum class Tier : std::uint8_t { Gpu = 0, Ram = 1, Ssd = 2 };
inline constexpr std::size_t kNumTiers = 3;

enum class CopyState : std::uint8_t { Absent = 0, Filling = 1, Valid = 2 };

// Where the slots of one tier are; everything but `slots` adds up to `slots`.
struct TierCounts {
  std::int64_t slots = 0;
  std::int64_t free = 0;
  std::int64_t filling = 0;
  std::int64_t droppable = 0;
  std::int64_t redundant = 0;
  std::int64_t dirty = 0;
  std::int64_t pinned = 0;  // VALID and pinned
  std::int64_t open = 0;    // VALID, open, not pinned
};

using PageIds = std::span<const PageId>;
using Slots = std::span<const Slot>;

class PageTable {
 public:
  struct Evicted {
    std::vector<PageId> dropped;  // lost their copy in the tier, coldest first
    std::vector<PageId> dead;     // those of them that had no other copy
  };

  // Slots per tier, in pages. 0 is legal; the lowest tier is the last one that has slots.
  // Throws std::invalid_argument unless each is in [0, 2^31) and one is positive.
  explicit PageTable(const std::array<std::int64_t, kNumTiers>& num_slots);

  // -- Life of a page ----------------------------------------------------------------------------

  // New open pages without a copy, each referred to once. REQUIRES: count >= 0.
  std::vector<PageId> create(std::int64_t count);

  // Pages found in a store that is reopened: sealed, published, unreferenced, VALID in these slots.
  // The order is the LRU order, oldest first. REQUIRES: slots are free and distinct.
  std::vector<PageId> create_stored(Tier tier, Slots slots);

  // One more sequence refers to each page. REQUIRES: pages are not dying.
  void add_ref(PageIds ids);

  // One sequence less refers to each page. At 0 an unpublished page dies: its unpinned VALID copies
  // are dropped, and while others are pinned or FILLING it is *dying*. A published one moves to the
  // MRU end of its lists in the order given: release the tail of a sequence first, and LRU order is
  // leaf-first. REQUIRES: refs > 0, as often as an id is given.
  std::vector<PageId> release(PageIds ids);

  // The prefix index names these pages (I7). REQUIRES: sealed, not lost, not dying, not published.
  void publish(PageIds ids);

  // It does no longer; an unreferenced page dies as in `release`. REQUIRES: published.
  std::vector<PageId> unpublish(PageIds ids);

  // Open pages become read-only. REQUIRES: open, VALID in the GPU tier.
  void seal(PageIds ids);

  // Sealed pages become writable again. REQUIRES: sealed, refs == 1, not published, not lost, and
  // the GPU copy is VALID and the only copy, VALID or FILLING.
  void reopen(PageIds ids);

  // The bytes of these pages are gone (I2); for good, an id's mark ends with its page.
  void mark_lost(PageIds ids);

  // -- Life of a copy ----------------------------------------------------------------------------

  // ABSENT -> FILLING. Returns the slots, lowest free first, in the order of the ids.
  // REQUIRES: as many free slots; pages not dying; an open page has no other copy (in a lower tier
  // it is then write-through).
  std::vector<Slot> reserve(PageIds ids, Tier tier);

  // FILLING -> VALID. An open page in a lower tier is sealed by this. REQUIRES: FILLING.
  std::vector<PageId> commit(PageIds ids, Tier tier);

  // FILLING -> ABSENT, the slot is free. A page that is unreferenced and has no other copy dies.
  // REQUIRES: FILLING and unpinned: what waits for a copy lets go of it first.
  std::vector<PageId> abort(PageIds ids, Tier tier);

  // VALID -> ABSENT. REQUIRES: unpinned, and the page has another VALID copy.
  void drop(PageIds ids, Tier tier);

  // VALID -> ABSENT even for the last copy: quarantine. A page that is referenced and has no other
  // VALID copy is lost; one that is unreferenced and has no other copy dies. REQUIRES: unpinned.
  std::vector<PageId> discard(PageIds ids, Tier tier);

  // Holds copies in place; pins count. REQUIRES: VALID or FILLING, page not dying.
  void pin(PageIds ids, Tier tier);

  // Ends one pin (I6: never below zero). A copy whose last pin ends goes to the MRU end of its
  // list. REQUIRES: pinned, as often as an id is given.
  std::vector<PageId> unpin(PageIds ids, Tier tier);

  // -- Choice of victims -------------------------------------------------------------------------

  // Moves the copies of each page to the MRU end of their lists, in every tier, in the order given.
  void touch(PageIds ids);

  // Drops up to `count` copies, coldest first: of the droppable, or of the redundant list.
  Evicted evict(Tier tier, std::int64_t count);
  Evicted evict_redundant(Tier tier, std::int64_t count);

  // Up to `count` pages from the cold end of the dirty list: what to demote next. Changes nothing.
  std::vector<PageId> coldest_dirty(Tier tier, std::int64_t count) const;

  // -- Questions ---------------------------------------------------------------------------------

  // Slots of VALID and FILLING copies, kNoSlot for ABSENT.
  std::vector<Slot> slots(PageIds ids, Tier tier) const;
  std::vector<CopyState> states(PageIds ids, Tier tier) const;
  std::vector<std::int64_t> pins(PageIds ids, Tier tier) const;
  std::vector<std::int64_t> refs(PageIds ids) const;
  std::vector<std::uint8_t> has_pins(PageIds ids) const;  // in any tier
  std::vector<std::uint8_t> is_sealed(PageIds ids) const;
  std::vector<std::uint8_t> is_published(PageIds ids) const;
  std::vector<std::uint8_t> is_lost(PageIds ids) const;

  // Whether an id names a page, dying ones included. Takes any number, throws nothing.
  std::vector<std::uint8_t> alive(PageIds ids) const;

  TierCounts counts(Tier tier) const;
  std::int64_t num_pages() const { return num_alive_; }
  Tier lowest_tier() const { return lowest_; }

  // Verifies every invariant that one table can see (I1, I2, I4 to I6, and that the lists, counts
  // and classes agree) by brute force, O(pages + slots). Throws InvariantError saying what is
  // wrong.
  void check() const;

 private:
  // The state of a copy and the place it is in, in one.
  enum class Place : std::uint8_t { Absent, Filling, Pinned, Open, Droppable, Redundant, Dirty };
  static constexpr std::size_t kNumPlaces = 7;
  static constexpr std::size_t kNumLists = 3;
  static constexpr std::int32_t kNone = -1;  // end of a list; slot of an ABSENT copy

  enum Flag : std::uint8_t { kAlive = 1, kSealed = 2, kPublished = 4, kLost = 8 };

  struct Copy {
    std::int32_t slot = kNone;
    std::int32_t pins = 0;
    std::int32_t prev = kNone;  // towards the cold end
    std::int32_t next = kNone;
  };

  // One cache line, so that a page costs one miss.
  struct alignas(64) Page {
    std::int32_t generation = 1;
    std::int32_t refs = 0;
    std::array<Place, kNumTiers> places{};
    std::uint8_t flags = 0;
    std::array<Copy, kNumTiers> copies;
    std::uint32_t batch = 0;  // the last batch that named it; see Marks

    bool has(Flag flag) const { return (flags & flag) != 0; }
    bool is_valid(std::size_t tier) const { return places[tier] >= Place::Pinned; }
    bool is_dying() const { return refs == 0 && !has(kPublished); }
    bool is_movable(std::size_t tier) const { return is_valid(tier) && copies[tier].pins == 0; }
    std::size_t num_valid() const;
    std::size_t num_copies() const;
  };

  struct List {
    std::int32_t cold = kNone;
    std::int32_t hot = kNone;
  };

  class Marks;

  friend class PageTableAudit;

  static bool is_listed(Place place) { return place >= Place::Droppable; }
  PageId id_of(std::int32_t index) const;
  std::int32_t index_of(PageId id) const;  // kNone if the id names no page
  std::int32_t find(const char* verb, PageId id) const;
  Page& page_at(std::int32_t index) { return pages_[static_cast<std::size_t>(index)]; }
  const Page& page_at(std::int32_t index) const { return pages_[static_cast<std::size_t>(index)]; }
  List& list_of(std::size_t tier, Place place);
  const List& list_of(std::size_t tier, Place place) const;

  [[noreturn]] void refuse(const char* verb, PageId id, const char* want) const;
  [[noreturn]] void refuse(const char* verb, PageId id, std::size_t tier, const char* want) const;

  void prefetch_page(PageIds ids, std::size_t i) const;
  void prefetch_neighbours(PageIds ids, std::size_t i) const;

  // Calls use(index) for each id, in order; throws for a stale id before using it.
  template <class Use>
  void each(const char* verb, PageIds ids, Use use) const;
  template <class Value, class Read>
  std::vector<Value> read(const char* verb, PageIds ids, Read read_page) const;

  // Refuses unless counter(page) can be counted down once for every mention. Changes nothing.
  template <class Counter>
  void require_countdown(const char* verb, PageIds ids, const char* want, Counter counter);

  void grow(std::size_t num_new);
  std::int32_t new_page(std::uint8_t flags, std::int32_t refs);
  Place place_for(const Page& page, std::size_t tier) const;
  void move(std::int32_t index, std::size_t tier, Place place);
  void unlink(std::int32_t index, std::size_t tier);
  void append(std::int32_t index, std::size_t tier);
  void to_hot_end(std::int32_t index, std::size_t tier);
  void free_copy(std::int32_t index, std::size_t tier);
  void settle(std::int32_t index);
  void settle(std::int32_t index, std::vector<PageId>& dead);
  void die(std::int32_t index);
  Evicted evict_from(Place place, Tier tier, std::int64_t count);

  std::vector<Page, HugePageAllocator<Page>> pages_;
  std::vector<std::int32_t> free_indices_;
  std::vector<SlotBitmap> free_slots_;
  std::array<std::array<List, kNumLists>, kNumTiers> lists_{};
  // Slots by the place of their copy; under Absent, the free ones.
  std::array<std::array<std::int64_t, kNumPlaces>, kNumTiers> num_in_place_{};
  std::int64_t num_alive_ = 0;
  std::uint32_t batch_ = 0;
  Tier lowest_ = Tier::Gpu;
};

}  // namespace tiermem
