// CRC-32 as zlib computes it (IEEE 802.3, reflected).
#pragma once

#include <cstdint>
#include <span>

namespace tiermem {

std::uint32_t crc32(std::span<const std::uint8_t> bytes);

}  // namespace tiermem
