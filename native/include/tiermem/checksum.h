// The 64-bit checksum of stored bytes: one per layer and page, the same on every processor.
//
// Not a cryptographic hash: it finds damage, mix-ups and torn writes, not forgery.
//
// Specification. All arithmetic is modulo 2^64 on unsigned words unless a line says otherwise.
//
//   Words. The buffer is read as little-endian 64-bit words; a last word of fewer than 8 bytes is
//   filled up with zero bytes. Block b = 0, 1, ... is words 128 b to 128 b + 127 (1,024 bytes); the
//   last block holds the words that are left. An empty buffer has no block.
//
//   Tables. splitmix64 with state kChecksumSeed: each draw adds 0x9E3779B97F4A7C15 to the state and
//   returns mix64(state). Draws 0 to 127 are key[i]; draws 128 to 255 are d[i], and
//   multiplier[i] = (d[i] mod 2^32 with its low 8 bits replaced by 2 i + 1): odd, below 2^32, and
//   multiplier[i] - multiplier[j] is never a multiple of 2^8.
//
//   mix64(x): x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB;
//             x ^= x >> 31.   (a bijection; the finaliser of splitmix64)
//
//   Block b with words w[0..n-1], lo = w mod 2^32, hi = w / 2^32, klo and khi likewise of key:
//     s1 = sum over i of ((lo[i] + klo[i]) mod 2^32) * ((hi[i] + khi[i]) mod 2^32)
//     s2 = sum over i of w[i] * multiplier[i]
//     t(b) = mix64(s1 + (b + 1) * kChecksumBlock1) + mix64(s2 ^ ((b + 1) * kChecksumBlock2))
//
//   Result = mix64(sum over b of t(b) + (length_bytes + 1) * kChecksumLength).
//
// Why these sums. s2 alone sees every change of a single word, since the multipliers are odd, and
// every swap of two words of a block that differ anywhere in their low 57 bits; s1 sees what s2
// does not, with a chance of about 2^-32 to miss. mix64 with the block number makes swapped, doubled and
// dropped blocks visible. Both sums, and the sum over blocks, may be added in any order, so that
// lanes, warps and thread blocks can each take a share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace tiermem {

inline constexpr std::size_t kChecksumBlockWords = 128;
inline constexpr std::uint64_t kChecksumSeed = 0x7469'6572'6D65'6D31;  // "tiermem1"
inline constexpr std::uint64_t kChecksumBlock1 = 0xD6E8'FEB8'6659'FD93;
inline constexpr std::uint64_t kChecksumBlock2 = 0xA076'1D64'78BD'642F;
inline constexpr std::uint64_t kChecksumLength = 0xE703'7ED1'A0B4'28DB;

// Constants of the specification, for those who compute it elsewhere.
struct ChecksumTables {
  alignas(64) std::array<std::uint64_t, kChecksumBlockWords> keys;
  alignas(64) std::array<std::uint64_t, kChecksumBlockWords> multipliers;
};
const ChecksumTables& checksum_tables() noexcept;

// Which instructions compute it. Every path gives the same bits; `automatic` takes the widest that
// this processor has.
enum class ChecksumPath { automatic, portable, avx2, avx512 };

// True if this build and this processor have the path; always true for automatic and portable.
bool checksum_path_supported(ChecksumPath path) noexcept;

// Checksum of `bytes` bytes at `data`, of any alignment.
// REQUIRES: checksum_path_supported(path); throws std::invalid_argument otherwise.
std::uint64_t checksum(const std::byte* data, std::size_t bytes,
                       ChecksumPath path = ChecksumPath::automatic);

// sums[i] = checksum of the slice_bytes bytes at data + i * slice_bytes.
// REQUIRES: as checksum.
void checksum_slices(const std::byte* data, std::size_t slice_bytes, std::span<std::uint64_t> sums,
                     ChecksumPath path = ChecksumPath::automatic);

// Row p of `sums` (row-major, one row of sums.size() / pages.size() slices each) becomes the
// checksums of the consecutive slices of the page at pages[p]. Large ones are shared with up to
// three more threads, which have ended when it returns.
// REQUIRES: sums.size() is a multiple of pages.size(), both zero or both not; as checksum.
void checksum_pages(std::span<const std::byte* const> pages, std::size_t slice_bytes,
                    std::span<std::uint64_t> sums, ChecksumPath path = ChecksumPath::automatic);

}  // namespace tiermem
