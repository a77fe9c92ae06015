// Entries of the prefix index: a forest of nodes, and a hash table over their keys.
#include "tiermem/prefix_index.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "tiermem/errors.h"

namespace tiermem {
namespace {

constexpr std::size_t kMinCells = 64;
constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

std::size_t page_number(PageId page) { return static_cast<std::size_t>(page & 0xffffffff); }

// Places in `positions` by ascending position, equal ones as they are.
std::vector<std::uint32_t> order_of(std::span<const std::int64_t> positions) {
  std::vector<std::uint32_t> order(positions.size());
  const std::int64_t most = positions.empty() ? 0 : *std::ranges::max_element(positions);
  if (static_cast<std::size_t>(most) > positions.size()) {  // chains with gaps: nothing to count
    std::iota(order.begin(), order.end(), std::uint32_t{0});
    std::ranges::stable_sort(order, {}, [&](std::uint32_t i) { return positions[i]; });
    return order;
  }
  std::vector<std::uint32_t> next(static_cast<std::size_t>(most) + 2);
  for (const std::int64_t position : positions) ++next[static_cast<std::size_t>(position) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (std::uint32_t i = 0; i < order.size(); ++i) {
    order[next[static_cast<std::size_t>(positions[i])]++] = i;
  }
  return order;
}

std::string text_of(PageId page) { return "page " + std::to_string(page); }

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t page_tokens)
    : page_tokens_(page_tokens), cells_(kMinCells, kNone) {
  if (page_tokens < 1 || page_tokens > kMaxInt32) {
    throw std::invalid_argument("page_tokens=" + std::to_string(page_tokens) +
                                ": must be in [1, 2147483647]");
  }
}

// -- Hash table
// ------------------------------------------------------------------------------------

// Keys are hashes already: any eight bytes of one are as good as all.
std::size_t PrefixIndex::home_of(const Digest& key) const {
  std::size_t word = 0;
  std::memcpy(&word, key.data(), sizeof(word));
  return word & (cells_.size() - 1);
}

std::size_t PrefixIndex::find_cell(const Digest& key) const {
  std::size_t cell = home_of(key);
  while (cells_[cell] != kNone && node_at(cells_[cell]).key != key) {
    cell = (cell + 1) & (cells_.size() - 1);
  }
  return cell;
}

PrefixIndex::NodeIndex PrefixIndex::find(const Digest& key) const { return cells_[find_cell(key)]; }

void PrefixIndex::rehash(std::size_t num_cells) {
  std::vector<NodeIndex, HugePageAllocator<NodeIndex>> old(num_cells, kNone);
  old.swap(cells_);
  for (const NodeIndex node : old) {
    if (node != kNone) cells_[find_cell(node_at(node).key)] = node;
  }
}

// Moves later keys of the run back, so that no search ends too early at the new gap.
void PrefixIndex::erase_cell(std::size_t gap) {
  const std::size_t mask = cells_.size() - 1;
  cells_[gap] = kNone;
  for (std::size_t cell = (gap + 1) & mask; cells_[cell] != kNone; cell = (cell + 1) & mask) {
    const std::size_t home = home_of(node_at(cells_[cell]).key);
    if (((cell - home) & mask) < ((cell - gap) & mask)) continue;  // its home is after the gap
    std::swap(cells_[gap], cells_[cell]);
    gap = cell;
  }
}

// -- Nodes
// -----------------------------------------------------------------------------------------

// Room for new nodes, so that nothing can fail once the first is made.
void PrefixIndex::reserve(PageIds pages, std::size_t num_roots) {
  const std::size_t wanted = nodes_.size() - free_nodes_.size() + pages.size() + num_roots;
  if (wanted > static_cast<std::size_t>(kMaxInt32)) {
    throw InvariantError("insert: the index would have " + std::to_string(wanted) +
                         " nodes: must be at most 2147483647");
  }
  if (wanted > nodes_.capacity()) nodes_.reserve(std::max(wanted, 2 * nodes_.capacity()));
  if (free_nodes_.capacity() < nodes_.capacity()) free_nodes_.reserve(nodes_.capacity());
  std::size_t num_cells = cells_.size();
  while (num_cells < 2 * wanted) num_cells *= 2;
  if (num_cells > cells_.size()) rehash(num_cells);
  std::size_t num_pages = node_of_page_.size();
  for (const PageId page : pages) num_pages = std::max(num_pages, page_number(page) + 1);
  if (num_pages > node_of_page_.capacity()) {
    node_of_page_.reserve(std::max(num_pages, 2 * node_of_page_.capacity()));
  }
  node_of_page_.resize(num_pages, kNone);
}

PrefixIndex::NodeIndex PrefixIndex::new_node(const Digest& key) {
  NodeIndex node = static_cast<NodeIndex>(nodes_.size());
  if (free_nodes_.empty()) {
    nodes_.emplace_back();
  } else {
    node = free_nodes_.back();
    free_nodes_.pop_back();
  }
  node_at(node).key = key;
  cells_[find_cell(key)] = node;
  return node;
}

void PrefixIndex::adopt(NodeIndex parent, NodeIndex child) {
  Node& above = node_at(parent);
  Node& below = node_at(child);
  below.parent = parent;
  below.next_sibling = above.first_child;
  if (above.first_child != kNone) {
    node_at(above.first_child).prev_sibling = child;
  }
  above.first_child = child;
}

PrefixIndex::NodeIndex PrefixIndex::remove_leaf(NodeIndex index) {
  Node& node = node_at(index);
  const NodeIndex parent = node.parent;
  erase_cell(find_cell(node.key));
  if (node.next_sibling != kNone) {
    node_at(node.next_sibling).prev_sibling = node.prev_sibling;
  }
  if (node.prev_sibling != kNone) {
    node_at(node.prev_sibling).next_sibling = node.next_sibling;
  } else if (parent != kNone) {
    node_at(parent).first_child = node.next_sibling;
  }
  if (node.page != kNoPage) {
    node_of_page_[page_number(node.page)] = kNone;
    --num_named_;
  }
  node = Node{};
  free_nodes_.push_back(index);
  return parent;
}

PrefixIndex::NodeIndex PrefixIndex::deepest(NodeIndex node) const {
  while (node_at(node).first_child != kNone) {
    node = node_at(node).first_child;
  }
  return node;
}

PrefixIndex::NodeIndex PrefixIndex::node_of(PageId page) const {
  if (page <= 0 || page_number(page) >= node_of_page_.size()) return kNone;
  const NodeIndex node = node_of_page_[page_number(page)];
  if (node == kNone || node_at(node).page != page) return kNone;
  return node;
}

// -- Entries
// ---------------------------------------------------------------------------------------

void PrefixIndex::require_insertable(PageId page, std::int64_t position) const {
  if (page <= 0 || page_number(page) > static_cast<std::size_t>(kMaxInt32)) {
    throw std::invalid_argument("insert: " + text_of(page) + ": must be the id of a page");
  }
  if (position < 0 || position > kMaxInt32) {
    throw std::invalid_argument("insert: position=" + std::to_string(position) +
                                ": must be in [0, 2147483647]");
  }
  const std::size_t number = page_number(page);
  if (number < node_of_page_.size() && node_of_page_[number] != kNone) {
    const PageId named = node_at(node_of_page_[number]).page;
    throw InvariantError("insert: " + text_of(page) + ": must not have a name; " + text_of(named) +
                         " has");
  }
}

// Whether a page at `position` may stand under `parent`; kNone and nodes without a page are roots.
bool PrefixIndex::follows(NodeIndex parent, std::int64_t position) const {
  if (parent == kNone) return position == 0;
  const Node& node = node_at(parent);
  return node.page == kNoPage ? position == 0 : position == node.position + 1;
}

// REQUIRES: the checks of `insert` passed, and reserve() for the page.
void PrefixIndex::insert_node(NodeIndex parent, const Digest& root, const Digest& key, PageId page,
                              std::int64_t position) {
  if (parent == kNone) parent = new_node(root);
  const NodeIndex index = new_node(key);
  Node& node = node_at(index);
  node.page = page;
  node.position = static_cast<std::int32_t>(position);
  adopt(parent, index);
  node_of_page_[page_number(page)] = index;
  ++num_named_;
}

bool PrefixIndex::insert(const Digest& parent, const Digest& key, PageId page,
                         std::int64_t position) {
  require_insertable(page, position);
  const NodeIndex above = find(parent);
  if (find(key) != kNone || (above == kNone && position > 0)) return false;
  if (!follows(above, position) || parent == key) {
    throw InvariantError("insert: " + text_of(page) + " at position " + std::to_string(position) +
                         ": must be 0 after a root, else one more than that of the page before");
  }
  reserve({&page, 1}, 1);
  insert_node(above, parent, key, page, position);
  return true;
}

void PrefixIndex::require_insertable(PageIds pages,
                                     std::span<const std::int64_t> positions) const {
  std::size_t most = 0;
  for (std::size_t i = 0; i < pages.size(); ++i) {
    require_insertable(pages[i], positions[i]);
    most = std::max(most, page_number(pages[i]));
  }
  std::vector<bool> given(pages.empty() ? 0 : most + 1);
  for (const PageId page : pages) {
    if (given[page_number(page)]) {
      throw InvariantError("insert_many: " + text_of(page) + ": must be given once");
    }
    given[page_number(page)] = true;
  }
}

std::vector<PageId> PrefixIndex::insert_many(const KeyRows& parents, const KeyRows& keys,
                                             PageIds pages,
                                             std::span<const std::int64_t> positions) {
  const std::size_t count = pages.size();
  if (parents.size() != count || keys.size() != count || positions.size() != count) {
    throw std::invalid_argument("insert_many: parents, keys, pages and positions differ in length");
  }
  require_insertable(pages, positions);
  reserve(pages, static_cast<std::size_t>(std::count(positions.begin(), positions.end(), 0)));
  const std::vector<std::uint32_t> order = order_of(positions);
  std::vector<PageId> strays;
  for (const std::uint32_t i : order) {
    const NodeIndex above = find(parents[i]);
    if (find(keys[i]) != kNone || parents[i] == keys[i] || !follows(above, positions[i])) {
      strays.push_back(pages[i]);
    } else {
      insert_node(above, parents[i], keys[i], pages[i], positions[i]);
    }
  }
  return strays;
}

PrefixIndex::Removed PrefixIndex::remove(PageIds pages) {
  Removed removed;
  const auto remove_next = [&](NodeIndex node) {
    removed.pages.push_back(node_at(node).page);
    removed.keys.push_back(node_at(node).key);
    return remove_leaf(node);
  };
  for (const PageId page : pages) {
    const NodeIndex top = node_of(page);
    if (top == kNone) continue;
    NodeIndex node = deepest(top);
    NodeIndex parent = remove_next(node);
    while (node != top) {
      node = deepest(parent);
      parent = remove_next(node);
    }
    const Node& above = node_at(parent);
    if (above.page == kNoPage && above.first_child == kNone) remove_leaf(parent);
  }
  return removed;
}

std::vector<PageId> PrefixIndex::match(Keys keys) const {
  std::vector<PageId> pages;
  for (const Digest& key : keys) {
    const NodeIndex node = find(key);
    if (node == kNone || node_at(node).page == kNoPage) break;
    pages.push_back(node_at(node).page);
  }
  return pages;
}

bool PrefixIndex::contains(const Digest& key) const { return !match({&key, 1}).empty(); }

PrefixIndex::Names PrefixIndex::names(PageIds pages) const {
  Names names;
  for (const PageId page : pages) {
    const NodeIndex index = node_of(page);
    const Node node = index == kNone ? Node{} : node_at(index);
    names.keys.push_back(node.key);
    names.parents.push_back(index == kNone ? Digest{} : node_at(node.parent).key);
    names.positions.push_back(node.position);
    names.named.push_back(index != kNone);
  }
  return names;
}

std::vector<Digest> PrefixIndex::keys(PageIds pages) const {
  std::vector<Digest> keys;
  for (const PageId page : pages) {
    const NodeIndex node = node_of(page);
    if (node == kNone) throw InvariantError("keys: " + text_of(page) + ": must have a name");
    keys.push_back(node_at(node).key);
  }
  return keys;
}

std::vector<PageId> PrefixIndex::pages() const {
  std::vector<NodeIndex> ahead;
  for (const Node& node : nodes_) {
    if (node.page == kNoPage && node.first_child != kNone) ahead.push_back(node.first_child);
  }
  std::vector<PageId> pages;
  pages.reserve(static_cast<std::size_t>(num_named_));
  while (!ahead.empty()) {
    const Node& node = node_at(ahead.back());
    ahead.pop_back();
    pages.push_back(node.page);
    if (node.next_sibling != kNone) ahead.push_back(node.next_sibling);
    if (node.first_child != kNone) ahead.push_back(node.first_child);
  }
  return pages;
}

// By position, last ones first: after a store was opened that is the order in memory, backwards.
bool PrefixIndex::raise_parents(std::span<std::int64_t> last_use) const {
  std::vector<std::int64_t> positions;
  positions.reserve(nodes_.size());
  for (const Node& node : nodes_) {
    positions.push_back(node.position);
    if (node.page != kNoPage && page_number(node.page) >= last_use.size()) {
      throw std::invalid_argument("raise_parents: " + text_of(node.page) + ": must be among the " +
                                  std::to_string(last_use.size()) + " that were given");
    }
  }
  bool changed = false;
  const std::vector<std::uint32_t> order = order_of(positions);
  for (auto index = order.rbegin(); index != order.rend(); ++index) {
    const Node& below = nodes_[*index];
    if (below.position == 0) continue;  // a root, a first page or none
    const Node& above = node_at(below.parent);
    const std::int64_t used = last_use[page_number(below.page)];
    std::int64_t& parent_used = last_use[page_number(above.page)];
    changed |= used > parent_used;
    parent_used = std::max(parent_used, used);
  }
  return changed;
}

}  // namespace tiermem
