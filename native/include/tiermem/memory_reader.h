// MemoryReader: reads host memory with all threads, as fast as it goes. Measures a ceiling.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiermem/worker_team.h"

namespace tiermem {

class MemoryReader {
 public:
  // Throws what WorkerTeam throws.
  explicit MemoryReader(std::size_t num_threads) : team_(num_threads) {}

  std::size_t num_threads() const noexcept { return team_.num_threads(); }

  // The sum, modulo 2^64, of all little-endian 64-bit words: so that every byte must be read.
  // REQUIRES: `memory` is aligned to 64 bytes and num_bytes is a multiple of 64.
  std::uint64_t sum(const std::byte* memory, std::uint64_t num_bytes);

 private:
  WorkerTeam team_;
};

}  // namespace tiermem
