#include "tiermem/copy_plan.h"

#include <algorithm>

namespace tiermem {

namespace {

std::uint64_t at(const CopyPiece& piece, CopySide side) {
  return side == CopySide::Dst ? piece.dst : piece.src;
}

bool is_border(CopyBorders borders, std::uint64_t address) {
  return std::binary_search(borders.begin(), borders.end(), address);
}

void order(std::vector<CopyPiece>& pieces, CopySide side) {
  const auto before = [side](const CopyPiece& a, const CopyPiece& b) {
    return at(a, side) < at(b, side);
  };
  // Slots are taken lowest first, so batches mostly come ordered.
  if (!std::is_sorted(pieces.begin(), pieces.end(), before)) {
    std::sort(pieces.begin(), pieces.end(), before);
  }
}

bool continues(const CopyPiece& piece, const CopyPiece& before, CopyBorders borders) {
  return before.dst + before.bytes == piece.dst && before.src + before.bytes == piece.src &&
         !is_border(borders, piece.dst) && !is_border(borders, piece.src);
}

void append(std::vector<CopyPiece>& pieces, const CopyPiece& piece, CopyBorders borders) {
  if (!pieces.empty() && continues(piece, pieces.back(), borders)) {
    pieces.back().bytes += piece.bytes;
  } else {
    pieces.push_back(piece);
  }
}

// Takes the first `bytes` bytes off `piece`.
CopyPiece take_front(CopyPiece& piece, std::uint64_t bytes) {
  const CopyPiece front{piece.dst, piece.src, bytes};
  piece = {piece.dst + bytes, piece.src + bytes, piece.bytes - bytes};
  return front;
}

}  // namespace

void arrange_pieces(std::vector<CopyPiece>& pieces, CopySide side, CopyBorders borders) {
  order(pieces, side);
  std::vector<CopyPiece> arranged;
  arranged.reserve(pieces.size());
  auto border = borders.begin();
  for (CopyPiece& piece : pieces) {
    while (border != borders.end() && *border <= at(piece, side)) ++border;
    for (auto next = border; next != borders.end() && *next < at(piece, side) + piece.bytes;
         ++next) {
      append(arranged, take_front(piece, *next - at(piece, side)), borders);
    }
    append(arranged, piece, borders);
  }
  pieces.swap(arranged);
}

void find_runs(std::span<const CopyPiece> pieces, CopySide side, CopyBorders borders,
               std::vector<CopyRun>& runs) {
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool is_neighbour = i > 0 && pieces[i].bytes == pieces[i - 1].bytes &&
                              at(pieces[i], side) == at(pieces[i - 1], side) + pieces[i].bytes &&
                              !is_border(borders, at(pieces[i], side));
    if (is_neighbour) {
      ++runs.back().count;
    } else {
      runs.push_back({i, 1});
    }
  }
}

}  // namespace tiermem
