// LmdbRows: the records of one size and kind that a table of an LMDB file holds, behind each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace tiermem {

// Which records are rows: the key starts with `kind`, key and value are `bytes` long together, and
// the last four of these are the CRC-32 of those before. bytes 0: none is.
struct RowShape {
  std::uint8_t kind = 0;
  std::size_t bytes = 0;
};

class LmdbRows {
 public:
  LmdbRows() = default;

  // Room for the rows of so many leaf pages of so many bytes; not touched before it is used.
  // Throws std::bad_alloc.
  LmdbRows(RowShape shape, std::size_t num_leaves, std::size_t page_bytes);

  // Keeps the record behind those of the same leaf, if it is a row. Leaves may be filled by several
  // threads, each by one. `record` is the key and, right behind it, the value.
  bool take(std::size_t leaf, std::span<const std::uint8_t> record);

  // Brings the rows of all leaves together, in the order of the leaves.
  void close_gaps();

  std::uint8_t* data() { return bytes_.get(); }
  std::size_t size() const { return size_; }  // REQUIRES: close_gaps() was called

 private:
  RowShape shape_;
  std::size_t leaf_bytes_ = 0;  // of the room for one leaf's rows
  std::size_t size_ = 0;
  std::unique_ptr<std::uint8_t[]> bytes_;
  std::vector<std::uint32_t> num_rows_;  // of each leaf
};

}  // namespace tiermem
