#include "tiermem/checksum.h"

#include <array>
#include <random>
#include <vector>

#include "check.h"

namespace {

using tiermem::checksum;
using tiermem::ChecksumPath;

constexpr std::array kPaths = {ChecksumPath::portable, ChecksumPath::avx2, ChecksumPath::avx512};

std::vector<std::byte> random_bytes(std::mt19937_64& random, std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

void test_paths_agree_at_every_length_and_alignment() {
  std::mt19937_64 random(7);
  for (std::size_t length = 0; length < 2200; ++length) {
    // Exactly as long as needed: a path that reads beyond it is seen by the address sanitizer.
    const std::size_t shift = random() % 65;
    const auto bytes = random_bytes(random, shift + length);
    const std::uint64_t expected = checksum(bytes.data() + shift, length, ChecksumPath::portable);
    for (const ChecksumPath path : kPaths) {
      if (!tiermem::checksum_path_supported(path)) continue;
      CHECK(checksum(bytes.data() + shift, length, path) == expected);
    }
    CHECK(checksum(bytes.data() + shift, length) == expected);
  }
}

void test_fixed_vectors() {
  const std::vector<std::byte> zeros(4096);
  std::vector<std::byte> ramp(1280);
  for (std::size_t i = 0; i < ramp.size(); ++i) ramp[i] = static_cast<std::byte>(i);
  CHECK(checksum(zeros.data(), 0) == 0x9A63C6065BD325C1);
  CHECK(checksum(zeros.data(), 1) == 0x8129145629915C68);
  CHECK(checksum(ramp.data(), ramp.size()) == 0xC0A6A1B750E7E792);
  CHECK(checksum(zeros.data(), zeros.size()) == 0xB3B313822DC43EED);
}

void test_slices_and_pages() {
  std::mt19937_64 random(11);
  const auto bytes = random_bytes(random, 6000);
  std::vector<std::uint64_t> slices(6);
  tiermem::checksum_slices(bytes.data(), 1000, slices);
  for (std::size_t i = 0; i < slices.size(); ++i) {
    CHECK(slices[i] == checksum(bytes.data() + i * 1000, 1000));
  }
  const std::vector<const std::byte*> pages = {bytes.data() + 3000, bytes.data()};
  std::vector<std::uint64_t> sums(6);
  tiermem::checksum_pages(pages, 1000, sums);
  CHECK(sums == std::vector<std::uint64_t>{slices[3], slices[4], slices[5],  //
                                           slices[0], slices[1], slices[2]});
  tiermem::checksum_pages({}, 1000, {});
}

void test_pages_that_several_threads_share() {
  constexpr std::size_t slice = (1 << 20) + 24;
  constexpr std::size_t slices = 5;
  std::mt19937_64 random(7);
  const auto data = random_bytes(random, 3 * slices * slice);
  const std::vector<const std::byte*> pages = {&data[2 * slices * slice], &data[0],
                                               &data[slices * slice]};
  std::vector<std::uint64_t> sums(pages.size() * slices);
  tiermem::checksum_pages(pages, slice, sums);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    CHECK(sums[i] == tiermem::checksum(pages[i / slices] + i % slices * slice, slice));
  }
}

void test_unsupported_paths_are_refused() {
  for (const ChecksumPath path : kPaths) {
    if (tiermem::checksum_path_supported(path)) continue;
    CHECK_THROWS(std::invalid_argument, checksum(nullptr, 0, path));
  }
  CHECK(tiermem::checksum_path_supported(ChecksumPath::automatic));
  CHECK(tiermem::checksum_path_supported(ChecksumPath::portable));
}

}  // namespace

int main() {
  test_paths_agree_at_every_length_and_alignment();
  test_fixed_vectors();
  test_slices_and_pages();
  test_pages_that_several_threads_share();
  test_unsupported_paths_are_refused();
  return tiermem_test::report("checksum");
}
