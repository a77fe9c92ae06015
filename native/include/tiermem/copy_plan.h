// How the pieces of one batch of copies lie beside each other: joined pieces, and runs of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tiermem {

// dst[0, bytes) receives src[0, bytes).
struct CopyPiece {
  std::uint64_t dst = 0;
  std::uint64_t src = 0;
  std::uint64_t bytes = 0;

  bool operator==(const CopyPiece&) const = default;
};

// Which address of a piece decides what its neighbours are: the one in host memory.
enum class CopySide { Dst, Src };

// pieces[first .. first + count) have one size and follow each other without gaps on one side.
struct CopyRun {
  std::size_t first = 0;
  std::size_t count = 1;

  bool operator==(const CopyRun&) const = default;
};

// Ascending addresses at which memory starts that the driver knows by itself. It refuses a copy
// that reaches from one such memory into the next, so nothing is joined across them.
using CopyBorders = std::span<const std::uint64_t>;

// Orders the pieces by their address on `side`, cuts those that cross a border there, and joins
// those that continue each other on both sides with no border between them.
//
// The order is worth its time: an H200 wrote scattered pieces of 64 KiB to the host with 50.8 GB/s
// in random order and with 54.4 in this one, of 55.4.
void arrange_pieces(std::vector<CopyPiece>& pieces, CopySide side, CopyBorders borders);

// Cuts arranged pieces into runs, each as long as it can be, that no border cuts; appends them to
// `runs`.
void find_runs(std::span<const CopyPiece> pieces, CopySide side, CopyBorders borders,
               std::vector<CopyRun>& runs);

}  // namespace tiermem
