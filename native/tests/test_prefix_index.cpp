// The prefix index: known hashes, each refusal, and random trees against a slow oracle.
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <string_view>

#include "check.h"
#include "tiermem/errors.h"
#include "tiermem/prefix_index.h"

namespace {

using tiermem::Bytes;
using tiermem::Digest;
using tiermem::InvariantError;
using tiermem::PageId;
using tiermem::PrefixIndex;

using Ids = std::vector<PageId>;
using Positions = std::vector<std::int64_t>;

constexpr PageId kFirst = PageId{1} << 32;

PageId page(int number) { return kFirst + number; }

Digest digest(std::uint64_t number) {
  tiermem::Sha256 hash;
  hash.update({reinterpret_cast<const std::uint8_t*>(&number), sizeof(number)});
  return hash.finish();
}

std::string hex(const Digest& digest) {
  std::string text;
  for (const std::uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

Digest root_of(const std::vector<std::string>& parts) {
  std::vector<Bytes> spans;
  for (const std::string& part : parts) {
    spans.emplace_back(reinterpret_cast<const std::uint8_t*>(part.data()), part.size());
  }
  return PrefixIndex::root_hash(spans);
}

void test_roots_are_unambiguous() {
  const std::vector<std::vector<std::string>> lists = {
      {}, {""}, {"", ""}, {"a"}, {"a", ""}, {"", "a"}, {"ab"}, {"a", "b"}, {"ab", ""}, {"b", "a"}};
  std::set<Digest> roots;
  for (const auto& list : lists) roots.insert(root_of(list));
  CHECK(roots.size() == lists.size());
}

void test_known_hashes() {
  // Computed with Python's hashlib from the formula in prefix_index.h.
  CHECK(hex(root_of({"a", "b"})) ==
        "771717f3f83fb728fd7b81efe89df7ab6ff0b8ad649789f099518b1d43f6f107");
  const PrefixIndex index(4);
  const std::vector<std::int64_t> tokens = {0, 1, 2, 3, 4, 5, 6, 4294967295, 8};
  const std::vector<std::uint32_t> same(tokens.begin(), tokens.end());
  const auto keys = index.chain(root_of({"a", "b"}), tokens);
  CHECK(keys.size() == 2);
  CHECK(hex(keys[0]) == "ffd8aa6081a0ef9f0ce0b7a2978349f2ae514b435b3b2d090f723733963fa27c");
  CHECK(hex(keys[1]) == "a9af5a58a799455f05644a15955d4d595023d90710532c2403ac4464c7c212ff");
  CHECK(index.chain(root_of({"a", "b"}), same) == keys);
  CHECK(index.chain(keys[0], std::span(tokens).subspan(4))[0] == keys[1]);
  CHECK(index.chain(keys[0], std::span(tokens).first(3)).empty());
}

void test_bad_numbers() {
  CHECK_THROWS(std::invalid_argument, PrefixIndex(0));
  CHECK_THROWS(std::invalid_argument, PrefixIndex(std::int64_t{1} << 31));
  PrefixIndex index(2);
  for (const std::int64_t token : {std::int64_t{-1}, std::int64_t{1} << 32}) {
    CHECK_THROWS(std::invalid_argument, index.chain(digest(0), std::vector{token, token}));
  }
  for (const PageId bad : {PageId{0}, PageId{-1}, PageId{0xffffffff}}) {
    CHECK_THROWS(std::invalid_argument, index.insert(digest(0), digest(1), bad, 0));
  }
  for (const std::int64_t position : {std::int64_t{-1}, std::int64_t{1} << 31}) {
    CHECK_THROWS(std::invalid_argument, index.insert(digest(0), digest(1), page(0), position));
  }
  CHECK(index.size() == 0);
}

void test_insert() {
  PrefixIndex index(16);
  CHECK(index.insert(digest(0), digest(1), page(1), 0));
  CHECK(!index.insert(digest(0), digest(1), page(2), 0));  // taken
  CHECK(!index.insert(digest(8), digest(9), page(2), 4));  // the page before is not there
  CHECK(index.insert(digest(1), digest(2), page(2), 1));
  CHECK_THROWS(InvariantError, index.insert(digest(2), digest(3), page(2), 2));  // has a name
  CHECK_THROWS(InvariantError, index.insert(digest(2), digest(3), page(3), 3));
  CHECK_THROWS(InvariantError, index.insert(digest(2), digest(3), page(3), 0));
  CHECK_THROWS(InvariantError, index.insert(digest(0), digest(3), page(3), 1));
  CHECK_THROWS(InvariantError, index.insert(digest(7), digest(7), page(3), 0));
  CHECK_THROWS(InvariantError, index.insert(digest(2), digest(3), page(2) + kFirst, 2));
  CHECK(index.size() == 2 && index.contains(digest(2)));
  CHECK(!index.contains(digest(0)) && !index.contains(digest(3)));
  CHECK(index.match(std::vector{digest(1), digest(2), digest(3)}) == Ids({page(1), page(2)}));
  CHECK(index.match(std::vector{digest(0), digest(1)}).empty());
}

void test_names() {
  PrefixIndex index(16);
  index.insert(digest(0), digest(1), page(5), 0);
  index.insert(digest(1), digest(2), page(3), 1);
  const auto names = index.names(Ids{page(3), page(4), page(5), page(5) + kFirst, 0, -1});
  CHECK(names.keys == std::vector<Digest>({digest(2), {}, digest(1), {}, {}, {}}));
  CHECK(names.parents == std::vector<Digest>({digest(1), {}, digest(0), {}, {}, {}}));
  CHECK(names.positions == Positions({1, 0, 0, 0, 0, 0}));
  CHECK(names.named == std::vector<std::uint8_t>({1, 0, 1, 0, 0, 0}));
  CHECK(index.keys(Ids{page(3)})[0] == digest(2));
  CHECK_THROWS(InvariantError, index.keys(Ids{page(3), page(4)}));
}

void test_remove_takes_what_follows() {
  PrefixIndex index(16);
  index.insert(digest(0), digest(1), page(1), 0);
  index.insert(digest(1), digest(2), page(2), 1);
  index.insert(digest(2), digest(3), page(3), 2);
  index.insert(digest(0), digest(4), page(4), 0);
  CHECK(index.remove(Ids{page(9), page(2)}).pages == Ids({page(3), page(2)}));
  CHECK(index.size() == 2 && index.pages().size() == 2);
  CHECK(index.insert(digest(1), digest(2), page(2) + kFirst, 1));
  CHECK(index.remove(Ids{page(1), page(1), page(2)}).pages == Ids({page(2) + kFirst, page(1)}));
  CHECK(index.remove(Ids{page(4)}).pages == Ids({page(4)}));
  CHECK(index.size() == 0 && index.pages().empty());
  CHECK(index.insert(digest(5), digest(0), page(6), 0));  // a root without pages is not kept
}

void test_insert_many() {
  PrefixIndex index(16);
  index.insert(digest(0), digest(1), page(1), 0);
  // 3 before 2, a page of another root, a taken key, a gap, a follower of the gap, a wrong
  // position.
  const std::vector<Digest> parents = {digest(2),  digest(1), digest(90), digest(0),
                                       digest(50), digest(6), digest(1)};
  const std::vector<Digest> keys = {digest(3), digest(2), digest(4), digest(1),
                                    digest(6), digest(7), digest(8)};
  const Ids pages = {page(3), page(2), page(4), page(11), page(6), page(7), page(8)};
  const Positions positions = {2, 1, 0, 0, 5, 6, 3};
  Ids strays = index.insert_many(parents, keys, pages, positions);
  std::sort(strays.begin(), strays.end());
  CHECK(strays == Ids({page(6), page(7), page(8), page(11)}));
  CHECK(index.match(std::vector{digest(1), digest(2), digest(3)}) ==
        Ids({page(1), page(2), page(3)}));
  CHECK(index.contains(digest(4)) && index.size() == 4);

  const auto insert_two = [&](PageId a, PageId b) {
    index.insert_many(std::vector{digest(70), digest(71)}, std::vector{digest(72), digest(73)},
                      Ids{a, b}, Positions{0, 0});
  };
  CHECK_THROWS(InvariantError, insert_two(page(20), page(20)));
  CHECK_THROWS(InvariantError, insert_two(page(20), page(1)));
  CHECK_THROWS(std::invalid_argument, insert_two(page(20), 0));
  CHECK_THROWS(std::invalid_argument, index.insert_many({}, {}, Ids{page(20)}, Positions{0}));
  CHECK(index.size() == 4 && !index.contains(digest(72)));
}

void test_a_long_chain() {
  // Linear time: quadratic removal of this chain would take minutes.
  PrefixIndex index(16);
  constexpr int kLength = 300'000;
  for (int i = 0; i < kLength; ++i) {
    index.insert(digest(static_cast<std::uint64_t>(i)), digest(static_cast<std::uint64_t>(i + 1)),
                 page(i), i);
  }
  CHECK(index.size() == kLength);
  const Ids pages = index.pages();
  CHECK(pages.size() == kLength && pages.front() == page(0) && pages.back() == page(kLength - 1));
  CHECK(index.remove(Ids{page(0)}).pages.front() == page(kLength - 1));
  CHECK(index.size() == 0);
}

// Parent of each key, and the page it names: an index without a tree.
struct Oracle {
  struct Entry {
    Digest parent;
    PageId page;
    std::int64_t position;
  };
  std::map<Digest, Entry> entries;

  std::set<PageId> below(const Digest& key) const {
    std::set<PageId> pages = {entries.at(key).page};
    for (const auto& [other, entry] : entries) {
      if (entry.parent == key) pages.merge(below(other));
    }
    return pages;
  }
};

bool in_order(const Oracle& oracle, const Ids& pages, bool is_parent_first) {
  std::map<PageId, std::size_t> rank;
  for (std::size_t i = 0; i < pages.size(); ++i) rank[pages[i]] = i;
  for (const auto& [key, entry] : oracle.entries) {
    const auto above = oracle.entries.find(entry.parent);
    if (above == oracle.entries.end()) continue;
    if (!rank.contains(entry.page) || !rank.contains(above->second.page)) continue;
    if ((rank[above->second.page] < rank[entry.page]) != is_parent_first) return false;
  }
  return true;
}

// Every page was used as late as the last of those that follow it, and no later.
void check_raised(const Oracle& oracle, const PrefixIndex& index, std::mt19937& random) {
  std::vector<std::int64_t> uses;
  for (const auto& [key, entry] : oracle.entries) {
    uses.resize(std::max(uses.size(), static_cast<std::size_t>(entry.page & 0xffffffff) + 1));
  }
  for (auto& use : uses) use = static_cast<std::int64_t>(random() % 9);
  std::vector<std::int64_t> wanted = uses;
  for (const auto& [key, entry] : oracle.entries) {
    for (const PageId page : oracle.below(key)) {
      auto& use = wanted[static_cast<std::size_t>(entry.page & 0xffffffff)];
      use = std::max(use, uses[static_cast<std::size_t>(page & 0xffffffff)]);
    }
  }
  const bool changes = wanted != uses;
  CHECK(index.raise_parents(uses) == changes && uses == wanted);
  CHECK(!index.raise_parents(uses));
  if (!uses.empty()) {
    CHECK_THROWS(std::invalid_argument, index.raise_parents({uses.data(), uses.size() - 1}));
  }
}

void test_against_oracle(std::uint32_t seed) {
  std::mt19937 random(seed);
  PrefixIndex index(16);
  Oracle oracle;
  std::vector<Digest> keys;  // every key ever used; the first few are roots
  for (std::uint64_t i = 0; i < 3; ++i) keys.push_back(digest(seed * 1000 + i));
  PageId next_page = kFirst;
  for (int step = 0; step < 3000; ++step) {
    const Digest parent = keys[random() % keys.size()];
    const auto above = oracle.entries.find(parent);
    const bool is_root = std::find(keys.begin(), keys.begin() + 3, parent) != keys.begin() + 3;
    if (random() % 8 > 0) {
      const bool is_old = random() % 6 == 0;
      const Digest key = is_old ? keys[3 + random() % std::max<std::size_t>(1, keys.size() - 3)]
                                : digest(random());
      if (is_old && keys.size() == 3) continue;
      const std::int64_t position = above != oracle.entries.end() ? above->second.position + 1
                                    : is_root                     ? 0
                                                                  : 1;
      const bool is_legal = !oracle.entries.contains(key) &&
                            (is_root || above != oracle.entries.end()) && key != parent;
      CHECK(index.insert(parent, key, next_page, position) == is_legal);
      if (is_legal) oracle.entries[key] = {parent, next_page, position};
      if (!is_old) keys.push_back(key);
      ++next_page;
    } else if (above != oracle.entries.end()) {
      const std::set<PageId> wanted = oracle.below(parent);
      const Ids removed = index.remove(Ids{above->second.page}).pages;
      CHECK(std::set<PageId>(removed.begin(), removed.end()) == wanted);
      CHECK(removed.size() == wanted.size() && in_order(oracle, removed, false));
      std::erase_if(oracle.entries, [&](const auto& e) { return wanted.contains(e.second.page); });
    }
    CHECK(index.size() == static_cast<std::int64_t>(oracle.entries.size()));
    const Digest any = keys[random() % keys.size()];
    const auto found = oracle.entries.find(any);
    CHECK(index.match({&any, 1}) ==
          (found == oracle.entries.end() ? Ids{} : Ids{found->second.page}));
    if (step % 50 != 0) continue;
    const Ids pages = index.pages();
    CHECK(pages.size() == oracle.entries.size() && in_order(oracle, pages, true));
    check_raised(oracle, index, random);
    for (const auto& [key, entry] : oracle.entries) {
      const auto names = index.names(Ids{entry.page});
      CHECK(names.keys[0] == key && names.parents[0] == entry.parent);
      CHECK(names.positions[0] == entry.position && names.named[0] == 1);
    }
  }
}

}  // namespace

int main() {
  test_roots_are_unambiguous();
  test_known_hashes();
  test_bad_numbers();
  test_insert();
  test_names();
  test_remove_takes_what_follows();
  test_insert_many();
  test_a_long_chain();
  for (std::uint32_t seed = 1; seed <= 6; ++seed) test_against_oracle(seed);
  return tiermem_test::report("prefix_index");
}
