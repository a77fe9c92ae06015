// The walk over an LMDB file, level by level.
#include "tiermem/lmdb_file.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include "lmdb_page.h"

namespace tiermem {
namespace {

using namespace lmdb;

constexpr std::size_t kMaxKey = 511;
constexpr int kMaxDepth = 32;
constexpr std::uint64_t kMaxTransaction = ~std::uint64_t{0} >> 1;  // LMDB counts on without looking
// What one thread reads at once: it stays in the cache until it is verified. Gaps are read along:
// a request costs as much as some pages do.
constexpr std::size_t kReadBytes = std::size_t{256} << 10;
constexpr std::uint64_t kMaxGapBytes = 32 << 10;

int compare(ConstBytes a, ConstBytes b) {
  const int order = std::memcmp(a.data(), b.data(), std::min(a.size(), b.size()));
  if (order != 0) return order;
  return a.size() == b.size() ? 0 : (a.size() < b.size() ? -1 : 1);
}

int compare_numbers(ConstBytes a, ConstBytes b) {
  const auto x = number_at<std::uint64_t>(a, 0);
  const auto y = number_at<std::uint64_t>(b, 0);
  return x == y ? 0 : (x < y ? -1 : 1);
}

std::vector<std::uint8_t> copy_of(ConstBytes bytes) { return {bytes.begin(), bytes.end()}; }

// A page of a tree, and which keys may be below it: from `low` to below `high`; empty: any.
struct Place {
  std::uint64_t page = 0;
  ConstBytes low{};
  ConstBytes high{};
};

// What a thread needs to look at pages; used again by the next one.
struct Desk {
  std::unique_ptr<std::uint8_t[]> bytes;
  NodeReader nodes;
};

class Desks {
 public:
  std::unique_ptr<Desk> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<Desk> desk = std::move(free_.back());
        free_.pop_back();
        return desk;
      }
    }
    auto desk = std::make_unique<Desk>();
    desk->bytes = std::make_unique_for_overwrite<std::uint8_t[]>(kReadBytes);
    return desk;
  }

  void give_back(std::unique_ptr<Desk> desk) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(desk));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Desk>> free_;  // guarded by mutex_
};

class FileWalk {
 public:
  FileWalk(const LmdbSource& source, std::uint64_t max_pages, RowShape shape, WorkerTeam& team)
      : source_(source), shape_(shape), team_(team), meta_(metas_in(source.head)[0]) {
    if (meta_.last_page < 1 || meta_.last_page >= max_pages) {
      damaged("last page " + std::to_string(meta_.last_page) + " of at most " +
              std::to_string(max_pages));
    }
    if (meta_.transaction > kMaxTransaction) damaged("the number of the transaction");
    num_pages_ = source.num_bytes / meta_.page_bytes;
    seen_.resize(meta_.last_page + 1);
    seen_[0] = seen_[1] = 1;
  }

  LmdbContent run() {
    // The pad of the free pages' tree is the size of a page.
    if (meta_.free.flags != kIntegerKeys || meta_.main.flags != 0 || meta_.main.pad != 0) {
      damaged("flags of a tree");
    }
    LmdbContent content;
    content.transaction = meta_.transaction;
    Count main{meta_.main, compare, shape_, 2};
    walk(main);
    std::sort(main.others.begin(), main.others.end(),
              [](const auto& a, const auto& b) { return compare(a.first, b.first) < 0; });
    content.rows = std::move(main.rows);
    content.others = std::move(main.others);
    Count free{meta_.free, compare_numbers, {}, 1};
    walk(free);
    for (const auto& [key, value] : free.others) add_free(key, value);
    for (std::uint64_t page = num_pages_; page <= meta_.last_page; ++page) {
      if (seen_[page] == 0) damaged("page " + std::to_string(page) + " is behind the file's end");
    }
    return content;
  }

 private:
  using Compare = int (*)(ConstBytes, ConstBytes);
  using Consume = std::function<void(std::size_t i, ConstBytes page, Desk& desk)>;

  // One tree: what its meta page says, and what was found in it so far.
  struct Count {
    const Tree& tree;
    Compare order;
    RowShape shape;
    std::size_t least_children;  // of a branch page
    std::uint64_t branches = 0;
    std::uint64_t overflows = 0;  // guarded by mutex_, as all below
    std::uint64_t entries = 0;
    LmdbRows rows{};  // but these
    std::vector<LmdbContent::Record> others{};

    bool has_numbers() const { return order == compare_numbers; }
  };

  // ---- trees -----------------------------------------------------------------------------------

  void walk(Count& count) {
    const Tree& tree = count.tree;
    std::size_t num_leaves = 0;
    if (tree.root == kNoPage) {
      if (tree.depth != 0) damaged("a tree without a root is not empty");
    } else {
      if (tree.depth < 1 || tree.depth > kMaxDepth) damaged("depth of a tree");
      std::vector<std::vector<std::uint8_t>> levels;  // the bytes that keys in places lie in
      std::vector<Place> places{{tree.root}};
      for (int depth = 1; depth < tree.depth; ++depth) {
        places = below(count, places, levels.emplace_back());
      }
      num_leaves = places.size();
      read_leaves(count, places);
    }
    if (count.branches != tree.branches || num_leaves != tree.leaves ||
        count.overflows != tree.overflows || count.entries != tree.entries) {
      damaged("a tree does not have the pages and entries that its meta page names");
    }
  }

  // The pages below these branch pages, which are left in `bytes`.
  std::vector<Place> below(Count& count, const std::vector<Place>& places,
                           std::vector<std::uint8_t>& bytes) {
    const std::size_t size = meta_.page_bytes;
    take_pages(places);
    bytes.resize(places.size() * size);
    read_pages(places, [&](std::size_t i, ConstBytes page, Desk&) {
      std::memcpy(bytes.data() + i * size, page.data(), size);
    });
    count.branches += places.size();
    std::vector<Place> next;
    NodeReader reader;
    for (std::size_t i = 0; i < places.size(); ++i) {
      const ConstBytes page = ConstBytes(bytes).subspan(i * size, size);
      const auto& nodes = reader.nodes_of(page, places[i].page, false);
      if (nodes.size() < count.least_children) bad_page(places[i].page);
      check_separators(count, nodes, places[i]);
      for (std::size_t n = 0; n < nodes.size(); ++n) {
        const ConstBytes low = n == 0 ? places[i].low : nodes[n].key;
        const ConstBytes high = n + 1 < nodes.size() ? nodes[n + 1].key : places[i].high;
        next.push_back({nodes[n].child, low, high});
      }
    }
    return next;
  }

  // The first key of a branch stands for everything below the second; its bytes mean nothing.
  static void check_separators(const Count& count, const std::vector<Node>& nodes,
                               const Place& place) {
    for (std::size_t i = 1; i < nodes.size(); ++i) {
      check_bounds(count, nodes[i].key, place);
      if (i > 1 && count.order(nodes[i - 1].key, nodes[i].key) >= 0) bad_page(place.page);
    }
  }

  static void check_bounds(const Count& count, ConstBytes key, const Place& place) {
    if (key.empty() || key.size() > kMaxKey || (count.has_numbers() && key.size() != 8)) {
      bad_page(place.page);
    }
    if (!place.low.empty() && count.order(key, place.low) < 0) bad_page(place.page);
    if (!place.high.empty() && count.order(key, place.high) >= 0) bad_page(place.page);
  }

  // ---- leaves ----------------------------------------------------------------------------------

  // The keys of a leaf lie between those of its place, which ascend from leaf to leaf: so all do.
  void read_leaves(Count& count, const std::vector<Place>& places) {
    take_pages(places);
    count.rows = LmdbRows(count.shape, places.size(), meta_.page_bytes);
    read_pages(places, [&](std::size_t i, ConstBytes page, Desk& desk) {
      read_leaf(count, i, places[i], page, desk);
    });
    count.rows.close_gaps();
  }

  // Key and value. REQUIRES: the value is in the page.
  static ConstBytes record_at(const Node& node) {
    return {node.key.data(), node.key.size() + node.size};
  }

  void read_leaf(Count& count, std::size_t leaf, const Place& place, ConstBytes page, Desk& desk) {
    const auto& nodes = desk.nodes.nodes_of(page, place.page, true);
    if (nodes.empty()) bad_page(place.page);
    std::vector<const Node*> others;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      const Node& node = nodes[i];
      check_bounds(count, node.key, place);
      if (i > 0 && count.order(nodes[i - 1].key, node.key) >= 0) bad_page(place.page);
      if (node.flags != 0 || !count.rows.take(leaf, record_at(node))) others.push_back(&node);
    }
    const std::lock_guard lock(mutex_);
    count.entries += nodes.size();
    for (const Node* node : others) keep(count, *node, page, place.page);
  }

  // REQUIRES: mutex_ is held.
  void keep(Count& count, const Node& node, ConstBytes page, std::uint64_t number) {
    if (node.flags == 0) {
      count.others.emplace_back(copy_of(node.key), copy_of(page.subspan(node.value, node.size)));
      return;
    }
    if (node.flags != kBigValue) bad_page(number);
    const auto first = number_at<std::uint64_t>(page, node.value);
    const std::vector<std::uint8_t> run = take_run(count, first, node.size);
    count.others.emplace_back(copy_of(node.key),
                              copy_of(ConstBytes(run).subspan(kPageHeader, node.size)));
  }

  // The overflow pages of a value of so many bytes; they are more than it needs where a longer one
  // was there before.
  std::vector<std::uint8_t> take_run(Count& count, std::uint64_t first, std::uint64_t value_bytes) {
    const std::uint64_t size = meta_.page_bytes;
    const std::uint64_t least = (kPageHeader + value_bytes + size - 1) / size;
    take_page(first);
    std::vector<std::uint8_t> run(size);
    read(first, run);
    check_number(run, first);
    const std::uint64_t num_pages = number_at<std::uint32_t>(run, 12);
    if (number_at<std::uint16_t>(run, 10) != kOverflow || num_pages < least) bad_page(first);
    if (num_pages > num_pages_ - first || num_pages > meta_.last_page + 1 - first) {
      damaged("page " + std::to_string(first) + " and those behind it are not in the file");
    }
    for (std::uint64_t i = 1; i < num_pages; ++i) mark(first + i);
    run.resize(least * size);
    read(first, run);
    count.overflows += num_pages;
    return run;
  }

  // ---- free pages ------------------------------------------------------------------------------

  void add_free(ConstBytes key, ConstBytes value) {
    const auto transaction = number_at<std::uint64_t>(key, 0);
    if (transaction > meta_.transaction || value.size() < 8 || value.size() % 8 != 0) {
      damaged("the list of free pages");
    }
    const auto count = number_at<std::uint64_t>(value, 0);
    if (count > value.size() / 8 - 1) damaged("the list of free pages");
    std::uint64_t before = kNoPage;
    for (std::uint64_t i = 1; i <= count; ++i) {
      const auto page = number_at<std::uint64_t>(value, 8 * i);
      if (page >= before || page < kFirstPage || page > meta_.last_page) {
        damaged("the list of free pages");
      }
      mark(page);
      before = page;
    }
  }

  // ---- pages -----------------------------------------------------------------------------------

  void take_pages(const std::vector<Place>& places) {
    for (const Place& place : places) take_page(place.page);
  }

  // A page that nothing else uses, within the file.
  void take_page(std::uint64_t number) {
    if (number < kFirstPage || number > meta_.last_page || number >= num_pages_) {
      damaged("page " + std::to_string(number) + " is not in the file");
    }
    mark(number);
  }

  void mark(std::uint64_t page) {
    if (seen_[page] != 0) damaged("page " + std::to_string(page) + " is used twice");
    seen_[page] = 1;
  }

  static void check_number(ConstBytes page, std::uint64_t number) {
    if (number_at<std::uint64_t>(page, 0) != number) bad_page(number);
  }

  // Calls `consume` for each of these pages of one level, from several threads at once.
  void read_pages(const std::vector<Place>& places, const Consume& consume) {
    std::vector<std::size_t> order(places.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return places[a].page < places[b].page; });
    const std::vector<std::size_t> starts = stretches(places, order);
    Desks desks;
    team_.run(starts.size() - 1, [&](std::size_t unit) {
      std::unique_ptr<Desk> desk = desks.take();
      const std::span mine(order.data() + starts[unit], starts[unit + 1] - starts[unit]);
      const std::uint64_t first = places[mine.front()].page;
      const std::uint64_t num_pages = places[mine.back()].page + 1 - first;
      const std::span bytes(desk->bytes.get(), num_pages * meta_.page_bytes);
      read(first, bytes);
      for (const std::size_t i : mine) {
        const std::uint64_t number = places[i].page;
        const ConstBytes page = bytes.subspan((number - first) * meta_.page_bytes, meta_.page_bytes);
        check_number(page, number);
        consume(i, page, *desk);
      }
      desks.give_back(std::move(desk));
    });
  }

  // Where in `order` each read begins, and its end.
  std::vector<std::size_t> stretches(const std::vector<Place>& places,
                                     const std::vector<std::size_t>& order) const {
    std::vector<std::size_t> starts{0};
    for (std::size_t i = 1; i < order.size(); ++i) {
      const std::uint64_t page = places[order[i]].page;
      const std::uint64_t first = places[order[starts.back()]].page;
      const std::uint64_t gap_bytes = (page - places[order[i - 1]].page) * meta_.page_bytes;
      if (gap_bytes > kMaxGapBytes || (page + 1 - first) * meta_.page_bytes > kReadBytes) {
        starts.push_back(i);
      }
    }
    starts.push_back(order.size());
    return starts;
  }

  void read(std::uint64_t first, std::span<std::uint8_t> bytes) const {
    if (source_.read_at(first * meta_.page_bytes, bytes) != bytes.size()) {
      damaged("page " + std::to_string(first) + " and those behind it are not in the file");
    }
  }

  const LmdbSource& source_;
  RowShape shape_;
  WorkerTeam& team_;
  Meta meta_;
  std::uint64_t num_pages_ = 0;  // whole ones in the file
  std::mutex mutex_;
  std::vector<std::uint8_t> seen_;  // by page number: used, or free; guarded while a team reads
};

}  // namespace

LmdbContent read_lmdb(const LmdbSource& source, std::uint64_t max_pages, RowShape shape,
                      WorkerTeam& team) {
  return FileWalk(source, max_pages, shape, team).run();
}

std::optional<std::uint64_t> lmdb_transaction(ConstBytes head) {
  try {
    return lmdb::metas_in(head)[0].transaction;
  } catch (const DamagedFile&) {
    return std::nullopt;
  }
}

}  // namespace tiermem
