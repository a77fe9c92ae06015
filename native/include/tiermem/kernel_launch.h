// KernelLaunch: one kernel with its grid and its parameters in place, launched again and again with
// a few other numbers. The core links no CUDA; Python looks the driver's functions up and hands
// their addresses over.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tiermem {

// Addresses of the driver's functions.
struct LaunchCalls {
  std::uintptr_t launch = 0;        // cuLaunchKernelEx
  std::uintptr_t get_context = 0;   // cuCtxGetCurrent
  std::uintptr_t set_context = 0;   // cuCtxSetCurrent
  std::uintptr_t error_string = 0;  // cuGetErrorString
};

// What is launched, the same in every launch.
struct LaunchedKernel {
  std::string name;             // for messages
  std::uintptr_t function = 0;  // CUfunction
  std::uintptr_t context = 0;   // CUcontext that the function is loaded in
  std::array<unsigned, 2> grid{};
  unsigned threads = 0;
  unsigned shared_bytes = 0;
  bool early = false;  // may start while the kernel before it on the stream still runs
};

// The driver refused a launch: CUDA's code, in its words in what().
class LaunchRefused : public std::runtime_error {
 public:
  LaunchRefused(const std::string& text, int code) : std::runtime_error(text), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// Nothing in it changes after it was made, so threads may share it.
class KernelLaunch {
 public:
  static constexpr std::size_t kMostParameters = 64;

  // The kernel's first `num_changing` parameters are numbers of 64 bits that differ from launch to
  // launch. `fixed` are the bytes of the others, in their order: numbers of 4 or 8 bytes, and
  // tensor maps of 128, which get the alignment that they need.
  // Raises std::invalid_argument for a parameter of another size, or too many.
  KernelLaunch(const LaunchCalls& calls, LaunchedKernel kernel, std::size_t num_changing,
               std::span<const std::string> fixed);
  KernelLaunch(const KernelLaunch&) = delete;
  KernelLaunch& operator=(const KernelLaunch&) = delete;

  // Launches on a stream of the kernel's context, which need not be the thread's current one. Waits
  // while the stream's queue is full. Raises LaunchRefused, and std::invalid_argument for another
  // count of numbers than `num_changing`.
  void operator()(std::uintptr_t stream, std::span<const std::uint64_t> numbers) const;

 private:
  // Tensor maps need 64 bytes; this is what the fixed parameters' memory is made of.
  struct alignas(64) Block {
    std::byte bytes[64];
  };

  int launch(std::uintptr_t stream, std::span<const std::uint64_t> numbers) const;
  [[noreturn]] void refuse(int code) const;

  LaunchCalls calls_;
  LaunchedKernel kernel_;
  std::size_t num_changing_;
  std::vector<Block> memory_;
  std::vector<const std::byte*> fixed_;  // in memory_, in the parameters' order
};

}  // namespace tiermem
