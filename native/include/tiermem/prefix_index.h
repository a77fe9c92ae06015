// PrefixIndex: pages of tokens by content. The key of a page is a chain hash,
//
//     root = SHA-256("tiermem prefix root, version 1\0\0" || for each part: length as uint64 ||
//     part) key  = SHA-256(root or the key of the page before || token ids as uint32),
//     little-endian
//
// so that a key names all tokens from the start of a sequence, and means the same in every process.
// Entries form a forest: every entry is a first page (position 0, its parent is a root) or follows
// a page that is in the index too, and goes when that one goes. So what can not be reached is not
// kept. Not thread-safe: one thread owns an index.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "tiermem/huge_pages.h"
#include "tiermem/page_table.h"
#include "tiermem/sha256.h"

namespace tiermem {

using Keys = std::span<const Digest>;
using Bytes = std::span<const std::uint8_t>;

// Keys in memory, `stride_bytes` from one to the next: parts of longer records.
class KeyRows {
 public:
  KeyRows() = default;
  KeyRows(const std::uint8_t* first, std::size_t size, std::size_t stride_bytes)
      : first_(first), size_(size), stride_bytes_(stride_bytes) {}
  KeyRows(const std::vector<Digest>& keys)
      : KeyRows(keys.empty() ? nullptr : keys[0].data(), keys.size(), sizeof(Digest)) {}

  std::size_t size() const { return size_; }
  const Digest& operator[](std::size_t i) const {
    static_assert(sizeof(Digest) == 32 && alignof(Digest) == 1);
    return *reinterpret_cast<const Digest*>(first_ + i * stride_bytes_);
  }

 private:
  const std::uint8_t* first_ = nullptr;
  std::size_t size_ = 0;
  std::size_t stride_bytes_ = 0;
};

class PrefixIndex {
 public:
  // What pages are called. Where `named` is 0 the other three are zeros.
  struct Names {
    std::vector<Digest> keys;
    std::vector<Digest> parents;
    std::vector<std::int64_t> positions;
    std::vector<std::uint8_t> named;
  };

  // Tokens per page. Throws std::invalid_argument unless it is in [1, 2^31).
  explicit PrefixIndex(std::int64_t page_tokens);

  // -- Hashes ------------------------------------------------------------------------------------

  // The parent of every first page whose layout, model, shard and salt are these parts. Different
  // lists of parts have different roots, however their bytes are divided.
  static Digest root_hash(std::span<const Bytes> parts);

  // The key of each whole page of tokens; what is left at the end is not hashed.
  // Throws std::invalid_argument for a token outside [0, 2^32).
  std::vector<Digest> chain(const Digest& parent, std::span<const std::int64_t> tokens) const;
  std::vector<Digest> chain(const Digest& parent, std::span<const std::uint32_t> tokens) const;

  // -- Entries -----------------------------------------------------------------------------------

  // Whether `page` is now what `key` names. It is not if the key is taken, or if the page before it
  // is not in the index (position > 0), so that nothing would ever find it.
  // Throws InvariantError for a page that has a name, and for a position that is not 0 after a root
  // or one more than that of the page before; std::invalid_argument for a position or page id out
  // of range. A call that throws has changed nothing.
  bool insert(const Digest& parent, const Digest& key, PageId page, std::int64_t position);

  // Inserts the entries of a store that is reopened, in any order. Returns the pages that `insert`
  // would not take, and those that follow them or stand at a wrong position. Throws as `insert`,
  // also for a page given twice, and std::invalid_argument for spans of different lengths.
  std::vector<PageId> insert_many(const KeyRows& parents, const KeyRows& keys, PageIds pages,
                                  std::span<const std::int64_t> positions);

  struct Removed {
    std::vector<PageId> pages;
    std::vector<Digest> keys;  // what they were called
  };

  // Takes pages out, and every page that follows one of them. Returns all that went, each after the
  // pages that follow it. Pages without a name are passed over: a page may have died unnamed.
  Removed remove(PageIds pages);

  // The pages of the longest prefix of a chain of keys that is in the index.
  std::vector<PageId> match(Keys keys) const;

  bool contains(const Digest& key) const;
  Names names(PageIds pages) const;

  // Keys alone. Throws InvariantError for a page without a name.
  std::vector<Digest> keys(PageIds pages) const;

  // Every page of the index, each before the pages that follow it.
  std::vector<PageId> pages() const;

  // Raises `last_use`, by the index half of the page id, so that no page was used longer ago than
  // one that follows it: what is evicted by it then leaves no page that can not be reached.
  // Returns whether anything changed. Throws std::invalid_argument where it is too short.
  bool raise_parents(std::span<std::int64_t> last_use) const;

  std::int64_t size() const { return num_named_; }
  std::int64_t page_tokens() const { return page_tokens_; }

 private:
  using NodeIndex = std::int32_t;
  static constexpr NodeIndex kNone = -1;
  static constexpr PageId kNoPage = 0;  // of a root, and of a free node

  // One cache line: an entry, or the root of a tree of entries.
  struct alignas(64) Node {
    Digest key{};
    PageId page = kNoPage;
    NodeIndex parent = kNone;
    NodeIndex first_child = kNone;
    NodeIndex next_sibling = kNone;
    NodeIndex prev_sibling = kNone;
    std::int32_t position = 0;
  };

  Node& node_at(NodeIndex index) { return nodes_[static_cast<std::size_t>(index)]; }
  const Node& node_at(NodeIndex index) const { return nodes_[static_cast<std::size_t>(index)]; }

  void require_insertable(PageId page, std::int64_t position) const;
  void require_insertable(PageIds pages, std::span<const std::int64_t> positions) const;
  bool follows(NodeIndex parent, std::int64_t position) const;
  void insert_node(NodeIndex parent, const Digest& root, const Digest& key, PageId page,
                   std::int64_t position);
  NodeIndex node_of(PageId page) const;
  NodeIndex new_node(const Digest& key);
  void reserve(PageIds pages, std::size_t num_roots);  // room for those pages, and new roots
  void adopt(NodeIndex parent, NodeIndex child);
  NodeIndex remove_leaf(NodeIndex node);  // returns its parent
  NodeIndex deepest(NodeIndex node) const;

  // The hash table from key to node: open addressing, linear probing, at most half full.
  std::size_t home_of(const Digest& key) const;
  std::size_t find_cell(const Digest& key) const;  // of the key, or the empty one where it would be
  NodeIndex find(const Digest& key) const;
  void rehash(std::size_t num_cells);
  void erase_cell(std::size_t cell);

  std::int64_t page_tokens_;
  std::int64_t num_named_ = 0;
  std::vector<Node, HugePageAllocator<Node>> nodes_;
  std::vector<NodeIndex> free_nodes_;
  std::vector<NodeIndex, HugePageAllocator<NodeIndex>> cells_;         // a power of two of them
  std::vector<NodeIndex, HugePageAllocator<NodeIndex>> node_of_page_;  // by the id's index half
};

}  // namespace tiermem
