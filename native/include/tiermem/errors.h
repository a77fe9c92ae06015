// Errors of the core. Arguments that make no sense are std::invalid_argument.
#pragma once

#include <stdexcept>

namespace tiermem {

// The bookkeeping was asked to contradict itself (a stale page id, a transition that the state does
// not allow), or does. The call that throws it has changed nothing.
class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace tiermem
