// The hashes of the prefix index.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tiermem/prefix_index.h"

namespace tiermem {
namespace {

// 32 bytes, the place of a parent's key in the message of a page: no chain hash starts like a root.
constexpr std::string_view kRootTag("tiermem prefix root, version 1\0\0", 32);

template <class Word>
void append_little_endian(Word word, std::vector<std::uint8_t>& bytes) {
  for (std::size_t i = 0; i < sizeof(Word); ++i) {
    bytes.push_back(static_cast<std::uint8_t>(word >> (8 * i)));
  }
}

template <class Token>
std::vector<Digest> chain_of(Digest parent, std::span<const Token> tokens,
                             std::size_t page_tokens) {
  std::vector<Digest> keys(tokens.size() / page_tokens);
  std::vector<std::uint8_t> message;
  message.reserve(page_tokens * sizeof(std::uint32_t));
  for (Digest& key : keys) {
    message.clear();
    for (const Token token : tokens.first(page_tokens)) {
      append_little_endian(static_cast<std::uint32_t>(token), message);
    }
    tokens = tokens.subspan(page_tokens);
    Sha256 hash;
    hash.update(parent);
    hash.update(message);
    key = parent = hash.finish();
  }
  return keys;
}

}  // namespace

Digest PrefixIndex::root_hash(std::span<const Bytes> parts) {
  std::vector<std::uint8_t> message(kRootTag.begin(), kRootTag.end());
  for (const Bytes part : parts) {
    append_little_endian(static_cast<std::uint64_t>(part.size()), message);
    message.insert(message.end(), part.begin(), part.end());
  }
  Sha256 hash;
  hash.update(message);
  return hash.finish();
}

std::vector<Digest> PrefixIndex::chain(const Digest& parent,
                                       std::span<const std::int64_t> tokens) const {
  constexpr std::int64_t kMaxToken = std::numeric_limits<std::uint32_t>::max();
  const auto bad = std::find_if(tokens.begin(), tokens.end(),
                                [](std::int64_t token) { return token < 0 || token > kMaxToken; });
  if (bad != tokens.end()) {
    throw std::invalid_argument("tokens[" + std::to_string(bad - tokens.begin()) +
                                "]=" + std::to_string(*bad) + ": must be in [0, 4294967295]");
  }
  return chain_of(parent, tokens, static_cast<std::size_t>(page_tokens_));
}

std::vector<Digest> PrefixIndex::chain(const Digest& parent,
                                       std::span<const std::uint32_t> tokens) const {
  return chain_of(parent, tokens, static_cast<std::size_t>(page_tokens_));
}

}  // namespace tiermem
