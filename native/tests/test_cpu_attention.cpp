// CpuAttention with every set of instructions against float64.
#include "tiermem/cpu_attention.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>

#include "../src/attention_kernel.h"
#include "attention_cases.h"
#include "check.h"

using namespace tiermem;
using namespace tiermem_test;

namespace {

constexpr AttentionInstructions kAll[] = {AttentionInstructions::portable,
                                          AttentionInstructions::avx2,
                                          AttentionInstructions::avx512};
constexpr FloatType kTypes[] = {FloatType::float16, FloatType::bfloat16, FloatType::float32};

// What rounding to the output's type costs, beside the error of float32 sums.
double tolerance(FloatType out_type) {
  if (out_type == FloatType::float16) return 6e-4;
  if (out_type == FloatType::bfloat16) return 5e-3;
  return 3e-6;
}

void check_case(CpuAttention& attention, const Shape& shape, std::uint64_t seed) {
  const Case one(shape, seed);
  const Case::Errors errors = one.errors(one.run(attention));
  const double of_scores = 1e-6 * std::abs(shape.scale) * std::sqrt(double(shape.head_dim));
  const bool is_right = errors.out <= tolerance(shape.out_type) + of_scores &&
                        errors.lse <= 2e-6 + of_scores && errors.page_lse <= 2e-6 + of_scores;
  CHECK(is_right);
  if (is_right) return;
  std::fprintf(stderr,
               "  instructions %d type %d heads %zu x %zu head_dim %zu page %zu rows %d.. stored %d.. "
               "window %d scattered %d scale %g out %d: errors %g %g %g\n",
               static_cast<int>(attention.instructions()), static_cast<int>(shape.type),
               shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.page_tokens,
               shape.rows[0], shape.stored[0], static_cast<int>(shape.window.value_or(0)),
               shape.scattered, shape.scale, static_cast<int>(shape.out_type), errors.out,
               errors.lse, errors.page_lse);
}

void every_head_dim_and_type(CpuAttention& attention) {
  for (const FloatType type : kTypes) {
    for (const std::size_t head_dim :
         {1, 3, 8, 13, 16, 24, 40, 56, 64, 72, 80, 96, 120, 128, 136, 200, 256, 264}) {
      Shape shape;
      shape.type = type;
      shape.head_dim = head_dim;
      shape.rows = {1, 9};
      shape.stored = {37, 70};
      check_case(attention, shape, head_dim);
    }
  }
}

void every_group(CpuAttention& attention) {
  for (std::size_t heads = 1; heads <= 17; ++heads) {
    for (const int rows : {1, 2, 5}) {
      Shape shape;
      shape.heads_per_kv = heads;
      shape.rows = {rows};
      shape.stored = {90};
      shape.type = kTypes[heads % 3];
      check_case(attention, shape, heads);
    }
  }
}

void every_page_size_and_row_count(CpuAttention& attention) {
  for (const std::size_t page_tokens : {1, 2, 7, 16, 33, 64, 100, 128}) {
    for (const int rows : {1, 2, 8, 17, 33}) {
      Shape shape;
      shape.page_tokens = page_tokens;
      shape.head_dim = 24;
      shape.rows = {rows, 1};
      shape.stored = {rows + 100, 150};
      check_case(attention, shape, page_tokens * 100 + static_cast<std::size_t>(rows));
      shape.window = rows + 3;
      check_case(attention, shape, page_tokens);
    }
  }
}

Shape random_shape(std::mt19937_64& random) {
  const auto from = [&](std::size_t low, std::size_t high) { return low + random() % (high - low + 1); };
  Shape shape;
  shape.type = kTypes[from(0, 2)];
  shape.out_type = kTypes[from(0, 2)];
  shape.num_kv_heads = from(1, 3);
  shape.heads_per_kv = from(1, 16);
  shape.head_dim = from(0, 3) == 0 ? from(1, 100) : 8 * from(1, 18);
  shape.page_tokens = from(1, 128);
  shape.rows.clear();
  shape.stored.clear();
  for (std::size_t sequences = from(1, 3); sequences > 0; --sequences) {
    shape.rows.push_back(static_cast<int>(from(0, 1) == 0 ? from(0, 2) : from(0, 33)));
    shape.stored.push_back(shape.rows.back() + static_cast<int>(from(0, 1) == 0 ? 0 : from(0, 300)));
  }
  if (from(0, 2) == 0) shape.window = static_cast<std::int64_t>(from(1, 150));
  shape.scattered = from(0, 1) == 0;
  constexpr double scales[] = {0.2, -0.2, 0.0, 1.0};
  shape.scale = scales[from(0, 3)];
  shape.wants_pages = from(0, 1) == 0;
  return shape;
}

void random_shapes(CpuAttention& attention, std::uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  for (int i = 0; i < count; ++i) check_case(attention, random_shape(random), random());
}

// The log-sum-exp of each page, of sizes that blocks of tokens begin and end within, in windows that do too.
void every_page(CpuAttention& attention) {
  for (const std::size_t page_tokens : {1, 3, 16, 50, 64, 65, 200}) {
    for (const std::size_t heads : {1, 2, 3, 5, 7, 8, 15, 17}) {
      for (const int rows : {1, 3, 20}) {
        Shape shape;
        shape.wants_pages = true;
        shape.page_tokens = page_tokens;
        shape.heads_per_kv = heads;
        shape.head_dim = 20;
        shape.rows = {rows, 0, 2};
        shape.stored = {rows + 210, 30, 2};
        shape.type = kTypes[heads % 3];
        shape.scattered = rows == 3;
        if (page_tokens % 2 == 1) shape.window = 60 + rows;
        check_case(attention, shape, page_tokens * 100 + heads);
      }
    }
  }
}

// Pages whose tokens all count for nothing beside another page's have their log-sum-exp none the less.
void pages_far_apart(CpuAttention& attention) {
  for (const std::size_t heads : {1, 20}) {
    Shape shape;
    shape.wants_pages = true;
    shape.heads_per_kv = heads;
    shape.gain = 10;
    shape.scale = 0.5;
    shape.page_tokens = 5;
    shape.stored = {300};
    const Case one(shape, 8);
    // What rounding 64 products of up to a thousand costs a score.
    CHECK(one.errors(one.run(attention)).page_lse <= 2e-4);
  }
}

// Enough tokens for several runs, so that partial results are merged; rows in several groups.
void long_contexts(CpuAttention& attention) {
  Shape shape;
  shape.stored = {3000, 1};
  shape.rows = {1, 1};
  shape.heads_per_kv = 7;
  shape.page_tokens = 64;
  shape.wants_pages = true;
  check_case(attention, shape, 1);
  shape.scattered = true;
  shape.window = 1500;
  check_case(attention, shape, 2);
  Shape rows;
  rows.head_dim = 16;
  rows.heads_per_kv = 8;
  rows.num_kv_heads = 1;
  rows.rows = {80};
  rows.stored = {900};
  check_case(attention, rows, 3);
}

// So many partial results that all threads merge them.
void many_partial_results() {
  Shape shape;
  shape.type = FloatType::float32;
  shape.num_kv_heads = 8;
  shape.heads_per_kv = 1;
  shape.head_dim = 256;
  shape.page_tokens = 32;
  shape.rows = {9, 0, 1};
  shape.stored = {5000, 3, 70};
  CpuAttention attention(3);
  check_case(attention, shape, 1);
}

// Scores of thousands: weights underflow, and the maximum moves often.
void large_scores(CpuAttention& attention) {
  for (const FloatType type : kTypes) {
    Shape shape;
    shape.type = type;
    shape.gain = 10;
    shape.scale = 0.5;
    shape.stored = {500};
    shape.rows = {4};
    // The error of a score is that of a sum of 64 products of up to a thousand in float32.
    const Case one(shape, 5);
    const Case::Errors errors = one.errors(one.run(attention));
    CHECK(errors.out <= 3e-3 && errors.lse <= 3e-6);
  }
}

// fp16 numbers below its normal range count in full.
void small_halves(CpuAttention& attention) {
  const std::vector<std::uint16_t> page(2 * 8, 0x0155);
  const std::vector<std::uint16_t> query(8, 0x3C00);
  const std::vector<std::int64_t> slices{
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(page.data()))};
  const std::vector<std::int32_t> one{1}, zero{0}, rows{0, 1};
  std::vector<float> out(8), lse(1);
  attention.attend({FloatType::float16, 1, 1, 8}, {1, slices, {}, one, one, rows, zero},
                   {query.data(), 8, 8, 1, 1.0, {}}, {FloatType::float32, out.data(), lse.data()});
  const float expected = 0x155 * 0x1p-24F;
  for (const float x : out) CHECK(x == expected);
  CHECK(std::abs(lse[0] - 8 * expected) <= 1e-7F);
}

void rows_that_see_nothing(CpuAttention& attention) {
  const std::vector<float> page(2 * 2 * 8, NAN);
  const std::vector<float> query(3 * 8, 1.0F);
  const std::vector<std::int64_t> slices{
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(page.data()))};
  const std::vector<std::int32_t> one{1}, zero{0}, rows{0, 3};
  std::vector<float> out(24, 5.0F), lse(3, 5.0F);
  attention.attend({FloatType::float32, 1, 2, 8}, {1, slices, {}, one, zero, rows, zero},
                   {query.data(), 8, 8, 1, 1.0, {}}, {FloatType::float32, out.data(), lse.data()});
  for (const float x : out) CHECK(x == 0.0F);
  for (const float x : lse) CHECK(x == -INFINITY);
  // Of five rows of which the first two have positions before the first token.
  const std::vector<float> filled(2 * 2 * 8, 2.0F);
  const std::vector<std::int64_t> there{
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(filled.data()))};
  const std::vector<std::int32_t> two{2}, before{-2};
  attention.attend({FloatType::float32, 1, 2, 8}, {1, there, {}, one, two, rows, before},
                   {query.data(), 8, 8, 1, 1.0, {}}, {FloatType::float32, out.data(), lse.data()});
  for (std::size_t i = 0; i < 24; ++i) CHECK(out[i] == (i < 16 ? 0.0F : 2.0F));
  CHECK(lse[1] == -INFINITY && lse[2] > 0);
}

void threads_do_not_show() {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    std::mt19937_64 random(seed);
    Shape shape = random_shape(random);
    shape.stored[0] += 4000;
    shape.wants_pages = true;
    const Case one(shape, seed);
    CpuAttention alone(1);
    const Outcome expected = one.run(alone);
    for (std::size_t threads = 2; threads <= 5; ++threads) {
      CpuAttention attention(threads);
      CHECK(attention.num_threads() == threads);
      for (int round = 0; round < 3; ++round) CHECK(one.run(attention) == expected);
    }
  }
}

void throwing_attend(const UnitTask& task) {
  if (task.kv_head == 1) throw std::runtime_error("no");
  kPortableAttention.attend(task);
}

void a_unit_that_throws() {
  AttentionKernel kernel = kPortableAttention;
  kernel.attend = &throwing_attend;
  CpuAttention attention(3, kernel);
  Shape shape;
  shape.stored = {2000};
  CHECK_THROWS(std::runtime_error, Case(shape, 1).run(attention));
  CHECK_THROWS(std::runtime_error, Case(shape, 2).run(attention));
  shape.num_kv_heads = 1;
  check_case(attention, shape, 3);
}

void wrong_arguments(CpuAttention& attention) {
  Case lost(Shape{}, 1);
  lost.lose_first_page();
  CHECK_THROWS(std::invalid_argument, lost.run(attention));
  const std::vector<std::int64_t> slices{16};
  const std::vector<std::int32_t> one{1}, two{2}, rows{0, 1}, down{0, -1}, late{1, 1};
  float number = 0;
  const auto attend = [&](const PageTables& tables) {
    attention.attend({FloatType::float32, 1, 1, 1}, tables, {&number, 1, 1, 1, 1.0, {}},
                     {FloatType::float32, &number, &number});
  };
  CHECK_THROWS(std::invalid_argument, attend({1, slices, {}, two, one, rows, one}));
  CHECK_THROWS(std::invalid_argument, attend({2, slices, {}, one, one, rows, one}));
  CHECK_THROWS(std::invalid_argument, attend({1, slices, rows, one, one, rows, one}));
  CHECK_THROWS(std::invalid_argument, attend({1, slices, {}, one, rows, rows, one}));
  CHECK_THROWS(std::invalid_argument, attend({1, slices, {}, one, one, one, one}));
  CHECK_THROWS(std::invalid_argument, attend({1, slices, {}, one, one, down, one}));
  CHECK_THROWS(std::invalid_argument, attend({1, slices, {}, one, one, late, one}));
  CHECK_THROWS(std::invalid_argument, CpuAttention(0));
}

}  // namespace

int main() {
  for (const AttentionInstructions instructions : kAll) {
    if (!attention_instructions_supported(instructions)) {
      CHECK_THROWS(std::invalid_argument, CpuAttention(1, {}, instructions));
      std::printf("instructions %d: not on this processor\n", static_cast<int>(instructions));
      continue;
    }
    CpuAttention attention(2, {}, instructions);
    CHECK(attention.instructions() == instructions);
    every_head_dim_and_type(attention);
    every_group(attention);
    every_page_size_and_row_count(attention);
    every_page(attention);
    pages_far_apart(attention);
    random_shapes(attention, 7, 60);
    long_contexts(attention);
    large_scores(attention);
    small_halves(attention);
    rows_that_see_nothing(attention);
    wrong_arguments(attention);
  }
  threads_do_not_show();
  many_partial_results();
  a_unit_that_throws();
  return report("cpu_attention");
}
