// Every byte counts, whatever the size and the number of threads.
#include "tiermem/memory_reader.h"

#include <cstring>
#include <random>
#include <vector>

#include "check.h"

namespace {

struct alignas(64) Line {
  std::uint64_t words[8];
};

void test_the_sum_is_that_of_all_words() {
  std::mt19937_64 random(11);
  for (const std::size_t lines : {0, 1, 3, 4, 16384, 16385, 50001}) {
    std::vector<Line> memory(lines);
    std::uint64_t wanted = 0;
    for (Line& line : memory) {
      for (std::uint64_t& word : line.words) wanted += word = random();
    }
    for (const std::size_t threads : {1, 3}) {
      tiermem::MemoryReader reader(threads);
      const auto* start = reinterpret_cast<const std::byte*>(memory.data());
      CHECK(reader.sum(start, lines * sizeof(Line)) == wanted);
      if (lines > 0) {
        memory[lines / 2].words[5] += 7;
        CHECK(reader.sum(start, lines * sizeof(Line)) == wanted + 7);
        memory[lines / 2].words[5] -= 7;
      }
    }
  }
}

}  // namespace

int main() {
  test_the_sum_is_that_of_all_words();
  return tiermem_test::report("test_memory_reader");
}
