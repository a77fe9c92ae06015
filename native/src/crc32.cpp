// Eight bytes at a time by eight tables.
#include "tiermem/crc32.h"

#include <array>
#include <cstddef>

namespace tiermem {
namespace {

constexpr std::uint32_t kPolynomial = 0xedb88320;
constexpr std::size_t kStep = 8;
using Tables = std::array<std::array<std::uint32_t, 256>, kStep>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ ((rest & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = rest;
  }
  for (std::size_t i = 1; i < kStep; ++i) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[i - 1][byte];
      tables[i][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

std::uint32_t crc32(std::span<const std::uint8_t> bytes) {
  std::uint32_t rest = 0xffffffff;
  while (bytes.size() >= kStep) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < kStep; ++i) {
      const std::uint32_t mixed = i < 4 ? bytes[i] ^ ((rest >> (8 * i)) & 0xff) : bytes[i];
      next ^= kTables[kStep - 1 - i][mixed];
    }
    rest = next;
    bytes = bytes.subspan(kStep);
  }
  for (const std::uint8_t byte : bytes) rest = (rest >> 8) ^ kTables[0][(rest ^ byte) & 0xff];
  return ~rest;
}

}  // namespace tiermem
