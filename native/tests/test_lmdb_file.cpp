// The reader of LMDB files on a file made by hand; what LMDB itself makes is read in the Python tests.
#include "tiermem/lmdb_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "tiermem/crc32.h"

namespace {

using tiermem::ConstBytes;
using tiermem::DamagedFile;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kPage = 4096;
constexpr std::uint64_t kNone = ~std::uint64_t{0};
constexpr std::uint64_t kMaxPages = 1000;

template <class Number>
void put(Bytes& file, std::size_t at, Number number) {
  std::memcpy(file.data() + at, &number, sizeof(number));
}

struct Shape {
  std::uint16_t depth = 2;
  std::uint64_t root = 2;
};

void put_meta(Bytes& file, std::uint64_t page, std::uint64_t transaction, const Shape& main) {
  const std::size_t start = page * kPage;
  put(file, start, page);
  put(file, start + 10, std::uint16_t{8});
  put(file, start + 16, std::uint32_t{0xbeefc0de});
  put(file, start + 20, std::uint32_t{1});
  put(file, start + 40, std::uint32_t{kPage});  // the tree of free pages: one leaf, page 5
  put(file, start + 44, std::uint16_t{8});
  put(file, start + 46, std::uint16_t{1});
  put(file, start + 56, std::uint64_t{1});
  put(file, start + 72, std::uint64_t{1});
  put(file, start + 80, std::uint64_t{5});
  put(file, start + 94, main.depth);  // the main tree: a branch over two leaves
  put(file, start + 96, std::uint64_t{1});
  put(file, start + 104, std::uint64_t{2});
  put(file, start + 120, std::uint64_t{4});
  put(file, start + 128, main.root);
  put(file, start + 136, std::uint64_t{6});
  put(file, start + 144, transaction);
}

// A node is (first six bytes, key, value): size and flags of a leaf's, a page number of a branch's.
struct Node {
  std::uint64_t head = 0;
  std::string key;
  std::string value;
};

void put_page(Bytes& file, std::uint64_t page, std::uint16_t flags, const std::vector<Node>& nodes) {
  const std::size_t start = page * kPage;
  put(file, start, page);
  put(file, start + 10, flags);
  std::size_t upper = kPage;
  std::size_t lower = 16;
  for (const Node& node : nodes) {
    const std::size_t size = 8 + node.key.size() + node.value.size();
    upper -= size + size % 2;
    put(file, start + upper, node.head);
    put(file, start + upper + 6, static_cast<std::uint16_t>(node.key.size()));
    std::memcpy(file.data() + start + upper + 8, node.key.data(), node.key.size());
    std::memcpy(file.data() + start + upper + 8 + node.key.size(), node.value.data(),
                node.value.size());
    put(file, start + lower, static_cast<std::uint16_t>(upper));
    lower += 2;
  }
  put(file, start + 12, static_cast<std::uint16_t>(lower));
  put(file, start + 14, static_cast<std::uint16_t>(upper));
}

Node leaf_node(const std::string& key, const std::string& value) {
  return {value.size(), key, value};
}

std::string words(const std::vector<std::uint64_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * 8};
}

// Pages: 2 the branch, 3 and 4 leaves, 5 the list of free pages, 6 free.
Bytes sound_file() {
  Bytes file(7 * kPage);
  put_meta(file, 0, 6, {});
  put_meta(file, 1, 7, {});
  put_page(file, 2, 1, {{3, "", ""}, {4, "c", ""}});
  put_page(file, 3, 2, {leaf_node("a", "first"), leaf_node("b", "")});
  put_page(file, 4, 2, {leaf_node("c", "third"), leaf_node("cc", "fourth one")});
  put_page(file, 5, 2, {leaf_node(words({5}), words({1, 6}))});
  return file;
}

tiermem::LmdbSource source_of(const Bytes& file) {
  tiermem::LmdbSource source;
  source.head.assign(file.begin(),
                     file.begin() + static_cast<std::ptrdiff_t>(
                                        std::min(file.size(), tiermem::LmdbSource::kHeadBytes)));
  source.num_bytes = file.size();
  source.read_at = [&file](std::uint64_t offset, std::span<std::uint8_t> bytes) {
    const std::uint64_t start = std::min<std::uint64_t>(offset, file.size());
    const std::size_t size = std::min<std::size_t>(bytes.size(), file.size() - start);
    if (size > 0) std::memcpy(bytes.data(), file.data() + start, size);
    return size;
  };
  return source;
}

tiermem::LmdbContent content_of(const Bytes& file, std::uint64_t max_pages = kMaxPages,
                                tiermem::RowShape shape = {}) {
  tiermem::WorkerTeam team(2);
  return tiermem::read_lmdb(source_of(file), max_pages, shape, team);
}

std::string read(const Bytes& file, std::uint64_t max_pages = kMaxPages) {
  std::string all;
  for (const auto& [key, value] : content_of(file, max_pages).others) {
    all += std::string(key.begin(), key.end()) + "=" + std::string(value.begin(), value.end()) + ";";
  }
  return all;
}

void test_reads_what_is_there() {
  const Bytes file = sound_file();
  CHECK(read(file) == "a=first;b=;c=third;cc=fourth one;");
  CHECK(content_of(file).transaction == 7);
  CHECK(tiermem::lmdb_transaction(file) == std::uint64_t{7});
  CHECK(!tiermem::lmdb_transaction(ConstBytes(file).first(kPage)).has_value());
  CHECK_THROWS(DamagedFile, read(file, 6));
}

void test_takes_the_newer_meta_page() {
  Bytes file = sound_file();
  put_meta(file, 0, 8, {1, 3});
  put(file, 96, std::uint64_t{0});
  put(file, 104, std::uint64_t{1});
  put(file, 120, std::uint64_t{2});
  CHECK(read(file) == "a=first;b=;");
}

template <class Number>
bool is_damage(std::size_t at, Number number) {
  Bytes file = sound_file();
  put(file, at, number);
  try {
    read(file);
  } catch (const DamagedFile&) {
    return true;
  }
  return false;
}

void test_refuses_what_lmdb_would_follow() {
  const std::size_t meta = kPage;  // the one in force
  const std::size_t branch = 2 * kPage;
  const std::size_t leaf = 3 * kPage;
  CHECK(is_damage(meta + 16, std::uint32_t{1}) && is_damage(std::size_t{16}, std::uint32_t{1}));
  CHECK(is_damage(meta + 40, std::uint32_t{8192}) && is_damage(meta + 44, std::uint16_t{0}));
  CHECK(is_damage(meta + 88, std::uint8_t{4}) && is_damage(meta + 91, std::uint8_t{1}));
  CHECK(is_damage(meta + 92, std::uint16_t{4}) && is_damage(meta + 94, std::uint16_t{1}));
  CHECK(is_damage(meta + 94, std::uint16_t{60}) && is_damage(meta + 96, std::uint64_t{2}));
  CHECK(is_damage(meta + 120, std::uint64_t{5}) && is_damage(meta + 128, std::uint64_t{1}));
  CHECK(is_damage(meta + 128, kNone) && is_damage(meta + 128, std::uint64_t{1} << 60));
  CHECK(is_damage(meta + 136, std::uint64_t{3}) && is_damage(meta + 136, std::uint64_t{7}));
  CHECK(is_damage(meta + 136, kNone) && is_damage(meta + 151, std::uint8_t{128}));
  CHECK(is_damage(branch, std::uint64_t{3}) && is_damage(branch + 10, std::uint16_t{2}));
  CHECK(is_damage(branch + 12, std::uint16_t{17}) && is_damage(branch + 12, std::uint16_t{18}));
  CHECK(is_damage(branch + 14, std::uint16_t{10}) && is_damage(branch + 14, std::uint16_t{5000}));
  CHECK(is_damage(branch + 16, std::uint16_t{4095}) && is_damage(branch + 18, std::uint16_t{0}));
  CHECK(is_damage(leaf + 18, std::uint16_t{4081}) && is_damage(leaf + 12, std::uint16_t{16}));
  const std::size_t first = leaf + kPage - 14;  // the node of "a"
  CHECK(is_damage(first, std::uint32_t{7}) && is_damage(first, std::uint32_t{1} << 31));
  CHECK(is_damage(first + 4, std::uint16_t{1}) && is_damage(first + 4, std::uint16_t{2}));
  CHECK(is_damage(first + 6, std::uint16_t{0}) && is_damage(first + 6, std::uint16_t{600}));
  CHECK(is_damage(first + 8, std::uint8_t{'b'}) && is_damage(first + 8, std::uint8_t{'x'}));
  const std::size_t free = 6 * kPage - 16;  // count and page
  CHECK(is_damage(free, std::uint64_t{2}) && is_damage(free + 8, std::uint64_t{4}));
  CHECK(is_damage(free + 8, std::uint64_t{1}) && is_damage(free + 8, std::uint64_t{7}));
}

void test_keys_belong_where_they_are() {
  Bytes file = sound_file();
  put_page(file, 4, 2, {leaf_node("bb", "third"), leaf_node("cc", "fourth one")});
  CHECK_THROWS(DamagedFile, read(file));  // below the key of its branch
  file = sound_file();
  put_page(file, 3, 2, {leaf_node("a", "first"), leaf_node("c", "")});
  CHECK_THROWS(DamagedFile, read(file));  // not below that of the next
  file = sound_file();
  put_page(file, 2, 1, {{3, "", ""}, {3, "c", ""}});
  CHECK_THROWS(DamagedFile, read(file));  // a page twice
  file = sound_file();
  put_page(file, 2, 1, {{3, "", ""}, {2, "c", ""}});
  CHECK_THROWS(DamagedFile, read(file));  // a cycle
}

void test_no_byte_leads_outside(std::uint32_t seed) {
  std::mt19937 random(seed);
  int num_damaged = 0;
  for (int i = 0; i < 3000; ++i) {
    Bytes file = sound_file();
    const std::size_t page = random() % 7;
    const std::size_t area = random() % 2 == 0 ? 160 : kPage;
    for (std::uint32_t j = 0; j <= random() % 3; ++j) {
      const std::size_t at = area == 160 ? random() % area : kPage - 1 - random() % 64;
      file[page * kPage + at] = static_cast<std::uint8_t>(random());
    }
    if (random() % 8 == 0) file.resize(random() % file.size());
    try {
      read(Bytes(file));
    } catch (const DamagedFile&) {
      ++num_damaged;
    }
  }
  CHECK(num_damaged > 300);
}

// A record of `bytes` bytes, key and value together, that ends in its CRC.
Node row_node(const std::string& key, std::size_t bytes) {
  std::string record = key + std::string(bytes - key.size() - 4, static_cast<char>(key.back()));
  const auto* start = reinterpret_cast<const std::uint8_t*>(record.data());
  const std::uint32_t crc = tiermem::crc32({start, record.size()});
  record.append(reinterpret_cast<const char*>(&crc), sizeof(crc));
  return leaf_node(key, record.substr(key.size()));
}

void test_rows_are_records_of_their_shape_with_a_sound_crc() {
  constexpr std::size_t kBytes = 21;
  Bytes file = sound_file();
  Node damaged = row_node("ab", kBytes);
  damaged.value[3] = static_cast<char>(damaged.value[3] ^ 1);
  put_page(file, 3, 2, {row_node("aa", kBytes), damaged});
  put_page(file, 4, 2, {row_node("ca", kBytes), row_node("cb", kBytes)});
  auto content = content_of(file, kMaxPages, {'a', kBytes});
  CHECK(content.rows.size() == 1 && content.others.size() == 3);
  CHECK(std::memcmp(content.rows.data(), "aa", 2) == 0);
  content = content_of(file, kMaxPages, {'c', kBytes});
  CHECK(content.rows.size() == 2 && content.others.size() == 2);
  CHECK(std::memcmp(content.rows.data(), "ca", 2) == 0);
  CHECK(std::memcmp(content.rows.data() + kBytes, "cb", 2) == 0);
  CHECK(content_of(file, kMaxPages, {'c', kBytes + 1}).rows.size() == 0);
  CHECK(content_of(file, kMaxPages, {'c', 100 * kPage}).rows.size() == 0);
}

void test_crc_is_that_of_zlib() {
  const std::string text = "123456789";
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  CHECK(tiermem::crc32({bytes, text.size()}) == 0xcbf43926U);
  CHECK(tiermem::crc32({}) == 0);
}

}  // namespace

int main() {
  test_reads_what_is_there();
  test_takes_the_newer_meta_page();
  test_refuses_what_lmdb_would_follow();
  test_keys_belong_where_they_are();
  for (std::uint32_t seed = 0; seed < 3; ++seed) test_no_byte_leads_outside(seed);
  test_rows_are_records_of_their_shape_with_a_sound_crc();
  test_crc_is_that_of_zlib();
  return tiermem_test::report("lmdb_file");
}
