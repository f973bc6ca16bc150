// Which instruction set the CPU kernels use. Files *_simd.cpp are compiled once per instruction set; the plain <op>.cpp
// asks isa() and calls the namespace that fits.
#pragma once
#include <string>

namespace sl::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The one in use. Until set_isa is called: SPARSELOTTERY_CPU_ISA (avx512, avx2, portable), else the best this CPU has.
// Throws std::invalid_argument when the environment names something unknown or something this CPU lacks.
Isa isa();

// "avx512", "avx2", "portable", or "auto" (the environment is read again). Throws like isa().
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

// Whether this CPU (and this build) can run it.
bool has_isa(Isa isa);

// Whether one gather of many elements is faster here than a load of each. Not on AMD: Zen decodes a gather of 16 into
// some 80 operations (25 cycles on Zen 4, against 15 for sixteen loads).
bool gathers();

// 1, 0, or -1 to ask the CPU: tests run both ways on one machine.
void set_gathers(int wish);

// The threads that a kernel may use: what torch.set_num_threads says, as long as there is one OpenMP pool in the
// process.
int max_threads();

}  // namespace sl::cpu
