// Which instruction set's objects run. Every *_simd.cpp is compiled once for each, in a namespace of its name.
#pragma once

#include <string>
#include <vector>

namespace audiokernels {

enum class Isa { generic, avx2, avx512, avx512_vnni, avx512_bf16, avx512_amx };  // each includes those before it

Isa isa();                              // in use; at first the fastest that this processor has
Isa float_isa();                        // isa(), or avx512 where it goes further: those after it add no float32
Isa bfloat16_isa();                     // the same, but avx512_bf16 and beyond where that is isa()
void set_isa(const std::string& name);  // throws std::invalid_argument if unknown or not supported here
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
std::vector<std::string> supported_isas();

}  // namespace audiokernels

// The instruction sets compiled for this machine's family.
#if defined(__x86_64__)
#define AUDIOKERNELS_FOR_EACH_FLOAT_ISA(X) X(generic) X(avx2) X(avx512)
#if defined(AUDIOKERNELS_AMX)
#define AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(X) AUDIOKERNELS_FOR_EACH_FLOAT_ISA(X) X(avx512_bf16) X(avx512_amx)
#else
#define AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(X) AUDIOKERNELS_FOR_EACH_FLOAT_ISA(X) X(avx512_bf16)
#endif
#define AUDIOKERNELS_FOR_EACH_ISA(X) AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(X) X(avx512_vnni)
#else
#define AUDIOKERNELS_FOR_EACH_FLOAT_ISA(X) X(generic)
#define AUDIOKERNELS_FOR_EACH_BFLOAT16_ISA(X) X(generic)
#define AUDIOKERNELS_FOR_EACH_ISA(X) X(generic)
#endif

// In a room's header, inside namespace audiokernels, declare an entry point in every instruction set's namespace:
//   #define DECLARE(isa) namespace isa { void my_kernel(const float* x, int64_t n); }
//   AUDIOKERNELS_FOR_EACH_ISA(DECLARE)
//   #undef DECLARE
// and in *_cpu.cpp get the one in use:
//   #define CASE(name) case Isa::name: return &name::my_kernel;
//   auto* pick() { switch (isa()) { AUDIOKERNELS_FOR_EACH_ISA(CASE) default: return &generic::my_kernel; } }
//   #undef CASE
