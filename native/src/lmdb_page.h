// One page of an LMDB file: meta pages, and the nodes of branch and leaf pages. Every offset is
// checked before it is followed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tiermem/lmdb_file.h"

namespace tiermem::lmdb {

inline constexpr std::size_t kPageHeader = 16;
inline constexpr std::uint64_t kNoPage = ~std::uint64_t{0};
inline constexpr std::uint64_t kFirstPage = 2;  // behind the meta pages
inline constexpr std::size_t kMaxPage = 65536;
inline constexpr std::uint16_t kBranch = 1, kLeaf = 2, kOverflow = 4;  // page flags
inline constexpr std::uint16_t kBigValue = 1;                          // node flags
inline constexpr std::uint16_t kIntegerKeys = 8;                       // tree flags

template <class Number>
Number number_at(ConstBytes bytes, std::size_t offset) {
  Number number = 0;
  std::memcpy(&number, bytes.data() + offset, sizeof(number));
  return number;
}

[[noreturn]] void damaged(const std::string& what);
[[noreturn]] void bad_page(std::uint64_t number);

struct Tree {
  std::uint32_t pad = 0;
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

// Both meta pages, the one in force first. `head` is at least the first two pages, if the file is
// as long. Throws DamagedFile.
std::array<Meta, 2> metas_in(ConstBytes head);

// One node of a branch or leaf page, inside its page.
struct Node {
  std::size_t start = 0;
  std::size_t end = 0;  // rounded up to even, as nodes are
  std::uint32_t size = 0;
  std::uint64_t child = 0;
  std::uint16_t flags = 0;
  ConstBytes key;
  std::size_t value = 0;  // where it starts in the page; of a leaf's node behind the key
};

// The nodes of one page after the other, in memory that is used again.
class NodeReader {
 public:
  // The nodes of a leaf or branch page, in the order of its table; they fill it from `upper` to the
  // end. Valid until the next call. Throws DamagedFile, also for a page of another kind.
  const std::vector<Node>& nodes_of(ConstBytes page, std::uint64_t number, bool is_leaf);

 private:
  std::vector<Node> nodes_;
  std::vector<std::pair<std::size_t, std::size_t>> places_;
};

}  // namespace tiermem::lmdb
