// Attention by products of tiles, on emulated tiles, against float64.
#include <cmath>
#include <cstdio>
#include <random>

#include "../src/attention_kernel.h"
#include "attention_cases.h"
#include "check.h"
#include "emulated_tiles.h"

using namespace tiermem;
using namespace tiermem_test;

namespace {

// Of any number of lines, and only from as many on as a real one has.
using Always = TileKernel<Emulated, 1, 1, 128>;
using Many = TileKernel<Emulated, 9, 9, 192>;

template <class Kernel>
void prepare(const PrepareTask& task) {
  if (!Kernel::prepare(task)) kPortableAttention.prepare(task);
}
template <class Kernel>
void attend(const UnitTask& task) {
  if (!Kernel::attend(task)) kPortableAttention.attend(task);
}
template <class Kernel>
AttentionKernel kernel() {
  return {AttentionInstructions::portable, &prepare<Kernel>, &attend<Kernel>,
          kPortableAttention.merge};
}

const AttentionKernel kAlways = kernel<Always>();
const AttentionKernel kMany = kernel<Many>();
constexpr FloatType kHalves[] = {FloatType::float16, FloatType::bfloat16};

void check_errors(const Case& one, CpuAttention& attention, const char* name, double out_limit,
                  double lse_limit) {
  const Case::Errors errors = one.errors(one.run(attention));
  const bool is_right = errors.out <= out_limit && errors.lse <= lse_limit &&
                        errors.page_lse <= lse_limit;
  CHECK(is_right);
  if (!is_right) {
    std::fprintf(stderr, "  %s: errors %g %g %g\n", name, errors.out, errors.lse, errors.page_lse);
  }
}

// What the parts left out cost: 2^-16 of a weight, and of the products that make up a score.
void check_case(CpuAttention& attention, const Shape& shape, std::uint64_t seed, const char* name) {
  const bool is_split = shape.type == FloatType::float16;
  const double of_scores =
      (is_split ? 3e-5 : 1e-6) * std::abs(shape.scale) * std::sqrt(double(shape.head_dim));
  check_errors(Case(shape, seed), attention, name, 1.5e-5 + of_scores, 3e-6 + of_scores);
}

void every_head_dim_and_group(CpuAttention& attention) {
  for (const FloatType type : kHalves) {
    for (const std::size_t head_dim : {32, 64, 96, 128, 256, 48, 288}) {
      for (const std::size_t heads : {1, 7, 16, 17, 33}) {
        Shape shape;
        shape.type = type;
        shape.head_dim = head_dim;
        shape.num_kv_heads = 1 + heads % 2;
        shape.heads_per_kv = heads;
        shape.rows = {1};
        shape.stored = {97};
        shape.wants_pages = heads == 7;
        check_case(attention, shape, head_dim + heads, "head_dim and group");
      }
    }
  }
}

// Pages that tiles fit into and that they do not, rows that see different tokens, and windows.
void every_page_size_and_row_count(CpuAttention& attention) {
  for (const FloatType type : kHalves) {
    for (const std::size_t page_tokens : {1, 5, 16, 32, 50, 64, 128}) {
      for (const int rows : {1, 2, 8, 17, 32}) {
        Shape shape;
        shape.type = type;
        shape.page_tokens = page_tokens;
        shape.heads_per_kv = rows == 32 ? 4 : 3;
        shape.head_dim = 32;
        shape.num_kv_heads = 1;
        shape.rows = {rows, 1};
        shape.stored = {rows + 100, 150};
        shape.scattered = rows == 2;
        shape.wants_pages = rows % 2 == 1;
        check_case(attention, shape, page_tokens, "page and rows");
        shape.window = rows + 3;
        check_case(attention, shape, page_tokens, "window");
      }
    }
  }
}

void every_scale(CpuAttention& attention) {
  for (const FloatType type : kHalves) {
    for (const double scale : {0.0, -0.3, 1.0, 1e-3}) {
      Shape shape;
      shape.type = type;
      shape.scale = scale;
      shape.rows = {5};
      shape.heads_per_kv = 3;
      shape.wants_pages = true;
      check_case(attention, shape, 4, "scale");
    }
  }
}

void random_shapes(CpuAttention& attention, std::uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  const auto from = [&](std::size_t low, std::size_t high) { return low + random() % (high - low + 1); };
  for (int i = 0; i < count; ++i) {
    Shape shape;
    shape.type = kHalves[from(0, 1)];
    shape.out_type = from(0, 3) == 0 ? FloatType::float32 : shape.type;
    shape.num_kv_heads = from(1, 2);
    shape.heads_per_kv = from(1, 8);
    shape.head_dim = 32 * from(1, 4);
    shape.page_tokens = from(1, 128);
    shape.rows = {static_cast<int>(from(0, 20)), static_cast<int>(from(0, 2))};
    for (std::size_t b = 0; b < 2; ++b) {
      shape.stored.resize(2);
      shape.stored[b] = shape.rows[b] + static_cast<int>(from(0, 200));
    }
    if (from(0, 2) == 0) shape.window = static_cast<std::int64_t>(from(1, 150));
    shape.scattered = from(0, 1) == 0;
    shape.wants_pages = from(0, 1) == 0;
    const bool is_wide = shape.out_type == FloatType::float32;
    const double of_type = is_wide ? 0 : shape.out_type == FloatType::float16 ? 6e-4 : 5e-3;
    check_errors(Case(shape, random()), attention, "random", of_type + 6e-5, 6e-5);
  }
}

void long_context(CpuAttention& attention) {
  for (const FloatType type : kHalves) {
    Shape shape;
    shape.type = type;
    shape.heads_per_kv = 7;
    shape.num_kv_heads = 1;
    shape.rows = {4};
    shape.stored = {1500};
    shape.page_tokens = 64;
    check_case(attention, shape, 1, "long");
  }
}

// Scores of hundreds: weights underflow, and the maximum moves often. An error of a score of 400 that is
// 2^-17 of its products shows.
void large_scores(CpuAttention& attention) {
  for (const FloatType type : kHalves) {
    Shape shape;
    shape.type = type;
    shape.gain = 10;
    shape.scale = 0.5;
    shape.stored = {200};
    shape.rows = {4};
    shape.wants_pages = true;
    const double limit = type == FloatType::float16 ? 2e-2 : 3e-3;
    check_errors(Case(shape, 5), attention, "large scores", limit, limit);
  }
}

struct Small {
  std::vector<float> out, lse;
};

// One page of two tokens of K = V, all bits the same; twenty rows of queries of ones.
Small attend_to(CpuAttention& attention, std::uint16_t first, std::uint16_t second,
                std::uint16_t one, FloatType type) {
  constexpr std::size_t dim = 32, rows = 20;
  std::vector<std::uint16_t> page;
  for (const std::uint16_t bits : {first, second, first, second}) page.insert(page.end(), dim, bits);
  const std::vector<std::uint16_t> queries(rows * dim, one);
  const std::vector<std::int64_t> slices{
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(page.data()))};
  const std::vector<std::int32_t> pages{1}, stored{2}, row_starts{0, rows}, start{1};
  Small result{std::vector<float>(rows * dim), std::vector<float>(rows)};
  attention.attend({type, 1, 2, dim}, {1, slices, {}, pages, stored, row_starts, start},
                   {queries.data(), dim, dim, 1, 1.0, {}},
                   {FloatType::float32, result.out.data(), result.lse.data()});
  return result;
}

// fp16 numbers below its normal range count in full; the largest ones do not overflow.
void small_and_large_halves(CpuAttention& attention) {
  constexpr std::uint16_t one = 0x3C00;
  for (const std::uint16_t bits : {0x0001, 0x0155, 0x03FF, 0x0400, 0x83FF, 0x0000, 0x8000}) {
    const Small result = attend_to(attention, bits, bits, one, FloatType::float16);
    const double expected = widened(FloatType::float16, reinterpret_cast<const std::byte*>(&bits));
    for (const float x : result.out) CHECK(std::abs(x - expected) <= 1e-5 * std::abs(expected));
    for (const float x : result.lse) CHECK(std::abs(x - std::log(2.0) - 32 * expected) <= 3e-7);
  }
  const Small most = attend_to(attention, 0x7BFF, 0x7BFF, one, FloatType::float16);
  for (const float x : most.out) CHECK(std::abs(x - 65504) <= 65504 * 4e-5);
  for (const float x : most.lse) CHECK(std::abs(x - 32 * 65504.0) <= 32 * 65504 * 1e-5);
}

// What is no number does not pass as one.
void no_numbers(CpuAttention& attention) {
  for (const std::uint16_t bits : {0x7C00, 0xFC00, 0x7E00}) {
    for (const float x : attend_to(attention, bits, 0x3C00, 0x3C00, FloatType::float16).out) CHECK(std::isnan(x));
  }
  for (const float x : attend_to(attention, 0x7FC0, 0x3F80, 0x3F80, FloatType::bfloat16).out) CHECK(std::isnan(x));
}

void what_goes_by_tiles() {
  CHECK(Many::uses_tiles(FloatType::float16, 9, 128) && !Many::uses_tiles(FloatType::float16, 8, 128));
  CHECK(!Many::uses_tiles(FloatType::float32, 64, 128) && !Many::uses_tiles(FloatType::bfloat16, 64, 80));
  CHECK(Many::uses_tiles(FloatType::bfloat16, 128, 256) && !Many::uses_tiles(FloatType::bfloat16, 129, 128));
  CHECK(!Many::uses_tiles(FloatType::bfloat16, 64, 288));
}

void check_all(CpuAttention& attention) {
  small_and_large_halves(attention);
  no_numbers(attention);
  every_scale(attention);
  every_head_dim_and_group(attention);
  every_page_size_and_row_count(attention);
  random_shapes(attention, 3, 40);
  long_context(attention);
  large_scores(attention);
}

}  // namespace

int main() {
  what_goes_by_tiles();
  CpuAttention always(1, kAlways), many(2, kMany);
  check_all(always);
  check_all(many);
  if (attention_instructions_supported(AttentionInstructions::amx)) {
    CpuAttention real(2, {}, AttentionInstructions::amx);
    CHECK(real.instructions() == AttentionInstructions::amx);
    check_all(real);
  } else {
    CHECK_THROWS(std::invalid_argument, CpuAttention(1, {}, AttentionInstructions::amx));
    std::printf("tiles: emulated only, this processor has none\n");
  }
  return report("attention_tiles");
}
