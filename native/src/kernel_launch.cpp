#include "tiermem/kernel_launch.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace tiermem {

namespace {

constexpr std::size_t kTensorMapBytes = 128;

// CUlaunchAttribute and CUlaunchConfig.
struct Attribute {
  std::uint32_t id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  std::uint32_t padding = 0;
  std::int32_t value[16] = {1};
};
static_assert(sizeof(Attribute) == 72 && offsetof(Attribute, value) == 8);

struct Config {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(Config) == 56 && offsetof(Config, stream) == 32);

template <class... Arguments>
int call(std::uintptr_t function, Arguments... arguments) {
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

void* handle(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

// A context that is the thread's current one for as long as this lives.
class CurrentContext {
 public:
  CurrentContext(const LaunchCalls& calls, std::uintptr_t context) : calls_(calls) {
    code_ = call(calls.get_context, &before_);
    if (code_ != 0 || before_ == handle(context)) return;
    code_ = call(calls.set_context, handle(context));
    changed_ = code_ == 0;
  }
  ~CurrentContext() {
    if (changed_) call(calls_.set_context, before_);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  int code() const { return code_; }

 private:
  const LaunchCalls& calls_;
  void* before_ = nullptr;
  int code_ = 0;
  bool changed_ = false;
};

}  // namespace

KernelLaunch::KernelLaunch(const LaunchCalls& calls, LaunchedKernel kernel,
                           std::size_t num_changing, std::span<const std::string> fixed)
    : calls_(calls), kernel_(std::move(kernel)), num_changing_(num_changing) {
  if (num_changing + fixed.size() > kMostParameters) {
    throw std::invalid_argument(kernel_.name + ": " + std::to_string(num_changing + fixed.size()) +
                                " parameters, must be at most " + std::to_string(kMostParameters));
  }
  std::vector<std::size_t> offsets;
  std::size_t end = 0;
  for (const std::string& bytes : fixed) {
    const std::size_t size = bytes.size();
    if (size != 4 && size != 8 && size != kTensorMapBytes) {
      throw std::invalid_argument(kernel_.name + ": a parameter of " + std::to_string(size) +
                                  " bytes, must be 4, 8 or 128");
    }
    const std::size_t alignment = std::min(size, alignof(Block));
    offsets.push_back((end + alignment - 1) / alignment * alignment);
    end = offsets.back() + size;
  }
  memory_.resize((end + sizeof(Block) - 1) / sizeof(Block));
  auto* const memory = reinterpret_cast<std::byte*>(memory_.data());
  for (std::size_t i = 0; i < fixed.size(); ++i) {
    std::memcpy(memory + offsets[i], fixed[i].data(), fixed[i].size());
    fixed_.push_back(memory + offsets[i]);
  }
}

void KernelLaunch::operator()(std::uintptr_t stream, std::span<const std::uint64_t> numbers) const {
  if (numbers.size() != num_changing_) {
    throw std::invalid_argument("launch of " + kernel_.name + " with " +
                                std::to_string(numbers.size()) + " numbers: must be " +
                                std::to_string(num_changing_));
  }
  if (const int code = launch(stream, numbers)) refuse(code);
}

int KernelLaunch::launch(std::uintptr_t stream, std::span<const std::uint64_t> numbers) const {
  // The driver copies the parameters before it returns, and writes to none of them.
  std::array<const void*, kMostParameters> parameters;
  std::size_t count = 0;
  for (const std::uint64_t& number : numbers) parameters[count++] = &number;
  for (const std::byte* bytes : fixed_) parameters[count++] = bytes;
  Attribute early;
  Config config{{kernel_.grid[0], kernel_.grid[1], 1}, {kernel_.threads, 1, 1},
                kernel_.shared_bytes, handle(stream), kernel_.early ? &early : nullptr,
                kernel_.early ? 1U : 0U};
  const CurrentContext current(calls_, kernel_.context);
  if (current.code() != 0) return current.code();
  void** const none = nullptr;
  return call(calls_.launch, &config, handle(kernel_.function), parameters.data(), none);
}

void KernelLaunch::refuse(int code) const {
  const char* words = nullptr;
  call(calls_.error_string, code, &words);
  throw LaunchRefused("launch of " + kernel_.name + ": CUDA error " + std::to_string(code) + ": " +
                          (words == nullptr ? "unknown" : words),
                      code);
}

}  // namespace tiermem
