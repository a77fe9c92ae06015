#include "registered_memory.h"

#include <stdexcept>
#include <string>

namespace tiermem {

void require_memory(std::int64_t address, std::int64_t bytes) {
  if (address < 1) {
    throw std::invalid_argument("address=" + std::to_string(address) + ": must be an address");
  }
  if (bytes < 1) {
    throw std::invalid_argument("num_bytes=" + std::to_string(bytes) + ": must be at least 1");
  }
}

RegisteredMemory::RegisteredMemory(std::uint32_t most) {
  for (std::uint32_t number = most; number > 0; --number) free_.push_back(number - 1);
}

std::optional<std::uint32_t> RegisteredMemory::free_number() const {
  if (free_.empty()) return std::nullopt;
  return free_.back();
}

void RegisteredMemory::add(std::uint64_t address, std::uint64_t bytes, std::uint32_t number) {
  free_.pop_back();
  ranges_[address] = {address + bytes, number};
}

std::optional<std::uint32_t> RegisteredMemory::find(std::uint64_t address,
                                                    std::uint64_t bytes) const {
  auto after = ranges_.upper_bound(address);
  if (after == ranges_.begin()) return std::nullopt;
  const Range& range = (--after)->second;
  if (address >= range.end || bytes > range.end - address) return std::nullopt;
  return range.number;
}

std::vector<std::uint32_t> RegisteredMemory::remove(std::uint64_t address, std::uint64_t bytes) {
  std::vector<std::uint32_t> numbers;
  auto next = ranges_.lower_bound(address);
  while (next != ranges_.end() && next->first - address < bytes) {
    numbers.push_back(next->second.number);
    free_.push_back(next->second.number);
    next = ranges_.erase(next);
  }
  return numbers;
}

}  // namespace tiermem
