#include "tiermem/checksum.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define TIERMEM_X86 1
#else
#define TIERMEM_X86 0
#endif

namespace tiermem {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

constexpr std::size_t kWordBytes = 8;
constexpr std::size_t kBlockBytes = kChecksumBlockWords * kWordBytes;

struct BlockSums {
  std::uint64_t s1 = 0;
  std::uint64_t s2 = 0;
};

// As plain reads do: the prefetch of the hardware stops at every border of 4 KiB. Prefetching past
// the end does no harm.
constexpr std::size_t kAheadBytes = 8 << 10;

void prefetch(const std::byte* source) { __builtin_prefetch(source + kAheadBytes, 0, 2); }

// Of pages that come from a disk several at a time: the last ones would wait for one thread.
constexpr std::size_t kMaxThreads = 4;
constexpr std::size_t kThreadBytes = 4 << 20;

// Sums over the first `num_words` whole words of a block.
using BlockFunction = BlockSums (*)(const std::byte* block, std::size_t num_words);

constexpr std::uint64_t mix64(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58'476D'1CE4'E5B9;
  x ^= x >> 27;
  x *= 0x94D0'49BB'1331'11EB;
  return x ^ (x >> 31);
}

constexpr ChecksumTables make_tables() {
  ChecksumTables tables{};
  std::uint64_t state = kChecksumSeed;
  auto draw = [&state] { return mix64(state += 0x9E37'79B9'7F4A'7C15); };
  for (auto& key : tables.keys) key = draw();
  for (std::uint64_t i = 0; i < kChecksumBlockWords; ++i) {
    tables.multipliers[i] = (draw() & 0xFFFF'FF00) | (2 * i + 1);
  }
  return tables;
}

constexpr ChecksumTables kTables = make_tables();

void add_word(BlockSums& sums, std::uint64_t word, std::size_t i) {
  const std::uint64_t key = kTables.keys[i];
  const auto low = static_cast<std::uint32_t>(word + key);
  const auto high = static_cast<std::uint32_t>((word >> 32) + (key >> 32));
  sums.s1 += std::uint64_t{low} * high;
  sums.s2 += word * kTables.multipliers[i];
}

void add_words(BlockSums& sums, const std::byte* block, std::size_t start, std::size_t end) {
  for (std::size_t i = start; i < end; ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, block + i * kWordBytes, kWordBytes);
    add_word(sums, word, i);
  }
}

BlockSums sum_portable(const std::byte* block, std::size_t num_words) {
  BlockSums sums;
  add_words(sums, block, 0, num_words);
  return sums;
}

#if TIERMEM_X86

__attribute__((target("avx2"))) std::uint64_t sum_lanes(__m256i v) {
  const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(pair)) +
         static_cast<std::uint64_t>(_mm_extract_epi64(pair, 1));
}

// 32-bit lanes add lo + klo and hi + khi in one instruction; mul_epu32 reads low halves only.
__attribute__((target("avx2"))) BlockSums sum_avx2(const std::byte* block, std::size_t num_words) {
  constexpr std::size_t lanes = 4;
  const std::size_t end = num_words / lanes * lanes;
  __m256i s1 = _mm256_setzero_si256();
  __m256i s2_low = s1;
  __m256i s2_high = s1;
  for (std::size_t i = 0; i < end; i += lanes) {
    const auto* source = reinterpret_cast<const __m256i*>(block + i * kWordBytes);
    if (i % (2 * lanes) == 0) prefetch(block + i * kWordBytes);  // once a line
    const __m256i word = _mm256_loadu_si256(source);
    const __m256i key = _mm256_load_si256(reinterpret_cast<const __m256i*>(&kTables.keys[i]));
    const __m256i multiplier =
        _mm256_load_si256(reinterpret_cast<const __m256i*>(&kTables.multipliers[i]));
    const __m256i keyed = _mm256_add_epi32(word, key);
    s1 = _mm256_add_epi64(s1, _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32)));
    s2_low = _mm256_add_epi64(s2_low, _mm256_mul_epu32(word, multiplier));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(word, 32), multiplier);
    s2_high = _mm256_add_epi64(s2_high, high);
  }
  BlockSums sums{sum_lanes(s1), sum_lanes(s2_low) + (sum_lanes(s2_high) << 32)};
  add_words(sums, block, end, num_words);
  return sums;
}

__attribute__((target("avx512f"))) std::uint64_t sum_lanes(__m512i v) {
  alignas(64) std::uint64_t lanes[8];
  _mm512_store_si512(lanes, v);
  std::uint64_t sum = 0;
  for (const std::uint64_t lane : lanes) sum += lane;
  return sum;
}

// gcc 12 takes the deliberately undefined operands inside its own AVX-512 headers for a defect.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
__attribute__((target("avx512f"))) BlockSums sum_avx512(const std::byte* block,
                                                        std::size_t num_words) {
  constexpr std::size_t lanes = 8;
  const std::size_t end = num_words / lanes * lanes;
  __m512i s1 = _mm512_setzero_si512();
  __m512i s2_low = s1;
  __m512i s2_high = s1;
  for (std::size_t i = 0; i < end; i += lanes) {
    prefetch(block + i * kWordBytes);
    const __m512i word = _mm512_loadu_si512(block + i * kWordBytes);
    const __m512i key = _mm512_load_si512(&kTables.keys[i]);
    const __m512i multiplier = _mm512_load_si512(&kTables.multipliers[i]);
    const __m512i keyed = _mm512_add_epi32(word, key);
    s1 = _mm512_add_epi64(s1, _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32)));
    s2_low = _mm512_add_epi64(s2_low, _mm512_mul_epu32(word, multiplier));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(word, 32), multiplier);
    s2_high = _mm512_add_epi64(s2_high, high);
  }
  BlockSums sums{sum_lanes(s1), sum_lanes(s2_low) + (sum_lanes(s2_high) << 32)};
  add_words(sums, block, end, num_words);
  return sums;
}
#pragma GCC diagnostic pop

BlockFunction block_function(ChecksumPath path) noexcept {
  switch (path) {
    case ChecksumPath::automatic:
      if (BlockFunction wide = block_function(ChecksumPath::avx512)) return wide;
      if (BlockFunction wide = block_function(ChecksumPath::avx2)) return wide;
      return sum_portable;
    case ChecksumPath::portable:
      return sum_portable;
    case ChecksumPath::avx2:
      return __builtin_cpu_supports("avx2") ? sum_avx2 : nullptr;
    case ChecksumPath::avx512:
      return __builtin_cpu_supports("avx512f") ? sum_avx512 : nullptr;
  }
  return nullptr;
}

#else

BlockFunction block_function(ChecksumPath path) noexcept {
  const bool here = path == ChecksumPath::automatic || path == ChecksumPath::portable;
  return here ? sum_portable : nullptr;
}

#endif

BlockFunction require_block_function(ChecksumPath path) {
  const BlockFunction function = block_function(path);
  if (function == nullptr) {
    throw std::invalid_argument("checksum path " + std::to_string(static_cast<int>(path)) +
                                " is not supported by this processor");
  }
  return function;
}

std::uint64_t block_term(const BlockSums& sums, std::uint64_t block) {
  return mix64(sums.s1 + (block + 1) * kChecksumBlock1) +
         mix64(sums.s2 ^ ((block + 1) * kChecksumBlock2));
}

BlockSums sum_last_block(const std::byte* block, std::size_t bytes, BlockFunction function) {
  const std::size_t num_words = bytes / kWordBytes;
  BlockSums sums = function(block, num_words);
  if (const std::size_t rest = bytes % kWordBytes; rest != 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, block + num_words * kWordBytes, rest);
    add_word(sums, word, num_words);
  }
  return sums;
}

std::uint64_t checksum_with(BlockFunction function, const std::byte* data, std::size_t bytes) {
  const std::size_t full_blocks = bytes / kBlockBytes;
  std::uint64_t sum = 0;
  for (std::size_t b = 0; b < full_blocks; ++b) {
    sum += block_term(function(data + b * kBlockBytes, kChecksumBlockWords), b);
  }
  if (const std::size_t rest = bytes % kBlockBytes; rest != 0) {
    const std::byte* last = data + full_blocks * kBlockBytes;
    sum += block_term(sum_last_block(last, rest, function), full_blocks);
  }
  return mix64(sum + (bytes + 1) * kChecksumLength);
}

void fill_slices(BlockFunction function, const std::byte* data, std::size_t slice_bytes,
                 std::span<std::uint64_t> sums) {
  for (std::size_t i = 0; i < sums.size(); ++i) {
    sums[i] = checksum_with(function, data + i * slice_bytes, slice_bytes);
  }
}

}  // namespace

const ChecksumTables& checksum_tables() noexcept { return kTables; }

bool checksum_path_supported(ChecksumPath path) noexcept {
  return block_function(path) != nullptr;
}

std::uint64_t checksum(const std::byte* data, std::size_t bytes, ChecksumPath path) {
  return checksum_with(require_block_function(path), data, bytes);
}

void checksum_slices(const std::byte* data, std::size_t slice_bytes, std::span<std::uint64_t> sums,
                     ChecksumPath path) {
  fill_slices(require_block_function(path), data, slice_bytes, sums);
}

void checksum_pages(std::span<const std::byte* const> pages, std::size_t slice_bytes,
                    std::span<std::uint64_t> sums, ChecksumPath path) {
  const BlockFunction function = require_block_function(path);
  if (pages.empty()) return;
  const std::size_t slices = sums.size() / pages.size();
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next++; i < sums.size(); i = next++) {
      sums[i] = checksum_with(function, pages[i / slices] + i % slices * slice_bytes, slice_bytes);
    }
  };
  std::vector<std::jthread> helpers;
  const std::size_t most =
      std::min<std::size_t>(kMaxThreads, std::max(1U, std::thread::hardware_concurrency()));
  try {
    while (helpers.size() + 1 < std::min(most, sums.size() * slice_bytes / kThreadBytes)) {
      helpers.emplace_back(work);
    }
  } catch (const std::system_error&) {
    // no more threads are to be had: those that are there do it
  }
  work();
}

}  // namespace tiermem
