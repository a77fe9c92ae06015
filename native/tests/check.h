// The whole test framework: CHECK(condition) and CHECK_THROWS(statement) count, report() prints.
#pragma once

#include <cstdio>
#include <stdexcept>

namespace tiermem_test {

struct Tally {
  int num_checks = 0;
  int num_failures = 0;
};

inline Tally& tally() {
  static Tally instance;
  return instance;
}

inline void check(bool passed, const char* text, const char* file, int line) {
  ++tally().num_checks;
  if (passed) return;
  ++tally().num_failures;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

// The exit status of main(): 0 when every check of the executable passed, and there was one.
inline int report(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, tally().num_checks, tally().num_failures);
  return tally().num_failures == 0 && tally().num_checks > 0 ? 0 : 1;
}

}  // namespace tiermem_test

#define CHECK(...) \
  ::tiermem_test::check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

#define CHECK_THROWS(exception, ...)                                                      \
  do {                                                                                    \
    bool threw = false;                                                                   \
    try {                                                                                 \
      __VA_ARGS__;                                                                        \
    } catch (const exception&) {                                                          \
      threw = true;                                                                       \
    }                                                                                     \
    ::tiermem_test::check(threw, #__VA_ARGS__ " throws " #exception, __FILE__, __LINE__); \
  } while (false)
