// SHA-256 (FIPS 180-4): the hash that names prefixes. Plain C++, no dependency.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace tiermem {

using Digest = std::array<std::uint8_t, 32>;

// Hashes a message given in pieces. One object hashes one message.
class Sha256 {
 public:
  Sha256();

  // Appends bytes to the message.
  void update(std::span<const std::uint8_t> bytes);

  // Pads the message and returns its hash. REQUIRES: the object is not used afterwards.
  Digest finish();

 private:
  static constexpr std::size_t kBlockBytes = 64;

  void compress(const std::uint8_t* block);

  std::array<std::uint32_t, 8> state_;
  std::array<std::uint8_t, kBlockBytes> pending_{};
  std::size_t num_pending_ = 0;
  std::uint64_t num_bytes_ = 0;
};

}  // namespace tiermem
