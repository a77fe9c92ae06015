#include "tiermem/kernel_launch.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "check.h"

using namespace tiermem;

namespace {

constexpr std::uintptr_t kFunction = 0x7001;
constexpr std::uintptr_t kContext = 0xC0;

// What the driver is given; laid out as CUDA's headers say.
struct GivenConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  std::uintptr_t stream;
  const unsigned char* attributes;
  unsigned num_attributes;
};

// A driver that keeps the last launch, with its parameters' bytes.
struct RecordingDriver {
  // Bytes of each parameter, for the copies.
  std::vector<std::size_t> sizes;
  GivenConfig config{};
  std::uintptr_t function = 0;
  std::optional<std::uintptr_t> context_at_launch;
  std::vector<std::string> parameters;
  std::vector<std::uintptr_t> addresses;
  std::vector<unsigned char> attributes;
  std::uintptr_t context = kContext;
  int launch_code = 0;
  int context_code = 0;
  bool has_words = true;

  RecordingDriver() { current() = this; }

  // The one that the functions below belong to.
  static RecordingDriver*& current() {
    static RecordingDriver* driver = nullptr;
    return driver;
  }

  static LaunchCalls calls() {
    const auto address = [](auto function) { return reinterpret_cast<std::uintptr_t>(function); };
    return {address(&launch), address(&get_context), address(&set_context),
            address(&error_string)};
  }

  static int launch(const GivenConfig* config, std::uintptr_t function, void** parameters,
                    void** extra) {
    RecordingDriver& self = *current();
    CHECK(extra == nullptr);
    self.config = *config;
    self.function = function;
    self.context_at_launch = self.context;
    self.attributes.assign(config->attributes, config->attributes + 72 * config->num_attributes);
    self.parameters.clear();
    self.addresses.clear();
    for (std::size_t i = 0; i < self.sizes.size(); ++i) {
      self.parameters.emplace_back(static_cast<const char*>(parameters[i]), self.sizes[i]);
      self.addresses.push_back(reinterpret_cast<std::uintptr_t>(parameters[i]));
    }
    return self.launch_code;
  }

  static int get_context(std::uintptr_t* context) {
    *context = current()->context;
    return current()->context_code;
  }

  static int set_context(std::uintptr_t context) {
    current()->context = context;
    return 0;
  }

  static int error_string(int, const char** words) {
    if (current()->has_words) *words = "out of luck";
    return current()->has_words ? 0 : 1;
  }
};

template <class Number>
std::string bytes_of(Number number) {
  std::string bytes(sizeof number, '\0');
  std::memcpy(bytes.data(), &number, sizeof number);
  return bytes;
}

LaunchedKernel kernel(bool early) {
  return {"merge", kFunction, kContext, {5, 7}, 96, 4321, early};
}

void test_every_byte_reaches_the_driver() {
  RecordingDriver driver;
  const std::string map(128, 'M');
  const std::vector<std::string> fixed = {bytes_of(std::int32_t{-2}), map, bytes_of(0.125F),
                                          bytes_of(~std::uint64_t{3}), bytes_of(std::int32_t{9}),
                                          map};
  driver.sizes = {8, 8, 4, 128, 4, 8, 4, 128};
  const KernelLaunch launch(RecordingDriver::calls(), kernel(true), 2, fixed);
  for (const std::uint64_t first : {std::uint64_t{10}, ~std::uint64_t{0}}) {
    const std::array<std::uint64_t, 2> numbers{first, 20};
    launch(0x57, numbers);
    std::vector<std::string> expected = {bytes_of(first), bytes_of(std::uint64_t{20})};
    expected.insert(expected.end(), fixed.begin(), fixed.end());
    CHECK(driver.parameters == expected);
  }
  for (std::size_t i = 0; i < driver.sizes.size(); ++i) {
    CHECK(driver.addresses[i] % std::min<std::size_t>(driver.sizes[i], 64) == 0);
  }
  const GivenConfig& config = driver.config;
  CHECK(driver.function == kFunction && config.stream == 0x57 && config.shared_bytes == 4321);
  CHECK(config.grid[0] == 5 && config.grid[1] == 7 && config.grid[2] == 1);
  CHECK(config.block[0] == 96 && config.block[1] == 1 && config.block[2] == 1);
}

void test_only_an_early_launch_has_an_attribute() {
  RecordingDriver driver;
  KernelLaunch(RecordingDriver::calls(), kernel(false), 0, {})(1, {});
  CHECK(driver.config.num_attributes == 0);
  KernelLaunch(RecordingDriver::calls(), kernel(true), 0, {})(1, {});
  CHECK(driver.config.num_attributes == 1);
  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and that it is allowed
  std::vector<unsigned char> expected(72, 0);
  expected[0] = 6;
  expected[8] = 1;
  CHECK(driver.attributes == expected);
}

void test_a_launch_runs_in_the_kernels_context_and_puts_the_threads_back() {
  for (const std::uintptr_t before : {std::uintptr_t{0}, std::uintptr_t{0xC1}, kContext}) {
    for (const int code : {0, 700}) {
      RecordingDriver driver;
      driver.context = before;
      driver.launch_code = code;
      const KernelLaunch launch(RecordingDriver::calls(), kernel(false), 0, {});
      bool refused = false;
      try {
        launch(1, {});
      } catch (const LaunchRefused&) {
        refused = true;
      }
      CHECK(refused == (code != 0));
      CHECK(driver.context_at_launch == kContext && driver.context == before);
    }
  }
}

std::string refusal_of(const KernelLaunch& launch, int code) {
  try {
    launch(1, {});
  } catch (const LaunchRefused& refused) {
    CHECK(refused.code() == code);
    return refused.what();
  }
  return "none";
}

void test_what_the_driver_refuses_is_raised_in_its_words() {
  RecordingDriver driver;
  const KernelLaunch launch(RecordingDriver::calls(), kernel(false), 0, {});
  driver.launch_code = 701;
  CHECK(refusal_of(launch, 701) == "launch of merge: CUDA error 701: out of luck");
  driver.has_words = false;
  CHECK(refusal_of(launch, 701) == "launch of merge: CUDA error 701: unknown");
  driver.context_code = 4;
  driver.context_at_launch.reset();
  CHECK(refusal_of(launch, 4) == "launch of merge: CUDA error 4: unknown");
  CHECK(!driver.context_at_launch);
}

void test_wrong_parameters_are_refused() {
  RecordingDriver driver;
  const auto make = [](std::size_t num_changing, const std::vector<std::string>& fixed) {
    return KernelLaunch(RecordingDriver::calls(), kernel(false), num_changing, fixed);
  };
  for (const std::size_t bytes : {0, 1, 5, 16, 64, 129}) {
    CHECK_THROWS(std::invalid_argument, make(1, {std::string(bytes, 'x')}));
  }
  const std::vector<std::string> most(KernelLaunch::kMostParameters - 1, std::string(8, 'x'));
  CHECK_THROWS(std::invalid_argument, make(2, most));
  const KernelLaunch launch = make(1, most);
  const std::array<std::uint64_t, 2> numbers{1, 2};
  launch(1, std::span(numbers).first(1));
  CHECK(driver.context_at_launch == kContext);
  driver.context_at_launch.reset();
  CHECK_THROWS(std::invalid_argument, launch(1, numbers));
  CHECK_THROWS(std::invalid_argument, launch(1, {}));
  CHECK(!driver.context_at_launch);
}

}  // namespace

int main() {
  test_every_byte_reaches_the_driver();
  test_only_an_early_launch_has_an_attribute();
  test_a_launch_runs_in_the_kernels_context_and_puts_the_threads_back();
  test_what_the_driver_refuses_is_raised_in_its_words();
  test_wrong_parameters_are_refused();
  return tiermem_test::report("test_kernel_launch");
}
