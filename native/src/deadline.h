// A point in time to wait for at most: the same arithmetic for every wait of the I/O engines.
#pragma once

#include <chrono>
#include <stdexcept>
#include <string>

namespace tiermem {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  // `timeout_s` seconds from now; infinity or more than a century: never.
  // Throws std::invalid_argument if it is negative or not a number.
  explicit Deadline(double timeout_s) {
    if (!(timeout_s >= 0)) {
      throw std::invalid_argument("timeout_s=" + std::to_string(timeout_s) + ": must be 0 or more");
    }
    constexpr double kNeverS = 100.0 * 365 * 24 * 3600;
    const std::chrono::duration<double> wait(timeout_s < kNeverS ? timeout_s : kNeverS);
    end_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(wait);
  }

  Clock::time_point end() const noexcept { return end_; }
  bool is_over() const noexcept { return Clock::now() >= end_; }

  // Never negative.
  std::chrono::nanoseconds left() const noexcept {
    const auto rest = end_ - Clock::now();
    return rest > Clock::duration::zero() ? rest : Clock::duration::zero();
  }

 private:
  Clock::time_point end_;
};

}  // namespace tiermem
