#include "amx_support.h"

#if defined(TIERMEM_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace tiermem {
namespace {

constexpr unsigned kAvx512Bits = 1U << 16 | 1U << 30;  // F, BW: of leaf 7, EBX
constexpr unsigned kAmxBits = 1U << 22 | 1U << 24;     // bfloat16, tiles: of leaf 7, EDX
constexpr int kRequestPermission = 0x1023;             // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;                          // XFEATURE_XTILEDATA

}  // namespace

bool has_amx() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  // What the system does not save for its processes, it does not grant; AVX-512 has a test of its own.
  return (ebx & kAvx512Bits) == kAvx512Bits && (edx & kAmxBits) == kAmxBits &&
         __builtin_cpu_supports("avx512f") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace tiermem
#else
namespace tiermem {

bool has_amx() noexcept { return false; }

}  // namespace tiermem
#endif
