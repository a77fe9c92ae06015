#include <string>
#include <string_view>

#include "check.h"
#include "tiermem/sha256.h"

namespace {

using tiermem::Digest;
using tiermem::Sha256;

std::span<const std::uint8_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

std::string hex(const Digest& digest) {
  std::string text;
  for (const std::uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string hash_of(std::string_view text) {
  Sha256 hash;
  hash.update(bytes_of(text));
  return hex(hash.finish());
}

void test_known_answers() {
  // FIPS 180-4 examples and the NIST long message.
  CHECK(hash_of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hash_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hash_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hash_of(std::string(1'000'000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

void test_pieces_hash_like_the_whole() {
  // Every length around the block and padding boundaries, cut at every place.
  for (std::size_t length = 0; length <= 130; ++length) {
    std::string text(length, ' ');
    for (std::size_t i = 0; i < length; ++i) text[i] = static_cast<char>(i * 37 + length);
    const std::string whole = hash_of(text);
    for (std::size_t cut = 0; cut <= length; ++cut) {
      Sha256 hash;
      hash.update(bytes_of(text).first(cut));
      hash.update(bytes_of(text).subspan(cut));
      CHECK(hex(hash.finish()) == whole);
    }
  }
}

}  // namespace

int main() {
  test_known_answers();
  test_pieces_hash_like_the_whole();
  return tiermem_test::report("sha256");
}
