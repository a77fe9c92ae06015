// Which memory the kernel knows already, and under which number.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

namespace tiermem {

// Throws std::invalid_argument for an address or a length below 1.
void require_memory(std::int64_t address, std::int64_t bytes);

// Disjoint ranges of memory, each with a number below `most`. Not thread-safe.
class RegisteredMemory {
 public:
  explicit RegisteredMemory(std::uint32_t most);

  // A number that no range has, if there is one left.
  std::optional<std::uint32_t> free_number() const;

  // REQUIRES: free_number() was `number`; overlaps no range.
  void add(std::uint64_t address, std::uint64_t bytes, std::uint32_t number);

  // The range in which all of [address, address + bytes) lies.
  std::optional<std::uint32_t> find(std::uint64_t address, std::uint64_t bytes) const;

  // Forgets the ranges that begin in [address, address + bytes); their numbers.
  std::vector<std::uint32_t> remove(std::uint64_t address, std::uint64_t bytes);

 private:
  struct Range {
    std::uint64_t end;
    std::uint32_t number;
  };
  std::map<std::uint64_t, Range> ranges_;  // by address
  std::vector<std::uint32_t> free_;        // the lowest last
};

}  // namespace tiermem
