#include "tiermem/lmdb_rows.h"

#include <sys/mman.h>

#include <cstring>

#include "tiermem/crc32.h"

namespace tiermem {
namespace {

constexpr std::size_t kCrcBytes = 4;
constexpr std::size_t kPageHeader = 16;
constexpr std::size_t kNodeBytes = 8 + 2;  // of a record in its page, besides key and value

// Of what lies in whole ones: touching a gigabyte of small pages takes as long as reading it.
void ask_for_huge_pages(std::uint8_t* bytes, std::size_t size) {
  constexpr std::uintptr_t kHugePageBytes = std::uintptr_t{2} << 20;
  const auto start = reinterpret_cast<std::uintptr_t>(bytes);
  const std::uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const std::uintptr_t end = (start + size) / kHugePageBytes * kHugePageBytes;
  if (first < end) ::madvise(bytes + (first - start), end - first, MADV_HUGEPAGE);
}

}  // namespace

LmdbRows::LmdbRows(RowShape shape, std::size_t num_leaves, std::size_t page_bytes)
    : shape_(shape), num_rows_(num_leaves) {
  if (shape.bytes <= kCrcBytes) return;
  const std::size_t most_rows = (page_bytes - kPageHeader) / (kNodeBytes + shape.bytes);
  leaf_bytes_ = most_rows * shape.bytes;
  bytes_ = std::make_unique_for_overwrite<std::uint8_t[]>(num_leaves * leaf_bytes_);
  ask_for_huge_pages(bytes_.get(), num_leaves * leaf_bytes_);
}

bool LmdbRows::take(std::size_t leaf, std::span<const std::uint8_t> record) {
  if (record.size() != shape_.bytes || record[0] != shape_.kind) return false;
  const std::size_t place = num_rows_[leaf] * shape_.bytes;
  if (place + shape_.bytes > leaf_bytes_) return false;
  std::uint32_t crc = 0;
  const std::span<const std::uint8_t> body = record.first(shape_.bytes - kCrcBytes);
  std::memcpy(&crc, body.data() + body.size(), kCrcBytes);
  if (crc != crc32(body)) return false;
  std::memcpy(bytes_.get() + leaf * leaf_bytes_ + place, record.data(), record.size());
  ++num_rows_[leaf];
  return true;
}

void LmdbRows::close_gaps() {
  std::size_t end = 0;
  for (std::size_t leaf = 0; leaf < num_rows_.size(); ++leaf) {
    const std::size_t size = num_rows_[leaf] * shape_.bytes;
    if (size > 0) std::memmove(bytes_.get() + end, bytes_.get() + leaf * leaf_bytes_, size);
    end += size;
  }
  size_ = shape_.bytes == 0 ? 0 : end / shape_.bytes;
  num_rows_.clear();
}

}  // namespace tiermem
