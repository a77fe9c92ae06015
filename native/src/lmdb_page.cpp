#include "lmdb_page.h"

#include <algorithm>

namespace tiermem::lmdb {
namespace {

constexpr std::size_t kNodeHeader = 8;
constexpr std::size_t kMetaEnd = 152;
constexpr std::size_t kMinPage = 4096;  // smaller ones are legal, but no machine of ours makes them
constexpr std::uint32_t kMagic = 0xbeefc0de;
constexpr std::uint32_t kVersion = 1;
constexpr std::uint16_t kMeta = 8;  // page flags

Tree tree_at(ConstBytes page, std::size_t offset) {
  const auto word = [&](std::size_t i) {
    return number_at<std::uint64_t>(page, offset + 8 + 8 * i);
  };
  return {number_at<std::uint32_t>(page, offset),
          number_at<std::uint16_t>(page, offset + 4),
          number_at<std::uint16_t>(page, offset + 6),
          word(0),
          word(1),
          word(2),
          word(3),
          word(4)};
}

Meta meta_at(ConstBytes head, std::uint64_t number, std::uint64_t page_bytes) {
  const std::uint64_t start = number * page_bytes;
  if (head.size() < start + kMetaEnd) damaged("the file ends in its meta pages");
  const ConstBytes page = head.subspan(start);
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

Node node_at(ConstBytes page, std::uint64_t number, std::size_t start, std::size_t upper,
             bool is_leaf) {
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

}  // namespace

void damaged(const std::string& what) { throw DamagedFile(what); }

void bad_page(std::uint64_t number) { damaged("page " + std::to_string(number) + " is damaged"); }

// Of equal transactions LMDB takes the first page.
std::array<Meta, 2> metas_in(ConstBytes head) {
  const Meta first = meta_at(head, 0, 0);
  const std::uint64_t size = first.page_bytes;
  if (size < kMinPage || size > kMaxPage || (size & (size - 1)) != 0) {
    damaged("pages of " + std::to_string(size) + " bytes");
  }
  const Meta second = meta_at(head, 1, size);
  if (second.page_bytes != size) damaged("the meta pages differ in the size of a page");
  if (first.transaction < second.transaction) return {second, first};
  return {first, second};
}

const std::vector<Node>& NodeReader::nodes_of(ConstBytes page, std::uint64_t number, bool is_leaf) {
  if (number_at<std::uint16_t>(page, 10) != (is_leaf ? kLeaf : kBranch)) bad_page(number);
  const auto lower = number_at<std::uint16_t>(page, 12);
  const auto upper = number_at<std::uint16_t>(page, 14);
  if (lower < kPageHeader || lower % 2 != 0 || lower > upper || upper > page.size()) {
    bad_page(number);
  }
  nodes_.clear();
  places_.clear();
  for (std::size_t at = kPageHeader; at < lower; at += 2) {
    const auto start = number_at<std::uint16_t>(page, at);
    const Node& node = nodes_.emplace_back(node_at(page, number, start, upper, is_leaf));
    places_.emplace_back(node.start, node.end);
  }
  std::sort(places_.begin(), places_.end());
  std::size_t at = upper;
  for (const auto& [start, end] : places_) {
    if (start != at) bad_page(number);
    at = end;
  }
  if (at != page.size()) bad_page(number);
  return nodes_;
}

}  // namespace tiermem::lmdb
