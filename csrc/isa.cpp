#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace audiokernels {
namespace {

constexpr Isa kAll[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16, Isa::avx512_amx};

// Intel's processors multiply pairs of bfloat16 at half the rate of float32 fmas: attention takes 1.6 times as long
// with them, WaveNets of 16 streams 1.5 times (one core of a Xeon with AMX).
bool slow_pairs() {
#if defined(__x86_64__) && !defined(AUDIOKERNELS_EMULATE)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa best() {
  Isa found = Isa::generic;
  for (Isa isa : kAll) {
    if (isa_supported(isa) && !(isa == Isa::avx512_bf16 && slow_pairs())) found = isa;
  }
  return found;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{best()};
  return value;
}

#if defined(__x86_64__) && !defined(AUDIOKERNELS_EMULATE)
// Has this processor tile registers with products of bfloat16 and int8, and does Linux let this process use them? It
// wants to be asked, since they make what it keeps of a thread 8 KiB larger.
bool tiles_granted() {
#if defined(AUDIOKERNELS_AMX) && defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d = 0;
    constexpr unsigned kBFloat16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25, kWanted = kBFloat16 | kTile | kInt8;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kWanted) != kWanted) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, as man 2 arch_prctl calls it
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

Isa float_isa() { return isa() > Isa::avx512 ? Isa::avx512 : isa(); }

Isa bfloat16_isa() { return isa() >= Isa::avx512_bf16 ? isa() : float_isa(); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512_amx: return "avx512_amx";
    default: return "generic";
  }
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(AUDIOKERNELS_EMULATE)
  const bool bf16 = vnni, amx = vnni;
#else
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16"), amx = bf16 && tiles_granted();
#endif
  switch (isa) {
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_vnni: return vnni;
    case Isa::avx512_bf16: return bf16;
    case Isa::avx512_amx: return amx;
    default: return true;
  }
#else
  return isa == Isa::generic;
#endif
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string supported;
  for (Isa isa : kAll) {
    if (!isa_supported(isa)) continue;
    if (name == isa_name(isa)) {
      current().store(isa, std::memory_order_relaxed);
      return;
    }
    supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("name must be an instruction set that this processor has (" + supported + "), got '" +
                              name + "'");
}

}  // namespace audiokernels
