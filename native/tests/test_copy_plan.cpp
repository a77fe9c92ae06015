// Joining and runs, against definitions that look at every byte and try every length.
#include "tiermem/copy_plan.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"

using tiermem::CopyPiece;
using tiermem::CopyRun;
using tiermem::CopySide;

namespace {

using Pieces = std::vector<CopyPiece>;
using Borders = std::vector<std::uint64_t>;

std::uint64_t at(const CopyPiece& piece, CopySide side) {
  return side == CopySide::Dst ? piece.dst : piece.src;
}

// Destination -> source, byte for byte.
std::map<std::uint64_t, std::uint64_t> bytes_of(const Pieces& pieces) {
  std::map<std::uint64_t, std::uint64_t> moved;
  for (const CopyPiece& piece : pieces) {
    for (std::uint64_t i = 0; i < piece.bytes; ++i) moved[piece.dst + i] = piece.src + i;
  }
  return moved;
}

bool is_border(const Borders& borders, std::uint64_t address) {
  return std::find(borders.begin(), borders.end(), address) != borders.end();
}

// Whether pieces[first .. first + count) are one run.
bool is_run(const Pieces& pieces, std::size_t first, std::size_t count, CopySide side,
            const Borders& borders) {
  const CopyPiece& start = pieces[first];
  for (std::size_t i = 1; i < count; ++i) {
    const CopyPiece& piece = pieces[first + i];
    if (piece.bytes != start.bytes || at(piece, side) != at(start, side) + i * start.bytes ||
        is_border(borders, at(piece, side))) {
      return false;
    }
  }
  return true;
}

std::vector<CopyRun> slow_runs(const Pieces& pieces, CopySide side, const Borders& borders) {
  std::vector<CopyRun> runs;
  for (std::size_t first = 0; first < pieces.size(); first += runs.back().count) {
    std::size_t count = pieces.size() - first;
    while (!is_run(pieces, first, count, side, borders)) --count;
    runs.push_back({first, count});
  }
  return runs;
}

void check_plan(Pieces pieces, CopySide side, const Borders& borders = {}) {
  const auto wanted = bytes_of(pieces);
  tiermem::arrange_pieces(pieces, side, borders);
  CHECK(bytes_of(pieces) == wanted);
  bool is_ordered = true, is_joined = true, is_cut = true;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const CopyPiece& a = pieces[i];
    for (const std::uint64_t border : borders) {
      is_cut &= border <= at(a, side) || border >= at(a, side) + a.bytes;
    }
    if (i + 1 == pieces.size()) break;
    const CopyPiece& b = pieces[i + 1];
    is_ordered &= at(a, side) <= at(b, side);
    is_joined &= a.dst + a.bytes != b.dst || a.src + a.bytes != b.src ||
                 is_border(borders, b.dst) || is_border(borders, b.src);
  }
  CHECK(is_ordered);
  CHECK(is_joined);
  CHECK(is_cut);
  std::vector<CopyRun> runs;
  tiermem::find_runs(pieces, side, borders, runs);
  CHECK(runs == slow_runs(pieces, side, borders));
}

// Every choice of 1 to 5 of 8 host slots, in every order, to device slots that are neighbours,
// apart, or backwards; slots as wide as their piece, or wider; without borders, between slots, or
// within them.
void test_every_small_batch() {
  for (unsigned mask = 1; mask < 256; ++mask) {
    std::vector<std::uint64_t> slots;
    for (std::uint64_t slot = 0; slot < 8; ++slot) {
      if (mask >> slot & 1) slots.push_back(slot);
    }
    if (slots.size() > 5) continue;
    do {
      for (const std::uint64_t stride : {2, 3}) {
        for (const int shape : {0, 1, 2}) {
          Pieces pieces;
          for (std::size_t i = 0; i < slots.size(); ++i) {
            const std::uint64_t place = shape == 2 ? slots.size() - i : (shape + 1) * i;
            pieces.push_back({1000 + place * 2, 100 + slots[i] * stride, 2});
          }
          for (const Borders& borders : {Borders{}, Borders{106}, Borders{103, 107, 1004}}) {
            check_plan(pieces, CopySide::Src, borders);
            Pieces other(pieces);
            for (CopyPiece& piece : other) std::swap(piece.dst, piece.src);
            check_plan(other, CopySide::Dst, borders);
          }
        }
      }
    } while (std::next_permutation(slots.begin(), slots.end()));
  }
}

// Batches of mixed sizes, made of stretches that continue each other, are spread or are alone.
void test_random_batches() {
  std::mt19937_64 random(7);
  const auto below = [&](std::uint64_t end) { return random() % end; };
  for (int round = 0; round < 3000; ++round) {
    Pieces pieces;
    std::uint64_t host = 1 << 20, device = 1 << 24;
    while (pieces.size() < 1 + below(40)) {
      const std::uint64_t bytes = 1 + below(5), gap = below(3), leap = below(2) * below(7);
      const std::uint64_t count = 1 + below(6);
      for (std::uint64_t i = 0; i < count; ++i) {
        pieces.push_back({device, host, bytes});
        host += bytes + gap;
        device += bytes + leap;
      }
      host += below(4);
      device += below(3);
    }
    if (below(2) == 0) std::shuffle(pieces.begin(), pieces.end(), random);
    Borders borders;
    for (std::uint64_t i = below(6); i > 0; --i) {
      const CopyPiece& piece = pieces[below(pieces.size())];
      borders.push_back((below(2) ? piece.src : piece.dst) + below(8));
    }
    std::sort(borders.begin(), borders.end());
    check_plan(pieces, CopySide::Src, borders);
    check_plan(pieces, CopySide::Dst, borders);
  }
}

// Many pieces, near together or all over the address space.
void test_large_batches() {
  std::mt19937_64 random(11);
  for (int round = 0; round < 40; ++round) {
    const std::uint64_t step = std::uint64_t{1} << random() % 40;
    std::vector<std::uint64_t> slots(1 << 12);
    std::iota(slots.begin(), slots.end(), random() % 1000);
    std::shuffle(slots.begin(), slots.end(), random);
    slots.resize(256 + random() % 1000);
    Pieces pieces;
    for (const std::uint64_t slot : slots) {
      const std::uint64_t bytes = 1 + random() % std::min(step, std::uint64_t{4});
      pieces.push_back({4096 + 8 * pieces.size(), slot * step, bytes});
    }
    check_plan(pieces, CopySide::Src);
    std::shuffle(pieces.begin(), pieces.end(), random);
    check_plan(pieces, CopySide::Dst);
  }
}

void test_one_source_may_be_read_twice() {
  check_plan({{100, 10, 4}, {200, 10, 4}, {300, 14, 4}}, CopySide::Src);
}

void test_neighbours_on_both_sides_become_one_piece() {
  Pieces pieces;
  for (std::uint64_t i = 0; i < 1000; ++i) pieces.push_back({5000 + 8 * i, 90000 + 8 * i, 8});
  std::shuffle(pieces.begin(), pieces.end(), std::mt19937_64(3));
  tiermem::arrange_pieces(pieces, CopySide::Src, {});
  CHECK(pieces == Pieces{{5000, 90000, 8000}});
}

}  // namespace

int main() {
  test_every_small_batch();
  test_random_batches();
  test_large_batches();
  test_one_source_may_be_read_twice();
  test_neighbours_on_both_sides_become_one_piece();
  return tiermem_test::report("test_copy_plan");
}
