// The walk over an LMDB file. Every offset is checked before it is followed.
#include "tiermem/lmdb_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>

namespace tiermem {
namespace {

constexpr std::size_t kPageHeader = 16;
constexpr std::size_t kNodeHeader = 8;
constexpr std::size_t kMetaEnd = 152;
constexpr std::size_t kMinPage = 4096;  // smaller ones are legal, but no machine of ours makes them
constexpr std::size_t kMaxPage = 65536;
constexpr std::size_t kMaxKey = 511;
constexpr std::uint32_t kMagic = 0xbeefc0de;
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kNoPage = ~std::uint64_t{0};
constexpr std::uint16_t kBranch = 1, kLeaf = 2, kOverflow = 4, kMeta = 8;  // page flags
constexpr std::uint16_t kBigValue = 1;                                     // node flags
constexpr std::uint16_t kIntegerKeys = 8;                                  // tree flags
constexpr int kMaxDepth = 32;
constexpr std::uint64_t kFirstPage = 2;  // behind the meta pages

template <class Number>
Number number_at(ConstBytes bytes, std::size_t offset) {
  Number number = 0;
  std::memcpy(&number, bytes.data() + offset, sizeof(number));
  return number;
}

[[noreturn]] void damaged(const std::string& what) { throw DamagedFile(what); }

struct Tree {
  std::uint16_t flags = 0;
  std::uint16_t depth = 0;
  std::uint64_t branches = 0;
  std::uint64_t leaves = 0;
  std::uint64_t overflows = 0;
  std::uint64_t entries = 0;
  std::uint64_t root = kNoPage;
};

struct Meta {
  std::uint64_t page_bytes = 0;
  Tree free;
  Tree main;
  std::uint64_t last_page = 0;
  std::uint64_t transaction = 0;
};

Tree tree_at(ConstBytes page, std::size_t offset) {
  const auto word = [&](std::size_t i) {
    return number_at<std::uint64_t>(page, offset + 8 + 8 * i);
  };
  return {number_at<std::uint16_t>(page, offset + 4), number_at<std::uint16_t>(page, offset + 6),
          word(0), word(1), word(2), word(3), word(4)};
}

Meta meta_at(ConstBytes file, std::uint64_t number, std::uint64_t page_bytes) {
  const std::uint64_t start = number * page_bytes;
  if (file.size() < start + kMetaEnd) damaged("the file ends in its meta pages");
  const ConstBytes page = file.subspan(start);
  if (number_at<std::uint64_t>(page, 0) != number || number_at<std::uint16_t>(page, 10) != kMeta ||
      number_at<std::uint32_t>(page, 16) != kMagic ||
      number_at<std::uint32_t>(page, 20) != kVersion) {
    damaged("page " + std::to_string(number) + " is not a meta page of LMDB's data version 1");
  }
  Meta meta;
  meta.page_bytes = number_at<std::uint32_t>(page, 40);
  meta.free = tree_at(page, 40);
  meta.main = tree_at(page, 88);
  meta.last_page = number_at<std::uint64_t>(page, 136);
  meta.transaction = number_at<std::uint64_t>(page, 144);
  return meta;
}

// Both, the one in force first. Of equal transactions LMDB takes the first page.
std::array<Meta, 2> metas_in(ConstBytes file) {
  const Meta first = meta_at(file, 0, 0);
  const std::uint64_t size = first.page_bytes;
  if (size < kMinPage || size > kMaxPage || (size & (size - 1)) != 0) {
    damaged("pages of " + std::to_string(size) + " bytes");
  }
  const Meta second = meta_at(file, 1, size);
  if (second.page_bytes != size) damaged("the meta pages differ in the size of a page");
  if (first.transaction < second.transaction) return {second, first};
  return {first, second};
}

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

// One node of a branch or leaf page, inside its page.
struct Node {
  std::size_t start = 0;
  std::size_t end = 0;  // rounded up to even, as nodes are
  std::uint32_t size = 0;
  std::uint64_t child = 0;
  std::uint16_t flags = 0;
  ConstBytes key;
  std::size_t value = 0;  // where it starts in the page
};

class FileWalk {
 public:
  FileWalk(ConstBytes file, std::uint64_t max_pages, const RecordVisitor& visit)
      : file_(file), visit_(visit), meta_(metas_in(file)[0]) {
    if (meta_.last_page < 1 || meta_.last_page >= max_pages) {
      damaged("last page " + std::to_string(meta_.last_page) + " of at most " +
              std::to_string(max_pages));
    }
    seen_.resize(meta_.last_page + 1);
    seen_[0] = seen_[1] = 1;
  }

  std::uint64_t run() {
    if (meta_.free.flags != kIntegerKeys || meta_.main.flags != 0) damaged("flags of a tree");
    walk(meta_.main, compare, [this](ConstBytes key, ConstBytes value) { visit_(key, value); });
    walk(meta_.free, compare_numbers,
         [this](ConstBytes key, ConstBytes value) { add_free(key, value); });
    const std::uint64_t whole = file_.size() / meta_.page_bytes;
    for (std::uint64_t page = whole; page <= meta_.last_page; ++page) {
      if (seen_[page] == 0) damaged("page " + std::to_string(page) + " is behind the file's end");
    }
    return meta_.transaction;
  }

 private:
  using Compare = int (*)(ConstBytes, ConstBytes);

  // What a walk through one tree has counted so far.
  struct Count {
    const Tree& tree;
    Compare order;
    const RecordVisitor& visit;
    std::uint64_t branches = 0;
    std::uint64_t leaves = 0;
    std::uint64_t overflows = 0;
    std::uint64_t entries = 0;
    ConstBytes last{};  // the key before
    bool is_main = false;
  };

  void walk(const Tree& tree, Compare order, const RecordVisitor& visit) {
    Count count{tree, order, visit};
    count.is_main = &tree == &meta_.main;
    if (tree.root == kNoPage) {
      if (tree.depth != 0) damaged("a tree without a root is not empty");
    } else {
      if (tree.depth < 1 || tree.depth > kMaxDepth) damaged("depth of a tree");
      descend(count, tree.root, 1, nullptr, nullptr);
    }
    if (count.branches != tree.branches || count.leaves != tree.leaves ||
        count.overflows != tree.overflows || count.entries != tree.entries) {
      damaged("a tree does not have the pages and entries that its meta page names");
    }
  }

  // Verifies the page and all below it: keys are at least *low and below *high.
  void descend(Count& count, std::uint64_t number, int depth, const ConstBytes* low,
               const ConstBytes* high) {
    const ConstBytes page = take_page(number);
    const bool is_leaf = depth == count.tree.depth;
    if (number_at<std::uint16_t>(page, 10) != (is_leaf ? kLeaf : kBranch)) bad_page(number);
    const std::vector<Node> nodes = nodes_of(page, number, is_leaf);
    if (nodes.size() < (is_leaf || !count.is_main ? 1U : 2U)) bad_page(number);
    ++(is_leaf ? count.leaves : count.branches);
    if (!is_leaf) {
      check_separators(count, nodes, low, high, number);
      for (std::size_t i = 0; i < nodes.size(); ++i) {
        const ConstBytes* from = i == 0 ? low : &nodes[i].key;
        const ConstBytes* to = i + 1 < nodes.size() ? &nodes[i + 1].key : high;
        descend(count, nodes[i].child, depth + 1, from, to);
      }
      return;
    }
    for (const Node& node : nodes) {
      check_key(count, node.key, low, high, number);
      visit_leaf(count, node, page, number);
    }
  }

  // The first key of a branch stands for everything below the second; its bytes mean nothing.
  void check_separators(const Count& count, const std::vector<Node>& nodes, const ConstBytes* low,
                        const ConstBytes* high, std::uint64_t number) const {
    for (std::size_t i = 1; i < nodes.size(); ++i) {
      check_bounds(count, nodes[i].key, low, high, number);
      if (i > 1 && count.order(nodes[i - 1].key, nodes[i].key) >= 0) bad_page(number);
    }
  }

  void check_key(Count& count, ConstBytes key, const ConstBytes* low, const ConstBytes* high,
                 std::uint64_t number) {
    check_bounds(count, key, low, high, number);
    if (count.entries > 0 && count.order(count.last, key) >= 0) bad_page(number);
    ++count.entries;
    count.last = key;
  }

  void check_bounds(const Count& count, ConstBytes key, const ConstBytes* low,
                    const ConstBytes* high, std::uint64_t number) const {
    if (key.empty() || key.size() > kMaxKey || (!count.is_main && key.size() != 8)) {
      bad_page(number);
    }
    if (low != nullptr && count.order(key, *low) < 0) bad_page(number);
    if (high != nullptr && count.order(key, *high) >= 0) bad_page(number);
  }

  void visit_leaf(Count& count, const Node& node, ConstBytes page, std::uint64_t number) {
    if (node.flags == 0) {
      count.visit(node.key, page.subspan(node.value, node.size));
      return;
    }
    if (node.flags != kBigValue) bad_page(number);
    const auto first = number_at<std::uint64_t>(page, node.value);
    const std::uint64_t size = meta_.page_bytes;
    const std::uint64_t least = (kPageHeader + node.size + size - 1) / size;
    const ConstBytes head = take_page(first);
    // More than the value needs where a longer one was there before.
    const std::uint64_t num_pages = number_at<std::uint32_t>(head, 12);
    if (number_at<std::uint16_t>(head, 10) != kOverflow || num_pages < least) bad_page(first);
    const ConstBytes run = take_run(first, num_pages);
    count.overflows += num_pages;
    count.visit(node.key, run.subspan(kPageHeader, node.size));
  }

  // The nodes of a page, in the order of its table; they fill it from `upper` to the end.
  std::vector<Node> nodes_of(ConstBytes page, std::uint64_t number, bool is_leaf) const {
    const auto lower = number_at<std::uint16_t>(page, 12);
    const auto upper = number_at<std::uint16_t>(page, 14);
    if (lower < kPageHeader || lower % 2 != 0 || lower > upper || upper > page.size()) {
      bad_page(number);
    }
    std::vector<Node> nodes((lower - kPageHeader) / 2);
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      const auto start = number_at<std::uint16_t>(page, kPageHeader + 2 * i);
      nodes[i] = node_at(page, number, start, upper, is_leaf);
    }
    std::vector<std::pair<std::size_t, std::size_t>> places;
    places.reserve(nodes.size());
    for (const Node& node : nodes) places.emplace_back(node.start, node.end);
    std::sort(places.begin(), places.end());
    std::size_t at = upper;
    for (const auto& [start, end] : places) {
      if (start != at) bad_page(number);
      at = end;
    }
    if (at != page.size()) bad_page(number);
    return nodes;
  }

  Node node_at(ConstBytes page, std::uint64_t number, std::size_t start, std::size_t upper,
               bool is_leaf) const {
    if (start < upper || start % 2 != 0 || start + kNodeHeader > page.size()) bad_page(number);
    Node node;
    node.start = start;
    node.size = number_at<std::uint32_t>(page, start);
    node.flags = number_at<std::uint16_t>(page, start + 4);
    node.child = node.size | std::uint64_t{node.flags} << 32;
    const std::size_t key_bytes = number_at<std::uint16_t>(page, start + 6);
    node.value = start + kNodeHeader + key_bytes;
    const std::size_t value_bytes =
        !is_leaf ? 0 : (node.flags == kBigValue ? sizeof(std::uint64_t) : node.size);
    node.end = node.value + value_bytes;
    node.end += node.end % 2;
    if (node.end > page.size()) bad_page(number);
    node.key = page.subspan(start + kNodeHeader, key_bytes);
    return node;
  }

  // A page that nothing else uses, within the file.
  ConstBytes take_page(std::uint64_t number) {
    const std::uint64_t size = meta_.page_bytes;
    if (number < kFirstPage || number > meta_.last_page || number >= file_.size() / size) {
      damaged("page " + std::to_string(number) + " is not in the file");
    }
    mark(number);
    const ConstBytes page = file_.subspan(number * size, size);
    if (number_at<std::uint64_t>(page, 0) != number) bad_page(number);
    return page;
  }

  // The pages from `first` on, which was taken.
  ConstBytes take_run(std::uint64_t first, std::uint64_t num_pages) {
    const std::uint64_t size = meta_.page_bytes;
    if (num_pages > file_.size() / size - first || num_pages > meta_.last_page + 1 - first) {
      damaged("page " + std::to_string(first) + " and those behind it are not in the file");
    }
    for (std::uint64_t i = 1; i < num_pages; ++i) mark(first + i);
    return file_.subspan(first * size, num_pages * size);
  }

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

  void mark(std::uint64_t page) {
    if (seen_[page] != 0) damaged("page " + std::to_string(page) + " is used twice");
    seen_[page] = 1;
  }

  [[noreturn]] static void bad_page(std::uint64_t number) {
    damaged("page " + std::to_string(number) + " is damaged");
  }

  ConstBytes file_;
  const RecordVisitor& visit_;
  Meta meta_;
  std::vector<std::uint8_t> seen_;  // by page number: used, or free
};

}  // namespace

std::uint64_t read_lmdb(ConstBytes file, std::uint64_t max_pages, const RecordVisitor& visit) {
  return FileWalk(file, max_pages, visit).run();
}

std::optional<std::uint64_t> lmdb_transaction(ConstBytes head) {
  try {
    return metas_in(head)[0].transaction;
  } catch (const DamagedFile&) {
    return std::nullopt;
  }
}

}  // namespace tiermem
