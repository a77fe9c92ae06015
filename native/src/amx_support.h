// Whether this processor, its operating system and this build have AMX.
#pragma once

namespace tiermem {

// Asks the system to let this process use tiles, which it may refuse; asking again is harmless.
bool has_amx() noexcept;

}  // namespace tiermem
