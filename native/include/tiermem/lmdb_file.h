// Reading an LMDB data file without trusting a byte of it.
//
// LMDB maps its file and follows the page numbers and offsets in it: a damaged one can kill the
// process. So a file is read and verified before LMDB is let near it. The format is that of LMDB
// 0.9 (data version 1), of an environment with one table (the main one) on a machine of 64 bits,
// little-endian:
//
//   page    16 bytes of header: number 8, pad 2, flags 2, then lower 2 and upper 2, or, for the
//           first of a run of overflow pages, their number 4
//   0, 1    meta pages: the header, then magic 4, version 4, address 8, map size 8, a tree of free
//           pages, the main tree (48 bytes each), last page 8, transaction 8. The one of the later
//           transaction is in force
//   tree    pad 4 (of the first: the page size), flags 2, depth 2, branch, leaf and overflow pages,
//           entries, root, 8 bytes each
//   branch, leaf    from 16 to lower the offsets of nodes (2 bytes), ascending by key; from upper to
//           the end the nodes without gaps: 4 + 2 + 2 bytes of which size, flags, size of the key;
//           the key; the value. Of a branch the first 6 bytes are a page number
//   free    transaction -> number of pages, their numbers descending
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tiermem/lmdb_rows.h"
#include "tiermem/worker_team.h"

namespace tiermem {

using ConstBytes = std::span<const std::uint8_t>;

// What is wrong with a file, and where.
class DamagedFile : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file as it is read: `head` is its first 128 KiB, or all of a shorter one, and was read before
// `num_bytes` was asked for. `read_at` fills `bytes` from `offset` on and returns how many there
// were; several threads call it at once.
struct LmdbSource {
  using ReadAt = std::function<std::size_t(std::uint64_t offset, std::span<std::uint8_t> bytes)>;
  static constexpr std::size_t kHeadBytes = std::size_t{2} * 65536;

  std::vector<std::uint8_t> head;
  std::uint64_t num_bytes = 0;
  ReadAt read_at;
};

// The main table of one state of a file. Rows ascend by key, and so do the other records.
struct LmdbContent {
  using Record = std::pair<std::vector<std::uint8_t>, std::vector<std::uint8_t>>;

  LmdbRows rows;
  std::vector<Record> others;
  std::uint64_t transaction = 0;
};

// Everything in the newest state that `head` names, of which all is verified that LMDB will rely
// on: both meta pages, every page of both trees (each used once, numbers, flags, offsets, sizes,
// order of keys, depths and counts) and the list of free pages. `max_pages` bounds the page
// numbers. The tree is read level by level, each in the order of the file and by the whole team.
// Throws DamagedFile, and what `read_at` throws.
LmdbContent read_lmdb(const LmdbSource& source, std::uint64_t max_pages, RowShape shape,
                      WorkerTeam& team);

// The number of the newest transaction that the meta pages of an LMDB file name; none where either
// is not one. `head` as in LmdbSource.
std::optional<std::uint64_t> lmdb_transaction(ConstBytes head);

// The same of an open file, by pread, of a state that a process which writes meanwhile cannot have
// changed; with at most `max_threads` threads. Throws DamagedFile, also for a file of more than
// `most_bytes` and when it does not hold still; std::system_error as the system.
LmdbContent read_lmdb_file(int descriptor, std::uint64_t most_bytes, RowShape shape,
                           std::size_t max_threads);

}  // namespace tiermem
