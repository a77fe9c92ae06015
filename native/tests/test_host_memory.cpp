// The first touch reaches every byte, in order; copies by several threads move every byte once.
#include "tiermem/host_memory.h"

#include <algorithm>
#include <random>
#include <vector>

#include "check.h"

namespace {

using Bytes = std::vector<std::uint8_t>;
using Numbers = std::vector<std::int64_t>;

std::int64_t address_of(const Bytes& memory, std::size_t offset) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory.data() + offset));
}

std::byte* start_of(Bytes& memory) { return reinterpret_cast<std::byte*>(memory.data()); }

void test_every_byte_is_set_before_the_wait_returns() {
  for (const std::size_t size : {1, 4095, (8 << 20) + 1, 26 << 20}) {
    for (const std::size_t threads : {1, 3}) {
      Bytes memory(size, 1);
      tiermem::MemoryToucher toucher(start_of(memory), size, 9, threads);
      for (const std::size_t part : {size / 3, size}) {
        toucher.wait(part);
        CHECK(std::all_of(memory.begin(), memory.begin() + part, [](int b) { return b == 9; }));
      }
    }
  }
}

void test_ending_early_waits_for_the_threads() {
  for (int round = 0; round < 5; ++round) {
    Bytes memory(40 << 20, 1);
    tiermem::MemoryToucher(start_of(memory), memory.size(), 2, 4);
    const Bytes before(memory);
    CHECK(memory == before);
  }
}

void test_pieces_of_any_size_arrive() {
  std::mt19937_64 random(5);
  Bytes from(26 << 20);
  for (std::size_t i = 0; i < from.size(); i += 8) {
    const std::uint64_t word = random();
    std::copy_n(reinterpret_cast<const std::uint8_t*>(&word), 8, from.begin() + i);
  }
  for (const std::size_t limit : {1000, 1 << 20, 20 << 20}) {
    for (const std::size_t threads : {0, 1, 3}) {
      Bytes to(from.size(), 0);
      Numbers dst, src, bytes;
      Bytes wanted(to);
      for (std::size_t offset = 0; offset < from.size();) {
        const std::size_t size = std::min<std::size_t>(1 + random() % limit, from.size() - offset);
        if (random() % 2) {
          const std::size_t place = from.size() - offset - size;
          dst.push_back(address_of(to, place));
          src.push_back(address_of(from, offset));
          bytes.push_back(static_cast<std::int64_t>(size));
          std::copy_n(from.begin() + offset, size, wanted.begin() + place);
        }
        offset += size;
      }
      tiermem::move_pieces(dst, src, bytes, threads);
      CHECK(to == wanted);
    }
  }
}

}  // namespace

int main() {
  test_every_byte_is_set_before_the_wait_returns();
  test_ending_early_waits_for_the_threads();
  test_pieces_of_any_size_arrive();
  return tiermem_test::report("test_host_memory");
}
